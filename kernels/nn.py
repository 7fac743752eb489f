"""torch.nn's layers on our kernels: its constructors and state_dict keys."""

from tileconv.kernels.modules import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    Conv2d,
    ConvReLU2d,
    Dropout,
    FusedReLU,
    Linear,
    LinearReLU,
    LocalResponseNorm,
    LPPool2d,
    MaxPool2d,
    MaxUnpool2d,
    ReLU,
)
from tileconv.kernels.modules_conv import Conv1d, ConvTranspose2d, Fold, LocallyConnected2d, Unfold
from tileconv.kernels.modules_fused import ConvReLUMaxPool2d, FusedMaxPool2d
from tileconv.kernels.modules_softmax import CrossEntropyLoss, LogSoftmax, Softmax

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "ConvReLU2d",
    "ConvReLUMaxPool2d",
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "Dropout",
    "Fold",
    "FusedMaxPool2d",
    "FusedReLU",
    "LPPool2d",
    "Linear",
    "LinearReLU",
    "LocalResponseNorm",
    "LocallyConnected2d",
    "LogSoftmax",
    "MaxPool2d",
    "MaxUnpool2d",
    "ReLU",
    "Softmax",
    "Unfold",
]
