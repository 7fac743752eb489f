"""PyTorch cannot tell the difference: opcheck, compile, export, torch.func, autocast, checkpoints, double backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import tileconv.kernels as tk
from tileconv.model.zoo import build

OPS = torch.ops.tileconv
CHANNELS_LAST = torch.channels_last
GEOMETRY = ((2, 1), (1, 0, 2, 1), (1, 2), 2)


def tensors() -> list[Tensor]:
    return [torch.randn(2, 6, 9, 11), torch.randn(4, 3, 3, 2), torch.randn(4), torch.randn(3, 8)]


def network(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    y = tk.conv2d(x, w, b, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, activation="relu")
    y = tk.relu(tk.max_pool2d(y, 2) - 0.1)
    return tk.linear(tk.adaptive_avg_pool2d(y, (2, 1)).flatten(1), v)


def layouts(x: Tensor) -> list[Tensor]:
    return [x, x.contiguous(memory_format=CHANNELS_LAST), torch.cat([x, x], 1)[:, ::2]]


def losses(x: Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of cross-entropy: classes and probabilities, every reduction."""
    classes, probabilities, weight = torch.randint(0, 6, (2, 9, 11)), torch.rand_like(x), torch.rand(6)
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for target, reduction, own in ((classes, "mean", weight), (classes, "none", None), (probabilities, "sum", weight)):
        settings = (-100, reduction, 0.1)
        loss, saved, divisor = OPS.cross_entropy(x, target, own, *settings)
        calls.append((OPS.cross_entropy, (x, target, own, *settings)))
        arguments = (torch.ones_like(loss), x, target, own, saved, divisor, *settings)
        calls.append((OPS.cross_entropy_backward, (*arguments, target is probabilities)))
    return calls


@pytest.mark.parametrize("layout", [0, 1, 2], ids=["contiguous", "channels_last", "sliced"])
def test_opcheck(layout: int) -> None:
    x, w, b, _ = tensors()
    x = layouts(x)[layout]
    cl = layout == 1
    y = OPS.conv2d_fprop(x, w, b, *GEOMETRY, "relu", "ieee", cl)
    dy = layouts(torch.randn(y.shape))[layout]
    window = ((3, 2), (2, 2), (1, 0), (1, 1), True)
    pooled, switch = OPS.max_pool2d(x, *window, "relu", True, cl)
    average = ((3, 2), (2, 2), (1, 0), True, False, None)
    places, norms = OPS.adaptive_max_pool2d(x, (2, 3), True, cl)[1], OPS.lp_pool2d(x, 2.0, (3, 2), (2, 2), False, cl)
    patches, local = ((3, 2), *GEOMETRY[:3]), torch.randn(*y.shape[2:], 4, 6, 3, 2)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.conv2d_fprop, (x, w, b, *GEOMETRY, "relu", "ieee", cl)),
        (OPS.conv2d_fprop, (x, w, None, *GEOMETRY, None, "ieee", cl)),
        (OPS.conv2d_max_pool2d, (x, w, b, *GEOMETRY, *window, "relu", "ieee", True, cl)),
        (OPS.conv2d_dgrad, (dy, w, x.shape, *GEOMETRY, "ieee", cl)),
        (OPS.conv2d_wgrad, (dy, x, w.shape, *GEOMETRY, "ieee")),
        (OPS.bias_grad, (dy,)),
        (OPS.relu_bias_grad, (dy, y)),
        (OPS.relu_bias_grad, (dy, y, 0.4)),
        (OPS.relu, (x,)),
        (OPS.relu_backward, (dy, y)),
        (OPS.relu_backward, (dy, y, 0.4)),
        (OPS.dropout, (x, torch.tensor([5]), 0.4)),
        (
            OPS.linear_dropout,
            (x[..., :1, :1], w[:, :, :1, :1].repeat(1, 2, 1, 1), b, torch.tensor([5]), 0.4, "relu", "ieee"),
        ),
        (OPS.max_pool2d, (x, *window, None, True, cl)),
        (OPS.max_pool2d, (x, *window, None, False, cl)),
        (OPS.max_pool2d_indices, (switch, x.shape, *window)),
        (OPS.max_pool2d_backward, (torch.randn_like(pooled), switch, pooled, x.shape, *window, cl)),
        (OPS.adaptive_avg_pool2d, (x, (2, 3), cl)),
        (OPS.adaptive_avg_pool2d_backward, (torch.randn(2, 6, 2, 3), x.shape, cl)),
        (OPS.adaptive_max_pool2d, (x, (2, 3), True, cl)),
        (OPS.adaptive_max_pool2d, (x, (2, 3), False, cl)),
        (OPS.adaptive_max_pool2d_indices, (places, x.shape)),
        (OPS.adaptive_max_pool2d_backward, (torch.randn(2, 6, 2, 3), places, x.shape, cl)),
        (OPS.avg_pool2d, (x, *average, cl)),
        (OPS.avg_pool2d_backward, (torch.randn_like(pooled), x.shape, *average, cl)),
        (OPS.lp_pool2d, (x, 2.0, (3, 2), (2, 2), False, cl)),
        (OPS.lp_pool2d_backward, (torch.randn_like(norms), x, norms, 2.0, (3, 2), (2, 2), False, cl)),
        (OPS.max_unpool2d, (pooled, OPS.max_pool2d_indices(switch, x.shape, *window), (9, 11), cl)),
        (OPS.max_unpool2d_backward, (x, OPS.max_pool2d_indices(switch, x.shape, *window), cl)),
        (OPS.softmax, (x, 1, False)),
        (OPS.softmax_backward, (torch.randn_like(x), OPS.softmax(x, 3, True), 3, True)),
        *losses(x),
        (OPS.unfold, (x, *patches, cl)),
        (OPS.fold, (OPS.unfold(x, *patches, cl), x.shape, *patches, cl)),
        (OPS.conv_transpose2d, (y, w, x[0, :, 0, 0], x.shape, *GEOMETRY, "relu", "ieee", cl)),
        (OPS.locally_connected2d, (x, local, b, *GEOMETRY[:3], "ieee", cl)),
        (OPS.locally_connected2d_dgrad, (dy, local, x.shape, *GEOMETRY[:3], "ieee", cl)),
        (OPS.locally_connected2d_wgrad, (dy, x, local.shape, *GEOMETRY[:3], "ieee")),
        (OPS.local_response_norm, (x, 3, 0.1, 0.75, 2.0, cl)),
        (OPS.local_response_norm_backward, (torch.randn_like(x), x, 3, 0.1, 0.75, 2.0, cl)),
    ]
    assert {op.default.name().split("::")[1] for op, _ in calls} == {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("tileconv::")
    }
    # Strides are what layouts change: schema and fake tensors see them, the tracer's tests take most of the time.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=tests if cl else tests[:3])


