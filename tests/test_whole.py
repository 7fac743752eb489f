"""Whole networks: their checks on real pictures, their calls for a timer, one CUDA graph, and their job."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tileconv.bench import records, whole, whole_calls, whole_job
from tileconv.bench.cli import app
from tileconv.bench.job import failures, rows_of
from tileconv.kernels import hardware
from tileconv.model.chains import plain, size_of
from tileconv.model.data import photographs
from tileconv.model.graph import captured
from tileconv.model.shapes import network
from tileconv.model.zoo import build, lively

# Checks


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("forward", "fp32"), ("forward", "fp16"), ("forward", "bf16"), ("training step", "fp64"),
     ("training step", "bf16")],
)  # fmt: skip
def test_lenet_on_digits(op: str, dtype: str, device: torch.device) -> None:
    row = whole.run_check({"network": "lenet", "op": op, "dtype": dtype, "batch": 2}, str(device))
    (check,) = rows_of(records.Check, [row])
    assert check.passed, check
    assert check.shape == (2, 1, 28, 28)
    assert check.error is not None
    assert check.allowed is not None
    assert 0 < check.error <= check.allowed
    assert check.layer == ("lenet" if op == "forward" else "lenet step")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in whole.NETWORKS if name != "lenet"])
def test_networks_on_photographs_at_full_size(name: str, device: torch.device) -> None:
    row = whole.run_check({"network": name, "op": "forward", "dtype": "fp16", "batch": 1}, str(device))
    (check,) = rows_of(records.Check, [row])
    assert check.passed, check
    assert check.shape == (1, 3, size_of(network(name)), size_of(network(name)))


def test_an_error_in_a_network_fails(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A tenth of a thousandth more than right is outside the budget of fp32, forward and backward."""
    built = whole.built

    def off(name: str, step: bool, where: str) -> nn.Module:
        model = built(name, step, where)
        forward = model.forward
        model.forward = lambda x: forward(x) * 1.0001  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(whole, "built", off)
    for op, dtype in (("forward", "fp32"), ("training step", "fp64")):
        assert not whole.run_check({"network": "lenet", "op": op, "dtype": dtype, "batch": 2}, str(device))["passed"]


def test_tasks_cover_every_network() -> None:
    todo = whole.tasks(3, tuple(whole.NETWORKS), ("fp32", "fp16"))
    assert {task["network"] for task in todo} == {"alexnet", "alexnet-2012", "lenet", "vgg16", "googlenet"}
    for name in whole.NETWORKS:
        own = {(task["op"], task["dtype"], task["batch"]) for task in todo if task["network"] == name}
        pictures = whole.NETWORKS[name].step_batch
        assert own == {
            ("forward", "fp32", 3), ("forward", "fp16", 3),
            ("training step", "fp64", pictures), ("training step", "fp16", pictures),
        }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1, ["vgg"], ["fp32"]), "network='vgg' is unknown; nearest: vgg16"),
        ((1, ["lenet"], ["fp8"]), "dtype='fp8' is unknown"),
        ((0, ["lenet"], ["fp32"]), "batch=0 must be at least 1"),
    ],
    ids=["network", "dtype", "batch"],
)
def test_refusals(arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        whole.network_checks(arguments[0], networks=arguments[1], dtypes=arguments[2])


@pytest.mark.parametrize("name", whole.NETWORKS)
def test_plain_networks_hold_torchs_layers_alone(name: str) -> None:
    model = network(name)
    twin = plain(model)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())
    assert not set(map(id, twin.parameters())) & set(map(id, model.parameters()))
    ours = {type(m).__module__ for m in twin.modules()} - {"tileconv.model.chains", "tileconv.model.googlenet"}
    assert all(module.startswith("torch.") for module in ours)


def test_plain_lenet_computes_what_torch_computes_in_its_definition() -> None:
    from tileconv.model.lenet import reference_forward

    model = lively(build("lenet")).double()
    for size in (28, 32):
        x = torch.randn(2, 1, size, size, dtype=torch.float64)
        torch.testing.assert_close(plain(model, size)(x), reference_forward(model, x), rtol=1e-13, atol=0)


