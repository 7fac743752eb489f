"""convert, revert, explain and use_kernels on models of every shape, those of transformers included."""

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import tileconv.kernels.nn
from tileconv.kernels import convert, explain, modules, reference, revert, use_kernels
from tileconv.kernels.conversion import OPS, SWAPS, Table


class LeNet(nn.Module):
    """LeNet-5's layers for 28x28 images, with ReLUs as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x))).flatten(1)
        y: Tensor = self.fc3(self.fc2(self.fc1(x).relu()).relu_())
        return y


class Block(nn.Module):
    """ResNet's basic block with a projection; one ReLU module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        z: Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return z


class Tied(nn.Module):
    """One convolution and one Sequential under two names each, and a weight shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.body(self.again(self.body(self.first(x)))))
        return y


def vgg() -> nn.Sequential:
    """VGG's pattern at small widths, nested as torchvision nests it."""
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
    )  # fmt: skip
    classifier = nn.Sequential(nn.Linear(24, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 5))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), classifier)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "root-layer": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
    "vgg": (vgg, (2, 3, 9, 11)),
    "lenet": (LeNet, (1, 1, 28, 28)),
    "block": (Block, (2, 4, 6, 7)),
    "tied": (Tied, (1, 3, 5, 4)),
}


def kinds(model: nn.Module) -> list[str]:
    """Class names of the layers, ours with a star."""
    return [
        type(m).__name__ + "*" * type(m).__module__.startswith("tileconv") for m in model.modules() if not m._modules
    ]


def training_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients; without dropout, whose random numbers differ, but with BatchNorm's batch statistics."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)).sum().backward()
    return [t.detach().clone() for t in (y, x.grad, *(p.grad for p in model.parameters())) if t is not None]


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_revert(name: str, device: torch.device) -> None:
    make, shape = MODELS[name]
    original = make().to(device).eval()
    model = copy.deepcopy(original)
    x = torch.randn(shape, device=device)
    members, parameters = list(model.named_modules(remove_duplicate=False)), dict(model.named_parameters())
    expected, rerun = original(x), training_step(copy.deepcopy(original), x)
    exact = training_step(copy.deepcopy(original).double(), x.double())

    assert convert(model) is model
    assert list(model.named_modules(remove_duplicate=False)) == members
    for key, parameter in model.named_parameters():
        assert parameter is parameters[key]
    assert list(model.state_dict()) == list(original.state_dict())
    assert any(kind.endswith("*") for kind in kinds(model))
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs, true in zip(training_step(copy.deepcopy(model), x), rerun, exact, strict=True):
        # Errors of a whole network: layer by layer the budget is 2, and the roundings before a layer add to its own.
        budget = 4 * ((theirs.double() - true).abs().max() + torch.finfo(torch.float32).eps * true.abs().max())
        assert (ours.double() - true).abs().max() <= budget

    restored = pickle.loads(pickle.dumps(model))
    assert kinds(restored) == kinds(model)
    for result in (revert(model), revert(restored)):
        assert repr(result) == repr(original)
        assert [type(m) for m in result.modules()] == [type(m) for m in original.modules()]
        assert [sorted(m.__dict__) for m in result.modules()] == [sorted(m.__dict__) for m in original.modules()]
        assert [p.stride() for p in result.parameters()] == [p.stride() for p in original.parameters()]
        assert torch.equal(result(x), expected)


# -- fusing ------------------------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Two convolutions, two ReLUs and a forward function of (self, x, ...)."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.r, self.s = nn.ReLU(), nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU()))
        self.features: dict[str, Tensor] = {}
        self.function = forward

    def forward(self, x: Tensor, taps: Any = None) -> Any:
        return self.function(self, x, taps)


def while_training(m: Any, x: Tensor, taps: Any) -> Any:
    y = m.a(x)
    return (m.r(y), y) if m.training else m.r(y)


def when_asked(m: Any, x: Tensor, taps: Any) -> Any:
    y = m.a(x)
    return m.r(y) if taps is None else m.r(y) + y


def data_dependent(m: Any, x: Tensor, taps: Any) -> Any:
    return m.body(m.r(m.a(x))) if x.sum() > 0 else m.a(x)


def leaves_traces(m: Any, x: Tensor, taps: Any) -> Any:
    m.last = x
    return m.r(m.a(x))


