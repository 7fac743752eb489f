"""The self-test of every tile, rehearsed in the interpreter; the file of excluded tiles; workers that hang or die."""

import dataclasses
import json
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

import tileconv.kernels
from tileconv.bench import cases, cli, environment, selftest, workers
from tileconv.bench.cli import app
from tileconv.bench.selftest import Test as Trial
from tileconv.kernels import conv_candidates, conv_tile, excluded, hardware, pool_tiles, run_tiles, tiles
from tileconv.kernels.geometry import Conv2dProblem, Pool2dProblem
from tileconv.kernels.launch import conv_pool as launch_conv_pool

H100 = hardware.GPUS["H100"]
FILE_VARIABLE = excluded.VARIABLE


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An exclusion file of its own for the test, forgotten afterwards."""
    path = tmp_path / "excluded.json"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    excluded.forget()
    tiles._choose.cache_clear()
    yield path
    excluded.forget()
    tiles._choose.cache_clear()


def an_entry(**changes):
    import triton

    return {"gpu": "H100", "triton": triton.__version__, "pass": "fprop", "tile": "a", "reason": "wrong"} | changes


# Which tests


def test_every_pass_dtype_and_kind_of_tile_is_tested():
    found = selftest.tests(selftest.DEFAULT_DTYPES, H100)
    assert len(found) == len({(t.shape, t.pass_, t.dtype, t.name) for t in found})
    tiled = [t for t in found if t.tile]
    assert {(t.pass_, t.dtype) for t in tiled} == {
        (pass_, dtype) for pass_ in selftest.PASSES for dtype in selftest.DEFAULT_DTYPES
    }
    assert {t.tile["formulation"] for t in tiled} == set(conv_tile.FORMULATIONS)
    assert {selftest.shapes()[t.shape].op for t in found if not t.tile} > {"conv2d", "max_pool2d", "cross_entropy"}


def test_the_tiles_in_use_come_before_the_others():
    found = [t for t in selftest.tests(["fp16"], H100) if t.tile]
    problem = cases.conv_problem(cases.shape_of(cases.Case("alexnet", "conv2", "fprop", 128, "fp16")))
    used = str(tiles.choose(problem, "fprop", torch.float16, "ieee", H100))
    place = next(i for i, t in enumerate(found) if (t.pass_, t.name) == ("fprop", used))
    assert place < len(found) // 5


def test_gpus_without_descriptors_are_tested_with_pointers():
    found = [t for t in selftest.tests(["fp16"], hardware.GPUS["A100"]) if t.tile]
    assert {t.tile["formulation"] for t in found} == {"gather"}


def test_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match="nearest: fp64"):
        selftest.tests(["fp61"], H100)


# One test


def box_trial(**changes):
    """The first boxed fprop tile on the smallest problem."""
    found = next(
        t for t in selftest.tests(["fp16"], H100) if t.tile and t.tile["formulation"] == "box" and t.pass_ == "fprop"
    )
    return dataclasses.replace(found, **changes)


def test_a_forced_tile_is_right_in_the_interpreter():
    trial = box_trial()
    assert selftest.run_test(Trial(**json.loads(json.dumps(dataclasses.asdict(trial)))), "cpu") == ""


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(lambda y, n: y + 1, "error 1"), (lambda y, n: y if n == 1 else y.nextafter(y + 1), "other bits")],
    ids=["wrong", "unsteady"],
)
def test_what_is_wrong_with_a_kernel_is_said(monkeypatch, spoil, reason):
    real, count = selftest.work, iter(range(1, 9))

    def work(side, case, shape, t):
        run = real(side, case, shape, t)
        return (lambda: spoil(run(), next(count))) if side == "ours" else run

    monkeypatch.setattr(selftest, "work", work)
    number = [shape.op for shape in selftest.shapes()].index("avg_pool2d")
    assert reason in selftest.run_test(Trial(number, "forward", "fp64"), "cpu")


def test_a_worker_answers_for_its_errors_and_leaves_after_lasting_ones(monkeypatch):
    broken = dataclasses.asdict(Trial(0, "sideways", "fp32"))
    assert "reason" in selftest.answer(broken, "cpu") and "last" not in selftest.answer(broken, "cpu")

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert selftest.answer(broken, "cuda")["last"] is True


OPERATIONS = sorted({shape.op for shape in selftest.shapes()})


@pytest.mark.filterwarnings("ignore:max_unpooling2d_forward_out does not have a deterministic")
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_pass_of_every_operation_is_called_rightly(op):
    """Each pass alone, ours against PyTorch's in float64, on the first layer of its operation."""
    number, shape = next((i, s) for i, s in enumerate(selftest.shapes()) if s.op == op)
    for pass_ in cases.passes_of(shape):
        assert selftest.run_test(Trial(number, pass_, "fp32"), "cpu") == "", pass_


