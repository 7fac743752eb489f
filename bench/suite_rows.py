"""The built-in suites' layers that no network of tileconv.model has, as data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .layers import Row

NETWORKS = {"alexnet": 128, "alexnet-2012": 128, "vgg16": 64, "googlenet": 128}
"""Whole networks and their batch sizes."""


def row(name: str, op: str, extents: str, batch: int | None = None, *, inner: bool = False, **settings: Any) -> Row:
    """A row from text: extents are 3x224x224."""
    return Row(name, op, tuple(int(extent) for extent in extents.split("x")), settings, batch, inner)


def conv(name: str, extents: str, filters: int, kernel: int | str, batch: int | None = None, **settings: Any) -> Row:
    """A convolution with bias and ReLU."""
    return row(name, "conv2d", extents, batch, **{"activation": "relu", **settings}, filters=filters, kernel=kernel)


def overfeat() -> Iterable[tuple[str, nn.Module]]:
    """OverFeat's fast network (Sermanet et al., arXiv:1312.6229) as convnet-benchmarks has it, for 231x231 images."""
    widths = {"conv3": (256, 512), "conv4": (512, 1024), "conv5": (1024, 1024)}
    with torch.device("meta"):
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, 96, 11, stride=4), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(96, 256, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        )  # fmt: skip
        for name, (channels, filters) in widths.items():
            layers[name] = nn.Conv2d(channels, filters, 3, padding=1)
            layers[f"relu of {name}"] = nn.ReLU()
        layers |= OrderedDict(
            pool5=nn.MaxPool2d(2), flatten=nn.Flatten(), fc6=nn.Linear(36864, 3072), relu6=nn.ReLU(),
            fc7=nn.Linear(3072, 4096), relu7=nn.ReLU(), fc8=nn.Linear(4096, 1000),
        )  # fmt: skip
    return layers.items()


