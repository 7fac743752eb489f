"""Whole networks: their checks on real pictures, their calls for a timer, one CUDA graph, and their job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tileconv.bench import job, records, whole
from tileconv.bench.cli import app
from tileconv.bench.job import failures, rows_of
from tileconv.model.chains import plain, size_of
from tileconv.model.data import photographs
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

    monkeypatch.setattr(job, "network_checks", checks)


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
    assert record.command == "tileconv bench --batch 2 --jobs 1 --suite networks"
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