# A run


def answering(monkeypatch, answers):
    """Workers that answer from `answers(test)` at once."""

    def run_tasks(module, tasks, **settings):
        assert module == "tileconv.bench.selftest" and settings["seconds_each"] and settings["deadline"]
        return [answers(Trial(**task)) for task in tasks]

    monkeypatch.setattr(selftest, "run_tasks", run_tasks)


def on_a_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "interpreting", lambda: False)
    monkeypatch.setattr(hardware, "gpu_of", lambda device: H100)
    monkeypatch.setattr(environment, "require_launches", lambda: None)


def test_nothing_is_excluded_where_nothing_can_be_launched(file, monkeypatch):
    def broken(x):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(tileconv.kernels, "relu", broken)
    monkeypatch.setattr(hardware, "interpreting", lambda: False)
    monkeypatch.setattr(torch, "ones", lambda *a, **k: None)
    with pytest.raises(ValueError, match=r"no kernel can be launched here: .*find C compiler.*Python's headers"):
        selftest.run_selftest(dtypes=["fp16"])
    assert not file.exists()


def test_what_fails_is_never_chosen_again(file, monkeypatch):
    on_a_gpu(monkeypatch)
    problem = selftest.conv_problem(selftest.PROBLEMS[0])
    chosen = tiles.choose(problem, "fprop", torch.float16, "ieee", H100)
    culprit = str(chosen)
    answering(monkeypatch, lambda t: {"reason": "error 7" if (t.pass_, t.name) == ("fprop", culprit) else ""})
    found = selftest.run_selftest(dtypes=["fp16"])
    assert {(t.pass_, t.name) for t, _ in found.failed} == {("fprop", culprit)}
    (entry,) = json.loads(file.read_text())
    assert (entry["gpu"], entry["pass"], entry["tile"]) == ("H100", "fprop", culprit)
    assert entry["reason"] == "fp16: error 7"
    tiles._choose.cache_clear()
    assert str(tiles.choose(problem, "fprop", torch.float16, "ieee", H100)) != culprit
    other = dataclasses.replace(H100, name="another GPU")
    assert tiles.choose(problem, "fprop", torch.float16, "ieee", other) == chosen
    with tiles.override(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}):
        assert tiles.choose(problem, "fprop", torch.float16, "ieee", H100) == chosen, "what is insisted on is done"
    assert "1 tiles are excluded on this GPU" in "\n".join(selftest.summary(found))
    # Mended, it is taken off the list; what belongs to others stays.
    file.write_text(json.dumps([entry, an_entry(gpu="B200")]))
    answering(monkeypatch, lambda t: {"reason": ""})
    assert selftest.run_selftest(dtypes=["fp16"]).excluded == 0
    assert [e["gpu"] for e in json.loads(file.read_text())] == ["B200"]


def test_what_was_not_reached_keeps_its_entry(file, monkeypatch):
    on_a_gpu(monkeypatch)
    name = next(t.name for t in selftest.tests(["fp16"], H100) if t.tile and t.pass_ == "fprop")
    file.write_text(json.dumps([an_entry(tile=name)]))
    answering(monkeypatch, lambda t: {"late": ""})
    found = selftest.run_selftest(dtypes=["fp16"])
    assert (found.passed, found.failed, found.excluded) == (0, (), 1) and found.late > 100
    assert json.loads(file.read_text()) == [an_entry(tile=name)]


