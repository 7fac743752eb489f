"""A whole network as one call: its forward pass, or a training step, on our kernels or on PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .networks import Shape
from .whole import loss_of


def network_call(ours: bool, shape: Shape, pass_: str, t: dict[str, torch.Tensor]) -> Any:
    """A call that runs the network named `shape.name` (tileconv.model.zoo) on t["x"], in that tensor's dtype.

    "forward": evaluating, returns the scores. "step": forward, loss, backward and SGD with momentum; returns the first
    layer's gradient, the last one that backward makes. The learning rate is 0, so that every step does the work of the
    first and has its result; dropout is off, because no two libraries draw the same numbers.
    """
    model = _network(shape.name, ours, t["x"])
    if pass_ == "forward":
        model.eval()
        return lambda: model(t["x"])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _step(model, ours, t["x"], t["target"])


def _network(name: str, ours: bool, x: torch.Tensor) -> nn.Module:
    """The network with x's dtype, device and layout, and the module that runs on one side's kernels."""
    from tileconv.kernels import layout
    from tileconv.model.chains import plain
    from tileconv.model.zoo import build

    model = build(name).to(device=x.device, dtype=x.dtype)
    if not ours:
        model = plain(model, x.shape[-1])
    if ours or layout.is_channels_last(x):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _step(model: nn.Module, ours: bool, x: torch.Tensor, target: torch.Tensor) -> Any:
    from tileconv.kernels import functional

    cross_entropy = functional.cross_entropy if ours else F.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    first = next(model.parameters())

    def step() -> torch.Tensor:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(x), target, cross_entropy).backward()
            optimizer.step()
        assert first.grad is not None
        return first.grad

    return step
