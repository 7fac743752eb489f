"""What each layer keeps for its backward pass, beside what PyTorch's own kernels keep.  Counted, on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .images import images


def saved_bytes(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, parameters: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps after `run(x)`: each storage once, parameters left out, since they are kept anyway."""
    kept: dict[int, int] = {}
    ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run(x)
    assert y.grad_fn is not None  # and it, like the tensors, lives until here
    return sum(kept.values())


def alexnet_saved(batch: int = 1) -> list[dict[str, Any]]:
    """For each layer of AlexNet in training: layer, and the bytes an image that tileconv and PyTorch keep (fp32).

    The input of a layer is the output of the one before; it counts where a layer keeps it, and once in the last row,
    the whole network.  A convolution, its ReLU and its max-pool as one layer have rows of their own, "conv1 + pool1".
    """
    from tileconv.kernels import conv2d_max_pool2d, hardware
    from tileconv.model.alexnet import alexnet, layers, reference_forward

    device = "cpu" if hardware.interpreting() else "cuda"
    model = alexnet(seed=0).to(device).train()
    x = pictures = images(batch)[0].to(device)
    rows = []

    def count(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
        return saved_bytes(run, x, list(model.parameters())) // batch

    def together(conv: Any, pool: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: conv2d_max_pool2d(
            x, conv.weight, conv.bias, conv.stride, conv.padding, pool_kernel_size=pool.kernel_size,
            pool_stride=pool.stride,
        )  # fmt: skip

    before: tuple[Any, torch.Tensor] | None = None
    for layer in layers(model):
        x = x.detach()
        if x.dim() == 4 and x.shape[1] > 3:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_(layer.name != "conv1")
        rows.append({"layer": layer.name, "tileconv": count(layer.ours, x), "pytorch": count(layer.reference, x)})
        if layer.op == "max_pool2d" and before is not None:
            conv, image = before
            reference = functools.partial(_one_after_the_other, conv.reference, layer.reference)
            ours = together(conv.module, layer.module)
            name = f"{conv.name} + {layer.name}"
            rows.append({"layer": name, "tileconv": count(ours, image), "pytorch": count(reference, image)})
        before = (layer, x) if layer.op == "conv2d" else None
        with torch.no_grad():
            x = layer.reference(x)
    theirs = count(lambda x: reference_forward(model, x), pictures)
    return [*rows, {"layer": "network", "tileconv": count(model, pictures), "pytorch": theirs}]


def _one_after_the_other(
    first: Callable[[torch.Tensor], torch.Tensor], second: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    return second(first(x))
