"""AlexNet: torchvision's parameters, torch's numbers; and the photographs it is run on."""

import copy
import sys
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from tileconv.model import data
from tileconv.model.alexnet import AlexNet, alexnet, layers, reference_forward
from tileconv.model.data import PHOTOGRAPHS, photographs

# torchvision.models.alexnet().state_dict(), written out
TORCHVISION = {
    "features.0.weight": (64, 3, 11, 11),
    "features.0.bias": (64,),
    "features.3.weight": (192, 64, 5, 5),
    "features.3.bias": (192,),
    "features.6.weight": (384, 192, 3, 3),
    "features.6.bias": (384,),
    "features.8.weight": (256, 384, 3, 3),
    "features.8.bias": (256,),
    "features.10.weight": (256, 256, 3, 3),
    "features.10.bias": (256,),
    "classifier.1.weight": (4096, 9216),
    "classifier.1.bias": (4096,),
    "classifier.4.weight": (4096, 4096),
    "classifier.4.bias": (4096,),
    "classifier.6.weight": (1000, 4096),
    "classifier.6.bias": (1000,),
}
NAMES = ["conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "avgpool", "fc6", "fc7", "fc8"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def model(device: torch.device) -> AlexNet:
    return alexnet().eval().to(device)


@pytest.fixture(scope="module")
def pictures(device: torch.device) -> Tensor:
    return photographs(2).to(device)


def plain_torch(model: AlexNet, dtype: torch.dtype) -> nn.Module:
    """The same weights in a plain stack of torch's layers, which torch itself runs."""
    return (
        copy.deepcopy(nn.Sequential(*model.features, model.avgpool, nn.Flatten(), *model.classifier)).to(dtype).eval()
    )


@lru_cache(maxsize=len(DTYPES))
def rounded(model: AlexNet, dtype: torch.dtype) -> AlexNet:
    """The network with its parameters in `dtype`; `model` itself stays as it is."""
    return copy.deepcopy(model).to(dtype)


def test_keys_and_shapes_are_torchvisions(model: AlexNet) -> None:
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == TORCHVISION
    assert list(state) == list(TORCHVISION)
    assert sum(p.numel() for p in model.parameters()) == 61_100_840


def test_arguments() -> None:
    model = AlexNet(num_classes=10, dropout=0.25)
    assert model.classifier[6].out_features == 10
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]


