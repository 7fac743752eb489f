"""AlexNet 2012, VGG-16, GoogLeNet and the visualiser's LeNet: published shapes, torch's numbers, one training step."""

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileconv.model import alexnet2012, googlenet, lenet, steps, vgg
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.data import photographs
from tileconv.model.googlenet import INCEPTIONS, GoogLeNet, GoogLeNetOutputs, fold_batch_norm
from tileconv.model.vgg import VGG
from tileconv.model.zoo import NETWORKS, build, lively

M = TypeVar("M", bound=nn.Module)
Budget = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def on_meta(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, **arguments)


# Names and parameters


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("alexnet", {}, 61_100_840),
        ("alexnet-2012", {}, 60_965_224),
        ("alexnet-2012", {"size": 224}, 60_965_224),
        ("googlenet", {}, 13_004_888),
        ("googlenet", {"aux_logits": False}, 6_624_904),
        ("lenet", {}, 61_706),
        ("lenet-visualiser", {}, 156 + 2_416 + 48_120 + 12_100 + 1_010),
        ("vgg16", {}, 138_357_544),
        ("vgg16", {"num_classes": 10}, 134_301_514),
    ],
)
def test_published_parameters(name: str, arguments: dict[str, Any], parameters: int) -> None:
    assert sum(p.numel() for p in on_meta(name, **arguments).parameters()) == parameters


def test_seed_decides_the_weights_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = build("lenet", seed=1), build("lenet", seed=1), build("lenet", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.fc1.weight, again.fc1.weight)
    assert not torch.equal(one.fc1.weight, other.fc1.weight)


@pytest.mark.parametrize(
    ("name", "says"),
    [("vgg-16", "did you mean 'vgg16'"), ("AlexNet", "did you mean 'alexnet'"), ("resnet", "allowed are alexnet, ")],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(name)


def test_every_network_is_named() -> None:
    assert sorted(NETWORKS) == list(NETWORKS)
    assert {"alexnet", "alexnet-2012", "alexnet-mini", "googlenet", "lenet", "vgg16"} <= set(NETWORKS)


# AlexNet 2012


PUBLISHED = {
    "conv1": (96, 55, 55), "norm1": (96, 55, 55), "pool1": (96, 27, 27),
    "conv2": (256, 27, 27), "norm2": (256, 27, 27), "pool2": (256, 13, 13),
    "conv3": (384, 13, 13), "conv4": (384, 13, 13), "conv5": (256, 13, 13), "pool5": (256, 6, 6),
    "flatten": (9216,), "fc6": (4096,), "drop6": (4096,), "fc7": (4096,), "drop7": (4096,), "fc8": (1000,),
}  # fmt: skip


@pytest.mark.parametrize("size", [227, 224])
def test_alexnet_2012_has_the_published_shapes(size: int) -> None:
    model = on_meta("alexnet-2012", size=size)
    assert isinstance(model, AlexNet2012)
    x, shapes = torch.empty(1, 3, size, size, device="meta"), {}
    for step in alexnet2012.layers(model):
        x = step.reference(x)
        shapes[step.name] = tuple(x.shape[1:])
    assert shapes == PUBLISHED
    # 650,000 in the abstract. (Section 3.5 lists 253,440 for conv1, which no 96 square maps have; the sum with
    # 96 * 55 * 55 = 290,400 is this.)
    neurons = sum(math.prod(shape) for name, shape in shapes.items() if name[:2] in ("co", "fc"))
    assert neurons == 659_272
    assert model.conv1.weight.numel() + model.conv1.bias.numel() == 34_944
    assert [m.groups for m in model if isinstance(m, nn.Conv2d)] == [1, 2, 1, 2, 2]


def test_alexnet_2012_starts_as_published() -> None:
    model = AlexNet2012(width=24, hidden=64)
    ones = [name for name, m in model.named_children() if isinstance(m, nn.Conv2d | nn.Linear) and (m.bias == 1).all()]
    zeros = [name for name, m in model.named_children() if isinstance(m, nn.Conv2d | nn.Linear) and not m.bias.any()]
    assert ones == ["conv2", "conv4", "conv5", "fc6", "fc7"]
    assert zeros == ["conv1", "conv3", "fc8"]
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert weight.std().item() == pytest.approx(0.01, rel=0.03), name
            assert weight.mean().abs().item() < 4 * 0.01 / math.sqrt(weight.numel()), name


def test_alexnet_2012_norm_is_the_codes_or_the_papers() -> None:
    def formula(x: Tensor, alpha: float) -> Tensor:
        """Section 3.3, with the paper's letters: n 5, k 2, beta 0.75."""
        sums = [(x[:, max(0, i - 2) : i + 3] ** 2).sum(1) for i in range(x.shape[1])]
        return x / (2 + alpha * torch.stack(sums, 1)) ** 0.75

    x = 10 * torch.randn(1, 12, 2, 2, dtype=torch.float64)
    for divide, alpha in ((True, 1e-4 / 5), (False, 1e-4)):
        model = AlexNet2012(width=12, hidden=4, divide_alpha=divide)
        (step,) = (step for step in alexnet2012.layers(model) if step.name == "norm1")
        torch.testing.assert_close(step.reference(x), formula(x, alpha), rtol=1e-12, atol=0)


def test_relus_join_their_neighbours(device: torch.device) -> None:
    """conv5's joins the pool behind it, the others the layer before."""
    model = lively(AlexNet2012(width=12, hidden=32)).to(device)
    x, negative = photographs(1, 227).to(device), []
    with torch.no_grad():
        for step in alexnet2012.layers(model):
            x = step.ours(x)
            negative += [step.name] if x.min() < 0 else []
    assert negative == ["conv5", "fc8"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"size": 225}, "size is 225: allowed are 227, 224"), ({"width": 50}, "width is 50: allowed are multiples of 12")],
)
def test_alexnet_2012_refuses(arguments: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AlexNet2012(**arguments)
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 224, 224\): allowed is \[N, 3, 227, 227\]"):
        AlexNet2012(width=12, hidden=4)(torch.zeros(1, 3, 224, 224))