def keeps_features(m: Any, x: Tensor, taps: Any) -> Any:
    y = m.a(x)
    m.features["a"] = y
    return m.r(y)


# forward, the layers that fuse, and a word of why `a` does not
FORWARDS: dict[str, tuple[Callable[..., Any], set[str], str]] = {
    "plain": (lambda m, x, taps: m.s(m.b(m.r(m.a(x)))), {"a", "b"}, ""),
    "across-containers": (lambda m, x, taps: m.body(m.a(x)), {"body.0"}, ""),
    "keeps-the-object-clean": (leaves_traces, {"a"}, ""),
    "read-twice": (lambda m, x, taps: (lambda y: m.r(y) + y)(m.a(x)), set(), "read by more than its ReLU"),
    "returned-as-well": (lambda m, x, taps: (lambda y: [m.r(y), y])(m.a(x)), set(), "read by more than its ReLU"),
    "kept-in-an-attribute": (keeps_features, set(), "read by more than its ReLU"),
    "relu-called-twice": (lambda m, x, taps: m.r(m.b(m.r(m.a(x)))), set(), "its ReLU is called in 2 places"),
    "conv-called-twice": (lambda m, x, taps: m.r(m.a(m.a(x))), set(), "not go to the same ReLU in every call"),
    "pair-called-twice": (lambda m, x, taps: m.r(m.a(m.r(m.a(x)))), set(), "called in 2 places"),
    "function": (lambda m, x, taps: F.relu(m.a(x)), set(), "its ReLU is a function call"),
    "method": (lambda m, x, taps: m.a(x).relu_(), set(), "its ReLU is a function call"),
    "read-while-training": (while_training, set(), "read by more than its ReLU"),
    "read-when-asked": (when_asked, set(), "read by more than its ReLU"),
    "data-dependent": (data_dependent, set(), "Forward does not trace"),
    "nothing-follows": (lambda m, x, taps: m.r(x + m.a(x)), set(), ""),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_what_fuses(case: str, device: torch.device) -> None:
    forward, fused, why = FORWARDS[case]
    model = Forward(forward).to(device).eval()
    x = torch.rand(1, 2, 3, 3, device=device)
    before = sorted(model.__dict__)
    twin = copy.deepcopy(model)
    convert(model, ["conv2d", "fuse"])
    assert sorted(model.__dict__) == before
    assert all(type(m) in (modules.Conv2d, modules.ConvReLU2d) for m in model.modules() if isinstance(m, nn.Conv2d))
    found = {name for name, m in model.named_modules() if isinstance(m, modules.ConvReLU2d)}
    if case != "across-containers":  # an unused pair inside a Sequential may fuse: it is not called
        found.discard("body.0")
    assert found == fused
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), twin.train(training)(x))
    row = {row.name: row for row in explain(model)}["a"]
    assert row.where == "tileconv"
    assert why in row.reason
    assert bool(why) == bool(row.reason) or "a" in fused


def test_fuses_inside_what_does_not_trace() -> None:
    inside = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(inplace=True))
    opaque = Forward(data_dependent)
    convert(nn.Sequential(opaque, inside))
    assert kinds(inside) == ["ConvReLU2d*", "FusedReLU*", "LinearReLU*", "FusedReLU*"]
    assert isinstance(opaque.body[0], modules.ConvReLU2d)
    assert type(opaque.a) is modules.Conv2d


def test_hooks_stay_and_prevent_fusing(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()).to(device)
    seen: list[str] = []
    model[0].register_forward_hook(lambda m, x, y: seen.append(f"forward {bool((y < 0).any())}"))
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model[2].register_forward_pre_hook(lambda m, x: seen.append("pre"))
    model[2].register_state_dict_post_hook(lambda m, state, prefix, local: seen.append("state"))
    convert(model)
    assert kinds(model) == ["Conv2d*", "ReLU*", "Conv2d*", "ReLU*"]
    assert "hooks" in explain(model)[0].reason
    model(torch.randn(1, 2, 4, 4, device=device).requires_grad_()).sum().backward()
    model.state_dict()
    assert seen == ["forward True", "pre", "backward", "state"]
    assert "hooks" in explain(convert(nn.Sequential(*model)))[2].reason


