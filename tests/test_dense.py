"""Dense evaluation: one pass over a large picture against the classifier on every crop of it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileconv.model import alexnet, alexnet2012, steps, vgg
from tileconv.model.alexnet import AlexNet
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.data import photographs
from tileconv.model.dense import by_crops, crops, dense, flops
from tileconv.model.vgg import VGG
from tileconv.model.zoo import build, lively

Budget = Callable[[Tensor, Tensor, Tensor], None]
WIDTHS = ((4,), (8,), (8,), (8,), (8,))


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
    return lively(without_padding(model))


def small_vgg(padding: int) -> VGG:
    """Five blocks of a convolution and a pool: 224 pixels leave 7x7 maps, or 5x5 where nothing is padded."""
    return lively(VGG(10, widths=WIDTHS, hidden=16, maps=7 if padding else 5, padding=padding))


EXACT: dict[str, tuple[Callable[[], nn.Module], int | None, int, int]] = {
    # constructor, size, extent of a picture, scores along a side
    "vgg of five pools, 224 and 384": (lambda: small_vgg(padding=0), None, 384, 6),
    "alexnet, 227 and 387": (unpadded_alexnet, None, 387, 6),
    "lenet, 32 and 64": (lambda: lively(build("lenet", channels=3)), None, 64, 9),
    # 83 pixels leave 5x5 maps, averaged to 2x2 over 3x3 windows two apart: the first layer of the head is dilated.
    "alexnet-mini, 83 and 99": (lambda: without_padding(lively(build("alexnet-mini", channels=3))), 83, 99, 3),
}


@pytest.mark.parametrize(("make", "size", "extent", "scores"), EXACT.values(), ids=EXACT)
def test_scores_are_those_of_the_crops(
    make: Callable[[], Any],
    size: int | None,
    extent: int,
    scores: int,
    device: torch.device,
    assert_within_budget: Budget,
) -> None:
    """Networks without padding: equal to rounding, to the classifier on our kernels and on torch's."""
    model = make().to(device)
    network = dense(model, size)
    assert network.padded == ()
    assert extent - network.size == (scores - 1) * network.stride
    x = photographs(1, extent).to(device)
    with torch.no_grad():
        ours = network(x)
        row = by_crops(model, x[:, :, : network.size], network.size, network.stride)
        plain = plain_torch(model)
        theirs = by_crops(plain, x, network.size, network.stride)
        exact = by_crops(plain.double(), x.double(), network.size, network.stride)
    assert ours.shape == (1, 10, scores, scores)
    assert_within_budget(ours, theirs, exact)
    assert_within_budget(row, theirs[:, :, :1], exact[:, :, :1])
    assert exact.std((2, 3)).min() > 100 * (ours - exact).abs().max()  # neighbours differ, so a shift would be seen


def plain_torch(model: nn.Module) -> nn.Module:
    """The same weights in a plain stack of torch's layers."""
    if isinstance(model, VGG | AlexNet):
        parts = [*model.features, model.avgpool, nn.Flatten(), *model.classifier]
    elif isinstance(model, AlexNet2012):
        parts = list(model.children())
    else:
        pool, relu = nn.MaxPool2d(2), nn.ReLU()
        parts = [model.conv1, relu, pool, model.conv2, relu, pool, nn.Flatten()]
        parts += [model.fc1, relu, model.fc2, relu, model.fc3]
    return copy.deepcopy(nn.Sequential(*parts)).eval()


def test_oblong_pictures_and_batches(device: torch.device) -> None:
    model = lively(build("lenet")).to(device)
    x = torch.randn(3, 1, 40, 52, device=device)
    with torch.no_grad():
        torch.testing.assert_close(dense(model)(x), by_crops(model, x, 32, 4, batch=7), rtol=1e-4, atol=1e-5)


# With padding


@pytest.mark.parametrize(
    ("make", "extent", "inside"),
    [(lambda: small_vgg(padding=1), 352, (1, 4)), (lambda: lively(AlexNet2012(10, width=12, hidden=32)), 387, (2, 4))],
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
        row = by_crops(model, x[:, :, : network.size], network.size, network.stride)
        assert_within_budget(scores, network.reference(x), network.reference(x, torch.float64))
    assert row.shape[3] == scores.shape[3] == scores.shape[2]
    # What is not true of padded networks: these differ by much more than rounding.
    assert (scores[:, :, :1] - row).abs().max() > 0.01 * row.abs().max()


CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], int | None, tuple[int, int]]] = {
    # constructor, size, (total stride, receptive field): the average pool before the fully connected layers
    "alexnet-2012, none": (lambda: AlexNet2012(10, width=12, hidden=32, size=224), None, (32, 355)),
    "vgg, the identity": (lambda: small_vgg(padding=1), None, (32, 286)),
    "lenet, none": (lambda: build("lenet", channels=3), 28, (4, 32)),
    "alexnet-mini, the identity": (lambda: build("alexnet-mini", channels=3), None, (8, 59)),
    "alexnet-mini, overlapping": (lambda: build("alexnet-mini", channels=3), 64, (8, 99)),
    "googlenet, all there is": (lambda: build("googlenet", num_classes=10, aux_logits=False), 64, (32, 411)),
}


