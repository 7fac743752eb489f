"""VGG-16 (Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv:1409.1556, configuration D), with torchvision's state_dict keys. Every layer runs on tileconv's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tileconv.model.steps import Chain, Step, keep_channels_last, run, run_reference
from tileconv.model.steps import steps as steps_of

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Filters of the 3x3 convolutions before each of the five pools."""


class VGG(nn.Module):
    """Input [N, 3, H, W] with H and W of at least 32 (224 as published), output [N, num_classes].

    Larger or smaller pictures than 224 are averaged to 7x7 maps before the fully connected layers, as in torchvision.
    `widths`, `hidden` and `maps` (7) make smaller networks of the same kind; with padding=0 no convolution is padded,
    and 224 pixels leave 5x5 maps of one convolution before each pool.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        widths: Sequence[Sequence[int]] = WIDTHS,
        hidden: int = 4096,
        maps: int = 7,
        padding: int = 1,
    ) -> None:
        super().__init__()
        # torch's own layers hold the parameters, and their places give the keys: features.0.weight, classifier.6.bias.
        places: list[nn.Module] = []
        channels = 3
        for block in widths:
            for width in block:
                places += [nn.Conv2d(channels, width, kernel_size=3, padding=padding), nn.ReLU()]
                channels = width
            places.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.widths = tuple(tuple(block) for block in widths)
        self.features = nn.Sequential(*places)
        self.avgpool = nn.AdaptiveAvgPool2d((maps, maps))
        self.classifier = nn.Sequential(
            nn.Linear(channels * maps * maps, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        self.reset_parameters()
        keep_channels_last(self)

    def reset_parameters(self) -> None:
        """Draw convolutions of variance 2 / fan_out (He et al., arXiv:1502.01852), the others of deviation 0.01.

        Biases are zero. These are torchvision's rules; the paper started from a smaller, trained network.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return run(layers(self), x)


def vgg16(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
    """VGG-16 with torchvision's parameters: 138,357,544 for 1000 classes."""
    return VGG(num_classes, dropout)


def chain(model: VGG) -> Chain:
    """torch's layers in order, under the paper's names: conv1_1, pool1, ..., fc8."""
    names = []
    for block, widths in enumerate(model.widths, 1):
        for i in range(1, len(widths) + 1):
            names += [f"conv{block}_{i}", f"relu{block}_{i}"]
        names.append(f"pool{block}")
    first = len(model.widths) + 1
    names += ["avgpool", "flatten"]
    names += [f"{part}{first + i}" for i in range(2) for part in ("fc", "relu", "drop")] + [f"fc{first + 2}"]
    return list(zip(names, [*model.features, model.avgpool, nn.Flatten(), *model.classifier], strict=True))


def layers(model: VGG) -> list[Step]:
    """The network's steps in order: forward() is their composition."""
    return steps_of(chain(model))


def reference_forward(model: VGG, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The network on torch's kernels, computed in `dtype` (the input's if None)."""
    return run_reference(layers(model), x, dtype)