def test_a_first_layer_in_runs_leaves_excluded_tiles_out(file):
    problem = Conv2dProblem(128, 3, 224, 224, 64, 11, 11, (4, 4), ((2, 2), (2, 2)))
    best = run_tiles.choose_runs(problem, "fprop", torch.float16, "ieee", H100)
    file.write_text(json.dumps([an_entry(tile=str(best))]))
    excluded.forget()
    run_tiles.choose_runs.cache_clear()
    assert run_tiles.choose_runs(problem, "fprop", torch.float16, "ieee", H100) != best
    run_tiles.choose_runs.cache_clear()


@pytest.fixture
def pooled(file):
    """A convolution, the max-pool behind it and a dtype; and a function that excludes tiles and forgets choices."""

    def forget():
        excluded.forget()
        for cached in (pool_tiles._choose, pool_tiles._why_slower, pool_tiles._why_no_tile, tiles._choose):
            cached.cache_clear()

    def exclude(names):
        file.write_text(json.dumps([an_entry(tile=str(name)) for name in names]))
        forget()

    problem = Conv2dProblem(128, 64, 112, 112, 64, 3, 3, padding=((1, 1), (1, 1)))
    pool = Pool2dProblem(128, 64, 112, 112, (2, 2), (2, 2))
    forget()
    yield (problem, pool, torch.float16), exclude
    forget()


def test_a_convolution_that_pools_leaves_excluded_tiles_out(pooled):
    operands, exclude = pooled
    best = pool_tiles.choose_pooled(*operands, "ieee", H100)
    assert pool_tiles.fuse_pool(*operands, "ieee", H100)
    exclude([best])
    second = pool_tiles.choose_pooled(*operands, "ieee", H100)
    assert second != best and second in pool_tiles.candidates(*operands, H100)
    assert pool_tiles.choose_pooled(*operands, "ieee", dataclasses.replace(H100, name="another GPU")) == best
    with tiles.override(**{f.name: getattr(best, f.name) for f in dataclasses.fields(best)}):
        assert pool_tiles.choose_pooled(*operands, "ieee", H100) == best, "what is insisted on is done"


def test_a_convolution_that_pools_runs_as_two_kernels_where_no_tile_is_left(pooled):
    operands, exclude = pooled
    problem, pool, dtype = operands
    exclude(pool_tiles.candidates(*operands, H100))
    reason = pool_tiles.why_impossible(*operands, "ieee", H100)
    assert reason == "a self-test on H100 excluded every tile of the kernel that pools"
    assert pool_tiles.why_separate(*operands, "ieee", H100) == reason

    def image(extents, kind=dtype):
        return torch.empty(extents, dtype=kind, device="meta", memory_format=torch.channels_last)

    y, switch = image(pool.y_shape), image(pool.y_shape, torch.uint8)
    arguments = (problem, pool, image(problem.x_shape), image(problem.w_shape), None, y, switch)
    apart = launch_conv_pool.plan(
        *arguments, gpu=H100, activation="relu", precision="ieee", channels_last=True, batch_invariant=False
    )
    assert [launch.kernel.__name__ for launch in apart] == ["fprop_box", "max_forward"]
    assert apart[0].tile not in map(str, pool_tiles.candidates(*operands, H100))
    with pytest.raises(RuntimeError, match="every tile for this fprop failed the self-test on H100"):
        launch_conv_pool.plan_conv_pool(*arguments, gpu=H100)


