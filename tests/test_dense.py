"""Dense evaluation: one pass over a large picture against the classifier on every crop of it."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileconv.model import alexnet, alexnet2012, steps, vgg
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.data import photographs
from tileconv.model.dense import by_crops, crops, dense, flops
from tileconv.model.vgg import VGG
from tileconv.model.zoo import build

Budget = Callable[[Tensor, Tensor, Tensor], None]
WIDTHS = ((4,), (8,), (8,), (8,), (8,))


def lively(model: Any) -> Any:
    """Weights under which the answer depends on the picture."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.normal_(m.weight, std=math.sqrt(2 / m.weight[0].numel()))
            if m.bias is not None:
                nn.init.normal_(m.bias, std=0.1)
    return model.eval()


def without_padding(model: Any) -> Any:
    """The same weights, no layer padded."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.padding = (0, 0)
    return model


def unpadded_alexnet() -> AlexNet2012:
    """AlexNet 2012, eight times narrower, its convolutions not padded: 227 pixels leave 2x2 maps."""
    model = AlexNet2012(10, width=12, hidden=32)
    model.fc6 = nn.Linear(model.conv5.out_channels * 2 * 2, 32)
    return lively(without_padding(model))  # type: ignore[no-any-return]


def small_vgg(padding: int) -> VGG:
    """Five blocks of a convolution and a pool: 224 pixels leave 7x7 maps, or 5x5 where nothing is padded."""
    return lively(VGG(10, widths=WIDTHS, hidden=16, maps=7 if padding else 5, padding=padding))  # type: ignore[no-any-return]


EXACT: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # constructor, extent of a picture, scores along a side
    "vgg of five pools, 224 and 384": (lambda: small_vgg(padding=0), 384, 6),
    "alexnet, 227 and 387": (unpadded_alexnet, 387, 6),
    "lenet, 32 and 64": (lambda: lively(build("lenet", channels=3)), 64, 9),
}


@pytest.mark.parametrize(("make", "extent", "scores"), EXACT.values(), ids=EXACT)
def test_scores_are_those_of_the_crops(
    make: Callable[[], Any], extent: int, scores: int, device: torch.device, assert_within_budget: Budget
) -> None:
    """Networks without padding: equal to rounding, to the classifier on our kernels and on torch's."""
    model = make().to(device)
    network = dense(model)
    assert network.padded == ()
    assert extent - network.size == (scores - 1) * network.stride
    x = photographs(1, extent).to(device)
    with torch.no_grad():
        ours = network(x)
        separate = by_crops(model, x, network.size, network.stride)
        theirs = by_crops(dense(model).reference, x, network.size, network.stride)[..., 0, 0]
        plain = plain_torch(model)
        theirs = by_crops(plain, x, network.size, network.stride)
        exact = by_crops(plain.double(), x.double(), network.size, network.stride)
    assert ours.shape == (1, 10, scores, scores)
    assert_within_budget(ours, theirs, exact)
    assert_within_budget(separate, theirs, exact)
    assert exact.std((2, 3)).min() > 100 * (ours - exact).abs().max()  # neighbours differ, so a shift would be seen


def plain_torch(model: nn.Module) -> nn.Module:
    """The same weights in a plain stack of torch's layers."""
    if isinstance(model, VGG):
        parts = [*model.features, model.avgpool, nn.Flatten(), *model.classifier]
    elif isinstance(model, AlexNet2012):
        parts = list(model.children())
    else:
        pool, relu = nn.MaxPool2d(2), nn.ReLU()
        parts = [model.conv1, relu, pool, model.conv2, relu, pool, nn.Flatten()]
        parts += [model.fc1, relu, model.fc2, relu, model.fc3]  # type: ignore[list-item]
    return copy.deepcopy(nn.Sequential(*parts)).eval()


def test_oblong_pictures_and_batches(device: torch.device) -> None:
    model = lively(build("lenet")).to(device)
    x = torch.randn(3, 1, 40, 52, device=device)
    with torch.no_grad():
        torch.testing.assert_close(dense(model)(x), by_crops(model, x, 32, 4, batch=7), rtol=1e-4, atol=1e-5)


# With padding


@pytest.mark.parametrize(
    ("make", "extent", "inside"),
    [(lambda: small_vgg(padding=1), 352, (1, 3)), (lambda: lively(AlexNet2012(10, width=12, hidden=32)), 387, (2, 4))],
    ids=["vgg", "alexnet"],
)
def test_padded_scores_are_those_of_the_receptive_field(
    make: Callable[[], Any], extent: int, inside: tuple[int, int], device: torch.device, assert_within_budget: Budget
) -> None:
    """A score whose field lies in the picture is that of the network without padding on the field, not on the crop."""
    model = make().to(device)
    network, plain = dense(model), without_padding(model)
    module: Any = alexnet2012 if isinstance(model, AlexNet2012) else vgg
    first, last = inside
    fields = [(network.stride * i - network.before, network.stride * i - network.before + network.receptive_field)
              for i in range(first - 1, last + 1)]  # fmt: skip
    assert fields[0][0] < 0 <= fields[1][0]
    assert fields[-2][1] <= extent < fields[-1][1]
    x = photographs(1, extent).to(device)
    with torch.no_grad():
        scores = network(x)
        for (low, high), i in zip(fields[1:-1], range(first, last), strict=True):
            field = x[:, :, low:high, low:high]
            layers = module.layers(plain)
            assert_within_budget(
                scores[:, :, i, i], steps.run_reference(layers, field), steps.run_reference(layers, field.double())
            )
        separate = by_crops(model, x, network.size, network.stride)
        assert_within_budget(scores, network.reference(x), network.reference(x, torch.float64))
    assert scores.shape == separate.shape
    # Documented as untrue: far from rounding, if not from the scores.
    assert 0.01 < (scores - separate).abs().max() / separate.abs().max() < 1


@pytest.mark.parametrize("name", ["alexnet-2012", "vgg", "lenet", "alexnet-mini", "googlenet"])
def test_a_picture_of_one_crop_has_the_classifiers_score(name: str, device: torch.device) -> None:
    """Padded or not, and through average pools that are none (VGG), overlap (AlexNet-mini) or take all (GoogLeNet)."""
    models: dict[str, tuple[Any, int | None]] = {
        "alexnet-2012": (AlexNet2012(10, width=12, hidden=32, size=224), None),
        "vgg": (small_vgg(padding=1), None),
        "lenet": (build("lenet"), 28),
        "alexnet-mini": (build("alexnet-mini"), 64),
        "googlenet": (build("googlenet", num_classes=10, aux_logits=False), 64),
    } if name == "all" else {name: one(name)}  # fmt: skip
    model, size = models[name]
    model = lively(model).to(device)
    network = dense(model, size)
    channels = 1 if name in ("lenet", "alexnet-mini") else 3
    x = torch.randn(2, channels, network.size, network.size, device=device)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[:, :, 0, 0], model(x), rtol=1e-4, atol=1e-5)


def one(name: str) -> tuple[Any, int | None]:
    raise NotImplementedError