# torch7/layerwise_benchmarks/benchmark.lua of soumith/convnet-benchmarks: batch 128, stride 1, no padding; gradients of
# weights and of inputs are timed there, the first layer's too.
SINGLE_LAYERS = (
    row("L1", "conv2d", "3x128x128", 128, inner=True, filters=96, kernel=11),
    row("L2", "conv2d", "64x64x64", 128, filters=128, kernel=9),
    row("L3", "conv2d", "128x32x32", 128, filters=128, kernel=9),
    row("L4", "conv2d", "128x16x16", 128, filters=128, kernel=7),
    row("L5", "conv2d", "384x13x13", 128, filters=384, kernel=3),
)
RESNET_STEM = (
    conv("resnet-7x7-s2", "3x224x224", 64, 7, stride=2, padding=3),
    row("pool-resnet-3x3-s2", "max_pool2d", "64x112x112", kernel=3, stride=2, padding=1),
    conv("resnet-d-1", "3x224x224", 32, 3, stride=2, padding=1),
    conv("resnet-d-2", "32x112x112", 32, 3, padding=1),
    conv("resnet-d-3", "32x112x112", 64, 3, padding=1),
    row("convnext-4x4-s4", "conv2d", "3x224x224", filters=96, kernel=4, stride=4),
    row("vit-16x16-s16", "conv2d", "3x224x224", filters=768, kernel=16, stride=16),
)
DILATED = (
    *(conv(f"dilation-{d}", "256x64x64", 256, 3, padding=d, dilation=d) for d in (1, 2, 4, 8, 16)),
    *(conv(f"aspp-rate-{d}", "2048x33x33", 256, 3, padding=d, dilation=d) for d in (6, 12, 18)),
    conv("large-fov", "512x41x41", 1024, 3, padding=12, dilation=12),
    *(conv(f"context-{d}", "21x64x64", 21, 3, padding=d, dilation=d) for d in (1, 16)),
    conv("one-axis", "128x64x64", 128, 3, padding="1x4", dilation="1x4"),
)
GROUPED = (
    conv("alexnet-conv2", "96x27x27", 256, 5, padding=2, groups=2),
    conv("alexnet-conv4", "384x13x13", 384, 3, padding=1, groups=2),
    conv("resnext-56x56", "128x56x56", 128, 3, padding=1, groups=32),
    conv("resnext-14x14", "512x14x14", 512, 3, padding=1, groups=32),
    conv("resnext-28x28-s2", "512x28x28", 512, 3, padding=1, stride=2, groups=32),
    conv("shufflenet-1x1", "240x28x28", 60, 1, groups=3),
    conv("groups-4-of-64", "256x28x28", 256, 3, padding=1, groups=4),
)
DEPTHWISE = (
    conv("mobilenet-3x3-32", "32x112x112", 32, 3, padding=1, groups=32),
    conv("mobilenet-3x3-s2-64", "64x112x112", 64, 3, padding=1, stride=2, groups=64),
    conv("mobilenet-3x3-512", "512x14x14", 512, 3, padding=1, groups=512),
    conv("mobilenet-3x3-1024", "1024x7x7", 1024, 3, padding=1, groups=1024),
    conv("efficientnet-5x5-240", "240x28x28", 240, 5, padding=2, groups=240),
    conv("efficientnet-5x5-s2-144", "144x56x56", 144, 5, padding=2, stride=2, groups=144),
    conv("convnext-7x7-96", "96x56x56", 96, 7, padding=3, groups=96, activation=None),
    conv("dilated-3x3-256", "256x33x33", 256, 3, padding=2, dilation=2, groups=256),
    conv("two-filters-each", "64x56x56", 128, 3, padding=1, groups=64),
)
POOLS = (
    row("pool-alexnet-3x3-s2", "max_pool2d", "64x55x55", kernel=3, stride=2),
    row("pool-vgg-2x2", "max_pool2d", "64x224x224", kernel=2),
    row("pool-googlenet-3x3-s2-ceil", "max_pool2d", "64x112x112", kernel=3, stride=2, ceil_mode=True),
    row("pool-inception-3x3-s1", "max_pool2d", "192x28x28", kernel=3, stride=1, padding=1),
    row("pool-resnet-3x3-s2", "max_pool2d", "64x112x112", kernel=3, stride=2, padding=1),
    row("pool-dilated-3x3", "max_pool2d", "256x33x33", kernel=3, stride=1, padding=1, dilation=2),
    row("pool-37-channels", "max_pool2d", "37x56x56", kernel=2),
    row("pool-average-2x2", "avg_pool2d", "128x56x56", kernel=2),
    row("pool-average-3x3-s1", "avg_pool2d", "192x35x35", kernel=3, stride=1, padding=1, count_include_pad=False),
    row("pool-average-7x7", "avg_pool2d", "1024x7x7", kernel=7, stride=1),
    row("pool-power-2x2", "lp_pool2d", "64x56x56", norm=2, kernel=2),
    row("pool-power-3-of-3x3-s2", "lp_pool2d", "64x55x55", norm=3, kernel=3, stride=2),
    row("pool-global-average", "adaptive_avg_pool2d", "512x7x7", output=1),
    row("pool-adaptive-average-6", "adaptive_avg_pool2d", "256x6x6", output=6),
    row("pool-adaptive-average-uneven", "adaptive_avg_pool2d", "256x13x13", output=4),
    row("pool-spatial-pyramid-6", "adaptive_max_pool2d", "256x13x13", output=6),
    row("pool-global-max", "adaptive_max_pool2d", "512x7x7", output=1),
    row("pool-segnet-unpool-2x2", "max_unpool2d", "64x112x112", kernel=2),
)
ALEXNET_NORM: dict[str, Any] = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
NORMS = (
    row("norm-alexnet-1", "local_response_norm", "96x55x55", **ALEXNET_NORM),
    row("norm-alexnet-2", "local_response_norm", "256x27x27", **ALEXNET_NORM),
    row("norm-googlenet-1", "local_response_norm", "64x56x56", size=5),
    row("norm-googlenet-2", "local_response_norm", "192x56x56", size=5),
    row("norm-window-3", "local_response_norm", "96x55x55", size=3),
    row("norm-window-9", "local_response_norm", "96x55x55", size=9),
    row("norm-31-channels", "local_response_norm", "31x55x55", size=5),
    row("norm-own-exponent", "local_response_norm", "96x55x55", size=5, beta=0.6),
)
CLASSES = "1000"
PIXELS = "21x128x128"
DENSE = (
    row("alexnet-fc6", "linear", "9216", features=4096, activation="relu", dropout=0.5),
    row("alexnet-fc7", "linear", "4096", features=4096, activation="relu", dropout=0.5),
    row("alexnet-fc8", "linear", "4096", features=1000),
    row("vgg-fc6", "linear", "25088", features=4096, activation="relu", dropout=0.5),
    row("no-bias", "linear", "4096", features=4096, bias=False),
    conv("1x1-256-to-64", "256x56x56", 64, 1),
    conv("1x1-64-to-256", "64x56x56", 256, 1),
    conv("1x1-480-to-192", "480x14x14", 192, 1),
    row("softmax-1000", "softmax", CLASSES),
    row("log-softmax-1000", "log_softmax", CLASSES),
    row("cross-entropy-1000", "cross_entropy", CLASSES),
    row("cross-entropy-smoothed", "cross_entropy", CLASSES, label_smoothing=0.1),
    row("softmax-of-50257", "softmax", "50257"),
    row("softmax-of-pixels", "softmax", PIXELS, 16),
    row("cross-entropy-of-pixels", "cross_entropy", PIXELS, 16),
    row("dropout-4096", "dropout", "4096", p=0.5),
)
BEYOND = 680  # images of 64 x 224 x 224: 2.18e9 elements, past 2^31
ODD_SIZES = (
    *(conv(f"channels-{c}", f"{c}x28x28", c, 3, padding=1) for c in (63, 64, 65, 127, 128, 129, 255, 256, 257)),
    *(conv(f"size-{s}", f"128x{s}x{s}", 128, 3, padding=1) for s in (31, 32, 33, 63, 64, 65)),
    *(conv(f"batch-{n}", "128x28x28", 128, 3, n, padding=1) for n in (1, 31, 32, 33, 127, 128, 129)),
    *(row(f"width-{w}", "linear", str(w), 128, features=w, activation="relu") for w in (1023, 1024, 1025)),
    *(row(f"pool-size-{s}", "max_pool2d", f"64x{s}x{s}", kernel=2) for s in (63, 64, 65)),
    conv("window-2x2", "128x28x28", 128, 2),
    conv("window-1x7", "128x28x28", 128, "1x7", padding="0x3"),
    conv("beyond-2^31-conv", "64x224x224", 64, 3, BEYOND, padding=1),
    conv("beyond-2^31-conv-63", "63x224x224", 63, 3, BEYOND, padding=1),
    conv("beyond-2^31-depthwise", "64x224x224", 64, 3, BEYOND, padding=1, groups=64),
    row("pool-beyond-2^31", "max_pool2d", "64x224x224", BEYOND, kernel=2),
    row("norm-beyond-2^31", "local_response_norm", "64x224x224", BEYOND, size=5),
)
LAYERS = (
    conv("conv2d", "64x27x27", 192, 5, padding=2),
    conv("depthwise_conv2d", "512x14x14", 512, 3, padding=1, groups=512),
    row("conv2d_max_pool2d", "conv2d_max_pool2d", "128x112x112", filters=128, kernel=3, padding=1, pool_kernel=2),
    row("conv2d_im2col", "conv2d_im2col", "64x27x27", filters=192, kernel=5, padding=2, activation="relu"),
    row("conv_transpose2d", "conv_transpose2d", "256x14x14", filters=128, kernel=4, stride=2, padding=1),
    row("conv1d", "conv1d", "256x1024", filters=256, kernel=9, padding=4, activation="relu"),
    row("locally_connected2d", "locally_connected2d", "64x13x13", filters=64, kernel=3, padding=1),
    row("linear", "linear", "9216", features=4096, activation="relu", dropout=0.5),
    row("dropout", "dropout", "4096"),
    row("relu", "relu", "64x55x55"),
    row("max_pool2d", "max_pool2d", "64x55x55", kernel=3, stride=2),
    row("avg_pool2d", "avg_pool2d", "64x55x55", kernel=3, stride=2),
    row("lp_pool2d", "lp_pool2d", "64x55x55", norm=2, kernel=3, stride=2),
    row("adaptive_avg_pool2d", "adaptive_avg_pool2d", "256x13x13", output=6),
    row("adaptive_max_pool2d", "adaptive_max_pool2d", "256x13x13", output=6),
    row("max_unpool2d", "max_unpool2d", "64x56x56", kernel=2),
    row("local_response_norm", "local_response_norm", "96x55x55", **ALEXNET_NORM),
    row("unfold", "unfold", "64x27x27", kernel=5, padding=2),
    row("fold", "fold", "1600x729", output=27, kernel=5, padding=2),
    row("softmax", "softmax", CLASSES),
    row("log_softmax", "log_softmax", CLASSES),
    row("cross_entropy", "cross_entropy", CLASSES),
)
LATENCY = (
    conv("resnet-3x3-14x14", "256x14x14", 256, 3, padding=1),
    conv("resnet-1x1-14x14", "1024x14x14", 256, 1),
    conv("mobilenet-3x3-512", "512x14x14", 512, 3, padding=1, groups=512),
    row("norm-alexnet-1", "local_response_norm", "96x55x55", **ALEXNET_NORM),
    row("softmax-1000", "softmax", CLASSES),
)