# torchvision's keys


def test_vgg16_has_torchvisions_keys() -> None:
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    expected: dict[str, tuple[int, ...]] = {}
    for place, c, k in zip(convolutions, widths, widths[1:], strict=False):
        expected |= {f"features.{place}.weight": (k, c, 3, 3), f"features.{place}.bias": (k,)}
    for place, c, k in ((0, 25088, 4096), (3, 4096, 4096), (6, 4096, 1000)):
        expected |= {f"classifier.{place}.weight": (k, c), f"classifier.{place}.bias": (k,)}
    state = on_meta("vgg16").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert list(state) == list(expected)


def test_googlenet_has_torchvisions_keys() -> None:
    expected: dict[str, tuple[int, ...]] = {}

    def block(name: str, c: int, k: int, r: int) -> None:
        expected[f"{name}.conv.weight"] = (k, c, r, r)
        expected.update({f"{name}.bn.{part}": (k,) for part in ("weight", "bias", "running_mean", "running_var")})
        expected[f"{name}.bn.num_batches_tracked"] = ()

    block("conv1", 3, 64, 7)
    block("conv2", 64, 64, 1)
    block("conv3", 64, 192, 3)
    for name, (c, b1, b2_reduced, b2, b3_reduced, b3, b4) in INCEPTIONS.items():
        block(f"inception{name}.branch1", c, b1, 1)
        block(f"inception{name}.branch2.0", c, b2_reduced, 1)
        block(f"inception{name}.branch2.1", b2_reduced, b2, 3)
        block(f"inception{name}.branch3.0", c, b3_reduced, 1)
        block(f"inception{name}.branch3.1", b3_reduced, b3, 3)
        block(f"inception{name}.branch4.1", c, b4, 1)
    for name, c in (("aux1", 512), ("aux2", 528)):
        block(f"{name}.conv", c, 128, 1)
        expected |= {f"{name}.fc1.weight": (1024, 2048), f"{name}.fc1.bias": (1024,)}
        expected |= {f"{name}.fc2.weight": (1000, 1024), f"{name}.fc2.bias": (1000,)}
    expected |= {"fc.weight": (1000, 1024), "fc.bias": (1000,)}
    state = on_meta("googlenet").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert list(state) == list(expected)