def gradients(function: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return (output.detach(), *torch.autograd.grad(output.square().sum(), leaves))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for ours, theirs in zip(gradients(compiled, tensors()), gradients(network, tensors()), strict=True):
        assert ours.shape == theirs.shape
    inputs = tensors()
    for ours, theirs in zip(gradients(compiled, inputs), gradients(network, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_compile_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=True)
    _, *parameters = tensors()
    graphs = []
    for batch in (5, 7, 13):
        x = torch.randn(batch, 6, 9, 11)
        torch.testing.assert_close(compiled(x, *parameters), network(x, *parameters))
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[:1] * 2  # the first call may trace twice, the others compile nothing


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parameters_ = torch.nn.ParameterList(tensors()[1:])

    def forward(self, x: Tensor) -> Tensor:
        w, b, v = (self.parameters_[i] for i in range(3))  # torch 2.11 cannot trace *ParameterList where it is strict
        return network(x, w, b, v)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    module, x = Module(), tensors()[0]
    program = torch.export.export(module, (x,), strict=strict)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any("tileconv" in str(node.target) for graph in graphs for node in graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_of_a_converted_model_needs_no_grad(tmp_path: Path) -> None:
    layers = [
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 2),
    ]
    model = tk.convert(torch.nn.Sequential(*layers))
    x, more = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 6, 6)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace keeps no gradients .* trace in torch.no_grad\(\)"):
        torch.jit.trace(model, x)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "model.pt")
        assert torch.equal(torch.jit.load(tmp_path / "model.pt")(more), model(more))