@pytest.mark.parametrize(("make", "size", "sight"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_a_picture_of_one_crop_has_the_classifiers_score(
    make: Callable[[], nn.Module], size: int | None, sight: tuple[int, int], device: torch.device
) -> None:
    """Padded or not, and whatever the average pool does."""
    model = lively(make()).to(device)
    network = dense(model, size)
    assert (network.stride, network.receptive_field) == sight
    assert network.padded
    x = photographs(2, network.size).to(device)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[:, :, 0, 0], model(x), rtol=1e-4, atol=1e-5)


def test_googlenet_on_a_larger_picture(device: torch.device, assert_within_budget: Budget) -> None:
    model = lively(build("googlenet", num_classes=10, aux_logits=False)).to(device)
    network = dense(model, 64)
    x = photographs(1, 128).to(device)
    with torch.no_grad():
        ours = network(x)
        assert_within_budget(ours, network.reference(x), network.reference(x, torch.float64))
    assert ours.shape == (1, 10, 3, 3)


# The numbers that are said of it


@pytest.mark.parametrize(
    ("name", "stride", "field", "before", "work", "separate"),
    [
        # The two sums of operations are of 384x384: dense, and 36 crops of 224x224.
        ("alexnet", 32, 355, 66, 8_259_450_240, 36 * 1_428_376_960),
        ("vgg16", 32, 404, 90, 99_102_228_480, 36 * 30_940_528_640),
        ("googlenet", 32, 571, 167, 8_874_491_904, 36 * 2_996_752_384),
    ],
)
def test_what_dense_evaluation_saves(name: str, stride: int, field: int, before: int, work: int, separate: int) -> None:
    """At full width, without values: 6x6 scores of 384x384 by 224x224."""
    with torch.device("meta"):
        model = build(name).eval()
    network = dense(model)
    assert (network.size, network.stride, network.receptive_field, network.before) == (224, stride, field, before)
    assert network.reference(torch.empty(1, 3, 384, 384, device="meta")).shape == (1, 1000, 6, 6)
    assert flops(network, 384, 384) == (work, separate)


def test_flops_by_hand() -> None:
    """LeNet on 36x36: 2x2 scores."""
    network = dense(build("lenet"))
    conv1, conv2, fc2, fc3 = 2 * 32 * 32 * 6 * 25, 2 * 12 * 12 * 16 * 6 * 25, 2 * 4 * 84 * 120, 2 * 4 * 10 * 84
    whole = conv1 + conv2 + 2 * 4 * 120 * 400 + fc2 + fc3
    one = 2 * (28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 120 * 400 + 84 * 120 + 10 * 84)
    assert flops(network, 36, 36) == (whole, 4 * one)


def test_alexnets_average_pool_disappears_at_224(device: torch.device) -> None:
    """In a larger picture the classifier would average 11x11 maps to 6x6; dense evaluation takes them as they are."""
    with torch.device("meta"):
        network = dense(build("alexnet"))
        assert [m for m in network.layers if isinstance(m, nn.AdaptiveAvgPool2d | nn.AvgPool2d)] == []
        assert [tuple(m.weight.shape) for m in network.layers[-5:] if isinstance(m, nn.Conv2d)] == [
            (4096, 256, 6, 6), (4096, 4096, 1, 1), (1000, 4096, 1, 1),
        ]  # fmt: skip


@pytest.mark.slow
def test_alexnet_on_a_photograph(device: torch.device, assert_within_budget: Budget) -> None:
    """torchvision's AlexNet at full width, 384x384 and 224x224."""
    model = alexnet.alexnet().eval().to(device)
    network = dense(model)
    x = photographs(1, 384).to(device)
    with torch.no_grad():
        ours = network(x)
        assert_within_budget(ours, network.reference(x), network.reference(x, torch.float64))
        torch.testing.assert_close(
            network(x[:, :, :224, :224])[..., 0, 0], model(x[:, :, :224, :224]), rtol=1e-4, atol=1e-4
        )
    assert ours.shape == (1, 1000, 6, 6)


def test_crops_are_pieces() -> None:
    x = torch.randn(2, 3, 20, 16)
    cut = crops(x, 8, 4)
    assert cut.shape == (2, 4, 3, 3, 8, 8)
    assert torch.equal(cut[1, 2, 1], x[1, :, 8:16, 4:12])


def test_copies_and_pickles(device: torch.device) -> None:
    model = lively(build("lenet")).to(device)
    network = dense(model)
    x = torch.randn(1, 1, 36, 36, device=device)
    with torch.no_grad():
        y = network(x)
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(twin(x), y)
        assert copy.deepcopy(network).half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: dense(nn.Linear(2, 2)), TypeError, "model is a Linear: allowed are the classifiers of"),
        (lambda: dense(build("lenet"), 30), ValueError, "size is 30: allowed are 28, 32"),
        (lambda: dense(build("lenet"), 0), ValueError, "size is 0: allowed are positive ints and None"),
        (lambda: dense(AlexNet2012(width=12, hidden=4), 224), ValueError, "size is 224: the model takes 227"),
        (lambda: dense(small_vgg(padding=1), 320), ValueError, "maps of 10x10, which .* 7x7 divides unevenly"),
        (
            lambda: dense(build("lenet"))(torch.zeros(1, 1, 40, 31)),
            ValueError,
            r"x has shape \(1, 1, 40, 31\): allowed are \[N, C, H, W\], H and W at least 32",
        ),
    ],
    ids=["stranger", "lenet-size", "no-size", "alexnet-size", "uneven", "small-picture"],
)  # fmt: skip
def test_refusals(call: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