def test_fuse_alone_and_later(device: torch.device) -> None:
    model = vgg().to(device)
    assert set(kinds(convert(copy.deepcopy(model), {"fuse"}))) >= {"ConvReLU2d*", "LinearReLU*", "MaxPool2d", "Linear"}
    convert(model, [op for op in OPS if not op.startswith("fuse")])
    assert "ConvReLU2d*" not in kinds(model)
    once = kinds(convert(model))
    assert once.count("ConvReLUMaxPool2d*") == once.count("FusedMaxPool2d*") == 2
    assert once.count("ConvReLU2d*") == once.count("FusedReLU*") - 3 == 1
    assert kinds(convert(model)) == once
    assert not any(kind.endswith("*") for kind in kinds(revert(model)))


def test_revert_leaves_what_was_ours() -> None:
    model = nn.Sequential(modules.Conv2d(2, 3, 1, precision="ieee"), nn.ReLU(), modules.ConvReLU2d(3, 3, 1))
    convert(model)
    assert kinds(model) == ["ConvReLU2d*", "FusedReLU*", "ConvReLU2d*"]
    assert kinds(revert(model)) == ["Conv2d*", "ReLU", "ConvReLU2d*"]
    assert model[0].precision == "ieee"


# A layer of each kind that convert() swaps, and what it is called with.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), lambda: (torch.randn(2, 4, 5, 6),)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2), lambda: (torch.randn(2, 4, 9),)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), lambda: (torch.randn(2, 4, 3, 4),)
    ),
    "linear": (lambda: nn.Linear(5, 3), lambda: (torch.randn(2, 2, 5),)),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), lambda: (torch.randn(2, 3, 6, 5),)),
    "max_unpool2d": (
        lambda: nn.MaxUnpool2d(2), lambda: F.max_pool2d(torch.randn(1, 3, 6, 4), 2, return_indices=True)
    ),
    "adaptive_max_pool2d": (lambda: nn.AdaptiveMaxPool2d((2, None)), lambda: (torch.randn(2, 3, 5, 4),)),
    "avg_pool2d": (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), lambda: (torch.randn(2, 3, 6, 5),)
    ),
    "lp_pool2d": (lambda: nn.LPPool2d(2, 3, 2), lambda: (torch.randn(2, 3, 7, 5),)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d(2), lambda: (torch.randn(2, 3, 5, 3),)),
    "local_response_norm": (lambda: nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0), lambda: (torch.randn(2, 7, 3, 2),)),
    "relu": (lambda: nn.ReLU(), lambda: (torch.randn(3, 5),)),
    "dropout": (lambda: nn.Dropout(0.5).eval(), lambda: (torch.randn(3, 5),)),
    "softmax": (lambda: nn.Softmax(1), lambda: (torch.randn(3, 5),)),
    "log_softmax": (lambda: nn.LogSoftmax(dim=-1), lambda: (torch.randn(3, 5),)),
    "cross_entropy": (
        lambda: nn.CrossEntropyLoss(torch.rand(5), ignore_index=2, label_smoothing=0.1),
        lambda: (torch.randn(4, 5), torch.tensor([0, 2, 4, 1])),
    ),
    "unfold": (lambda: nn.Unfold(3, padding=1, stride=2), lambda: (torch.randn(2, 3, 5, 4),)),
    "fold": (lambda: nn.Fold((4, 5), 2, stride=1), lambda: (torch.randn(2, 8, 12),)),
}  # fmt: skip


@pytest.mark.parametrize("op", LAYERS)
def test_every_layer_is_swapped_and_computes_the_same(op: str, device: torch.device) -> None:
    make, inputs = LAYERS[op]
    layer = make().to(device)
    twin, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    arguments = [a.to(device) for a in inputs()]
    assert type(convert(layer, [op])) is SWAPS[type(twin)][1]
    assert SWAPS[type(twin)][0] == op
    results = []
    for module, wide in ((layer, False), (twin, False), (exact, True)):
        x, *rest = [a.double() if wide and a.is_floating_point() else a for a in arguments]
        x = x.clone().requires_grad_()
        y = module(x, *rest)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=device).reshape(y.shape))
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs, true in zip(*results, strict=True):
        assert reference.error(ours.cpu(), true.cpu()) <= reference.allowed_error(true.cpu(), theirs.cpu())
    assert explain(layer)[0].where == "tileconv"
    assert repr(revert(layer)) == repr(twin)
    assert torch.equal(layer(*arguments), twin(*arguments))


