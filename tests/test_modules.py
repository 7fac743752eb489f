"""Modules: torch.nn's constructors, keys and numbers, and weights that stay channels_last."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tileconv.kernels as tk
from tileconv.kernels import modules

Check = Callable[[Tensor, Tensor, Tensor], None]

# name, constructor arguments, input shape
CASES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "conv": ("Conv2d", (3, 5, 3), {"padding": 1}, (2, 3, 7, 5)),
    "conv-strided-dilated-grouped": (
        "Conv2d",
        (4, 6, (3, 2)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2, "bias": False},
        (1, 4, 7, 6),
    ),
    "conv-same": ("Conv2d", (2, 3, 4), {"padding": "same"}, (1, 2, 5, 5)),
    "conv-unbatched": ("Conv2d", (2, 3, 1), {}, (2, 3, 3)),
    "linear": ("Linear", (7, 3), {}, (2, 3, 7)),
    "linear-without-bias": ("Linear", (5, 4), {"bias": False}, (3, 5)),
    "max-pool": ("MaxPool2d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}, (2, 3, 6, 7)),
    "relu": ("ReLU", (), {}, (3, 5)),
    "adaptive-avg-pool": ("AdaptiveAvgPool2d", ((2, None),), {}, (2, 3, 5, 3)),
    "dropout": ("Dropout", (0.5,), {}, (3, 5)),
}


def pair(case: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours and torch's with the same values (neither training: dropout has random numbers of its own), and an input."""
    name, args, kwargs, shape = CASES[case]
    torch.manual_seed(1)
    ours = getattr(modules, name)(*args, **kwargs)
    torch.manual_seed(1)
    theirs = getattr(nn, name)(*args, **kwargs)
    return ours.eval(), theirs.eval(), torch.randn(shape)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own, of the copy that it makes
def test_numbers_of_forward_and_gradients(case: str, device: torch.device, assert_within_budget: Check) -> None:
    ours, theirs, x = pair(case)
    ours, theirs, x = ours.to(device), theirs.to(device), x.to(device)
    exact = copy.deepcopy(theirs).double()
    results = gradients(ours, x), gradients(theirs, x), gradients(exact, x.double())
    for a, b, c in zip(*results, strict=True):
        assert_within_budget(a, b, c)


@pytest.mark.parametrize("case", CASES)
def test_reads_as_torchs(case: str) -> None:
    ours, theirs, _ = pair(case)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():  # the seed gives the same values
        assert torch.equal(state[key], value)
    assert not ours.load_state_dict(expected).missing_keys
    assert not theirs.load_state_dict(state).missing_keys


@pytest.mark.parametrize("case", ["conv", "conv-strided-dilated-grouped", "linear", "linear-without-bias"])
def test_fused_relu(case: str, device: torch.device, assert_within_budget: Check) -> None:
    name, args, kwargs, _ = CASES[case]
    _, layer, x = pair(case)
    ours = getattr(modules, {"Conv2d": "ConvReLU2d", "Linear": "LinearReLU"}[name])(*args, **kwargs)
    ours.load_state_dict(layer.state_dict())
    theirs = nn.Sequential(layer, nn.ReLU())
    exact = copy.deepcopy(theirs).double()
    inputs = x, x, x.double()
    results = [gradients(m.to(device), i.to(device)) for m, i in zip((ours, theirs, exact), inputs, strict=True)]
    for a, b, c in zip(*results, strict=True):
        assert_within_budget(a, b, c)


def test_max_pool_indices(device: torch.device) -> None:
    x = torch.randn(2, 3, 5, 5, device=device)
    values, indices = modules.MaxPool2d(2, return_indices=True)(x)
    expected = nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_dropout_drops_while_training(device: torch.device) -> None:
    layer, x = modules.Dropout(0.25), torch.ones(400, device=device)
    y = layer(x)
    assert set(y.tolist()) == {0.0, (x / 0.75)[0].item()}
    assert 0.1 < (y == 0).float().mean() < 0.4
    assert torch.equal(layer.eval()(x), x)