def test_lively_networks_look_at_the_picture_and_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    twin = plain(lively(build("alexnet-2012", width=12, hidden=32, num_classes=10)))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        first, second = twin(photographs(2, 227))
    assert (first - second).abs().mean() > 0.1 * first.abs().mean()


# The job


@pytest.fixture
def lenet_alone(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In this process: a worker takes seconds to start."""

    def checks(batch: int, dtypes: Sequence[str], jobs: int, progress: Any) -> list[dict[str, Any]]:
        return [whole.run_check(task, str(device)) for task in whole.tasks(batch, ["lenet"], dtypes)]

    monkeypatch.setattr(whole_job, "network_checks", checks)


@pytest.mark.slow
def test_workers_answer() -> None:
    said: list[str] = []
    rows = whole.network_checks(1, ["lenet"], ["fp32"], jobs=1, progress=lambda done, total, label: said.append(label))
    assert [check.passed for check in rows_of(records.Check, rows)] == [True, True]
    assert said == ["lenet forward fp32", "lenet training step fp64"]


def test_the_job_writes_a_record_of_its_own(lenet_alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tileconv.bench import report

    monkeypatch.setattr(report, "render", lambda draw, size: (b"<svg/>", b"<svg/>", b"\x89PNG"))
    arguments = ["bench", "--suite", "networks", "--out", str(tmp_path), "--jobs", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "data").iterdir()
    assert file.name.endswith("-networks.json")
    record = records.load(file)
    assert record.command == "tileconv bench --suite networks --batch 2 --jobs 1"
    assert not failures(record)
    assert {(c.layer, c.dtype) for c in record.checks} == {
        ("lenet", "fp32"), ("lenet", "fp16"), ("lenet", "bf16"),
        ("lenet step", "fp64"), ("lenet step", "fp16"), ("lenet step", "bf16"),
    }  # fmt: skip
    text = (tmp_path / f"{record.device.slug}.md").read_text()
    assert "| lenet step | training step | 2x1x28x28 | - |" in text


def test_an_unknown_suite_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--suite", "network", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "nearest: networks" in result.output


# Calls for a timer


class StubTimer:
    """Runs the call once and says that it took a millisecond."""

    def __call__(self, call: Callable[[], Any], *, cold: bool) -> list[float]:
        call()
        return [1000.0]


def test_calls_of_all_providers_compute_the_same(device: torch.device, assert_within_budget: Any) -> None:
    found = {}
    for call in whole_calls.network_calls("lenet", 2, "fp32", str(device), providers=("tileconv", "torch")):
        found[call.provider, call.pass_] = call.run(), call.run()
    exact = plain(lively(build("lenet")).double(), 28)(whole.pictures("lenet", 2, 28)[0].double())
    ours, theirs = (found[provider, "forward"][0].cpu() for provider in ("tileconv", "torch"))
    assert_within_budget(ours, theirs, exact.detach())
    first, second = found["tileconv", "training step"]
    torch.testing.assert_close(first, found["torch", "training step"][0])
    torch.testing.assert_close(second, found["torch", "training step"][1])
    assert second < first  # a step down the gradient


def test_flops_are_three_forward_passes_but_for_the_pictures_gradient() -> None:
    forward, step = (whole_calls.flops("vgg16", 2, pass_) for pass_ in whole_calls.PASSES)
    assert forward == 2 * 30_940_528_640  # as test_dense has it for a crop
    assert step == 3 * forward - 2 * 2 * 224 * 224 * 64 * 27


def test_timings_of_whole_networks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(torch, "compile", lambda net: net)  # a CPU would need a C++ compiler
    rows = whole_calls.network_timings(2, ["fp32"], StubTimer(), networks=["lenet"], device=str(device))
    assert {(row.provider, row.pass_, row.l2) for row in rows} == {
        (provider, pass_, l2)
        for provider in whole_calls.PROVIDERS for pass_ in whole_calls.PASSES for l2 in ("cold", "warm")
    }  # fmt: skip
    assert all(row.passed and row.p50_us == 1000 for row in rows)
    assert all((row.error is not None) == (row.pass_ == "forward") for row in rows)
    forward = next(row for row in rows if row.pass_ == "forward")
    assert forward.tflops == pytest.approx(whole_calls.flops("lenet", 2, "forward") / 1e9)


def test_latency_is_that_of_one_graph(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    kept: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr(whole_calls, "captured", lambda net, x: (kept.append(net), torch.no_grad()(net))[1])
    rows = whole_calls.network_timings(
        1, ["fp32"], StubTimer(), networks=["lenet"], device=str(device), graphs=True
    )  # fmt: skip
    graphs = [row for row in rows if row.method == "graph"]
    assert {(row.provider, row.pass_, row.l2) for row in graphs} == {
        (provider, "forward", l2) for provider in ("tileconv", "torch") for l2 in ("cold", "warm")
    }  # fmt: skip
    assert all(row.passed and row.error is not None for row in graphs)
    assert [type(net).__name__ for net in kept] == ["LeNet", "Sequential"]
    assert not any(net.training for net in kept)


def test_what_is_wrong_gets_no_speed(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(torch, "compile", lambda net: lambda x: net(x) + 1)
    rows = whole_calls.network_timings(2, ["fp32"], StubTimer(), networks=["lenet"], device=str(device))
    wrong = [row for row in rows if row.provider == "torch.compile"]
    assert len(wrong) == 4
    assert all(not row.passed and "outside their budget" in row.note for row in wrong)
    assert all(row.passed for row in rows if row.provider != "torch.compile")


# One CUDA graph


class StubGraph:
    """Keeps what a capture ran, and runs it again into the same output."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.again: Callable[[], object] = lambda: None

    def replay(self) -> None:
        self.log.append("replay")
        self.again()


class Recorded(nn.Module):
    """Doubles its input; while captured, tells the graph how to do it again."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log
        self.graph: StubGraph | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.log.append("captured" if self.graph else "run")
        assert not torch.is_grad_enabled()
        y = 2 * x
        if self.graph is not None:
            self.graph.again = lambda: y.copy_(2 * x)
        return y


@pytest.fixture
def stubbed_cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorded, list[str]]:
    """A GPU that is none: streams that wait for nothing, and one graph."""
    log: list[str] = []
    network = Recorded(log).eval()

    class Stream:
        def wait_stream(self, other: object) -> None:
            log.append("wait")

    @contextlib.contextmanager
    def capture(graph: StubGraph) -> Iterator[None]:
        network.graph = graph
        yield
        network.graph = None

    monkeypatch.setattr(hardware, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: StubGraph(log))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return network, log


def test_a_network_is_captured_once_and_replayed(stubbed_cuda: tuple[Recorded, list[str]]) -> None:
    network, log = stubbed_cuda
    run = captured(network, torch.ones(2, 3), warm_up=2)
    assert log == ["wait", "run", "run", "wait", "captured"]
    first = run(torch.full((2, 3), 5.0))
    assert torch.equal(first, torch.full((2, 3), 10.0))
    second = run(torch.full((2, 3), 7.0))
    assert second is first  # the graph's own output
    assert torch.equal(second, torch.full((2, 3), 14.0))
    assert log[5:] == ["replay", "replay"]
    with pytest.raises(ValueError, match=r"x is torch\.float32 \(1, 3\) on cpu: the graph was captured for"):
        run(torch.ones(1, 3))


def test_what_cannot_be_captured(stubbed_cuda: tuple[Recorded, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = stubbed_cuda
    with pytest.raises(ValueError, match=r"network is training: .* call eval\(\) first"):
        captured(network.train(), torch.ones(1))
    with pytest.raises(ValueError, match="warm_up is 0"):
        captured(network.eval(), torch.ones(1), warm_up=0)
    monkeypatch.setattr(hardware, "interpreting", lambda: True)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        captured(network, torch.ones(1))


@pytest.mark.gpu
@pytest.mark.parametrize("name", whole.NETWORKS)
def test_a_captured_network_gives_the_same_scores(name: str, device: torch.device) -> None:
    model = lively(build(name)).to(device).half()
    x, y = (t.half()[None].to(device) for t in whole.pictures(name, 2, whole.NETWORKS[name].size)[0])
    run = captured(model, x)
    with torch.no_grad():
        for picture in (x, y):
            assert torch.equal(run(picture), model(picture))
