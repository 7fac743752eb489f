"""Networks as the layers that reach the kernels: operation, geometry and input shape; nothing is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

SUITES = ("alexnet", "alexnet-2012")
# The layers that a forward pass leaves without a ReLU.
LINEAR_OUTPUT = {"fc8"}


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
    """A layer of a network: its operation, module (parameters on the meta device), input shape and fused activation."""

    name: str
    op: str
    module: nn.Module
    input: tuple[int, ...]
    activation: str | None

    @property
    def reads_image(self) -> bool:
        """Whether this is the first layer: its input is what the data loader gives, and needs no gradient."""
        return len(self.input) == 4 and self.input[1] == 3


@cache
def network_layers(network: str, batch: int, size: int | None = None) -> tuple[Shape, ...]:
    """The layers of a network with the shapes that arrive at them, for images of `size` (its own if None)."""
    known("network", network, SUITES)
    return _alexnet(batch, size or 224) if network == "alexnet" else _alexnet_2012(batch, size or 227)


def _alexnet(batch: int, size: int) -> tuple[Shape, ...]:
    from tileconv.model.alexnet import AlexNet, layers

    with torch.device("meta"):
        model = AlexNet().eval()
        x = torch.empty(batch, 3, size, size)
    found = []
    for layer in layers(model):
        shape = tuple(x.flatten(1).shape) if layer.op == "linear" else tuple(x.shape)
        found.append(Shape(layer.name, layer.op, layer.module, shape, _activation(layer.name, layer.op)))
        x = layer.reference(x)
    return tuple(found)


def _alexnet_2012(batch: int, size: int) -> tuple[Shape, ...]:
    """Krizhevsky, Sutskever and Hinton, NIPS 2012: two GPUs' worth of groups, and response norms before two pools.

    Its 224 pixels do not give the 55 outputs of its first layer; as everywhere since, images have 227 and no padding.
    """
    with torch.device("meta"):
        pool = nn.MaxPool2d(3, 2)
        norm = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)
        steps: list[tuple[str, str, nn.Module]] = [
            ("conv1", "conv2d", nn.Conv2d(3, 96, 11, stride=4)),
            ("norm1", "local_response_norm", norm),
            ("pool1", "max_pool2d", pool),
            ("conv2", "conv2d", nn.Conv2d(96, 256, 5, padding=2, groups=2)),
            ("norm2", "local_response_norm", norm),
            ("pool2", "max_pool2d", pool),
            ("conv3", "conv2d", nn.Conv2d(256, 384, 3, padding=1)),
            ("conv4", "conv2d", nn.Conv2d(384, 384, 3, padding=1, groups=2)),
            ("conv5", "conv2d", nn.Conv2d(384, 256, 3, padding=1, groups=2)),
            ("pool5", "max_pool2d", pool),
            ("fc6", "linear", nn.Linear(256 * 6 * 6, 4096)),
            ("fc7", "linear", nn.Linear(4096, 4096)),
            ("fc8", "linear", nn.Linear(4096, 1000)),
        ]
        x = torch.empty(batch, 3, size, size)
    found = []
    for name, op, module in steps:
        x = x.flatten(1) if op == "linear" else x
        found.append(Shape(name, op, module, tuple(x.shape), _activation(name, op)))
        x = module(x)
    return tuple(found)


def _activation(layer: str, op: str) -> str | None:
    return "relu" if op in ("conv2d", "linear") and layer not in LINEAR_OUTPUT else None