def test_every_layer_of_tileconv_nn_can_be_the_result_of_convert() -> None:
    """But for those that torch.nn lacks."""
    assert list(LAYERS) == [op for op, _ in SWAPS.values()]
    ours = {getattr(tileconv.kernels.nn, name) for name in tileconv.kernels.nn.__all__}
    missing = {m.__name__ for m in ours - {m for _, m in SWAPS.values()} if hasattr(nn, m.__name__)}
    assert not missing


# -- what is swapped ---------------------------------------------------------------------------------------------------


class Mine(nn.Conv2d):
    pass


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "padding-mode": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), "its weight is torch.complex64"),
    "empty": (lambda: nn.Linear(0, 2, bias=False), r"shape (2, 0)"),
    "batch-norm": (lambda: nn.BatchNorm2d(2), "tileconv has no kernel for BatchNorm2d"),
    "conv3d": (lambda: nn.Conv3d(2, 2, 1), "tileconv has no kernel for Conv3d"),
    "padding-mode-1d": (lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode is 'circular'"),
    "complex-transpose": (lambda: nn.ConvTranspose2d(2, 2, 1, dtype=torch.complex64), "its weight is torch.complex64"),
    "softmax-guesses": (lambda: nn.Softmax(), "its dim is None"),
    "subclass": (lambda: Mine(2, 2, 1), "a subclass of torch.nn.Conv2d"),
    "lazy": (lambda: nn.LazyLinear(2), "a subclass of torch.nn.Linear"),
    "parametrized": (lambda: weight_norm(nn.Conv2d(2, 2, 1)), "a subclass of torch.nn.Conv2d"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_unsupported_layers_stay(case: str) -> None:
    make, reason = UNSUPPORTED[case]
    layer = make()
    kind = type(layer)
    assert type(convert(layer)) is kind
    row = explain(layer)[0]
    assert (row.where, row.type) == ("pytorch", kind.__name__)
    assert reason in row.reason


def test_replaced_forward_stays() -> None:
    layer = nn.Linear(2, 2)
    layer.__dict__["forward"] = lambda x: x
    assert type(convert(layer)) is nn.Linear
    assert "its forward was replaced" in explain(layer)[0].reason


def test_ops_and_filter() -> None:
    assert Counter(k for k in kinds(convert(vgg(), ops={"linear"})) if k.endswith("*")) == {"Linear*": 2}
    asked = []

    def keep_first(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name != "0.1"

    model = convert(vgg(), filter_fn=keep_first)
    assert ("0.1", nn.ReLU) in asked
    assert kinds(model)[:4] == ["Conv2d*", "ReLU", "ConvReLUMaxPool2d*", "FusedReLU*"]
    assert not any(kind.endswith("*") for kind in kinds(convert(vgg(), ops=())))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "model": (lambda: convert(torch.relu), TypeError, "model must be a torch.nn.Module, not builtin"),  # type: ignore[type-var]
    "revert": (lambda: revert(None), TypeError, "model must be a torch.nn.Module, not NoneType"),  # type: ignore[type-var]
    "explain": (lambda: explain(3), TypeError, "model must be a torch.nn.Module, not int"),  # type: ignore[arg-type]
    "op": (lambda: convert(vgg(), ["conv"]), ValueError, "ops has 'conv': allowed are conv2d, .*, fuse"),
    "string": (lambda: convert(vgg(), "conv2d"), TypeError, "ops must be a collection of names, not 'conv2d'"),
    "filter": (lambda: convert(vgg(), None, True), TypeError, "filter_fn must be a function"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, error, match = ERRORS[case]
    with pytest.raises(error, match=match):
        call()


def test_nothing_changes_if_filter_fails() -> None:
    def fail(name: str, module: nn.Module) -> bool:
        if name == "3.3":
            raise KeyError(name)
        return True

    model = vgg()
    with pytest.raises(KeyError):
        convert(model, filter_fn=fail)
    assert not any(kind.endswith("*") for kind in kinds(model))


def test_revert_refuses_what_was_parametrized_since() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(3, 3), nn.ReLU())
    weight_norm(convert(model)[1])
    with pytest.raises(ValueError, match=r"1 has become a ParametrizedLinearReLU since convert"):
        revert(model)
    assert type(model[0]) is modules.Conv2d


def test_optimizer_goes_on(device: torch.device) -> None:
    model = vgg().to(device).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8, device=device)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for step in range(3):
        if step == 1:
            convert(model)  # in the middle, with momentum kept in the old memory format
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def resnet(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    # `python -m pytest` puts this repository on the path, where transformers, looking for Hugging Face's package of
    # that name, would import the folder kernels/.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "kernels").is_dir()])
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetModel(config).to(device).eval()


def test_transformers_resnet(resnet: Any, device: torch.device) -> None:
    x = torch.randn(1, 3, 32, 32, device=device)
    expected, text = resnet(x), repr(resnet)
    members = list(resnet.modules())
    convert(resnet)
    assert not [m for m in resnet.modules() if type(m) in (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d)]
    converted = resnet(x)
    torch.testing.assert_close(converted.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(converted.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    rows = explain(resnet, x)
    assert {row.type for row in rows if row.where == "pytorch"} == {"BatchNorm2d", "Identity"}
    assert not any("not called" in row.reason for row in rows if row.where == "tileconv")
    assert repr(revert(resnet)) == text
    assert list(resnet.modules()) == members
    assert torch.equal(resnet(x).pooler_output, expected.pooler_output)


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain_with_an_example(device: torch.device) -> None:
    model = LeNet().to(device)
    model.spare = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    rows = explain(convert(model, ["conv2d", "linear"]), torch.randn(1, 1, 28, 28, device=device))
    assert isinstance(rows, Table)
    assert model.training
    found = {row.name: row for row in rows if row.name}
    assert found["conv1"].where == "tileconv"
    assert found["conv1"].reason == "ReLU not fused: its ReLU is a function call, which cannot be swapped"
    assert (found["pool"].where, found["pool"].reason) == ("pytorch", "convert() would swap it")
    assert found["spare.0"].reason == "tileconv has no kernel for BatchNorm2d; not called with this example"
    assert [(r.type, r.where, r.reason) for r in rows if not r.name] == [
        ("F.relu", "pytorch", "a function call, 4 times: use_kernels() can take it")
    ]
    lines = str(rows).splitlines()
    assert lines[0].split() == ["name", "type", "where", "reason"]
    assert len(lines) == len(rows) + 1
    assert lines[1].split()[:3] == ["conv1", "Conv2d", "tileconv"]


def test_explain_disturbs_nothing(device: torch.device) -> None:
    model = convert(Block()).to(device)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    explain(model, torch.randn(1, 4, 5, 5, device=device, generator=torch.Generator(device).manual_seed(0)))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="channels"):
        explain(model, torch.randn(1, 3, 5, 5, device=device))
    assert not torch.nn.modules.module._global_forward_hooks
    assert all(module.training for module in model.modules())


# -- use_kernels -------------------------------------------------------------------------------------------------------


def test_use_kernels_on_a_functional_model(device: torch.device) -> None:
    model = LeNet().to(device)
    x = torch.randn(1, 1, 28, 28, device=device)
    expected = training_step(copy.deepcopy(model), x)
    with use_kernels(strict=True) as mode:
        results = training_step(model, x)
    assert mode.taken == {"conv2d": 2, "linear": 3, "max_pool2d": 2, "relu": 4}
    assert not mode.left
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model(x)
    assert mode.taken.total() == 11  # outside nothing is redirected


def test_view_needs_contiguous_activations(device: torch.device) -> None:
    model = Forward(lambda m, x, taps: m.a(x).view(len(x), -1)).to(device)
    x = torch.randn(1, 2, 3, 3, device=device)
    with use_kernels(strict=True):  # weights stay as they are, and so the activations
        torch.testing.assert_close(model(x), revert(convert(model))(x))
    with pytest.raises(RuntimeError, match=r"Use \.reshape"):
        convert(model)(x)


# Every name of a function that the mode knows, and which count it goes to.
CALLS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "F.conv2d": (lambda x: F.conv2d(x, x[:, :, :2, :2], stride=2), "conv2d"),
    "torch.conv2d": (lambda x: torch.conv2d(x, weight=x[:, :, :2, :2], padding="same"), "conv2d"),
    "F.linear": (lambda x: F.linear(x, x[0, 0]), "linear"),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2, padding=1), "max_pool2d"),
    "F.max_pool2d-indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), "max_pool2d"),
    "F.max_pool2d_with_indices": (lambda x: F.max_pool2d_with_indices(x, [2, 2], [1, 1]), "max_pool2d"),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, 2), "max_pool2d"),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), "adaptive_avg_pool2d"),
    "F.conv1d": (lambda x: F.conv1d(x[0], x[0, :, :, :3], padding=1), "conv1d"),
    "F.conv_transpose2d": (lambda x: F.conv_transpose2d(x, x[:, :, :2, :2], stride=2), "conv_transpose2d"),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 1, 1, False, False), "avg_pool2d"),
    "F.lp_pool2d": (lambda x: F.lp_pool2d(x, 2.0, 2), "lp_pool2d"),
    "F.max_unpool2d": (
        lambda x: F.max_unpool2d(x, torch.arange(0, 64, 4, device=x.device).reshape(4, 4).expand(2, 2, 4, 4), 2),
        "max_unpool2d",
    ),
    "F.adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), "adaptive_max_pool2d"),
    "F.adaptive_max_pool2d-indices": (lambda x: F.adaptive_max_pool2d(x, 3, True), "adaptive_max_pool2d"),
    "F.local_response_norm": (lambda x: F.local_response_norm(x, 3, 0.1, k=2.0), "local_response_norm"),
    "F.softmax": (lambda x: F.softmax(x, 1), "softmax"),
    "F.softmax-dtype": (lambda x: F.softmax(x, dim=-1, dtype=torch.float64), "softmax"),
    "torch.softmax": (lambda x: torch.softmax(x, 1, torch.float64), "softmax"),
    "Tensor.softmax": (lambda x: x.softmax(dim=2), "softmax"),
    "F.log_softmax": (lambda x: F.log_softmax(x, 1), "log_softmax"),
    "torch.log_softmax": (lambda x: torch.log_softmax(x, -1), "log_softmax"),
    "Tensor.log_softmax": (lambda x: x.log_softmax(0), "log_softmax"),
    "F.cross_entropy": (
        lambda x: F.cross_entropy(x[:, :, 0, 0], torch.zeros_like(x[:, 0, 0, 0]).long(), label_smoothing=0.1),
        "cross_entropy",
    ),
    "F.unfold": (lambda x: F.unfold(x, 3, padding=1), "unfold"),
    "F.fold": (lambda x: F.fold(x[0].reshape(1, 4, 8)[..., :6], (3, 4), 2), "fold"),
    "F.relu": (lambda x: F.relu(x), "relu"),
    "F.relu-inplace": (lambda x: F.relu(x.clone(), inplace=True), "relu"),
    "torch.relu": (lambda x: torch.relu(input=x), "relu"),
    "torch.relu_": (lambda x: torch.relu_(x.clone()), "relu"),
    "Tensor.relu": (lambda x: x.relu(), "relu"),
    "Tensor.relu_": (lambda x: x.clone().relu_(), "relu"),
    "F.dropout": (lambda x: F.dropout(x, 0.5, training=False), "dropout"),
    "F.dropout-all": (lambda x: F.dropout(x, p=1.0), "dropout"),
    "torch.dropout": (lambda x: torch.dropout(x, 0.0, True), "dropout"),
    "nn.Conv2d": (lambda x: nn.Conv2d(2, 2, 1, device=x.device).requires_grad_(False)(x) * 0, "conv2d"),
}


@pytest.mark.parametrize("call", CALLS)
def test_use_kernels_knows(call: str, device: torch.device) -> None:
    function, counted = CALLS[call]
    x = torch.randn(2, 2, 4, 4, device=device)
    with use_kernels(strict=True) as mode:
        ours = function(x)
    assert mode.taken == {counted: 1}
    torch.testing.assert_close(ours, function(x))


def test_use_kernels_leaves_what_it_cannot_do() -> None:
    x = torch.arange(-8, 8).reshape(1, 1, 4, 4)
    with use_kernels() as mode:
        assert torch.equal(F.relu(x), x.clamp(min=0))
        assert F.max_pool2d(x, 2).shape == (1, 1, 2, 2)
        with pytest.raises(RuntimeError, match="expected input"):  # PyTorch's own words
            F.conv2d(torch.randn(1, 2, 3, 3), torch.randn(1, 3, 1, 1))
    assert not mode.taken
    assert [name.split(" has ")[0] for name in mode.left] == ["relu: input", "max_pool2d: input", "conv2d: weight"]
    with use_kernels(strict=True), pytest.raises(TypeError, match=r"input has dtype torch\.int64: allowed are"):
        F.relu(x)
