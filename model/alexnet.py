"""AlexNet as in "One weird trick for parallelizing convolutional neural networks" (Krizhevsky, arXiv:1404.5997).

This is the network, and these are the state_dict keys, of torchvision: widths 64-192-384-256-256, no local response
normalisation, no groups. Every layer runs on tileconv's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileconv.kernels import functional as TF


@dataclass(frozen=True)
class Layer:
    """One step of the network, twice: on our kernels, and on torch's for comparison.

    A convolution includes its bias and ReLU, a fully connected layer also the dropout and flattening before it.
    """

    name: str
    op: Literal["conv2d", "max_pool2d", "adaptive_avg_pool2d", "linear"]
    module: nn.Module
    """Holds the parameters and the geometry; calling it would run torch's kernels."""
    ours: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    """The same on torch.nn.functional, in the dtype of its input: the parameters are cast to that, float64 included."""


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
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach().to(memory_format=torch.channels_last))

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
        for layer in layers(self):
            x = layer.ours(x)
        return x


def alexnet(seed: int = 0, **kwargs: Any) -> AlexNet:
    """An AlexNet whose parameters depend on `seed` alone; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlexNet(**kwargs)


def layers(model: AlexNet) -> list[Layer]:
    """The network's layers in order: forward() is their composition, and the bench checks and times them one by one."""
    features, classifier = model.features, model.classifier
    return [
        _conv("conv1", features[0]),
        _max_pool("pool1", features[2]),
        _conv("conv2", features[3]),
        _max_pool("pool2", features[5]),
        _conv("conv3", features[6]),
        _conv("conv4", features[8]),
        _conv("conv5", features[10]),
        _max_pool("pool5", features[12]),
        _avg_pool("avgpool", model.avgpool),
        _dense("fc6", classifier[1], activation="relu", dropout=classifier[0]),
        _dense("fc7", classifier[4], activation="relu", dropout=classifier[3]),
        _dense("fc8", classifier[6], activation=None, dropout=None),
    ]


def reference_forward(model: AlexNet, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The network on torch.nn.functional, computed in `dtype` (the input's if None)."""
    x = x if dtype is None else x.to(dtype)
    for layer in layers(model):
        x = layer.reference(x)
    return x


def _conv(name: str, m: nn.Module) -> Layer:
    assert isinstance(m, nn.Conv2d)
    assert m.bias is not None
    bias = m.bias

    def ours(x: Tensor) -> Tensor:
        return TF.conv2d(x, m.weight, bias, m.stride, m.padding, m.dilation, m.groups, activation="relu")

    def reference(x: Tensor) -> Tensor:
        weight = m.weight.to(x.dtype)
        return F.relu(F.conv2d(x, weight, bias.to(x.dtype), m.stride, m.padding, m.dilation, m.groups))

    return Layer(name, "conv2d", m, ours, reference)


def _max_pool(name: str, m: nn.Module) -> Layer:
    assert isinstance(m, nn.MaxPool2d)

    def ours(x: Tensor) -> Tensor:
        y = TF.max_pool2d(x, m.kernel_size, m.stride, m.padding)
        assert isinstance(y, Tensor)  # a pair only with return_indices
        return y

    def reference(x: Tensor) -> Tensor:
        return F.max_pool2d(x, m.kernel_size, m.stride, m.padding)

    return Layer(name, "max_pool2d", m, ours, reference)


def _avg_pool(name: str, m: nn.AdaptiveAvgPool2d) -> Layer:
    def ours(x: Tensor) -> Tensor:
        return TF.adaptive_avg_pool2d(x, m.output_size)

    def reference(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, m.output_size)

    return Layer(name, "adaptive_avg_pool2d", m, ours, reference)


def _dense(name: str, m: nn.Module, *, activation: Literal["relu"] | None, dropout: nn.Module | None) -> Layer:
    assert isinstance(m, nn.Linear)
    assert dropout is None or isinstance(dropout, nn.Dropout)

    def ours(x: Tensor) -> Tensor:
        x = x.flatten(1)
        if dropout is not None:
            x = TF.dropout(x, dropout.p, dropout.training)
        return TF.linear(x, m.weight, m.bias, activation=activation)

    def reference(x: Tensor) -> Tensor:
        x = x.flatten(1)
        if dropout is not None:
            x = F.dropout(x, dropout.p, dropout.training)
        y = F.linear(x, m.weight.to(x.dtype), m.bias.to(x.dtype))
        return F.relu(y) if activation == "relu" else y

    return Layer(name, "linear", m, ours, reference)
