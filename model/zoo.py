"""The networks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tileconv.model.alexnet import AlexNet
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.alexnet_mini import AlexNetMini
from tileconv.model.googlenet import GoogLeNet
from tileconv.model.lenet import LeNet
from tileconv.model.vgg import vgg16


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
