"""GoogLeNet (Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842), with torchvision's state_dict keys.

As in torchvision each convolution is followed by batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) where the
paper has a bias, and the third branch's filters are 3x3 where the paper's are 5x5. Batch normalisation runs on torch's
kernels; `fold_batch_norm` does away with it for evaluation. Everything else runs on tileconv's.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileconv.kernels import functional as TF
from tileconv.model.data import MEAN, STD
from tileconv.model.steps import keep_channels_last, max_pool

INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels of each module's input, branch 1, branch 2 (reduced, out), branch 3 (reduced, out) and branch 4."""


class GoogLeNetOutputs(NamedTuple):
    """What a network with auxiliary heads gives while training; the paper adds 0.3 of each auxiliary loss."""

    logits: Tensor
    aux_logits2: Tensor
    """Of the head behind inception4d."""
    aux_logits1: Tensor
    """Of the head behind inception4a."""


class BasicConv2d(nn.Module):
    """Convolution, batch normalisation and, unless a pool behind it does that, ReLU."""

    def __init__(self, channels: int, filters: int, **geometry: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, bias=False, **geometry)
        self.bn: nn.Module = nn.BatchNorm2d(filters, eps=0.001)

    def forward(self, x: Tensor, activation: str | None = "relu") -> Tensor:
        folded = isinstance(self.bn, nn.Identity)
        conv = self.conv
        y = TF.conv2d(
            x, conv.weight, conv.bias, conv.stride, conv.padding, activation=activation if folded else None
        )  # fmt: skip
        if folded:
            return y
        y = self.bn(y)
        return TF.relu(y) if activation else y


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 3x3; 3x3 max-pool and 1x1. Their outputs are stacked."""

    def __init__(self, channels: int, b1: int, b2_reduced: int, b2: int, b3_reduced: int, b3: int, b4: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(channels, b1, kernel_size=1)
        self.branch2 = nn.Sequential(
            BasicConv2d(channels, b2_reduced, kernel_size=1), BasicConv2d(b2_reduced, b2, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(channels, b3_reduced, kernel_size=1), BasicConv2d(b3_reduced, b3, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(channels, b4, kernel_size=1),
        )

    def forward(self, x: Tensor, activation: str | None = "relu") -> Tensor:
        pool = self.branch4[0]
        assert isinstance(pool, nn.MaxPool2d)
        return torch.cat(
            [
                self.branch1(x, activation),
                self.branch2[1](self.branch2[0](x), activation),
                self.branch3[1](self.branch3[0](x), activation),
                self.branch4[1](max_pool(pool, x), activation),
            ],
            dim=1,
        )


class InceptionAux(nn.Module):
    """An auxiliary classifier: 4x4 means, 1x1 convolution and two fully connected layers."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = BasicConv2d(channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(TF.adaptive_avg_pool2d(x, (4, 4)))
        x = TF.linear(x.flatten(1), self.fc1.weight, self.fc1.bias, activation="relu")
        x = TF.dropout(x, self.dropout.p, self.training)
        return TF.linear(x, self.fc2.weight, self.fc2.bias)


