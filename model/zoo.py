"""The networks by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tileconv.model.alexnet import AlexNet
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.alexnet_mini import AlexNetMini
from tileconv.model.googlenet import GoogLeNet
from tileconv.model.lenet import LeNet
from tileconv.model.vgg import vgg16

M = TypeVar("M", bound=nn.Module)


class VisualisedLeNet(LeNet):
    """The network of Harley's visualiser ("An Interactive Node-Link Visualization of Convolutional Neural Networks",
    ISVC 2015): six 5x5 filters, 2x2 max-pool, sixteen 5x5 filters, 2x2 max-pool, 120, 100 and 10 neurons.

    LeNet but for 100 neurons where LeNet-5 has 84; 32x32 pictures.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__(num_classes, channels)
        self.fc2 = nn.Linear(120, 100)
        self.fc3 = nn.Linear(100, num_classes)
        nn.init.kaiming_normal_(self.fc2.weight, nonlinearity="relu")
        nn.init.normal_(self.fc3.weight, std=0.01)
        for layer in (self.fc2, self.fc3):
            nn.init.zeros_(layer.bias)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "alexnet-2012": AlexNet2012,
    "alexnet-mini": AlexNetMini,
    "googlenet": GoogLeNet,
    "lenet": LeNet,
    "lenet-visualiser": VisualisedLeNet,
    "vgg16": vgg16,
}


def build(name: str, *, seed: int = 0, **arguments: Any) -> nn.Module:
    """A network with parameters that depend on `seed` alone; torch's own random state is left as it was.

    `arguments` go to its constructor: num_classes, dropout, ... Raises ValueError for a name that is none, and says
    which ones come near.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(str(name).lower(), NETWORKS, cutoff=0.5)
        meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"name is {name!r}: {meant}allowed are {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](**arguments)


def lively(model: M, seed: int = 0) -> M:
    """Draw parameters under which the answer depends on the picture, in place; returns `model`, evaluating.

    The published ones shrink a signal from layer to layer until training has begun: comparing two such answers would
    compare little more than biases. Depends on `seed` alone; torch's own random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for m in model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.normal_(m.weight, std=math.sqrt(2 / m.weight[0].numel()))
                if m.bias is not None:
                    nn.init.normal_(m.bias, std=0.1)
            elif isinstance(m, nn.BatchNorm2d):
                for values, low, high in ((m.running_mean, -0.2, 0.2), (m.running_var, 0.5, 1.5), (m.weight, 0.8, 1.2)):
                    assert values is not None
                    nn.init.uniform_(values, low, high)
                nn.init.normal_(m.bias, std=0.1)
    return model.eval()
