"""AlexNet as in "One weird trick for parallelizing convolutional neural networks" (Krizhevsky, arXiv:1404.5997).

This is the network, and these are the state_dict keys, of torchvision: widths 64-192-384-256-256, no local response
normalisation, no groups. Every layer runs on tileconv's kernels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tileconv.model.steps import Step, keep_channels_last, run, run_reference, step


class AlexNet(nn.Module):
    """torchvision's AlexNet on tileconv's kernels.

    Input [N, 3, H, W] with H and W of at least 63 (224 as published), output [N, num_classes]. The convolutions'
    weights are kept channels_last, so that no call has to repack them; loading a state_dict keeps them so.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        # torch's own layers hold the parameters, and their places give the keys: features.0.weight, classifier.6.bias.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, num_classes),
        )
        self.reset_parameters()
        keep_channels_last(self)

    def reset_parameters(self) -> None:
        """Draw weights of variance 2 / fan_in (He et al., arXiv:1502.01852) and biases of 1 / fan_in.

        torch's default for these layers shrinks a signal about 2.4-fold a layer. Eight layers down an untrained network
        would answer with its biases whatever the picture, and comparing two such answers would say little.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=1 / math.sqrt(module.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        return run(layers(self), x)


def alexnet(seed: int = 0, **kwargs: Any) -> AlexNet:
    """An AlexNet whose parameters depend on `seed` alone; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlexNet(**kwargs)


def layers(model: AlexNet) -> list[Step]:
    """The network's layers in order: forward() is their composition, and the bench checks and times them one by one.

    A convolution includes its bias and ReLU, a fully connected layer also the dropout and flattening before it.
    """
    features, classifier = model.features, model.classifier
    return [
        step("conv1", features[0], activated=True),
        step("pool1", features[2]),
        step("conv2", features[3], activated=True),
        step("pool2", features[5]),
        step("conv3", features[6], activated=True),
        step("conv4", features[8], activated=True),
        step("conv5", features[10], activated=True),
        step("pool5", features[12]),
        step("avgpool", model.avgpool),
        _dense("fc6", classifier[1], classifier[0], activated=True),
        _dense("fc7", classifier[4], classifier[3], activated=True),
        _dense("fc8", classifier[6]),
    ]


def reference_forward(model: AlexNet, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The network on torch.nn.functional, computed in `dtype` (the input's if None)."""
    return run_reference(layers(model), x, dtype)


def _dense(name: str, m: nn.Module, dropout: nn.Module | None = None, activated: bool = False) -> Step:
    """A fully connected layer with what comes before it."""
    before = [] if dropout is None else [step("", dropout)]
    parts = [step("", nn.Flatten()), *before, step(name, m, activated)]
    return Step(name, "linear", m, partial(run, parts), partial(run_reference, parts))
