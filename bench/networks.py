"""Networks as the layers that reach the kernels: operation, geometry and input shape; nothing is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

OPS = {
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
    nn.MaxPool2d: "max_pool2d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.LocalResponseNorm: "local_response_norm",
}
"""The layers that networks' chains are made of, beside ReLU, Dropout, Flatten and GoogLeNet's modules."""


def known(argument: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed; else ValueError with the nearest names."""
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(f"{argument}={value!r} is unknown{hint}. Allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Shape:
    """A layer of a network: its operation, module (parameters on the meta device), input shape and fused activation.

    `dropout` of a linear layer follows its activation. `inner`: a layer on its own, whose input wants a gradient like
    an activation's even if it has three channels.
    """

    name: str
    op: str
    module: nn.Module
    input: tuple[int, ...]
    activation: str | None
    dropout: float = 0.0
    inner: bool = False

    @property
    def reads_image(self) -> bool:
        """Whether this is the first layer: its input is what the data loader gives, and needs no gradient."""
        return not self.inner and len(self.input) == 4 and self.input[1] == 3


def network_layers(network: str, batch: int | None = None, size: int | None = None) -> tuple[Shape, ...]:
    """The layers of a suite with the shapes that arrive at them, for `batch` images of `size` (its own if None).

    network: a built-in suite's name, a user's YAML or CSV file, or "module:callable" (suites.suite_of).
    """
    from .suites import suite_of

    suite = suite_of(network)
    if size is not None:
        return zoo_layers(known("network", network, ("alexnet", "alexnet-2012", "vgg16", "googlenet")), batch, size)
    return suite.shapes(batch)


@cache
def zoo_layers(network: str, batch: int | None, size: int | None = None, **arguments: Any) -> tuple[Shape, ...]:
    """The layers of a network of tileconv.model, without its dropouts; 128 images unless told otherwise."""
    from tileconv.model import shapes

    extent = size or shapes.SIZES[network]
    if network == "googlenet":
        arguments = {"aux_logits": False} | arguments
    if network == "alexnet-2012" and size is not None:
        arguments = arguments | {"size": size}
    model = shapes.network(network, **arguments)
    images = (batch or 128, shapes.channels_of(model), extent, extent)
    return chain_layers(shapes.layers_of(model, images), images)


def chain_layers(chain: Iterable[tuple[str, nn.Module]], images: tuple[int, ...]) -> tuple[Shape, ...]:
    """The layers of a chain for images [N, C, H, W]; a ReLU joins the convolution or linear layer before it.

    Inception modules become their branches' layers. Batch normalisation is taken to be folded into the convolution
    before it, as for evaluation, which gives that a bias.
    """
    found: list[Shape] = []
    with torch.device("meta"):
        _walk(list(chain), torch.empty(images), found)
    return tuple(found)


def _walk(chain: list[tuple[str, nn.Module]], x: torch.Tensor, found: list[Shape]) -> torch.Tensor:
    from tileconv.model.googlenet import BasicConv2d, Inception

    for place, (name, m) in enumerate(chain):
        if isinstance(m, Inception):
            x = torch.cat([_walk(list(branch), x, found) for branch in _branches(name, m)], dim=1)
            continue
        if isinstance(m, nn.ReLU | nn.Dropout | nn.Identity):
            continue
        activated = isinstance(m, BasicConv2d) or any(isinstance(after, nn.ReLU) for _, after in chain[place + 1 :][:1])
        m = _with_bias(m.conv) if isinstance(m, BasicConv2d) else m
        if not isinstance(m, nn.Flatten):
            shape = tuple(x.flatten(1).shape) if isinstance(m, nn.Linear) else tuple(x.shape)
            found.append(Shape(name, OPS[type(m)], m, shape, "relu" if activated else None))
            x = x.reshape(shape)
        x = m(x)
    return x


def _branches(name: str, m: Any) -> Iterator[Iterator[tuple[str, nn.Module]]]:
    for label, branch in m.named_children():
        layers = [("", branch)] if label == "branch1" else branch.named_children()
        yield ((f"{name}.{label}.{place}".rstrip("."), layer) for place, layer in layers)


def _with_bias(m: nn.Conv2d) -> nn.Conv2d:
    padding: Any = m.padding
    kernel: Any = m.kernel_size
    stride: Any = m.stride
    return nn.Conv2d(m.in_channels, m.out_channels, kernel, stride, padding)
