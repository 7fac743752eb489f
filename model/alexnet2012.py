"""AlexNet as published: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NIPS 2012. Two groups in conv2, conv4 and conv5, local response normalisation, overlapping pools.

Every layer runs on tileconv's kernels.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tileconv.model.steps import Chain, Step, keep_channels_last, run, run_reference
from tileconv.model.steps import steps as steps_of

SIZES = {227: 0, 224: 2}
"""Extents of a picture -> padding of conv1 that goes with it; both give 55x55 maps, so the weights fit both."""
ONES = ("conv2", "conv4", "conv5", "fc6", "fc7")
"""The layers whose biases start at one (section 5): their ReLUs are given positive inputs from the first step on."""


class AlexNet2012(nn.Sequential):
    """Input [N, 3, size, size], output [N, num_classes].

    The paper says 224x224, with which 11x11 filters, stride 4 and no padding do not come out even: (224 - 11) / 4 + 1
    is 54.25, while its 55x55 maps need 227. So `size` is 227 unless given; 224 pads conv1 by 2, as torchvision's
    AlexNet does. Both have the same parameters, 60,965,224 for 1000 classes, and the same state_dict keys, by Caffe's
    layer names: conv1.weight, fc8.bias.

    LRN has the paper's n 5, k 2, alpha 1e-4 and beta 0.75. Here alpha is divided by n, as in cuda-convnet, the code the
    network was trained with, and in PyTorch and Caffe. The paper's formula does not divide: divide_alpha=False.

    Raises ValueError for another size, and in forward for pictures of one.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        size: int = 227,
        divide_alpha: bool = True,
        width: int = 96,
        hidden: int = 4096,
    ) -> None:
        """width: filters of conv1, which the other convolutions' are multiples of. hidden: neurons of fc6 and fc7."""
        if size not in SIZES:
            raise ValueError(f"size is {size}: allowed are {', '.join(map(str, SIZES))}")
        if width % 12:
            raise ValueError(
                f"width is {width}: allowed are multiples of 12, so that all layers divide into two groups"
            )
        a, b, c = width, width * 8 // 3, width * 4  # 96, 256, 384
        norm = {"size": 5, "alpha": 1e-4 if divide_alpha else 5e-4, "beta": 0.75, "k": 2.0}
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(3, a, kernel_size=11, stride=4, padding=SIZES[size]),
                relu1=nn.ReLU(),
                norm1=nn.LocalResponseNorm(**norm),  # type: ignore[arg-type]
                pool1=nn.MaxPool2d(kernel_size=3, stride=2),
                conv2=nn.Conv2d(a, b, kernel_size=5, padding=2, groups=2),
                relu2=nn.ReLU(),
                norm2=nn.LocalResponseNorm(**norm),  # type: ignore[arg-type]
                pool2=nn.MaxPool2d(kernel_size=3, stride=2),
                conv3=nn.Conv2d(b, c, kernel_size=3, padding=1),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(c, c, kernel_size=3, padding=1, groups=2),
                relu4=nn.ReLU(),
                conv5=nn.Conv2d(c, b, kernel_size=3, padding=1, groups=2),
                relu5=nn.ReLU(),
                pool5=nn.MaxPool2d(kernel_size=3, stride=2),
                flatten=nn.Flatten(),
                fc6=nn.Linear(b * 6 * 6, hidden),
                relu6=nn.ReLU(),
                drop6=nn.Dropout(dropout),
                fc7=nn.Linear(hidden, hidden),
                relu7=nn.ReLU(),
                drop7=nn.Dropout(dropout),
                fc8=nn.Linear(hidden, num_classes),
            )
        )
        self.size = size
        self.reset_parameters()
        keep_channels_last(self)

    def reset_parameters(self) -> None:
        """Draw the paper's weights, of deviation 0.01 in every layer; biases are one in ONES and zero elsewhere."""
        for name, module in self.named_children():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                assert module.bias is not None
                nn.init.constant_(module.bias, float(name in ONES))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != (3, self.size, self.size):
            raise ValueError(f"x has shape {tuple(x.shape)}: allowed is [N, 3, {self.size}, {self.size}]")
        return run(layers(self), x)


def chain(model: AlexNet2012) -> Chain:
    """torch's layers in order."""
    return list(model.named_children())


def layers(model: AlexNet2012) -> list[Step]:
    """The network's steps in order: forward() is their composition."""
    return steps_of(chain(model))


def reference_forward(model: AlexNet2012, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The network on torch's kernels, computed in `dtype` (the input's if None)."""
    return run_reference(layers(model), x, dtype)
