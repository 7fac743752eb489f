"""Other projects' convolutions beside ours: ours ahead on modelled time, and FlagGems where it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tileconv.bench import flaggems, inspect, peers
from tileconv.bench.cases import Case, cases
from tileconv.bench.records import Inspection, from_data
from tileconv.bench.targets import case_sums

# A package of FlagGems' shape, and not its code: what the loader relies on is the order of the arguments.
SIZES = ["n", "h", "w", "k", "p", "q", *(f"{t}{a}" for t in "xwy" for a in ("_n", "_c", "_h", "_w"))]
CONSTANTS = ["C", "R", "S", "SH", "SW", "PH", "PW", "DH", "DW", "G", "BLOCK_NI_HO_WO", "BLOCK_CI", "BLOCK_CO"]
WEIGHT_SIZES = [*(f"{t}{a}" for t in "xwy" for a in ("_n", "_c", "_h", "_w")), "h", "w", "r", "s", "c", "n", "sh", "sw",
                "p", "q", "k", "ph", "pw", "dil_h", "dil_w"]  # fmt: skip
WEIGHT_CONSTANTS = ["BLOCK_NO", "BLOCK_CI_HK_WK", "BLOCK_CO"]
SOURCE = """
import triton
import triton.language as tl

from flag_gems import runtime
from flag_gems.utils import libentry


@libentry()
@triton.autotune(configs=[triton.Config(c.kwargs) for c in runtime.get_tuned_config("forward")], key=["n"])
@triton.jit
def conv2d_forward_kernel(x, wt, y, b, {sizes}, {constants}):
    rows, columns = tl.arange(0, BLOCK_NI_HO_WO), tl.arange(0, BLOCK_CO)
    acc = tl.zeros((BLOCK_NI_HO_WO, BLOCK_CO), tl.float32)
    for i in range(C // BLOCK_CI):
        depth = i * BLOCK_CI + tl.arange(0, BLOCK_CI)
        a = tl.load(x + rows[:, None] * x_w + depth[None, :] * x_c)
        acc += tl.dot(a, tl.load(wt + depth[:, None] * w_c + columns[None, :] * w_n))
    tl.store(y + rows[:, None] * y_w + columns[None, :] * y_c, acc)


@libentry()
@triton.autotune(configs=[triton.Config(c.kwargs) for c in runtime.get_tuned_config("weight")], key=["n"])
@triton.jit
def conv2d_backward_kernel_weight(x, dy, dw, {weight_sizes}, {weight_constants}):
    rows, columns = tl.arange(0, BLOCK_CI_HK_WK), tl.arange(0, BLOCK_CO)
    acc = tl.zeros((BLOCK_CI_HK_WK, BLOCK_CO), tl.float32)
    for i in range(n // BLOCK_NO):
        depth = i * BLOCK_NO + tl.arange(0, BLOCK_NO)
        a = tl.load(x + rows[:, None] * x_c + depth[None, :] * x_n)
        acc += tl.dot(a, tl.load(dy + depth[:, None] * y_n + columns[None, :] * y_c))
    tl.store(dw + rows[:, None] * w_c + columns[None, :] * w_n, acc)
"""
TILES = """
conv2d_forward:
  - META: {BLOCK_NI_HO_WO: 64, BLOCK_CO: 64, BLOCK_CI: 32}
    num_warps: 4
    num_stages: 2
conv2d_backward_weight:
  - META: {BLOCK_CI_HK_WK: 64, BLOCK_CO: 32, BLOCK_NO: 32}
    num_warps: 4
    num_stages: 3
"""


def listed(names: list[str], suffix: str = "") -> str:
    return ", ".join(name + suffix for name in names)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("yaml")
    place = tmp_path / "flag_gems"
    for folder in (place / "ops", place / "runtime" / "backend" / "_nvidia"):
        folder.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('No device were detected on your machine !')\n")
    constants, weights = listed(CONSTANTS, ": tl.constexpr"), listed(WEIGHT_CONSTANTS, ": tl.constexpr")
    (place / "ops" / "conv2d.py").write_text(
        SOURCE.format(
            sizes=listed(SIZES), constants=constants, weight_sizes=listed(WEIGHT_SIZES), weight_constants=weights
        )
    )
    (place / "runtime" / "backend" / "_nvidia" / "tune_configs.yaml").write_text(TILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return place


def test_flaggems_is_looked_for_without_importing_it(package: Path) -> None:
    assert flaggems.missing() is None
    (package / "ops" / "conv2d.py").unlink()
    assert "no conv2d.py" in str(flaggems.missing())


def test_without_flaggems_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flaggems, "folder", lambda: None)
    assert flaggems.NEEDS in str(flaggems.missing())


def test_flaggems_has_no_tf32_and_no_linear_layers() -> None:
    taken = [c for c in cases("alexnet", 128, ["fp16", "tf32"]) if flaggems.takes(c)]
    assert {c.dtype for c in taken} == {"fp16"} and {c.layer for c in taken} == {f"conv{i}" for i in range(1, 6)}
    assert {c.pass_ for c in taken} == {"fprop", "dgrad", "wgrad"}


@pytest.mark.slow
def test_flaggems_kernels_are_compiled_where_it_is_installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [Case("alexnet", "conv3", pass_, 128, "fp16") for pass_ in ("fprop", "dgrad", "wgrad")]
    monkeypatch.setattr(peers, "peer_cases", lambda cases: [])
    rows = [from_data(Inspection, row, "row") for row in peers.inspect_peers(todo, ["sm_90"], cached=False)]
    assert [row.failure for row in rows] == [None] * 3
    assert [row.kernel for row in rows] == [f"FlagGems {flaggems.LISTS[c.pass_]}" for c in todo]
    # conv3: 128 x 13 x 13 pixels, 192 -> 384 channels; dgrad the other way round; 192 * 9 rows of dw x 384.
    assert [row.ctas for row in rows] == [338 * 6, 338 * 3, 27 * 12]
    assert all(str(row.mma).startswith("HGMMA") for row in rows)


@pytest.mark.slow
def test_ours_are_ahead_of_inductors_on_modelled_time() -> None:
    # Of AlexNet's 14 those where the peer comes nearest, and one backward pass; each costs 8 s of compiling.
    chosen = [("conv3", "fprop"), ("conv5", "fprop"), ("conv5", "dgrad")]
    todo = [Case("alexnet", *which, 128, "fp16") for which in chosen]
    ours = {
        c.first.case: c
        for c in case_sums(from_data(Inspection, r, "row") for r in inspect.inspect_all(todo, ["sm_90"]))
    }
    theirs = [from_data(Inspection, row, "row") for row in peers.inspect_peers(todo, ["sm_90"])]
    # Torch 2.11 has no backward template: its row says so, and there is nothing to be ahead of.
    none = [row for row in theirs if "Inductor calls cuDNN there" in (row.failure or "")]
    assert [row.pass_ for row in none] == ([] if peers.has_template("dgrad") else ["dgrad"])
    theirs = [row for row in theirs if row not in none]
    assert len([row for row in theirs if row.kernel.startswith("Inductor")]) == len(todo) - len(none) >= 2
    behind = []
    for row in theirs:
        mine = ours[row.case].modelled_us
        assert mine is not None and row.modelled_us is not None, row.failure
        if mine >= row.modelled_us:
            behind.append((row.case, row.kernel, mine, row.modelled_us))
    assert behind == []