def test_googlenet_has_the_published_shapes() -> None:
    model = on_meta("googlenet", aux_logits=False)
    assert isinstance(model, GoogLeNet)
    maps = googlenet.reference_features(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [(512, 14, 14), (528, 14, 14), (1024, 7, 7)]


# Forward


def plain_torch(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same weights in a plain stack of torch's layers, which torch itself runs."""
    if isinstance(model, VGG):
        parts = [*model.features, model.avgpool, nn.Flatten(), *model.classifier]
    else:
        assert isinstance(model, AlexNet2012)
        parts = list(model)
    return copy.deepcopy(nn.Sequential(*parts)).to(dtype)


def check_forward(model: nn.Module, x: Tensor, budget: Budget) -> None:
    with torch.no_grad():
        exact = plain_torch(model, torch.float64)(x.double())
        budget(model(x), plain_torch(model, x.dtype)(x), exact)
    assert exact.std() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_narrow_alexnet_2012_against_torch(
    dtype: torch.dtype, device: torch.device, assert_within_budget: Budget
) -> None:
    model = lively(AlexNet2012(10, width=24, hidden=64)).to(device, dtype)
    x = photographs(2, 227).to(device, dtype)
    with torch.no_grad():
        exact = plain_torch(model, torch.float64)(x.double())
        # Not plain_torch: on a CPU torch's LRN knows no half precision, and the reference widens for it.
        assert_within_budget(model(x), alexnet2012.reference_forward(model, x), exact)
    assert exact.std() > 1e-2


def test_alexnet_2012_against_torch(device: torch.device, assert_within_budget: Budget) -> None:
    model = lively(AlexNet2012(size=224)).to(device)
    x = photographs(1).to(device)
    check_forward(model, x, assert_within_budget)
    with torch.no_grad():
        exact = alexnet2012.reference_forward(model, x, torch.float64)
        torch.testing.assert_close(exact, plain_torch(model, torch.float64)(x.double()), rtol=1e-12, atol=1e-12)


def test_vgg16_against_torch(device: torch.device, assert_within_budget: Budget) -> None:
    """All 16 layers at full width; 64x64 pictures, which the average pool spreads from 2x2 to 7x7 maps."""
    model = lively(vgg.vgg16()).to(device)
    x = photographs(1, 64).to(device)
    check_forward(model, x, assert_within_budget)
    assert [step.name for step in vgg.layers(model) if step.op == "conv2d"] == [
        "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3",
        "conv4_1", "conv4_2", "conv4_3", "conv5_1", "conv5_2", "conv5_3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def inception(device: torch.device) -> GoogLeNet:
    torch.manual_seed(0)
    return lively(GoogLeNet(10, dropout=0, dropout_aux=0)).to(device)


def test_googlenet_against_torch(inception: GoogLeNet, device: torch.device, assert_within_budget: Budget) -> None:
    """96x96: maps of 48, 24, 12, 6 and 3 pixels; the last windows of the 3x3 pools hang over the edge."""
    x = photographs(1, 96).to(device)
    with torch.no_grad():
        ours, theirs = inception(x), googlenet.reference_forward(inception, x)
        exact = googlenet.reference_forward(inception, x, torch.float64)
        folded = fold_batch_norm(inception)(x)
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    assert isinstance(exact, Tensor)
    assert exact.std() > 1e-2
    assert_within_budget(ours, theirs, exact)
    # Folding rounds each weight once more.
    torch.testing.assert_close(folded.double(), exact, rtol=1e-4, atol=1e-5)


def test_folding_needs_evaluation() -> None:
    with torch.device("meta"):
        model = GoogLeNet(aux_logits=False)
    with pytest.raises(ValueError, match=r"model is training: .* after model\.eval\(\)"):
        fold_batch_norm(model)


def test_googlenet_transforms_its_input() -> None:
    with torch.device("meta"):
        model = GoogLeNet(aux_logits=False, transform_input=True)
    pixels = torch.rand(1, 3, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model.normalised(normalised), 2 * pixels - 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lenet", "lenet-visualiser"])
def test_lenet_against_torch(name: str, device: torch.device, assert_within_budget: Budget) -> None:
    model = lively(build(name)).to(device)
    assert isinstance(model, lenet.LeNet)
    x = torch.randn(2, 1, 32, 32, device=device)
    with torch.no_grad():
        exact = lenet.reference_forward(copy.deepcopy(model).double(), x.double())
        assert_within_budget(model(x), lenet.reference_forward(model, x), exact)


# One training step


def check_step(model: nn.Module, plain: Callable[[nn.Module, Tensor], Any], x: Tensor, budget: Budget) -> None:
    """Loss, every gradient and the weights after a step of SGD: ours, torch's, and torch's in float64."""
    labels = torch.arange(len(x), device=x.device)
    results = []
    for net, forward, dtype in (
        (model, lambda net, x: net(x), x.dtype),
        (copy.deepcopy(model), plain, x.dtype),
        (copy.deepcopy(model).double(), plain, torch.float64),
    ):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        outputs = forward(net, x.to(dtype))
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(share * F.cross_entropy(y, labels) for share, y in zip((1, 0.3, 0.3), heads, strict=False))
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        results.append(([p.grad for p in net.parameters()], list(net.parameters()), loss.detach()))
    (ours, weights, loss), (theirs, torch_weights, torchs), (exact, exact_weights, exact_loss) = results
    if x.dtype == torch.float64:
        torch.testing.assert_close(loss.detach(), exact_loss, rtol=1e-12, atol=0)
    else:
        budget(loss, torchs, exact_loss)
    for (name, _), a, b, c in zip(model.named_parameters(), ours, theirs, exact, strict=True):
        assert a is not None, name
        assert b is not None
        assert c is not None
        if x.dtype == torch.float64:
            torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-9 * c.abs().max().item())
            continue
        # A ReLU or a maximum on the edge decides by a rounding, so single elements differ; hence the norm.
        error, torch_error = (a.double() - c).norm().item(), (b.double() - c).norm().item()
        assert error <= 2 * torch_error + 1e-5 * c.norm().item(), name
    for a, b, c in zip(weights, torch_weights, exact_weights, strict=True):
        error, torch_error = ((w.detach().double() - c.detach()).norm().item() for w in (a, b))
        assert error <= 2 * torch_error + 1e-6 * c.norm().item()


@pytest.mark.parametrize("name", ["lenet", "lenet-visualiser"])
def test_training_step_of_lenet(name: str, device: torch.device, assert_within_budget: Budget) -> None:
    model = lively(build(name)).to(device).train()
    assert isinstance(model, lenet.LeNet)

    def plain(net: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(net, lenet.LeNet)
        return lenet.reference_forward(net, x)

    check_step(model, plain, torch.randn(3, 1, 28, 28, device=device), assert_within_budget)


def test_training_step_of_alexnet_2012(device: torch.device, assert_within_budget: Budget) -> None:
    model = lively(AlexNet2012(10, dropout=0, width=24, hidden=64)).to(device).train()
    x = photographs(2, 227).to(device)
    check_step(model, lambda net, x: plain_torch_of(net)(x), x, assert_within_budget)


def test_training_step_of_vgg(device: torch.device, assert_within_budget: Budget) -> None:
    """VGG-16's thirteen convolutions, an eighth as wide, on 64x64 pictures."""
    widths = [[width // 8 for width in block] for block in vgg.WIDTHS]
    model = lively(VGG(10, dropout=0, widths=widths, hidden=64, maps=2)).to(device).train()
    check_step(model, lambda net, x: plain_torch_of(net)(x), photographs(2, 64).to(device), assert_within_budget)


def test_training_step_of_googlenet(inception: GoogLeNet, device: torch.device, assert_within_budget: Budget) -> None:
    """With both auxiliary heads; batch normalisation by the batch.

    In float64: in fp32 the ReLUs of 59 layers, most with inputs around zero, decide differently by a rounding here and
    there, and that alone changes torch's own gradients by up to a hundredth.
    """

    def plain(net: nn.Module, x: Tensor) -> Any:
        assert isinstance(net, GoogLeNet)
        outputs = googlenet.reference_forward(net, x)
        assert isinstance(outputs, GoogLeNetOutputs)
        return outputs

    model = copy.deepcopy(inception).double().train()
    check_step(model, plain, photographs(4, 64).double().to(device), assert_within_budget)


def plain_torch_of(net: nn.Module) -> nn.Module:
    """As plain_torch, but with the network's own parameters, so that gradients arrive there."""
    if isinstance(net, VGG):
        return nn.Sequential(*net.features, net.avgpool, nn.Flatten(), *net.classifier)
    return nn.Sequential(*net.children())


# Steps


def test_steps_refuse_what_they_do_not_know() -> None:
    with pytest.raises(TypeError, match="chain has a Sigmoid"):
        steps.steps([("s", nn.Sigmoid())])
    with pytest.raises(ValueError, match="the ReLU 'r' behind none of"):
        steps.steps([("p", nn.MaxPool2d(2)), ("r", nn.ReLU())])
