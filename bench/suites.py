"""The suites by name: which layers, at which batch sizes, where the figures come from, and how they are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import suite_rows
from .layers import Row
from .networks import Shape, chain_layers, known, zoo_layers

FILES = (".yaml", ".yml", ".csv")
Layers = Callable[[int | None], tuple[Shape, ...]]


@dataclass(frozen=True)
class Suite:
    """A set of layers. `shapes(batch)` gives them for a batch size, or each at its own for None.

    fixed: the batch sizes are what the suite is about, and no other may be asked for. graph: time each call also as
    replayed from a CUDA graph, because the host's time matters at this size. whole: the suite's layers are networks, of
    tileconv.model.zoo, run as a whole: forward, and one training step. telling: the layers that say most, first those
    that a short run takes first (cases.by_weight). left_out: what a recorded model calls beside, and why it is no layer
    here.
    """

    name: str
    description: str
    source: str
    layers: Layers
    batch: str
    fixed: bool = False
    graph: bool = False
    whole: bool = False
    telling: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def shapes(self, batch: int | None = None) -> tuple[Shape, ...]:
        """The layers. Raises ValueError for a batch below 1, and for any batch where the suite has its own."""
        if batch is not None and self.fixed:
            raise ValueError(f"batch={batch}: the layers of {self.name!r} have batch sizes of their own; leave it out")
        if batch is not None and batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        return self.layers(batch)


def of_rows(rows: Sequence[Row], batch: int) -> Layers:
    """Layers from rows: at the batch asked for, else at the row's own, else at `batch`."""

    @cache
    def layers(asked: int | None) -> tuple[Shape, ...]:
        return tuple(row.at(asked or row.batch or batch) for row in rows)

    return layers


def _zoo(network: str, own: int = 128) -> Layers:
    return lambda batch: zoo_layers(network, batch or own)


def _named(prefix: str, shapes: tuple[Shape, ...], skip: tuple[str, ...] = ()) -> tuple[Shape, ...]:
    """The layers of a network in a suite of several."""
    import dataclasses

    return tuple(dataclasses.replace(s, name=f"{prefix}.{s.name}") for s in shapes if s.name not in skip)


@cache
def _convnet_benchmarks(batch: int | None) -> tuple[Shape, ...]:
    """The four networks at their batch sizes, then the five single layers.

    AlexNet is the one-column network of arXiv:1404.5997; the average pools that torchvision added before the fully
    connected layers pass 6x6 and 7x7 maps on as they are and are left out. GoogLeNet's third branches are 5x5, as in
    the paper, and its fourth pool 3x3.
    """
    from torch import device, nn

    from tileconv.model import chains, shapes
    from tileconv.model.googlenet import Inception
    from tileconv.model.vgg import VGG, chain

    many, few = batch or 128, batch or 64
    with device("meta"):
        vgg = VGG(widths=((64,), (128,), (256, 256), (512, 512), (512, 512)))
        googlenet = shapes.network("googlenet", aux_logits=False)
        for module in googlenet.modules():
            if isinstance(module, Inception):
                block: Any = module.branch3[1]
                third = block.conv
                block.conv = nn.Conv2d(third.in_channels, third.out_channels, 5, padding=2, bias=False)
        googlenet.maxpool4 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        overfeat = suite_rows.overfeat()
    pictures = (many, 3, 224, 224)
    return (
        *_named("alexnet", zoo_layers("alexnet", many), skip=("avgpool",)),
        *_named("overfeat", chain_layers(overfeat, (many, 3, 231, 231))),
        *_named("vgg-a", chain_layers(chain(vgg), (few, 3, 224, 224)), skip=("avgpool",)),
        *_named("googlenet", chain_layers(chains.chain(googlenet, pictures), pictures)),
        *(row.at(many) for row in suite_rows.SINGLE_LAYERS),
    )


def _fused(batch: int | None) -> tuple[Shape, ...]:
    from .fused import fused_layers

    return fused_layers(batch or 128)


def _latency(batch: int | None) -> tuple[Shape, ...]:
    return (*zoo_layers("alexnet", batch or 1), *(row.at(batch or 1) for row in suite_rows.LATENCY))


def _networks(batch: int | None) -> tuple[Shape, ...]:
    from tileconv.model import chains, shapes

    found = []
    for name, own in suite_rows.NETWORKS.items():
        model = shapes.network(name)
        size = shapes.SIZES[name]
        found.append(Shape(name, "network", model, (batch or own, chains.channels_of(model), size, size), None))
    return tuple(found)


def _rows(name: str, description: str, source: str, rows: Sequence[Row], batch: int, **more: object) -> Suite:
    return Suite(name, description, source, of_rows(rows, batch), str(batch), **more)  # type: ignore[arg-type]