def test_inplace_relu_writes_its_input(device: torch.device) -> None:
    x = torch.tensor([-1.0, 2.0], device=device)
    assert modules.ReLU(inplace=True)(x).data_ptr() == x.data_ptr()
    assert x.tolist() == [0.0, 2.0]


# -- memory format -----------------------------------------------------------------------------------------------------


def channels_last(layer: modules.Conv2d) -> bool:
    return layer.weight.is_contiguous(memory_format=torch.channels_last) and not layer.weight.is_contiguous()


def saved(layer: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def reset(layer: modules.Conv2d) -> modules.Conv2d:
    layer.reset_parameters()
    return layer


LAYOUTS: dict[str, Callable[[modules.Conv2d], Any]] = {
    "constructor": lambda m: m,
    "reset_parameters": reset,
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
    "dtype": lambda m: m.half(),
    "deepcopy": copy.deepcopy,
    "pickle": saved,
    "load": lambda m: m.load_state_dict(nn.Conv2d(3, 4, 3).state_dict()) and m,
    "load-assign": lambda m: m.load_state_dict(nn.Conv2d(3, 4, 3).state_dict(), assign=True) and m,
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "skip_init": lambda m: nn.utils.skip_init(modules.Conv2d, 3, 4, 3),
}


@pytest.mark.parametrize("way", LAYOUTS)
def test_weight_is_channels_last_after(way: str) -> None:
    layer = LAYOUTS[way](modules.ConvReLU2d(3, 4, 3) if way != "skip_init" else modules.Conv2d(3, 4, 3))
    assert isinstance(layer, modules.Conv2d)
    assert channels_last(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad


def test_weight_stays_the_same_parameter() -> None:
    layer = modules.Conv2d(3, 4, 3)
    before = layer.weight, layer.weight.detach().clone()
    layer.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    assert layer.weight is before[0]
    assert torch.equal(layer.weight, before[1])


def test_weight_norm(device: torch.device) -> None:
    layer = nn.utils.parametrizations.weight_norm(modules.Conv2d(2, 3, 3)).to(device)
    twin = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)).to(device)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 4, 4, device=device)
    torch.testing.assert_close(layer(x), twin(x))


# -- precision, tracing, errors ----------------------------------------------------------------------------------------


def test_a_linear_layer_drops_in_training_alone() -> None:
    layer, x = modules.LinearReLU(7, 5, dropout=0.5), torch.randn(3, 7)
    torch.manual_seed(1)
    dropped = layer(x)
    torch.manual_seed(1)
    assert torch.equal(dropped, tk.linear(x, layer.weight, layer.bias, activation="relu", dropout=0.5))
    whole = layer.eval()(x)
    assert torch.equal(whole, tk.linear(x, layer.weight, layer.bias, activation="relu"))
    assert not torch.equal(dropped, whole)
    assert repr(layer) == "LinearReLU(in_features=7, out_features=5, bias=True, dropout=0.5)"
    with pytest.raises(ValueError, match=r"dropout is 1\.5: allowed is 0 to 1"):
        modules.Linear(7, 5, dropout=1.5)


@pytest.mark.parametrize("make", [lambda **k: modules.Conv2d(2, 3, 1, **k), lambda **k: modules.Linear(2, 3, **k)])
def test_precision(make: Callable[..., nn.Module]) -> None:
    assert "precision" not in repr(make())
    assert repr(make(precision="tf32")).endswith("precision='tf32')")
    assert copy.deepcopy(make(precision="tf32")).precision == "tf32"
    with pytest.raises(ValueError, match="precision is 'fp8': allowed are None, 'ieee', 'tf32'"):
        make(precision="fp8")


def test_symbolic_trace(device: torch.device) -> None:
    model = nn.Sequential(modules.ConvReLU2d(2, 3, 3), modules.MaxPool2d(2), nn.Flatten(), modules.Linear(3, 2))
    model, x = model.to(device), torch.randn(2, 2, 4, 4, device=device)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_are_torchs(mode: Any) -> None:
    with pytest.raises(ValueError, match=rf"padding_mode is '{mode}': allowed is 'zeros'; torch\.nn\.Conv2d does"):
        modules.Conv2d(2, 3, 3, padding_mode=mode)
