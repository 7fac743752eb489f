"""`tileconv tune` rehearsed with a stub timer, and the table that choices look into."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn
from typer.testing import CliRunner

import tileconv.kernels as tk
from tileconv.bench import tune
from tileconv.bench.cases import Case
from tileconv.bench.cli import app
from tileconv.bench.networks import Shape
from tileconv.bench.tune import Outcome, Unit
from tileconv.kernels import conv_tile, excluded, hardware, tiles, tuned
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import plans

H100 = hardware.GPUS["H100"]
HALF = torch.float16


@pytest.fixture(autouse=True)
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tuned.VARIABLE, "")
    tuned.forget()
    yield
    tuned.forget()
    plans.forget()


def small(pass_: str, stride: int = 1, channels: int = 16) -> list[Unit]:
    shape = Shape("small", "conv2d", nn.Conv2d(channels, 24, 3, stride, 1, device="meta"), (2, channels, 6, 5), "relu")
    return tune.units(Case("alexnet", "conv3", pass_, 2, "fp16"), shape, H100)


class Stub:
    """Times from a list, one for each candidate that gets as far, after a run to see that the call can be made."""

    def __init__(self, *samples: list[float]) -> None:
        self.samples, self.calls = list(samples), 0

    def __call__(self, calls: Sequence[Callable[[], Any]], *, cold: bool, **_: Any) -> list[float]:
        assert cold and len(calls) == 1
        self.calls += 1
        return self.samples[min(self.calls, len(self.samples)) - 1]


@pytest.mark.parametrize("pass_", conv_tile.PASSES)
def test_a_rehearsal_checks_every_candidate_and_keeps_the_quickest(pass_: str) -> None:
    [unit] = small(pass_)
    stub = Stub([10.0, 10.1, 10.2], [9.0, 9.1, 9.2], [9.5, 9.6, 9.7])
    outcome = tune.tune_unit(unit, stub, H100, "cpu", count=3)
    assert outcome.refused == () and stub.calls == 3
    ranked = tiles.ranked(unit.problem, pass_, None, HALF, "ieee", H100)
    assert (outcome.model, outcome.best) == (ranked[0], ranked[1])
    assert outcome.won and "->" in str(outcome)


def test_a_strided_gradient_has_a_choice_for_every_residue() -> None:
    found = small("dgrad", stride=2)
    assert [unit.part.offset for unit in found if unit.part] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    outcome = tune.tune_unit(found[3], Stub([5.0]), H100, "cpu", count=1)
    assert outcome.refused == () and not outcome.won


def test_a_first_layer_is_tuned_as_the_blocked_one() -> None:
    shape = Shape("first", "conv2d", nn.Conv2d(3, 8, 7, 4, 2, device="meta"), (2, 3, 15, 15), "relu")
    for pass_, dtype in (("fprop", "fp16"), ("wgrad", "tf32")):
        assert tune.units(Case("alexnet", "conv1", pass_, 2, dtype), shape, H100) == [], "read in runs"
    [unit] = tune.units(Case("alexnet", "conv1", "wgrad", 2, "bf16x3"), shape, H100)
    assert unit.problem == unit.layer.space_to_depth
    assert tune.tune_unit(unit, Stub([5.0]), H100, "cpu", count=1).refused == ()


def test_a_wrong_tile_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    [unit] = small("fprop")
    real, ranked = tune._run, tiles.ranked(unit.problem, "fprop", None, HALF, "ieee", H100)
    runs = []

    def spoil(launches: Any) -> None:
        real(launches)
        runs.append(launches)
        if len(runs) == 1:
            launches[-1].arguments["y"].base.fill_(1.0)

    monkeypatch.setattr(tune, "_run", spoil)
    outcome = tune.tune_unit(unit, Stub([7.0]), H100, "cpu", count=2)
    assert len(outcome.refused) == 1 and "over the allowed" in outcome.refused[0]
    assert outcome.model_us is None and outcome.best == ranked[1] and outcome.won, "the model's own tile was wrong"


def test_noise_does_not_win() -> None:
    [unit] = small("fprop")
    close = Stub([10.0, 11.0, 12.0], [9.0, 10.0, 11.0])
    outcome = tune.tune_unit(unit, close, H100, "cpu", count=2)
    assert outcome.best != outcome.model and not outcome.won
    assert tune.merged([], [outcome], H100) == []


def won(problem: Conv2dProblem | None = None) -> Outcome:
    [unit] = small("fprop")
    if problem is not None:
        unit = dataclasses.replace(unit, problem=problem)
    outcome = tune.tune_unit(small("fprop")[0], Stub([10.0, 10.0], [5.0, 5.0]), H100, "cpu", count=2)
    return dataclasses.replace(outcome, unit=unit)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / tuned.NAME
    path.write_text(tuned.text(tune.merged([], [won()], H100)))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.forget()
    return path


def choice(gpu: hardware.GPU = H100, **settings: bool) -> conv_tile.ConvTile:
    return tiles.choose(small("fprop")[0].problem, "fprop", HALF, "ieee", gpu, **settings)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    tuned.forget()


def test_a_measured_tile_overrides_the_model_and_override_beats_it(table: Path) -> None:
    second = tiles.ranked(small("fprop")[0].problem, "fprop", None, HALF, "ieee", H100)[1]
    assert choice() == second
    with tiles.override(num_stages=2):
        assert choice() == dataclasses.replace(second, num_stages=2)
    with tiles.override(formulation="gather"):
        assert choice().formulation == "gather"
    assert choice(batch_invariant=True) == tiles.choose(
        small("fprop")[0].problem, "fprop", HALF, "ieee", H100, batch_invariant=True
    )


def test_a_measured_tile_that_a_self_test_excluded_is_not_taken(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = choice()
    tuned.forget()
    monkeypatch.setattr(excluded, "names", lambda gpu, pass_: frozenset({str(measured)}))
    assert choice() != measured


def test_another_gpu_or_triton_is_left_alone(table: Path) -> None:
    model = tiles.ranked(small("fprop")[0].problem, "fprop", None, HALF, "ieee", H100)[0]
    other = dataclasses.replace(H100, name="H200")
    assert choice(other) == tiles.ranked(small("fprop")[0].problem, "fprop", None, HALF, "ieee", other)[0]
    rewrite(table, lambda data: data["entries"][0].update(triton=triton.__version__ + "x"))
    assert choice() == model


SHARED_FILTERS = {"formulation": "pixel", "box": [64, 1, 1], "block_k": 64, "block_k2": 32, "splits": 1, "tail": 2}
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schema": (lambda d: d.update(schema=1), "schema is 1: allowed is 2"),
    "list": (lambda d: d.update(entries={}), "entries must be a list"),
    "missing": (lambda d: d["entries"][0].pop("tile"), r"entries\[0\] has no field 'tile'"),
    "unknown": (lambda d: d["entries"][0].update(speed=3), r"entries\[0\] has an unknown field 'speed'"),
    "pass": (lambda d: d["entries"][0].update({"pass": "forward"}), r"entries\[0\].pass is 'forward': allowed are"),
    "dtype": (lambda d: d["entries"][0].update(dtype="int8"), r"entries\[0\].dtype is 'int8'"),
    "gpu name": (lambda d: d["entries"][0].update(gpu=3), r"entries\[0\].gpu must be a string"),
    "type": (lambda d: d["entries"][0]["tile"].update(block_k="64"), r"tile.block_k must be int, not '64'"),
    "bool": (lambda d: d["entries"][0]["tile"].update(num_warps=True), "tile.num_warps must be int"),
    "box": (lambda d: d["entries"][0]["tile"].update(box=[1, 2]), r"tile.box must be tuple\[int, int, int\]"),
    "padding": (lambda d: d["entries"][0]["problem"].update(padding=[1, 1]), "problem.padding must be Padding"),
    "problem": (lambda d: d["entries"][0]["problem"].update(groups=5), "problem: groups=5 must divide"),
    "time": (lambda d: d["entries"][0]["tile_us"].update(p50=0), "tile_us.p50 must be a number of microseconds"),
    "cannot run": (lambda d: d["entries"][0]["tile"].update(block_k=48), "tile cannot run on H100: block_k=48 must be"),
    "shared filters of parts": (
        lambda d: d["entries"][0].update(
            dtype="float32", precision="bf16x3", tile=d["entries"][0]["tile"] | SHARED_FILTERS
        ),
        "tail=2 with splits=1 multiplies no parts, and precision='bf16x3' does",
    ),
}


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_table_is_refused_by_field(
    table: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    rewrite(table, change)
    with pytest.raises(ValueError, match=words):
        choice()


def test_where_a_table_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"TILECONV_TILES=.*no such file"):
        tuned.table_path()
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path))
    assert tuned.table_path() is None, "none is packaged: nothing has been measured"
    (tmp_path / tuned.NAME).write_text("not JSON")
    assert tuned.table_path() == tmp_path / tuned.NAME
    with pytest.raises(ValueError, match=r"tiles_tuned.json: cannot be read as JSON"):
        choice()
    monkeypatch.setenv(tuned.CACHE_VARIABLE, "")
    assert tuned.table_path() is None


def test_tuning_again_replaces_its_own_entries_alone() -> None:
    first, other = won(), won(Conv2dProblem(2, 16, 9, 9, 24, 3, 3))
    before = tune.merged([], [first, other], H100)
    assert len(before) == 2
    lost = dataclasses.replace(first, best=first.model, best_us=first.model_us)
    assert tune.merged(before, [lost], H100) == before[1:]
    moved = tune.merged(before, [first], dataclasses.replace(H100, name="H200"))
    assert moved[:2] == before and moved[2].key.gpu == "H200"


def test_a_table_reads_back(tmp_path: Path) -> None:
    entries = tune.merged([], [won()], H100)
    path = tmp_path / "t.json"
    path.write_text(tuned.text(entries))
    assert tuned.read(path) == entries


def test_time_runs_out_before_a_unit_not_in_it() -> None:
    now = iter([0.0, 1.0, 61.0, 62.0])
    done = tune.outcomes(small("fprop") * 3, Stub([5.0]), H100, device="cpu", minutes=1, clock=lambda: next(now))
    assert len(list(done)) == 1


def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    if hardware.has_gpu():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "t.json")])
    assert done.exit_code == 2
    assert "needs a CUDA GPU" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_tile_is_tuned_on_the_gpu(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    arguments = ["tune", "--layer", "conv5", "--batch", "8", "--pass", "fprop", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "refused" not in done.output
    tuned.read(out)
    x = torch.randn(8, 256, 13, 13, device="cuda", dtype=HALF)
    assert tk.conv2d(x, torch.randn(256, 256, 3, 3, device="cuda", dtype=HALF), padding=1).isfinite().all()
