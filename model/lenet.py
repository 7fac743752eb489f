"""LeNet-5 (LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998).

The modern form: every map of the first layer feeds every map of the second, ReLU and max-pooling instead of sigmoids
and sub-sampling, a linear output instead of radial basis functions. Every layer runs on tileconv's kernels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tileconv.kernels import functional as TF
from tileconv.model.steps import keep_channels_last

SIZES = {28: 2, 32: 0}
"""Allowed extents of a picture -> padding of the first convolution; both give 28x28 maps, so the weights fit both."""


class LeNet(nn.Module):
    """Input [N, channels, 28, 28] or [N, channels, 32, 32], output [N, num_classes].

    Keys and shapes of the state_dict, for one channel and ten classes:

        conv1.weight (6, 1, 5, 5)    conv1.bias (6,)     5x5, ReLU, 2x2 max-pool: 28x28 -> 14x14
        conv2.weight (16, 6, 5, 5)   conv2.bias (16,)    5x5, ReLU, 2x2 max-pool: 14x14 -> 5x5
        fc1.weight   (120, 400)      fc1.bias   (120,)   ReLU; 400 is (16, 5, 5) flattened
        fc2.weight   (84, 120)       fc2.bias   (84,)    ReLU
        fc3.weight   (10, 84)        fc3.bias   (10,)
    """

    def __init__(self, num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        # torch's own layers hold the parameters; calling them would run torch's kernels.
        self.conv1 = nn.Conv2d(channels, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(
            self.fc3.weight, std=0.01
        )  # an untrained network is sure of nothing: its loss is log(num_classes)
        keep_channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU and maximum commute. Inside the pool the ReLU costs no pass of its own, and backward keeps no activation.
        x = _pool(TF.conv2d(x, self.conv1.weight, self.conv1.bias, padding=padding(x)))
        x = _pool(TF.conv2d(x, self.conv2.weight, self.conv2.bias))
        x = TF.linear(x.flatten(1), self.fc1.weight, self.fc1.bias, activation="relu")
        x = TF.linear(x, self.fc2.weight, self.fc2.bias, activation="relu")
        return TF.linear(x, self.fc3.weight, self.fc3.bias)


def reference_forward(model: LeNet, x: Tensor) -> Tensor:
    """The network on torch.nn.functional, with the same parameters."""
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=padding(x))), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv2.weight, model.conv2.bias)), 2)
    x = F.relu(F.linear(x.flatten(1), model.fc1.weight, model.fc1.bias))
    x = F.relu(F.linear(x, model.fc2.weight, model.fc2.bias))
    return F.linear(x, model.fc3.weight, model.fc3.bias)


def padding(x: Tensor) -> int:
    """Of the first convolution for pictures `x`; ValueError for a size that LeNet does not take."""
    if x.dim() != 4 or x.shape[2] != x.shape[3] or x.shape[2] not in SIZES:
        raise ValueError(f"x has shape {tuple(x.shape)}: LeNet takes [N, C, 28, 28] or [N, C, 32, 32]")
    return SIZES[x.shape[2]]


def _pool(x: Tensor) -> Tensor:
    y = TF.max_pool2d(x, 2, activation="relu")
    assert isinstance(y, Tensor)  # a pair only with return_indices
    return y
