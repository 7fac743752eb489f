"""Classifiers as fully convolutional networks: one pass over a large picture gives a score for every crop of it.

A fully connected layer is a convolution as large as its input (Long, Shelhamer and Darrell, arXiv:1411.4038; Sermanet
et al., "OverFeat", arXiv:1312.6229). A network with total stride 32 made for 224x224 turns 384x384 into 6x6 scores;
score (i, j) belongs to the crop at row 32 * i, column 32 * j, and neighbouring crops share nearly all of their work.

When the scores are those of the crops:

- Without padding, always, to rounding: both see the same pixels. Here `DenseNetwork.padded` is empty (LeNet on 32x32,
  and VGG with padding=0).
- With padding, only for the picture that is one crop. Evaluated alone, a crop has zeros around each layer's maps; in
  the large picture there are its neighbours' maps instead. `padded` names the layers that do so: AlexNet's, VGG-16's
  and GoogLeNet's. Zeros around the picture do not help, as a layer's maps of zeros are not zeros. What is then true:
  a score whose receptive field (`receptive_field`, larger than the crop) lies inside the picture is that of the
  network without padding on this field. The dense score is no worse for it, it sees more; but it is another number.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tileconv.kernels.exchange import fc_to_conv
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.model import alexnet2012, googlenet, lenet, vgg
from tileconv.model.alexnet import AlexNet
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.alexnet_mini import AlexNetMini
from tileconv.model.googlenet import GoogLeNet
from tileconv.model.lenet import LeNet
from tileconv.model.steps import Chain, Step, run, run_reference, steps
from tileconv.model.vgg import VGG


class DenseNetwork(nn.Module):
    """Input [N, C, H, W] with H and W of at least `size`, output [N, num_classes, P, Q].

    P = (H - size) / stride + 1 where stride divides H - size; where it does not, pixels at the lower edge are unused or
    make one more row of scores. The layers up to the maps are the classifier's own, the convolutions behind them hold
    copies of its fully connected layers; dropouts are left out.
    """

    def __init__(self, size: int, window: Chain, body: Chain, head: Chain) -> None:
        """window: layers in order that a pixel's way through the body goes, named; `body` itself for a plain chain."""
        super().__init__()
        way = [*window, *((name, m) for name, m in head if not isinstance(m, nn.ReLU))]
        self.size = size
        self.padded = tuple(name for name, m in way if _pads(m))
        """Layers that see zeros at a crop's edge and the neighbouring pixels in a larger picture."""
        self.stride, self.receptive_field, self.before = _sight(m for _, m in way)
        """Pixels from one score to the next; rows (and columns) that a score sees; and how many of them lie before
        the first row of its crop: score i sees stride * i - before and the receptive_field - 1 rows after that."""
        self.names = [name for name, _ in (*body, *head)]
        self.layers = nn.ModuleList(m for _, m in (*body, *head))

    @property
    def steps(self) -> list[Step]:
        """The network's steps in order: forward() is their composition."""
        chain = list(zip(self.names, self.layers, strict=True))
        return [*_features(chain[:1]), *steps(chain[1:])] if isinstance(chain[0][1], GoogLeNet) else steps(chain)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or min(x.shape[2:]) < self.size:
            raise ValueError(f"x has shape {tuple(x.shape)}: allowed are [N, C, H, W], H and W at least {self.size}")
        return run(self.steps, x)

    def reference(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The same on torch's kernels, computed in `dtype` (the input's if None)."""
        return run_reference(self.steps, x, dtype)


def dense(model: nn.Module, size: int | None = None) -> DenseNetwork:
    """The fully convolutional network of a classifier of this package, for crops of size x size.

    size is the classifier's own unless given: 224, AlexNet2012's 227 or 224, LeNet's 32, AlexNetMini's 28.

    Adaptive average pools before the fully connected layers depend on the size: they are built for crops, whatever the
    picture. At 224 AlexNet's and VGG's change nothing and disappear; GoogLeNet's becomes a 7x7 average of stride 1.
    Raises ValueError where their windows are not evenly spaced, and TypeError for another kind of model.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"size is {size!r}: allowed are positive ints and None")
    size, window, body, fc = _parts(model, size)
    first = next(m for _, m in window if isinstance(m, nn.Conv2d))
    picture = torch.empty(1, first.in_channels, size, size, device="meta", dtype=first.weight.dtype)
    extent = run_reference(_features(body) if isinstance(model, GoogLeNet) else steps(body), picture).shape[2]
    head: Chain = []
    dilation = 1
    for name, m in fc:
        if isinstance(m, nn.AdaptiveAvgPool2d):
            wanted = _first(m.output_size)
            average, dilation = _even_windows(extent, wanted, size)
            extent = wanted
            if average > 1:
                head.append((name, nn.AvgPool2d(average, stride=1)))
        elif isinstance(m, nn.Linear):
            head.append((name, _convolution(m, m.in_features // extent**2, extent, dilation)))
            dilation, extent = 1, 1
        elif isinstance(m, nn.ReLU):
            head.append((name, m))
    return DenseNetwork(size, window, body, head)


def crops(x: Tensor, size: int, stride: int) -> Tensor:
    """[N, C, H, W] -> the crops [N, P, Q, C, size, size] that dense evaluation gives scores for."""
    cut: Tensor = x.unfold(2, size, stride).unfold(3, size, stride)
    return cut.permute(0, 2, 3, 1, 4, 5)


def by_crops(classify: Callable[[Tensor], Tensor], x: Tensor, size: int, stride: int, batch: int = 36) -> Tensor:
    """The same scores the long way, [N, num_classes, P, Q]: the classifier on each crop, `batch` at a time."""
    cut = crops(x, size, stride)
    scores = torch.cat([classify(part) for part in cut.flatten(0, 2).split(batch)])
    result: Tensor = scores.unflatten(0, tuple(cut.shape[:3])).permute(0, 3, 1, 2)
    return result


def flops(network: DenseNetwork, height: int, width: int) -> tuple[int, int]:
    """Multiplications and additions for one picture: dense, and crop by crop for as many scores.

    Those of convolutions and fully connected layers, taps in the padding included. A crop on its own costs what the
    dense network does on a picture of a crop's size.
    """
    whole, scores = _counted(network, height, width)
    one, _ = _counted(network, network.size, network.size)
    return whole, one * scores


class _Count(TorchFunctionMode):
    """Adds up the operations of the convolutions that are called."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            x, w, _, stride, padding, dilation, groups = args
            (n, c, h, width), (k, _, r, s) = x.shape, w.shape
            sides = (padding[0], padding[0]), (padding[1], padding[1])
            problem = Conv2dProblem(n, c, h, width, k, r, s, tuple(stride), sides, tuple(dilation), groups)
            assert result.shape == problem.y_shape
            self.total += problem.flops
        return result


def _counted(network: DenseNetwork, height: int, width: int) -> tuple[int, int]:
    """Operations and scores, from torch's kernels on tensors without values."""
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    x = torch.empty(1, first.in_channels, height, width, device="meta", dtype=first.weight.dtype)
    with _Count() as count:
        scores = network.reference(x)
    return count.total, scores.shape[2] * scores.shape[3]


def _parts(model: nn.Module, size: int | None) -> tuple[int, Chain, Chain, Chain]:
    """Size, what gives the maps their stride and sight, the layers up to the maps, and those behind."""
    if isinstance(model, GoogLeNet):
        fc: Chain = [("avgpool", model.avgpool), ("fc", model.fc)]
        return size or 224, _googlenet_window(model), [("features", model)], fc
    if isinstance(model, LeNet):
        size = size or 32
        chain = _lenet_chain(model, size)
    elif isinstance(model, AlexNet2012):
        if size not in (None, model.size):
            raise ValueError(f"size is {size}: the model takes {model.size}")
        size, chain = model.size, alexnet2012.chain(model)
    elif isinstance(model, VGG):
        size, chain = size or 224, vgg.chain(model)
    elif isinstance(model, AlexNet):
        size = size or (28 if isinstance(model, AlexNetMini) else 224)
        places = [(f"features.{i}", m) for i, m in enumerate(model.features)]
        chain = [*places, ("avgpool", model.avgpool)]
        chain += [(f"classifier.{i}", m) for i, m in enumerate(model.classifier)]
    else:
        raise TypeError(f"model is a {type(model).__name__}: allowed are the classifiers of tileconv.model")
    end = next(i for i, (_, m) in enumerate(chain) if isinstance(m, nn.AdaptiveAvgPool2d | nn.Flatten | nn.Linear))
    window: Chain = [(name, m) for name, m in chain[:end] if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    return size, window, chain[:end], chain[end:]


def _features(chain: Chain) -> list[Step]:
    """GoogLeNet up to its maps, as one step."""
    ((name, model),) = chain
    assert isinstance(model, GoogLeNet)
    return [Step(name, name, model, model.features, lambda x: googlenet.reference_features(model, x)[2])]


def _lenet_chain(model: LeNet, size: int) -> Chain:
    if size not in lenet.SIZES:
        raise ValueError(f"size is {size}: allowed are {', '.join(map(str, lenet.SIZES))}")
    first = copy.copy(model.conv1)  # the same parameters, another padding
    first.padding = (lenet.SIZES[size], lenet.SIZES[size])
    parts: Chain = [("conv1", first), ("relu", nn.ReLU()), ("pool1", nn.MaxPool2d(2))]
    parts += [("conv2", model.conv2), ("relu", nn.ReLU()), ("pool2", nn.MaxPool2d(2)), ("flatten", nn.Flatten())]
    parts += [("fc1", model.fc1), ("relu", nn.ReLU()), ("fc2", model.fc2), ("relu", nn.ReLU()), ("fc3", model.fc3)]
    return parts


def _googlenet_window(model: GoogLeNet) -> Chain:
    """Along the branches that see farthest; those with 1x1 filters change no extent."""
    window: Chain = []
    for name, m in model.named_children():
        if isinstance(m, googlenet.Inception):
            last = m.branch2[1]
            assert isinstance(last, googlenet.BasicConv2d)
            window.append((f"{name}.branch2.1.conv", last.conv))
        elif isinstance(m, googlenet.BasicConv2d):
            window.append((f"{name}.conv", m.conv))
        elif isinstance(m, nn.MaxPool2d):
            window.append((name, m))
    return window


def _convolution(linear: nn.Linear, channels: int, extent: int, dilation: int) -> nn.Conv2d:
    """torch's layer, so that it can be a step's; its values are fc_to_conv's."""
    values = fc_to_conv(linear, (channels, extent, extent))
    with torch.device("meta"):
        conv = nn.Conv2d(channels, linear.out_features, extent, dilation=dilation, bias=linear.bias is not None)
    conv.weight, conv.bias = values.weight, values.bias
    return conv.train(linear.training)


def _even_windows(extent: int, wanted: int, size: int) -> tuple[int, int]:
    """Length and distance of the windows of an adaptive pool; they must be the same all along."""
    starts = [i * extent // wanted for i in range(wanted)]
    ends = [-(-(i + 1) * extent // wanted) for i in range(wanted)]
    lengths = {end - start for start, end in zip(starts, ends, strict=True)}
    distances = {after - before for before, after in itertools.pairwise(starts)} or {1}
    if len(lengths) > 1 or len(distances) > 1 or 0 in distances:
        raise ValueError(
            f"size is {size}: it leaves maps of {extent}x{extent}, which the classifier's average pool to "
            f"{wanted}x{wanted} divides unevenly; no convolution does that"
        )
    return lengths.pop(), distances.pop()


def _pads(m: nn.Module) -> bool:
    """Whether the layer's windows can hang over the edge of its input."""
    if isinstance(m, nn.Conv2d):
        return any(int(pad) for pad in m.padding)
    return isinstance(m, nn.MaxPool2d) and (m.ceil_mode or _first(m.padding) > 0)


def _sight(window: Iterable[nn.Module]) -> tuple[int, int, int]:
    """Stride, receptive field and padding before of all layers together, in pixels of the picture."""
    stride, field, before = 1, 1, 0
    for m in window:
        assert isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
        spread = 1 if isinstance(m, nn.AvgPool2d) else _first(m.dilation)
        field += (_first(m.kernel_size) - 1) * spread * stride
        before += _first(m.padding) * stride
        stride *= _first(m.stride)
    return stride, field, before


def _first(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
