"""Every network as the chain of layers that it is: one list for the calculator, dense evaluation and comparisons."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from tileconv.model import alexnet2012, googlenet, lenet, vgg
from tileconv.model.alexnet import AlexNet
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.alexnet_mini import AlexNetMini
from tileconv.model.googlenet import GoogLeNet, GoogLeNetOutputs
from tileconv.model.lenet import LeNet
from tileconv.model.steps import Chain, plain_norm
from tileconv.model.vgg import VGG

NETWORKS = (AlexNet, AlexNet2012, GoogLeNet, LeNet, VGG)
"""The classes that chains are known of; their subclasses too."""


def size_of(model: nn.Module) -> int:
    """Height and width of the pictures that a network of this package is made for."""
    if isinstance(model, AlexNet2012):
        return model.size
    return 32 if isinstance(model, LeNet) else 28 if isinstance(model, AlexNetMini) else 224


def channels_of(model: nn.Module) -> int:
    """Channels of the pictures that a network takes."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def chain(model: nn.Module, shape: Sequence[int]) -> Chain:
    """A network as named layers in order, GoogLeNet's modules among them, for pictures [N, C, H, W] of `shape`.

    The layers are the network's own. Raises ValueError for a shape that LeNet does not take, and TypeError for what is
    neither a network of this package nor a torch.nn.Sequential.
    """
    if isinstance(model, GoogLeNet):
        layers = [(name, m) for name, m in model.named_children() if name not in ("aux1", "aux2")]
        return [*layers[:-1], ("flatten", nn.Flatten()), layers[-1]]
    if isinstance(model, LeNet):
        return _lenet(model, shape)
    if isinstance(model, AlexNet2012):
        return alexnet2012.chain(model)
    if isinstance(model, VGG):
        return vgg.chain(model)
    if isinstance(model, AlexNet):
        parts = ("conv1", "", "pool1", "conv2", "", "pool2", "conv3", "", "conv4", "", "conv5", "", "pool5")
        dense = ("", "fc6", "", "", "fc7", "", "fc8")
        return [
            *zip(parts, model.features, strict=True), ("avgpool", model.avgpool), ("", nn.Flatten()),
            *zip(dense, model.classifier, strict=True),
        ]  # fmt: skip
    if isinstance(model, nn.Sequential):
        return list(model.named_children())
    raise TypeError(
        f"model is a {type(model).__name__}: allowed are the networks of tileconv.model, torch.nn.Sequential "
        "and (name, layer) pairs"
    )


def plain(model: nn.Module, size: int | None = None) -> nn.Module:
    """The same network of torch's layers alone, for pictures of size x size: a copy of its weights, in its mode.

    What a network of ours is compared with, in any dtype and on any device; size is the network's own unless given.
    """
    model = copy.deepcopy(model)
    if isinstance(model, GoogLeNet):
        return PlainGoogLeNet(model).train(model.training)
    extent = size_of(model) if size is None else size
    layers = chain(model, (1, channels_of(model), extent, extent))
    places = OrderedDict((f"{i}_{name}".rstrip("_"), _widening(m)) for i, (name, m) in enumerate(layers))
    return nn.Sequential(places).train(model.training)


class PlainGoogLeNet(nn.Module):
    """GoogLeNet's layers, called on torch's kernels."""

    def __init__(self, network: GoogLeNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        return googlenet.reference_forward(self.network, x)


class _WideningNorm(nn.LocalResponseNorm):
    """torch's own, which knows no half precision on a CPU: there it computes in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return plain_norm(self, input)


def _widening(m: nn.Module) -> nn.Module:
    return _WideningNorm(m.size, m.alpha, m.beta, m.k) if isinstance(m, nn.LocalResponseNorm) else m


def _lenet(model: LeNet, shape: Sequence[int]) -> Chain:
    """LeNet's forward spelled out; the padding of its first layer depends on the picture."""
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] not in lenet.SIZES:
        raise ValueError(f"input_shape is {tuple(shape)}: LeNet takes [N, C, 28, 28] or [N, C, 32, 32]")
    first = copy.copy(model.conv1)  # the same parameters, another padding
    first.padding = (lenet.SIZES[shape[2]],) * 2
    return [
        ("conv1", first), ("relu1", nn.ReLU()), ("pool1", nn.MaxPool2d(2)),
        ("conv2", model.conv2), ("relu2", nn.ReLU()), ("pool2", nn.MaxPool2d(2)), ("flatten", nn.Flatten()),
        ("fc1", model.fc1), ("relu3", nn.ReLU()), ("fc2", model.fc2), ("relu4", nn.ReLU()), ("fc3", model.fc3),
    ]  # fmt: skip