def test_seed_decides_the_weights_and_leaves_the_random_state_alone(model: AlexNet) -> None:
    before = torch.get_rng_state()
    again, other = alexnet(seed=0), alexnet(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in model.state_dict().items():
        assert torch.equal(value.cpu(), again.state_dict()[key])
        assert not torch.equal(value.cpu(), other.state_dict()[key])


def test_weights_are_and_stay_channels_last() -> None:
    model = AlexNet()
    contiguous = {key: value.contiguous() for key, value in alexnet(seed=3).state_dict().items()}
    model.load_state_dict(contiguous)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.is_contiguous(memory_format=torch.channels_last)
    for key, value in model.state_dict().items():
        assert torch.equal(value, contiguous[key])


def test_layers_are_named_in_order(model: AlexNet) -> None:
    assert [layer.name for layer in layers(model)] == NAMES


def test_reference_is_torch_in_float64(model: AlexNet, pictures: Tensor) -> None:
    with torch.no_grad():
        expected = plain_torch(model, torch.float64)(pictures.double())
        composed = reference_forward(model, pictures, torch.float64)
    assert composed.dtype == torch.float64
    torch.testing.assert_close(composed, expected, rtol=1e-12, atol=1e-12)


def test_the_answer_depends_on_the_picture(model: AlexNet, pictures: Tensor) -> None:
    """Else the comparison of whole networks would compare little more than biases."""
    with torch.no_grad():
        first, second = reference_forward(model, pictures)
    assert (first - second).abs().mean() > 0.1 * first.abs().mean()


@pytest.fixture(scope="module")
def inputs(model: AlexNet, pictures: Tensor) -> dict[str, Tensor]:
    """What each layer is given, in float64."""
    given, x = {}, pictures.double()
    with torch.no_grad():
        for layer in layers(model):
            given[layer.name] = x
            x = layer.reference(x)
    return given


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_layer_against_torch(
    model: AlexNet,
    inputs: dict[str, Tensor],
    name: str,
    dtype: torch.dtype,
    assert_within_budget: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    (layer,) = (layer for layer in layers(rounded(model, dtype)) if layer.name == name)
    x = inputs[name].to(dtype)
    with torch.no_grad():
        assert_within_budget(layer.ours(x), layer.reference(x), layer.reference(x.double()))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_whole_network_against_torch(
    model: AlexNet,
    pictures: Tensor,
    dtype: torch.dtype,
    assert_within_budget: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    net = rounded(model, dtype)
    x = pictures.to(dtype)
    with torch.no_grad():
        ours = net(x)
        theirs = plain_torch(net, dtype)(x)
        exact = plain_torch(net, torch.float64)(x.double())
    assert ours.dtype == dtype
    assert_within_budget(ours, theirs, exact)


def test_forward_is_the_layers(model: AlexNet, device: torch.device) -> None:
    """At the smallest picture the network takes: every pool's last window just fits."""
    x = torch.randn(1, 3, 63, 63, device=device)
    with torch.no_grad():
        y = x
        for layer in layers(model):
            y = layer.ours(y)
        assert torch.equal(model(x), y)
        torch.testing.assert_close(y, reference_forward(model, x), rtol=1e-4, atol=1e-4)


def test_gradients_are_torchs(model: AlexNet, device: torch.device) -> None:
    """Of every parameter and of the picture, through the whole network."""
    net, twin = copy.deepcopy(model), plain_torch(model, torch.float64)
    x = torch.randn(1, 3, 63, 63, device=device, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    direction = torch.randn(1, 1000, device=device)
    net(x).backward(direction)
    twin(exact_x).backward(direction.double())
    pairs = [(x, exact_x), *zip(net.parameters(), twin.parameters(), strict=True)]
    for ours, exact in pairs:
        assert ours.grad is not None
        assert exact.grad is not None
        error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 1e-5  # fp32 rounds at 6e-8; through 8 layers torch's own error is about 1e-6


def test_photographs_are_normalised_and_repeatable() -> None:
    x = photographs(3)
    assert x.shape == (3, 3, 224, 224)
    assert x.dtype == torch.float32
    assert torch.equal(x, photographs(3))
    assert x.abs().max() < 2.7  # (1 - 0.406) / 0.225 is the largest a normalised value can be
    assert (x.std(dim=(1, 2, 3)) > 0.3).all()
    assert not torch.equal(x[0], x[1])


def test_photographs_come_again_mirrored() -> None:
    count = len(PHOTOGRAPHS)
    x = photographs(2 * count + 1, size=32)
    assert torch.equal(x[count : 2 * count], x[:count].flip(3))
    assert torch.equal(x[2 * count], x[0])


@pytest.mark.parametrize("size", [1, 37, 256])
def test_photographs_of_other_sizes(size: int) -> None:
    assert photographs(2, size).shape == (2, 3, size, size)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0,), ValueError, "n must be at least 1, got 0"),
        ((-1,), ValueError, "n must be at least 1, got -1"),
        ((1, 0), ValueError, "size must be at least 1, got 0"),
        ((1.5,), TypeError, "n must be an int, got 1.5"),
        ((True,), TypeError, "n must be an int, got True"),
        ((1, "224"), TypeError, "size must be an int, got '224'"),
    ],
    ids=["none", "negative", "no-size", "fraction", "bool", "string"],
)
def test_photographs_refuse(arguments: tuple[int, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        photographs(*arguments)


def test_missing_scikit_image_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    data._prepared.cache_clear()  # a picture prepared before would need no scikit-image
    with pytest.raises(ImportError, match=r"pip install 'tileconv\[bench\]'"):
        photographs(1)


def test_uninitialised_memory_is_poisoned() -> None:
    """conftest's promise, on which the other tests rely to see unwritten outputs."""
    x = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for empty in (torch.empty(3, 4), torch.empty_strided((3, 4), (8, 2)), x.new_empty(7), torch.empty_like(x)):
        assert torch.isnan(empty).all()
