"""A chain of torch's layers as the steps that run on tileconv's kernels: ReLUs, and pools where they can, join in.

The chain itself, called layer by layer, is the network on torch's kernels: the reference of the steps made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileconv.kernels import functional as TF

Chain = list[tuple[str, nn.Module]]
"""Names and layers in order; of ReLUs, dropouts and flattenings the names do not matter."""
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """One step of a network, twice: on our kernels, and on torch's for comparison."""

    name: str
    op: str
    """The function in tileconv.kernels.functional that does it; "flatten" and "features" (many layers) are none."""
    module: nn.Module
    """Holds the parameters and the geometry; calling it would run torch's kernels."""
    ours: Function
    reference: Function
    """The same on torch's kernels, in the dtype of its input: the parameters are cast to that, float64 included."""


def steps(chain: Iterable[tuple[str, nn.Module]]) -> list[Step]:
    """The steps of a chain of Conv2d, Linear, MaxPool2d, AdaptiveAvgPool2d, AvgPool2d, LocalResponseNorm, ReLU,
    Dropout and Flatten.

    A ReLU joins the convolution or fully connected layer before it; where a max-pool follows the ReLU, it joins the
    pool instead. ReLU and maximum commute, and backward then keeps neither activation. Raises TypeError for another
    layer and ValueError for a ReLU behind none of these.
    """
    layers = list(chain)
    result: list[Step] = []
    taken: set[int] = set()
    for i, (name, m) in enumerate(layers):
        if i in taken or isinstance(m, nn.Identity):
            continue
        follows = [type(module) for _, module in layers[i + 1 : i + 3]]
        activated = False
        if isinstance(m, nn.Conv2d | nn.Linear) and follows[:1] == [nn.ReLU]:
            taken.add(i + 1)
            activated = follows[1:] != [nn.MaxPool2d]
        elif isinstance(m, nn.MaxPool2d):
            activated = i - 1 in taken  # only a ReLU is taken
        elif isinstance(m, nn.ReLU):
            raise ValueError(f"chain has the ReLU {name!r} behind none of Conv2d and Linear")
        result.append(step(name, m, activated))
    return result


def run(steps: Iterable[Step], x: Tensor) -> Tensor:
    """All steps on our kernels."""
    for step in steps:
        x = step.ours(x)
    return x


def run_reference(steps: Iterable[Step], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All steps on torch's kernels, computed in `dtype` (the input's if None)."""
    x = x if dtype is None else x.to(dtype)
    for step in steps:
        x = step.reference(x)
    return x


def keep_channels_last(model: nn.Module) -> None:
    """Lay the convolutions' weights out as our kernels read them, so that no call has to repack them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().to(memory_format=torch.channels_last))


def step(name: str, m: nn.Module, activated: bool = False) -> Step:
    """One layer as a step, with a ReLU where `activated`: of Conv2d, Linear and MaxPool2d in the same kernel."""
    op, ours, plain = _functions(m, "relu" if activated else None)

    def reference(x: Tensor) -> Tensor:
        y = plain(x)
        return F.relu(y) if activated else y

    return Step(name, op, m, ours, reference)


def _functions(m: nn.Module, activation: str | None) -> tuple[str, Function, Function]:
    """The name, ours with its activation and torch's without; by F, for a module of ours would run our kernels."""
    if isinstance(m, nn.Conv2d):

        def conv(x: Tensor) -> Tensor:
            return TF.conv2d(x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, activation=activation)

        def plain_conv(x: Tensor) -> Tensor:
            return F.conv2d(x, *_like(x, m.weight, m.bias), m.stride, m.padding, m.dilation, m.groups)

        return "conv2d", conv, plain_conv
    if isinstance(m, nn.Linear):
        return (
            "linear",
            lambda x: TF.linear(x, m.weight, m.bias, activation=activation),
            lambda x: F.linear(x, *_like(x, m.weight, m.bias)),
        )
    if isinstance(m, nn.MaxPool2d):
        return "max_pool2d", lambda x: max_pool(m, x, activation), lambda x: _plain_max_pool(m, x)
    if isinstance(m, nn.AdaptiveAvgPool2d):
        return (
            "adaptive_avg_pool2d",
            lambda x: TF.adaptive_avg_pool2d(x, m.output_size),
            lambda x: F.adaptive_avg_pool2d(x, m.output_size),
        )
    if isinstance(m, nn.AvgPool2d):
        return (
            "avg_pool2d",
            lambda x: TF.avg_pool2d(x, m.kernel_size, m.stride, m.padding),
            lambda x: F.avg_pool2d(x, m.kernel_size, m.stride, m.padding),
        )
    if isinstance(m, nn.LocalResponseNorm):
        return (
            "local_response_norm",
            lambda x: TF.local_response_norm(x, m.size, m.alpha, m.beta, m.k),
            lambda x: plain_norm(m, x),
        )
    if isinstance(m, nn.Dropout):
        return "dropout", lambda x: TF.dropout(x, m.p, m.training), lambda x: F.dropout(x, m.p, m.training)
    if isinstance(m, nn.Flatten):
        return "flatten", lambda x: x.flatten(1), lambda x: x.flatten(1)
    raise TypeError(f"chain has a {type(m).__name__}, which is none of the layers that steps are made of")


def _like(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In the dtype and on the device of `x`: on the meta device too, where shapes and work are counted."""
    return weight.to(x), None if bias is None else bias.to(x)


def _plain_max_pool(m: nn.MaxPool2d, x: Tensor) -> Tensor:
    return F.max_pool2d(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)


def plain_norm(m: nn.LocalResponseNorm, x: Tensor) -> Tensor:
    """The layer on torch's kernels."""
    # On a CPU torch's average pool, which this is made of, knows no half precision.
    wide = x.float() if x.dtype.itemsize == 2 and x.device.type == "cpu" else x
    return F.local_response_norm(wide, m.size, m.alpha, m.beta, m.k).to(x.dtype)


def max_pool(m: nn.MaxPool2d, x: Tensor, activation: str | None = None) -> Tensor:
    """The layer on our kernels, without indices."""
    y = TF.max_pool2d(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, activation=activation)
    assert isinstance(y, Tensor)  # a pair only with return_indices
    return y