def test_func_grad_and_vmap() -> None:
    inputs = tensors()
    want = gradients(network, inputs)[1:]
    got = grad(lambda *t: network(*t).square().sum(), argnums=(0, 1, 2, 3))(*inputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    x, *parameters = inputs
    torch.testing.assert_close(vmap(lambda x: network(x[None], *parameters)[0])(x), network(x, *parameters))
    one = grad(lambda w, x: network(x[None], w, *parameters[1:]).square().sum())
    per_sample = vmap(one, in_dims=(None, 0))(parameters[0], x)
    assert per_sample.shape == (2, *parameters[0].shape)
    torch.testing.assert_close(per_sample.sum(0), want[1], rtol=1e-5, atol=1e-5)


def test_forward_mode_raises() -> None:
    x, w, b, _ = tensors()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        tk.conv2d(forward_ad.make_dual(x, x), w, b, groups=2)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(tk.relu, (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_regions_dtype(dtype: torch.dtype) -> None:
    x, w, b, v = (t.requires_grad_() for t in tensors())
    with torch.autocast("cpu", dtype=dtype):
        y = tk.conv2d(x, w, b, groups=2)
        assert y.dtype == dtype
        assert tk.linear(v, v).dtype == dtype
        assert tk.conv2d(x.double(), w.double(), groups=2).dtype == torch.float64
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["alexnet", "googlenet"])
def test_meta_tensors_have_shapes_and_no_values(name: str, autocast: bool) -> None:
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model = build(name)
        images, classes = torch.empty(5, 3, 224, 224, requires_grad=True), torch.empty(5, dtype=torch.int64)
        scores = model(images)
        scores = scores[0] if isinstance(scores, tuple) else scores
        tk.cross_entropy(scores, classes).backward()
    assert (scores.shape, scores.dtype, scores.device.type) == ((5, 1000), torch.float32, "meta")
    assert images.grad is not None and images.grad.shape == images.shape
    for key, parameter in model.named_parameters():
        if "aux" not in key:
            assert parameter.grad is not None and parameter.grad.stride() == parameter.stride(), key


def test_checkpointing_and_determinism() -> None:
    inputs = tensors()
    torch.use_deterministic_algorithms(True)  # raises, where the fixture only warned
    plain = gradients(network, inputs)
    again = gradients(lambda *t: checkpoint(network, *t, use_reentrant=False), inputs)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_checkpointed_dropout_draws_the_same_mask() -> None:
    def drop(x: Tensor) -> Tensor:
        return tk.dropout(x, 0.5) * x

    x = torch.randn(40, 40, requires_grad=True)
    y = checkpoint(drop, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.where(y != 0, 4 * x, 0.0))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tileconv.kernels.autograd import conv as autograd

    called = []
    for name in ("conv2d_dgrad", "conv2d_wgrad", "bias_grad", "relu_bias_grad", "relu_backward"):
        real = getattr(autograd, name)
        monkeypatch.setattr(autograd, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    x, w, b, _ = tensors()
    for wanted, calls in ((x, ["conv2d_dgrad"]), (w, ["conv2d_wgrad"]), (b, ["bias_grad"])):
        for leaf in (x, w, b):
            leaf.requires_grad_(leaf is wanted)
        called.clear()
        tk.conv2d(x, w, b, groups=2).sum().backward()
        assert called == calls
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tk.conv2d(x, w, b, groups=2)
    assert saved == []  # the gradient of the bias alone needs neither input nor weight


def test_saved_tensors_modified_in_place_are_noticed() -> None:
    x, w, b, _ = tensors()
    w.requires_grad_()
    y = tk.conv2d(x, w, b, groups=2)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck_and_gradgradcheck(activation: str | None) -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 5, 4), (4, 2, 2, 3), (4,)))

    def conv(*t: Tensor) -> Tensor:
        return tk.conv2d(*t, stride=(2, 1), padding=1, dilation=(1, 2), groups=2, activation=activation)

    assert torch.autograd.gradcheck(conv, (x, w, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, (x, w, b), fast_mode=True)


def test_gradgradcheck_of_the_others() -> None:
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: tk.max_pool2d(x, 3, 2, 1),
        lambda x: tk.max_pool2d(x, 2, activation="relu"),
        lambda x: tk.adaptive_avg_pool2d(x, (3, 4)),
        tk.relu,
        lambda x: tk.linear(x, v),
    ):
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


@pytest.mark.gpu
def test_calls_replay_in_a_cuda_graph() -> None:
    inputs = [t.cuda() for t in tensors()]
    network(*inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = network(*inputs)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    torch.testing.assert_close(captured, network(*inputs))