class GoogLeNet(nn.Module):
    """Input [N, 3, H, W] (224 as published), output [N, num_classes]; GoogLeNetOutputs while training with aux_logits.

    6,624,904 parameters for 1000 classes, 13,004,888 with the auxiliary heads. transform_input: pictures are normalised
    by ImageNet's means and deviations, the weights want (-1, 1), as torchvision's trained ones do.
    """

    aux1: InceptionAux | None
    aux2: InceptionAux | None

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
    ) -> None:
        super().__init__()
        self.aux_logits, self.transform_input = aux_logits, transform_input
        self.conv1 = BasicConv2d(3, 64, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(*INCEPTIONS["3a"])
        self.inception3b = Inception(*INCEPTIONS["3b"])
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(*INCEPTIONS["4a"])
        self.inception4b = Inception(*INCEPTIONS["4b"])
        self.inception4c = Inception(*INCEPTIONS["4c"])
        self.inception4d = Inception(*INCEPTIONS["4d"])
        self.inception4e = Inception(*INCEPTIONS["4e"])
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = Inception(*INCEPTIONS["5a"])
        self.inception5b = Inception(*INCEPTIONS["5b"])
        self.aux1 = InceptionAux(512, num_classes, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, dropout_aux) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        self.reset_parameters()
        keep_channels_last(self)

    def reset_parameters(self) -> None:
        """Draw weights of deviation 0.01, none beyond two deviations, as torchvision does; biases keep torch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        a = self._to_4a(self.normalised(x))
        d = self._to_4d(a)
        x = TF.adaptive_avg_pool2d(self._to_5b(d), self.avgpool.output_size).flatten(1)
        logits = TF.linear(TF.dropout(x, self.dropout.p, self.training), self.fc.weight, self.fc.bias)
        if self.aux1 is None or self.aux2 is None or not self.training:
            return logits
        return GoogLeNetOutputs(logits, self.aux2(d), self.aux1(a))

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> the maps of inception5b, [N, 1024, H / 32, W / 32]."""
        return self._to_5b(self._to_4d(self._to_4a(self.normalised(x))))

    def normalised(self, x: Tensor) -> Tensor:
        """What the first layer is given: `x`, or with transform_input (pixel - 0.5) / 0.5 for pixels in [0, 1]."""
        if not self.transform_input:
            return x
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return (x * std + mean - 0.5) / 0.5

    # ReLU and maximum commute: before a pool the ReLU is the pool's, for all branches at once, and takes no pass.
    def _to_4a(self, x: Tensor) -> Tensor:
        x = max_pool(self.maxpool1, self.conv1(x, activation=None), "relu")
        x = max_pool(self.maxpool2, self.conv3(self.conv2(x), activation=None), "relu")
        x = max_pool(self.maxpool3, self.inception3b(self.inception3a(x), activation=None), "relu")
        y: Tensor = self.inception4a(x)
        return y

    def _to_4d(self, x: Tensor) -> Tensor:
        y: Tensor = self.inception4d(self.inception4c(self.inception4b(x)))
        return y

    def _to_5b(self, x: Tensor) -> Tensor:
        x = max_pool(self.maxpool4, self.inception4e(x, activation=None), "relu")
        y: Tensor = self.inception5b(self.inception5a(x))
        return y


def fold_batch_norm(model: GoogLeNet) -> GoogLeNet:
    """A copy for evaluation without batch normalisation: w * g / s and b - m * g / s of the running m and s.

    Convolution, bias and ReLU are then one kernel. Raises ValueError for a network that is training, whose batch
    statistics no weights can hold.
    """
    if model.training:
        raise ValueError("model is training: batch normalisation folds into weights only after model.eval()")
    model = copy.deepcopy(model)
    for block in model.modules():
        if not (isinstance(block, BasicConv2d) and isinstance(block.bn, nn.BatchNorm2d)):
            continue
        norm, conv = block.bn, block.conv
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
        conv.weight = nn.Parameter(conv.weight.detach() * scale[:, None, None, None])
        conv.bias = nn.Parameter(norm.bias.detach() - norm.running_mean * scale)
        block.bn = nn.Identity()
    keep_channels_last(model)
    return model


def reference_features(model: GoogLeNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of inception4a, inception4d and inception5b on torch's kernels, in the dtype of `x`."""
    model = _like(model, x)

    def block(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.bn(m.conv(x)))

    def inception(m: Any, x: Tensor) -> Tensor:
        branches = [block(m.branch1, x)]
        branches += [block(branch[1], block(branch[0], x)) for branch in (m.branch2, m.branch3)]
        branches.append(block(m.branch4[1], m.branch4[0](x)))
        return torch.cat(branches, 1)

    x = model.maxpool1(block(model.conv1, model.normalised(x)))
    x = model.maxpool2(block(model.conv3, block(model.conv2, x)))
    x = model.maxpool3(inception(model.inception3b, inception(model.inception3a, x)))
    a = inception(model.inception4a, x)
    d = inception(model.inception4d, inception(model.inception4c, inception(model.inception4b, a)))
    x = model.maxpool4(inception(model.inception4e, d))
    return a, d, inception(model.inception5b, inception(model.inception5a, x))


def reference_forward(model: GoogLeNet, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | GoogLeNetOutputs:
    """The network on torch's kernels, computed in `dtype` (the input's if None), by a copy if that is not its own."""
    x = x if dtype is None else x.to(dtype)
    model = _like(model, x)
    a, d, x = reference_features(model, x)
    logits: Tensor = model.fc(model.dropout(model.avgpool(x).flatten(1)))
    if model.aux1 is None or model.aux2 is None or not model.training:
        return logits

    def head(m: InceptionAux, x: Tensor) -> Tensor:
        x = F.relu(m.conv.bn(m.conv.conv(F.adaptive_avg_pool2d(x, (4, 4)))))
        y: Tensor = m.fc2(m.dropout(F.relu(m.fc1(x.flatten(1)))))
        return y

    return GoogLeNetOutputs(logits, head(model.aux2, d), head(model.aux1, a))


def _like(model: GoogLeNet, x: Tensor) -> GoogLeNet:
    """The model, or a copy if `x` is of another dtype or device."""
    weight = model.fc.weight
    return model if (weight.dtype, weight.device) == (x.dtype, x.device) else copy.deepcopy(model).to(x)
