"""A whole network as one call: its forward pass, or a training step, on our kernels or on PyTorch's."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .networks import Shape

HEADS = (1.0, 0.3, 0.3)
"""Shares of the losses of GoogLeNet's three heads, section 5 of its paper; other networks have one."""


def network_call(ours: bool, shape: Shape, pass_: str, t: dict[str, torch.Tensor]) -> Any:
    """A call that runs the network named `shape.name` (tileconv.model.zoo) on t["x"], in that tensor's dtype.

    "forward": evaluating, returns the scores. "step": forward, loss, backward and SGD with momentum; returns the first
    layer's gradient, the last one that backward makes. The learning rate is 0, so that every step does the work of the
    first and has its result; dropout is off, because no two libraries draw the same numbers.
    """
    model, run = _network(shape.name, ours, t["x"])
    if pass_ == "forward":
        model.eval()
        return lambda: run(t["x"])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return _step(model, run, ours, t["x"], t["target"])


def _network(name: str, ours: bool, x: torch.Tensor) -> tuple[nn.Module, Any]:
    """The network with x's dtype, device and layout, and the function that runs it on one side's kernels."""
    from tileconv.kernels import layout
    from tileconv.model.zoo import build

    model = build(name).to(device=x.device, dtype=x.dtype)
    if ours or layout.is_channels_last(x):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if ours:
        return model, model
    module = next(m for m in (importlib.import_module(c.__module__) for c in type(model).__mro__[:-1])
                  if hasattr(m, "reference_forward"))  # fmt: skip
    return model, lambda images: module.reference_forward(model, images)


def _step(model: nn.Module, run: Any, ours: bool, x: torch.Tensor, target: torch.Tensor) -> Any:
    from tileconv.kernels import functional

    cross_entropy = functional.cross_entropy if ours else F.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    first = next(model.parameters())

    def step() -> torch.Tensor:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            y = run(x)
            heads = y if isinstance(y, tuple) else (y,)
            losses = [share * cross_entropy(head, target) for share, head in zip(HEADS, heads, strict=False)]
            torch.stack(losses).sum().backward()
            optimizer.step()
        assert first.grad is not None
        return first.grad

    return step