ALEXNET_FIRST = ("conv2", "conv3", "conv1", "fc6", "pool1")
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "alexnet", "AlexNet, one column (torchvision's)", "Krizhevsky, arXiv:1404.5997", _zoo("alexnet"), "128",
            telling=ALEXNET_FIRST,
        ),
        Suite(
            "alexnet-2012", "AlexNet as published: two groups, local response normalisation",
            "Krizhevsky, Sutskever and Hinton, NIPS 2012", _zoo("alexnet-2012"), "128",
            telling=(*ALEXNET_FIRST, "norm1"),
        ),
        Suite(
            "convnet-benchmarks", "AlexNet, OverFeat, VGG-A, GoogLeNet and five single layers",
            "github.com/soumith/convnet-benchmarks", _convnet_benchmarks, "128, VGG-A 64",
            telling=("L2", "L5", "L1", "L3", "L4", "alexnet.conv2", "overfeat.conv3", "vgg-a.conv3_2"),
        ),
        Suite("vgg16", "VGG-16, configuration D", "Simonyan and Zisserman, arXiv:1409.1556", _zoo("vgg16", 64), "64",
              telling=("conv3_2", "conv1_2", "conv5_1", "fc6", "pool1")),
        Suite(
            "googlenet", "GoogLeNet with torchvision's 3x3 third branches, batch normalisation folded",
            "Szegedy et al., arXiv:1409.4842", _zoo("googlenet"), "128",
            telling=("conv3", "conv1", "inception3a.branch1"),
        ),
        _rows("resnet-stem", "First layers: of ResNet, ResNet-D, ConvNeXt and ViT",
              "arXiv:1512.03385, 1812.01187, 2201.03545, 2010.11929", suite_rows.RESNET_STEM, 128,
              telling=("resnet-7x7-s2", "pool-resnet-3x3-s2")),
        _rows("dilated", "Dilation 1 to 16, and the atrous 3x3 of dense prediction",
              "Yu and Koltun, arXiv:1511.07122; DeepLab, arXiv:1606.00915 and 1706.05587", suite_rows.DILATED, 16,
              telling=("dilation-2", "dilation-16", "aspp-rate-12")),
        _rows("grouped", "Grouped convolutions: AlexNet 2012, ResNeXt, ShuffleNet",
              "NIPS 2012, arXiv:1611.05431, 1707.01083", suite_rows.GROUPED, 128,
              telling=("alexnet-conv2", "resnext-56x56")),
        _rows("depthwise", "Depthwise convolutions: MobileNet, EfficientNet, ConvNeXt",
              "arXiv:1704.04861, 1905.11946, 2201.03545", suite_rows.DEPTHWISE, 128,
              telling=("mobilenet-3x3-512", "mobilenet-3x3-s2-64")),
        _rows("pools", "Every pool, overlapping or not, padded, dilated, adaptive; unpooling", "the networks named",
              suite_rows.POOLS, 128, telling=("pool-alexnet-3x3-s2", "pool-vgg-2x2")),
        _rows("norms", "Local response normalisation of AlexNet and GoogLeNet, and odd windows",
              "NIPS 2012, arXiv:1409.4842", suite_rows.NORMS, 128, telling=("norm-alexnet-1",)),
        _rows("dense", "Fully connected layers, 1x1 convolutions, softmax and losses", "the networks named",
              suite_rows.DENSE, 128, telling=("alexnet-fc6", "vgg-fc6", "cross-entropy-1000")),
        _rows("odd-sizes", "Cliff hunt: channels, sizes and batches beside powers of two, and tensors beyond 2^31",
              "made for this", suite_rows.ODD_SIZES, 64, fixed=True,
              telling=("channels-256", "channels-255", "channels-257", "size-33", "beyond-2^31-conv")),
        _rows("layers", "Every layer of the library once, forward and backward", "AlexNet's sizes where it has them",
              suite_rows.LAYERS, 128),
        Suite("fused", "Convolution, ReLU and max-pool as one layer: AlexNet, VGG-16, GoogLeNet, LeNet-5",
              "the networks named", _fused, "128", telling=("vgg16.conv1_2", "vgg16.conv3_3")),
        Suite("latency", "One image: AlexNet's layers and small ones, with and without a CUDA graph",
              "as alexnet, resnet and mobilenet", _latency, "1", graph=True, telling=("conv2", "fc6", "conv3")),
        Suite("networks", "Whole networks: the forward pass, and a training step", "tileconv.model.zoo", _networks,
              "128, VGG-16 64", whole=True, telling=("alexnet", "alexnet-2012")),
    )
}  # fmt: skip


def suite_of(name: str) -> Suite:
    """A built-in suite by name, a user's by its YAML or CSV file, or a model's layers by "module:callable".

    Raises ValueError with the nearest names for one that is none, and for what is wrong in a file or with a model.
    """
    if name in SUITES:
        return SUITES[name]
    if name.lower().endswith(FILES):
        from .user_suites import load

        path = Path(name)
        try:
            return load(name, path.stat().st_mtime_ns)
        except OSError as error:
            raise ValueError(f"suite={name!r} cannot be read: {error.strerror}") from None
    if ":" in name:
        from .recorded import record

        return record(name)
    try:
        known("suite", name, SUITES)
    except ValueError as error:
        raise ValueError(f"{error}, a {', '.join(FILES)} file, or module:callable") from None
    raise AssertionError