def test_no_tile_left_is_said_where_it_is_met(file, monkeypatch):
    problem = selftest.conv_problem(selftest.PROBLEMS[0])
    every = conv_candidates.clean_candidates(problem, "fprop", torch.float16, "ieee", H100)
    file.write_text(json.dumps([an_entry(tile=str(tile)) for tile in every]))
    with pytest.raises(RuntimeError, match=r"every tile for this fprop failed the self-test on H100"):
        tiles.choose(problem, "fprop", torch.float16, "ieee", H100)
    tiles.choose(problem, "dgrad", torch.float16, "ieee", H100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        (json.dumps([an_entry(), an_entry(tile=3)]), r"\[1\]\.tile must be a string"),
        ("[7]", r"\[0\]\.gpu must be a string"),
    ],
)
def test_a_broken_file_names_itself_and_its_field(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        excluded.names("H100", "fprop")
    assert str(file) in str(caught.value)


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.setenv(FILE_VARIABLE, "")
    assert excluded.path() is None and excluded.load(None) == []
    monkeypatch.delenv(FILE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert excluded.path() == tmp_path / "tileconv" / "excluded.json"


# The command


def test_the_command_rehearses_in_the_interpreter(file, monkeypatch):
    """Real workers, a test of each kind."""
    monkeypatch.setattr(selftest, "REHEARSED", 1)
    result = CliRunner().invoke(app, ["selftest", "--jobs", "1", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    assert "interpreter: 1 tests passed, 0 failed, 0 not reached" in result.output
    assert not file.exists()


def test_a_failure_is_the_exit_status(file, monkeypatch):
    answering(monkeypatch, lambda t: {"error": "worker ended with status -9: "})
    result = CliRunner().invoke(app, ["selftest", "--dtype", "fp32"])
    assert result.exit_code == 1
    assert "fprop fp32: worker ended with status -9" in result.output and "cannot be left out" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dtype", "float16"], 2, "dtype='float16' is unknown"),
        (["--minutes", "0"], 2, "minutes=0 must be more than 0"),
        (["--minutes", "nan"], 2, "minutes=nan must be more than 0"),
        (["--sanitize"], 3, "compute-sanitizer is not on PATH"),
    ],
)
def test_bad_requests(file, monkeypatch, arguments, status, message):
    monkeypatch.setattr(selftest.shutil, "which", lambda program: None)
    result = CliRunner().invoke(app, ["selftest", *arguments])
    assert result.exit_code == status and message in result.output


def test_the_sanitizer_runs_both_tools_on_one_worker(monkeypatch, tmp_path):
    ran = []
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(selftest.shutil, "which", lambda name: str(program))

    def run(command, env, check):
        ran.append(command)
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return selftest.subprocess.CompletedProcess(command, len(ran) - 1)

    monkeypatch.setattr(selftest.subprocess, "run", run)
    result = CliRunner().invoke(app, ["selftest", "--sanitize", "--minutes", "8", "--dtype", "fp16"])
    assert result.exit_code == 1, "the worse of the two"
    assert [command[:3] for command in ran] == [[str(program), "--tool", tool] for tool in ("memcheck", "racecheck")]
    assert ran[0][-6:] == ["--jobs", "1", "--minutes", "4", "--dtype", "fp16"]


# Workers


WORKER = """
import os, sys, time
from tileconv.bench.workers import serve
def handle(task):
    if task["do"] == "hang":
        time.sleep(60)
    if task["do"] == "last":
        return {"pid": os.getpid(), "last": True}
    return {"pid": os.getpid()}
serve(handle)
"""


def run_worker(tmp_path, monkeypatch, todo, **settings):
    (tmp_path / "a_worker.py").write_text(WORKER)
    path = f"{tmp_path}:{':'.join(p for p in sys.path if p)}"
    return workers.run_tasks(
        "a_worker", [{"do": do} for do in todo], jobs=1, environment={"PYTHONPATH": path}, label=str, **settings
    )


def test_a_worker_that_hangs_is_killed_and_the_next_one_goes_on(tmp_path, monkeypatch):
    start = time.monotonic()
    first, hung, after = run_worker(tmp_path, monkeypatch, ["go", "hang", "go"], seconds_each=5.0)
    assert hung == {"error": "no answer within 5 s"}
    assert first["pid"] != after["pid"] and time.monotonic() - start < 40


def test_a_worker_may_give_its_last_answer(tmp_path, monkeypatch):
    first, after = run_worker(tmp_path, monkeypatch, ["last", "go"])
    assert first["last"] and after["pid"] != first["pid"]


def test_past_the_deadline_nothing_is_begun(tmp_path, monkeypatch):
    assert run_worker(tmp_path, monkeypatch, ["go"] * 3, deadline=time.monotonic() - 1) == [{"late": ""}] * 3


def test_workers_by_default_are_as_many_as_cores():
    assert 1 <= cli.default_jobs() <= 8


def test_env_counts_what_is_excluded(file, monkeypatch):
    from tileconv.bench import environment
    from tileconv.bench.records import Device

    file.write_text(json.dumps([an_entry(gpu="Some GPU"), an_entry()]))
    monkeypatch.setattr(environment, "device", lambda: Device("Some GPU", "cuda", "some-gpu"))
    assert f"excluded tiles: 1 ({file})" in CliRunner().invoke(app, ["env"]).output
