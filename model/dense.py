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

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tileconv.kernels.exchange import fc_to_conv
from tileconv.model import googlenet, lenet
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.chains import NETWORKS, chain, channels_of, size_of
from tileconv.model.googlenet import GoogLeNet
from tileconv.model.lenet import LeNet
from tileconv.model.shapes import Row, shapes, totals
from tileconv.model.steps import Chain, Step, run, run_reference, steps

ENDS = (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear)
"""What comes behind the maps."""


class DenseNetwork(nn.Module):
    """Input [N, C, H, W] with H and W of at least `size`, output [N, num_classes, P, Q].

    P = (H - size) / stride + 1 where stride divides H - size; where it does not, pixels at the lower edge are unused or
    make one more row of scores. The layers up to the maps are the classifier's own, the convolutions behind them hold
    copies of its fully connected layers; dropouts are left out.
    """

    def __init__(self, size: int, body: Chain, head: Chain) -> None:
        super().__init__()
        self.size = size
        self.names = [name for name, _ in (*body, *head)]
        self.layers = nn.ModuleList(m for _, m in (*body, *head))
        self.padded = tuple(f"{name}.{part}".rstrip(".") for name, m in self.chain
                            for part, inside in m.named_modules() if _pads(inside))  # fmt: skip
        """Layers that see zeros at a crop's edge and the neighbouring pixels in a larger picture."""
        last = self.rows(size, size)[-1]
        self.stride, self.receptive_field, self.before = last.jump[0], last.receptive_field[0], last.before[0]
        """Pixels from one score to the next; rows (and columns) that a score sees; and how many of them lie before
        the first row of its crop: score i sees stride * i - before and the receptive_field - 1 rows after that."""

    @property
    def chain(self) -> Chain:
        """The layers by name, in order; GoogLeNet's spelled out."""
        (name, first), *rest = zip(self.names, self.layers, strict=True)
        return [*_body(chain(first, ())), *rest] if isinstance(first, GoogLeNet) else [(name, first), *rest]

    @property
    def steps(self) -> list[Step]:
        """The network's steps in order: forward() is their composition."""
        layers = list(zip(self.names, self.layers, strict=True))
        first = layers[0][1]
        return [_features(first), *steps(layers[1:])] if isinstance(first, GoogLeNet) else steps(layers)

    def rows(self, height: int, width: int, batch: int = 1) -> list[Row]:
        """What every layer makes, sees and costs, for pictures of height x width."""
        return shapes(self.chain, (batch, channels_of(self), height, width))

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
    size = _crop(model, size)
    layers = chain(model, (1, channels_of(model), size, size))
    body = _body(layers)
    extent = shapes(body, (1, channels_of(model), size, size))[-1].shape[2]
    head: Chain = []
    dilation = 1
    for name, m in layers[len(body) :]:
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
    return DenseNetwork(size, [("features", model)] if isinstance(model, GoogLeNet) else body, head)


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
    whole, one = network.rows(height, width), network.rows(network.size, network.size)
    return totals(whole).flops, totals(one).flops * math.prod(whole[-1].shape[2:])


def _crop(model: nn.Module, size: int | None) -> int:
    """The extent of a crop: the one asked for, if the model takes it, or the model's own."""
    if not isinstance(model, NETWORKS):
        raise TypeError(f"model is a {type(model).__name__}: allowed are the classifiers of tileconv.model")
    own = size_of(model)
    if isinstance(model, AlexNet2012) and size not in (None, own):
        raise ValueError(f"size is {size}: the model takes {own}")
    if isinstance(model, LeNet) and size is not None and size not in lenet.SIZES:
        raise ValueError(f"size is {size}: allowed are {', '.join(map(str, lenet.SIZES))}")
    return own if size is None else size


def _features(model: GoogLeNet) -> Step:
    """GoogLeNet up to its maps, as one step: its ReLUs join pools across modules."""
    return Step("features", "features", model, model.features, lambda x: googlenet.reference_features(model, x)[2])


def _body(layers: Chain) -> Chain:
    """The layers before the fully connected ones."""
    return layers[: next(i for i, (_, m) in enumerate(layers) if isinstance(m, ENDS))]


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


def _first(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
