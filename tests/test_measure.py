"""Measuring as a GPU machine does it, rehearsed without one: torch.cuda, the timer and NVML are stand-ins.

Tensors lie on the CPU and our kernels run in the interpreter, so layers are small ones of AlexNet at batch 2.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
import triton
from torch import nn
from typer.testing import CliRunner

import tileconv.kernels
from tileconv.bench import (
    check,
    clocks,
    environment,
    gates,
    images,
    job,
    measure,
    passes,
    providers,
    records,
    report,
    warm,
)
from tileconv.bench.cases import Case, shape_of
from tileconv.bench.cli import app
from tileconv.bench.measure import Instruments, LostDevice, Measurement, applicable, key_of, time_case
from tileconv.bench.networks import Shape
from tileconv.bench.providers import Provider
from tileconv.bench.records import Device
from tileconv.bench.timing import CudaTimer, GraphError, Quantiles
from tileconv.model import version

POOL = Case("alexnet", "pool5", "forward", 2, "fp32")
CONV = Case("alexnet", "conv5", "fprop", 2, "fp32")
FC = Case("alexnet", "fc8", "fprop", 2, "fp32")
MEAN = Case("alexnet", "avgpool", "forward", 2, "fp32")
ROOT = Path(__file__).resolve().parent.parent


class FakeCuda:
    """What the code under test asks of torch.cuda, and what it may be told to answer."""

    def __init__(self):
        self.event_ms = 2.0
        self.lost = False
        self.capture_error = None
        self.captured = self.replayed = self.waits = 0
        self.capturing = False
        self.free = 1 << 34

    def synchronize(self, *_):
        self.waits += 1
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                pass

            def elapsed_time(self, end):
                return fake.event_ms

        class Graph:
            def replay(self):
                fake.replayed += 1

        @contextlib.contextmanager
        def graph(recorded, stream=None):
            if fake.capture_error is not None:
                raise fake.capture_error
            assert stream == "a stream of its own", "the default stream cannot be captured"
            fake.captured += 1
            yield

        properties = types.SimpleNamespace(uuid="1234", name="Some GPU", major=9, minor=0, multi_processor_count=132)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": self.synchronize,
            "Stream": lambda: "a stream of its own", "stream": lambda s: contextlib.nullcontext(),
            "current_stream": lambda: "a stream of its own", "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 5096, "mem_get_info": lambda: (self.free, 1 << 36),
            "current_device": lambda: 0, "get_device_properties": lambda index: properties,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


class StubTimer:
    """Runs every call once and says recorded times; remembers under which conditions it was asked."""

    def __init__(self, samples=(110.0, 120.0, 130.0, 140.0, 150.0), graph_error=None):
        self.samples, self.graph_error = list(samples), graph_error
        self.asked, self.buffers = [], []

    def __call__(self, calls, *, cold, graph=False, watch=lambda: None):
        if graph and self.graph_error is not None:
            raise self.graph_error
        for call in calls:
            call()
        watch()
        self.asked.append((cold, graph))
        self.buffers.append(len(calls))
        return self.samples


def spoilt(change, name="tileconv", alone=True):
    """PyTorch's forward pass with a fault in its result."""

    def make(case, shape, t):
        return lambda: change(passes.work("torch", case, shape, t)())

    return Provider(name, "channels_last", make, providers.SEARCHED, lambda case, shape: True, alone=alone)


def raising(error, name="other"):
    def run():
        raise error

    return Provider(
        name, "channels_last", lambda case, shape, t: run, providers.SEARCHED, lambda case, shape: True
    )  # fmt: skip


PLAIN = spoilt(lambda y: y, "torch")


def rows_of(case, some, timer=None, gauge=None):
    found = time_case(case, applicable(case, some), Instruments(timer or StubTimer(), gauge, "cpu"))
    return [row for rows in found for row in rows]


# Quantiles and the timer


def test_quantiles():
    q = Quantiles.of([50.0, 10.0, 30.0, 20.0, 40.0])
    assert (q.p20, q.p50, q.p80, q.p99, q.n) == pytest.approx((18.0, 30.0, 42.0, 49.6, 5))
    with pytest.raises(ValueError, match="at least one"):
        Quantiles.of([])
    with pytest.raises(ValueError, match="positive"):
        Quantiles.of([1.0, 0.0])


class Flush:
    count = 0

    def zero_(self):
        Flush.count += 1


def test_cuda_timer_counts_events_and_empties_the_cache(cuda):
    """The timer's own arithmetic, on events that say 2 ms for each recorded pair."""
    Flush.count = 0
    looks = []
    timer = CudaTimer(warmup_ms=1.0, measure_ms=20.0, _flush=Flush(), _flush_us=1e6)
    cold = timer([lambda: None], cold=True, watch=lambda: looks.append(1))
    assert cold == [2000.0] * 10
    assert Flush.count == 2 * 10, "one write to empty the cache, one for the host to get ahead"
    assert looks, "the clocks are read while the GPU works"
    assert timer([lambda: None], cold=False) == [200.0] * 10
    assert Flush.count == 20


def test_cold_calls_go_round_the_buffers_and_warm_ones_do_not(cuda):
    used = []
    several = [lambda i=i: used.append(i) for i in range(3)]
    timer = CudaTimer(warmup_ms=0.1, measure_ms=1.0, least=6, most=6, burst=1, _flush=Flush(), _flush_us=1e6)
    timer(several, cold=True)
    assert used[-6:] == [0, 1, 2, 0, 1, 2]
    timer(several, cold=False)
    assert used[-6:] == [0] * 6


def test_slow_hosts_get_more_writes_to_hide_behind():
    timer = CudaTimer(_flush=Flush(), _flush_us=80.0)
    assert timer._writes(10.0) == 2
    assert timer._writes(200.0) == 6
    assert timer._writes(1e9) == 32


def test_graphs_are_captured_on_a_stream_of_their_own(cuda):
    cuda.event_ms = 0.5
    timer = CudaTimer(warmup_ms=0.1, measure_ms=1.0, least=4, most=4, _flush=Flush(), _flush_us=1e6)
    assert timer([lambda: None] * 3, cold=False, graph=True) == [50.0] * 4, "ten calls a replay"
    assert cuda.captured == 1
    assert timer([lambda: None] * 3, cold=True, graph=True) == [500.0] * 4
    assert cuda.captured == 1 + 3 and cuda.replayed == 1 + 4 + 3 + 4


def test_what_no_graph_can_hold_is_said_and_memory_is_not_mistaken_for_it(cuda):
    timer = CudaTimer(warmup_ms=0.1, _flush=Flush(), _flush_us=1e6)
    cuda.capture_error = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(GraphError, match="not permitted"):
        timer([lambda: None], cold=False, graph=True)
    cuda.capture_error = torch.cuda.OutOfMemoryError("full")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        timer([lambda: None], cold=False, graph=True)


# Providers


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (CONV, {"tileconv", "cudnn-benchmark", "cudnn-heuristic", "cudnn-deterministic", "torch-default",
                "tileconv:pixel", "tileconv:box", "tileconv:gather", "im2col", "torch-compile"}),
        (dataclasses.replace(CONV, pass_="wgrad", dtype="fp16"),
         {"tileconv", "cudnn-benchmark", "cudnn-heuristic", "cudnn-deterministic", "tileconv:pixel", "tileconv:box",
          "tileconv:gather"}),
        (FC, {"tileconv", "torch", "torch-default", "torch-compile"}),
        (dataclasses.replace(POOL, pass_="backward"), {"tileconv", "torch"}),
    ],
    ids=["conv fprop fp32", "conv wgrad fp16", "linear", "pool backward"],
)  # fmt: skip
def test_who_computes_what(case, expected):
    assert {p.name for p, _ in applicable(case, providers.chosen())} == expected


def test_a_matrix_has_one_layout_and_an_image_two():
    assert [b.memory_format for p, b in applicable(FC, providers.chosen(["torch"]))] == ["contiguous"]
    both = [b.memory_format for p, b in applicable(CONV, providers.chosen(["cudnn-benchmark"]))]
    assert both == ["channels_last", "contiguous"]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["cudn-benchmark"], "nearest: cudnn-benchmark"), (["flaggems"], "not installed")],
)
def test_providers_that_are_not_there(names, message):
    with pytest.raises(ValueError, match=message):
        providers.chosen(names)
    assert "flaggems" not in {p.name for p in providers.chosen()}


def flags():
    backends = torch.backends
    return (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision, backends.cudnn.benchmark,
            backends.cudnn.deterministic)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("tileconv", "tf32", ("tf32", "tf32", True, False)),
        ("cudnn-benchmark", "tf32", ("tf32", "tf32", True, False)),
        ("cudnn-benchmark", "fp32", ("ieee", "ieee", True, False)),
        ("cudnn-heuristic", "fp32", ("ieee", "ieee", False, False)),
        ("cudnn-deterministic", "fp32", ("ieee", "ieee", True, True)),
    ],
)
def test_every_provider_runs_under_its_settings_and_leaves_none(cuda, name, dtype, expected):
    seen, before = [], flags()
    provider = providers.chosen([name])[0]
    spy = dataclasses.replace(
        provider, make=lambda case, shape, t: lambda: seen.append(flags()) or passes.work("torch", case, shape, t)()
    )
    rows_of(dataclasses.replace(CONV, dtype=dtype), [spy])
    assert set(seen) == {expected}
    assert flags() == before


def test_pytorchs_default_is_judged_by_the_precision_that_it_has(cuda, monkeypatch):
    (default,) = [p for p in providers.chosen(["torch-default"]) if p.memory_format == "contiguous"]
    monkeypatch.setattr(providers, "level_of", lambda provider, case: "tf32")
    assert providers.label_of("tf32") == "tf32" and providers.label_of("fp64") == "ieee"
    monkeypatch.setattr(measure, "level_of", lambda provider, case: "tf32")
    loose = rows_of(CONV, [dataclasses.replace(default)])[0]
    monkeypatch.setattr(measure, "level_of", lambda provider, case: "fp32")
    tight = rows_of(CONV, [dataclasses.replace(default)])[0]
    assert (loose.precision, tight.precision) == ("tf32", "ieee")
    assert loose.allowed > 100 * tight.allowed


def test_im2col_is_a_convolution_with_groups_bias_and_relu():
    with torch.device("meta"):
        module = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    shape = Shape("c", "conv2d", module, (2, 6, 9, 7), "relu")
    case = Case("x", "c", "fprop", 2, "fp64")
    t = passes.operands_of(shape, case, "cpu")
    torch.testing.assert_close(passes.im2col(case, shape, t)(), passes.work("torch", case, shape, t)())
    with pytest.raises(passes.Unsupported, match="wgrad of conv2d"):
        passes.im2col(dataclasses.replace(case, pass_="wgrad"), shape, t)


def test_flaggems_would_be_asked_for_its_kernels(cuda, monkeypatch):
    used = []

    @contextlib.contextmanager
    def use_gems():
        used.append(True)
        yield

    monkeypatch.setitem(sys.modules, "flag_gems", types.SimpleNamespace(use_gems=use_gems, __spec__=object()))
    monkeypatch.setattr(providers, "has_gems", lambda: True)
    assert all(row.passed for row in rows_of(POOL, providers.chosen(["flaggems"])))
    assert used


def test_compiled_calls_are_compiled_anew_for_every_case(cuda, monkeypatch):
    compiled = []
    providers._compiled_forward.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: compiled.append(dynamic) or run)
    assert all(row.passed for row in rows_of(POOL, providers.chosen(["torch-compile"]), StubTimer()))
    assert compiled == [False], "once for all buffers and both gates"
    providers._compiled_forward.cache_clear()


# Calls


def test_operands_are_random_and_weights_scaled():
    t = passes.operands(CONV, "cpu")
    for value in t.values():
        assert value.count_nonzero() == value.numel()
    assert float(t["w"][0].square().sum()) == pytest.approx(1.0, rel=0.2)
    again = passes.operands(CONV, "cpu")
    assert all(torch.equal(value, again[name]) for name, value in t.items())


@pytest.mark.parametrize("pass_", ["dgrad", "wgrad", "backward"])
@pytest.mark.parametrize("layer", ["conv5", "fc8"])
def test_passes_alone_agree_with_autograd(layer, pass_):
    case = Case("alexnet", layer, pass_, 2, "fp64")
    shape = shape_of(case)
    t = passes.operands(case, "cpu")
    wanted = {"dgrad": "x", "wgrad": "w", "backward": "b"}[pass_]
    leaf = t[wanted].clone().requires_grad_()
    y = passes.forward("torch", shape, t | {wanted: leaf}, activation=False)
    if pass_ == "backward":
        y = y * (t["y"] > 0) if shape.activation else y
    (expected,) = torch.autograd.grad(y, leaf, t["dy"])
    torch.testing.assert_close(passes.work("torch", case, shape, t)(), expected)


def test_unpooling_indices_are_distinct():
    with torch.device("meta"):
        shape = Shape("u", "max_unpool2d", nn.MaxUnpool2d(3, 2), (2, 3, 4, 5), None)
    t = passes.operands_of(shape, Case("x", "u", "forward", 2, "fp32"), "cpu")
    planes = t["indices"].flatten(2).flatten(0, 1)
    assert all(len(set(plane.tolist())) == 20 for plane in planes)


def test_unknown_operations_are_refused_by_name(cuda):
    with pytest.raises(passes.Unsupported, match="shuffle has no entry"):
        passes.known_op(Shape("s", "shuffle", nn.Identity(), (1,), None))


@pytest.mark.slow
@pytest.mark.parametrize("pass_", ["forward", "step"])
def test_whole_networks_on_both_sides(pass_):
    shape = Shape("lenet", "network", nn.Identity(), (2, 1, 28, 28), None)
    case = Case("networks", "lenet", pass_, 2, "fp32")
    t = passes.operands_of(shape, case, "cpu")
    wide = {"x": t["x"].double(), "target": t["target"]}
    exact = passes.work("torch", case, shape, wide)()
    run = passes.work("ours", case, shape, t)
    ours, theirs = run(), passes.work("torch", case, shape, t)()
    allowed = 2 * ((theirs - exact).abs().max() + 2**-23 * exact.abs().max())
    assert (ours - exact).abs().max() <= allowed
    assert torch.equal(run(), ours), "a learning rate of 0 makes every step the first"


# Gates and rows


def test_right_rows_are_timed_cold_and_warm(cuda):
    timer = StubTimer()
    rows = rows_of(POOL, [PLAIN], timer)
    assert timer.asked == [(True, False), (False, False)]
    assert timer.buffers == [3, 3]
    assert [(r.l2, r.method, r.p50_us, r.p99_us, r.n, r.status) for r in rows] == [
        ("cold", "events", 130.0, pytest.approx(149.6), 5, "timed"),
        ("warm", "events", 130.0, pytest.approx(149.6), 5, "timed"),
    ]
    row = rows[0]
    assert row.passed and row.tflops is None, "a pool has no FLOP/s"
    assert row.gbs == pytest.approx(4 * 2 * 256 * (13 * 13 + 6 * 6) / 130e-6 / 1e9)
    assert row.peak_bytes == 4096 and row.first_call_ms > 0
    assert row.repeatable and row.batch_invariant
    assert row.saved_bytes == 2 * 256 * (13 * 13 * 4 + 6 * 6 * 8), "PyTorch keeps its input and eight-byte indices"


def test_short_calls_are_replayed_from_graphs_as_well(cuda):
    timer = StubTimer([10.0, 20.0, 30.0])
    assert [(r.l2, r.method) for r in rows_of(POOL, [PLAIN], timer)] == [
        ("cold", "events"), ("warm", "events"), ("cold", "graph"), ("warm", "graph"),
    ]  # fmt: skip
    refused = rows_of(POOL, [PLAIN], StubTimer([10.0, 20.0], GraphError("not permitted")))
    assert [r.method for r in refused] == ["events", "events"]
    assert refused[0].passed and "no CUDA graph: GraphError: not permitted" in refused[0].note


def test_speed_of_a_convolution_and_its_tile(cuda):
    (ours,) = providers.chosen(["tileconv"])
    rows = rows_of(dataclasses.replace(CONV, dtype="fp16"), [ours])
    assert [r.status for r in rows] == ["timed", "timed"], rows[0].note
    assert rows[0].tflops == pytest.approx(2 * 2 * 256 * 13 * 13 * 256 * 9 / 130e-6 / 1e12)
    assert rows[0].tile.startswith("box ") and rows[0].precision == "fp16"
    assert rows[0].repeatable is True and rows[0].batch_invariant is not None
    assert rows[0].error <= rows[0].allowed


@pytest.mark.parametrize("pass_", ["dgrad", "wgrad", "backward"])
def test_our_backward_passes_are_timed_alone(cuda, pass_):
    rows = rows_of(dataclasses.replace(CONV, pass_=pass_, dtype="fp16"), providers.chosen(["tileconv"]))
    assert [r.status for r in rows] == ["timed", "timed"], rows[0].note
    assert rows[0].saved_bytes is None


def test_forced_formulations_say_which_tile_they_ran(cuda):
    rows = rows_of(CONV, providers.chosen(["tileconv:gather"]))
    assert rows[0].status == "timed" and rows[0].tile.startswith("gather ")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda y: y + 1, "outside its budget"),
        (lambda y: y * math.nan, "not finite"),
        (lambda y: y[:1], "another shape"),
    ],
    ids=["off by one", "nan", "wrong shape"],
)
@pytest.mark.parametrize("name", ["tileconv", "torch"])
def test_wrong_rows_have_no_speed_whoever_made_them(cuda, name, spoil, reason):
    timer = StubTimer()
    (row,) = rows_of(POOL, [spoilt(spoil, name)], timer)
    assert timer.asked == []
    assert (row.passed, row.status, row.p50_us, row.n) == (False, "wrong", None, 0)
    assert reason in row.note


def unsteady():
    """Right to a rounding, and other bits on every call."""
    count = 0

    def change(y):
        nonlocal count
        count += 1
        return y * (1 + 1e-9 * count)

    return change


def test_results_that_change_from_call_to_call(cuda):
    case = dataclasses.replace(POOL, dtype="fp64")
    level = 1e-6
    loose = gates.Reference(passes.work("torch", case, shape_of(case), passes.operands(case, "cpu"))(), level)
    t = passes.operands(case, "cpu")
    for ours, status in ((True, "a second call gives other bits"), (False, "")):
        change = unsteady()

        def make(tensors, change=change):
            run = passes.work("torch", case, shape_of(case), tensors)
            return lambda: change(run())

        found = gates.verdict(make, make(t)(), t, case, shape_of(case), loose, ours)
        assert (found.repeatable, found.reason) == (False, status)


def test_images_that_see_their_neighbours_are_found(cuda):
    """The second image decides about the first: right in the batch that the reference saw, wrong alone."""
    case = dataclasses.replace(POOL, dtype="fp64")
    t = passes.operands(case, "cpu")
    shape = shape_of(case)

    def make(tensors):
        y = passes.work("torch", case, shape, tensors)()
        return lambda: y if len(y) > 1 else y + 1

    exact = gates.Reference(make(t)(), 1e-6)
    found = gates.verdict(make, make(t)(), t, case, shape, exact, ours=True)
    assert found.batch_invariant is False and "depends on the rest of its batch" in found.reason
    assert not gates.verdict(make, make(t)(), t, case, shape, exact, True, alone=False).reason


def test_dropout_is_judged_by_its_own_mask():
    shape = Shape("d", "dropout", nn.Dropout(0.25), (64, 64), None)
    case = Case("x", "d", "forward", 64, "fp32")
    t = passes.operands_of(shape, case, "cpu")
    ref = gates.reference(case, shape, t, "fp32")

    def make(change):
        return lambda tensors: lambda: change(passes.work("torch", case, shape, tensors)())

    good = make(lambda y: y)
    assert gates.verdict(good, good(t)(), t, case, shape, ref, ours=True).reason == ""
    for wrong in (lambda y: y * 1.1, lambda y: torch.zeros_like(y)):
        assert gates.verdict(make(wrong), make(wrong)(t)(), t, case, shape, ref, ours=True).reason


def test_out_of_memory_and_errors_leave_the_others(cuda):
    some = [
        raising(torch.cuda.OutOfMemoryError("full"), "tileconv"),
        raising(RuntimeError("at /a/b/c.cu: broken"), "other"),
        raising(passes.Unsupported("no such pass"), "third"), PLAIN,
    ]  # fmt: skip
    rows = rows_of(POOL, some)
    assert [(r.provider, r.status) for r in rows[:3]] == [
        ("tileconv", "out of memory"), ("other", "failed"), ("third", "skipped"),
    ]  # fmt: skip
    assert [r.note for r in rows[:3]] == [
        "not timed: out of GPU memory", "not timed: RuntimeError: at c.cu: broken", "skipped: no such pass",
    ]  # fmt: skip
    assert [r.status for r in rows[3:]] == ["timed", "timed"]


def test_operands_that_do_not_fit_are_everybodys_row(cuda, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(measure, "operands", full)
    assert [r.status for r in rows_of(POOL, [PLAIN, spoilt(lambda y: y)])] == ["out of memory"] * 2


def test_little_free_memory_means_fewer_buffers(cuda):
    cuda.free = 0
    timer = StubTimer()
    rows_of(POOL, [PLAIN], timer)
    assert timer.buffers == [1, 1]


# Clocks


class FakeNvml(types.ModuleType):
    """pynvml with one GPU."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlClocksEventReasonGpuIdle, nvmlClocksEventReasonSwPowerCap = 1, 4
    nvmlClocksEventReasonSwThermalSlowdown = 32

    class NVMLError(Exception):
        pass

    def __init__(self, bits=(), uuids=("GPU-1234",)):
        super().__init__("pynvml")
        self.bits, self.uuids, self.clock = list(bits), uuids, 1980

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.uuids:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetClockInfo(self, handle, kind):
        assert (handle, kind) == (self.uuids[0], self.NVML_CLOCK_SM)
        self.clock -= 10
        return self.clock

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 60 + sensor

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.bits.pop(0) if len(self.bits) > 1 else (self.bits or [0])[0]


def test_a_throttled_row_is_marked(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([0, 1, 4, 36]))
    gauge, missing = clocks.open_gauge()
    assert missing == ""
    cold, warm = rows_of(POOL, [PLAIN], gauge=gauge)
    assert cold.throttled == (), "idle is no slowdown"
    assert warm.throttled == ("power cap",)
    assert cold.clocks_mhz == (1960.0, 1960.0) and cold.temperatures_c == (60.0, 60.0)
    later = clocks.Watch(gauge)
    later.look()
    assert later.fields["throttled"] == ("power cap", "thermal slowdown")


def test_older_libraries_name_the_reasons_differently(monkeypatch):
    nvml = FakeNvml([8])
    old = types.SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlDeviceGetClockInfo=nvml.nvmlDeviceGetClockInfo, nvmlDeviceGetTemperature=nvml.nvmlDeviceGetTemperature,
        nvmlDeviceGetCurrentClocksThrottleReasons=nvml.nvmlDeviceGetCurrentClocksEventReasons,
    )  # fmt: skip
    assert clocks.Gauge(old, "GPU-1234").read().reasons == ("hardware slowdown",)


@pytest.mark.parametrize(
    ("module", "message"),
    [(None, "nvidia-ml-py is not installed"), (FakeNvml(uuids=("GPU-other",)), "NVMLError: Not Found")],
    ids=["not installed", "not its GPU"],
)
def test_without_clocks_rows_are_timed_all_the_same(cuda, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    gauge, missing = clocks.open_gauge()
    assert gauge is None and message in missing
    assert rows_of(POOL, [PLAIN], gauge=gauge)[0].clocks_mhz == ()


def test_a_look_that_fails_is_one_look_less(cuda, monkeypatch):
    nvml = FakeNvml()
    gauge = clocks.Gauge(nvml, "GPU-1234")
    watch = clocks.Watch(gauge)
    watch.look()
    monkeypatch.setattr(nvml, "nvmlDeviceGetTemperature", lambda *_: (_ for _ in ()).throw(nvml.NVMLError("lost")))
    watch.look()
    assert len(watch.readings) == 1


# The loop over cases


FIRST, SECOND = PLAIN, dataclasses.replace(spoilt(lambda y: y, "cudnn-heuristic"), turn=1)


def a_run(cases, some=(FIRST, SECOND), **changes):
    return Measurement(cases, list(some), Instruments(StubTimer(), None, "cpu"), **changes)


def test_the_strongest_comparison_of_every_case_comes_before_anybodys_second(cuda):
    saved, said = [], []
    cases = [POOL, dataclasses.replace(FC, dtype="fp64"), FC]
    run = a_run(cases, save=lambda rows: saved.append(len(rows)), progress=lambda *a: said.append(a))
    run.go()
    order = list(dict.fromkeys((r.layer, r.dtype, r.provider) for r in run.rows))
    assert order == [
        ("fc8", "fp32", "torch"), ("pool5", "fp32", "torch"), ("fc8", "fp64", "torch"),
        ("fc8", "fp32", "cudnn-heuristic"), ("pool5", "fp32", "cudnn-heuristic"), ("fc8", "fp64", "cudnn-heuristic"),
    ]  # fmt: skip
    assert saved == [2, 4, 6, 8, 10, 12], "after every case"
    assert said[0] == (1, 6, "fc8 fprop fp32") and said[-1][:2] == (6, 6)


def test_what_the_time_budget_leaves_out_is_said_and_can_be_made_up_for(cuda):
    clock = iter(range(100))
    run = a_run([POOL, FC], deadline=1.5, now=lambda: next(clock))
    run.go()
    assert [(r.layer, r.provider, r.status) for r in run.rows[4:]] == [
        ("fc8", "cudnn-heuristic", "skipped"), ("pool5", "cudnn-heuristic", "skipped"),
    ]  # fmt: skip
    assert "time budget" in run.rows[-1].note
    again = a_run([POOL, FC], kept=run.rows)
    again.go()
    assert len(again.rows) == 8 and not [r for r in again.rows if r.status == "skipped"]
    assert len(again.instruments.timer.asked) == 4, "only what was left out"


def test_a_lost_gpu_ends_the_run_with_its_culprit_named(cuda):
    def illegal():
        cuda.lost = True
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    culprit = Provider("tileconv", "channels_last", lambda *a: illegal, providers.SEARCHED, lambda case, shape: True)
    saved = []
    run = a_run([POOL], [FIRST, culprit, spoilt(lambda y: y, "never reached")], save=lambda rows: saved.extend(rows))
    with pytest.raises(LostDevice, match="illegal memory access"):
        run.go()
    assert [(r.provider, r.status) for r in run.rows][-1] == ("tileconv", "failed")
    assert saved[-1] == run.rows[-1]
    cuda.lost = False
    again = a_run([POOL], [FIRST, culprit, spoilt(lambda y: y, "reached")], kept=run.rows)
    again.go()
    assert [r.provider for r in again.rows] == ["torch", "torch", "tileconv", "reached", "reached"]


# First calls in processes of their own


def test_a_first_call_and_its_errors(cuda, monkeypatch):
    loss = Case("layers", "cross_entropy", "backward", 2, "fp32")  # whose gradient has no first image
    for case in (POOL, loss):
        assert warm.first_call(case.to_json(), "cpu")["first_call_ms"] > 0
    monkeypatch.setattr(warm, "work", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
    assert warm.first_call(POOL.to_json(), "cpu") == {"failed": "RuntimeError: broken"}

    def lost(*_):
        cuda.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(warm, "work", lost)
    found = warm.first_call(POOL.to_json(), "cpu")
    assert found["last"] and "illegal memory access" in found["lost"]


def test_what_kills_its_worker_is_not_run_where_it_could_kill_more(cuda, monkeypatch):
    answers = [{"error": "worker ended with status -11: "}, {"failed": "RuntimeError: x"}, {"late": ""},
               {"lost": "illegal", "last": True}, {"first_call_ms": 9.0}]  # fmt: skip
    monkeypatch.setattr(warm, "run_tasks", lambda module, tasks, **_: answers)
    cases = [POOL, MEAN, FC, CONV, dataclasses.replace(FC, batch=3)]
    found = warm.first_calls(cases, jobs=2, deadline=0.0, progress=lambda *a: None)
    assert set(found) == {POOL, CONV, cases[-1]}
    some = [spoilt(lambda y: y), PLAIN]
    instruments = Instruments(StubTimer(), None, "cpu", found)
    rows = [row for rows in time_case(POOL, applicable(POOL, some), instruments) for row in rows]
    assert [(r.provider, r.status) for r in rows] == [("tileconv", "failed"), ("torch", "timed"), ("torch", "timed")]
    assert "worker ended with status -11" in rows[0].note


# The job, as a GPU machine runs it


A_CHECK = records.Check(
    case="alexnet/conv2/fp32", layer="conv2", op="conv2d", shape=(2, 64, 27, 27), dtype="fp32",
    memory_format="channels_last", formulation="chosen", error=0.0, torch_error=0.0, allowed=1.0, passed=True,
    seconds=0.1,
)  # fmt: skip


@pytest.fixture
def gpu_job(cuda, monkeypatch):
    """`tileconv bench` on a machine that seems to have a GPU: one check, nothing compiled, two cases timed.

    Calling it runs the command in `tmp_path` with the providers "tileconv" and "torch"; it counts checks and timings.
    """
    seen = types.SimpleNamespace(checked=0, timers=[])

    def checks(*_, **__):
        seen.checked += 1
        return [records.to_data(A_CHECK)]

    def timer():
        seen.timers.append(StubTimer())
        return seen.timers[-1]

    monkeypatch.setattr(environment, "device", lambda: Device("Some GPU", "cuda", "some-gpu"))
    monkeypatch.setattr(job, "checks", checks)
    monkeypatch.setattr(job, "inspect_all", lambda *a, **k: [])
    monkeypatch.setattr(job, "alexnet_saved", lambda: [])
    monkeypatch.setattr(report, "render", lambda draw, size: (b"<svg/>", b"<svg/>", b"\x89PNG"))
    monkeypatch.setattr(warm, "run_tasks", lambda module, tasks, **_: [{"first_call_ms": 1234.5} for _ in tasks])
    monkeypatch.setattr(job.Job, "measured", lambda self: [POOL, MEAN])
    monkeypatch.setattr(job, "CudaTimer", timer)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([4]))

    def run(out, *arguments):
        some = ["--provider", "tileconv", "--provider", "torch"]
        return CliRunner().invoke(app, ["bench", "--out", str(out), *some, *arguments])

    run.seen = seen
    return run


def stored(out):
    return records.load(out / "data" / "some-gpu.json")


def test_the_whole_command_on_a_gpu(gpu_job, tmp_path):
    result = gpu_job(tmp_path, "--minutes", "3", "--jobs", "2")
    assert result.exit_code == 0, result.output
    record = stored(tmp_path)
    assert record.command == "tileconv bench --batch 2 --jobs 2 --provider tileconv --provider torch --minutes 3"
    assert {(t.layer, t.provider, t.memory_format, t.status) for t in record.timings} == {
        ("pool5", "tileconv", "channels_last", "timed"), ("pool5", "torch", "channels_last", "timed"),
        ("pool5", "torch", "contiguous", "timed"), ("avgpool", "tileconv", "channels_last", "timed"),
        ("avgpool", "torch", "channels_last", "timed"), ("avgpool", "torch", "contiguous", "timed"),
    }  # fmt: skip
    assert {t.throttled for t in record.timings} == {("power cap",)}
    assert {t.first_call_ms for t in record.timings if t.provider == "tileconv"} == {1234.5}
    assert all(t.first_call_ms < 1000 for t in record.timings if t.provider == "torch")
    assert "Measured: " in result.output
    page = (tmp_path / "some-gpu.md").read_text()
    assert "Some GPU" in page and "pool5" in page
    assert str(tmp_path) not in (tmp_path / "data" / "some-gpu.json").read_text()


def test_the_report_calls_noise_noise(tmp_path):
    check = dataclasses.replace(A_CHECK, layer="network", note=images.NOISE)
    base = records.load(ROOT / "reports" / "data" / "interpreter.json")
    for row, said in ((check, "smooth noise (scikit-image"), (A_CHECK, "real photographs")):
        report.render_report(dataclasses.replace(base, checks=(row,), inspections=()), tmp_path)
        assert said in (tmp_path / "interpreter.md").read_text()


def test_what_cannot_launch_is_said_before_anything_is_checked(gpu_job, tmp_path, monkeypatch):
    def broken(x):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(tileconv.kernels, "relu", broken)
    result = gpu_job(tmp_path)
    assert result.exit_code == 2 and gpu_job.seen.checked == 0
    assert "no kernel can be launched here: RuntimeError: Failed to find C compiler" in result.output


def test_a_missing_library_is_said_once(gpu_job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    result = gpu_job(tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.count("nvidia-ml-py is not installed") == 1
    assert (tmp_path / "some-gpu.md").read_text().count("nvidia-ml-py was not installed") == 1


def test_two_runs_into_one_file_are_refused_unless_asked_for(gpu_job, tmp_path):
    assert gpu_job(tmp_path).exit_code == 0
    before = stored(tmp_path)
    refused = gpu_job(tmp_path)
    assert refused.exit_code == 2
    for way_out in ("--resume", "--overwrite", "--out"):
        assert way_out in refused.output
    assert stored(tmp_path) == before and gpu_job.seen.checked == 1
    again = gpu_job(tmp_path, "--resume")
    assert again.exit_code == 0, again.output
    assert stored(tmp_path).timings == before.timings
    assert gpu_job.seen.checked == 1 and gpu_job.seen.timers[1].asked == [], "nothing is done twice"
    anew = gpu_job(tmp_path, "--overwrite")
    assert anew.exit_code == 0 and gpu_job.seen.timers[2].asked
    assert "exclude each other" in gpu_job(tmp_path, "--overwrite", "--resume").output


def test_ctrl_c_keeps_what_is_measured_and_resume_goes_on(gpu_job, tmp_path, monkeypatch):
    real = measure.time_case
    begun = []

    def interrupted(case, able, instruments):
        begun.append(case)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(case, able, instruments)

    monkeypatch.setattr(measure, "time_case", interrupted)
    result = gpu_job(tmp_path)
    assert result.exit_code == 130, result.output
    assert "--resume goes on from it" in result.output
    assert {t.layer for t in stored(tmp_path).timings} == {"pool5"}
    assert "pool5" in (tmp_path / "some-gpu.md").read_text()
    again = gpu_job(tmp_path, "--resume")
    assert again.exit_code == 0, again.output
    assert [t.layer for t in stored(tmp_path).timings] == ["pool5"] * 6 + ["avgpool"] * 6
    assert gpu_job.seen.checked == 1


def test_ctrl_c_before_anything_is_measured_writes_nothing(gpu_job, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "checks", stop)
    result = gpu_job(tmp_path)
    assert result.exit_code == 130 and "nothing was written" in result.output
    assert not list((tmp_path / "data").iterdir())


def test_every_case_is_on_disk_before_the_next_begins(gpu_job, tmp_path, monkeypatch):
    real = measure.time_case

    def killed(case, able, instruments):
        if case is MEAN:
            raise SystemExit(9)
        return real(case, able, instruments)

    monkeypatch.setattr(measure, "time_case", killed)
    assert gpu_job(tmp_path).exit_code == 9
    assert [t.layer for t in stored(tmp_path).timings] == ["pool5"] * 6


def test_a_lost_gpu_is_gone_round_in_a_fresh_process(gpu_job, tmp_path, monkeypatch):
    def lost(case, able, instruments):
        raise LostDevice("an illegal memory access", [dataclasses.replace(able[0][1], status="failed", note="broken")])

    started = []

    def execv(program, arguments):
        started.append(arguments)
        raise SystemExit(0)  # the real one does not return

    monkeypatch.setattr(measure, "time_case", lost)
    monkeypatch.setattr("os.execv", execv)
    result = gpu_job(tmp_path, "--minutes", "8")
    assert "an illegal memory access" in result.output
    (arguments,) = started
    assert arguments[1:4] == ["-m", "tileconv.bench", "bench"] and arguments[-1] == "--resume"
    assert 7 < float(arguments[arguments.index("--minutes") + 1]) <= 8
    assert arguments[arguments.index("--out") + 1] == str(tmp_path)
    assert [t.status for t in stored(tmp_path).timings] == ["failed"]


def edited(out, change):
    file = out / "data" / "some-gpu.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


OTHERS = {
    "triton": (lambda d: d["versions"].update(triton="3.5.0"), "measured with triton 3.5.0"),
    "commit": (lambda d: d["commit"].update(hash="f" * 40), f"measured at commit {'f' * 40}"),
    "malformed": (lambda d: d["timings"][0].update(p50_us="fast"), r"timings[0].p50_us: expected float"),
    "schema": (lambda d: d.update(schema=1), "written by an older version"),
}


def test_resume_refuses_rows_of_another_kind(gpu_job, tmp_path):
    assert gpu_job(tmp_path).exit_code == 0
    file = tmp_path / "data" / "some-gpu.json"
    good = file.read_bytes()
    for name, (change, message) in OTHERS.items():
        file.write_bytes(good)
        edited(tmp_path, change)
        before = file.read_bytes()
        result = gpu_job(tmp_path, "--resume")
        assert result.exit_code == 2 and message in result.output.replace("\n", ""), name
        assert file.read_bytes() == before, name
    assert gpu_job(tmp_path, "--overwrite").exit_code == 0


def test_a_record_without_timings_is_replaced(gpu_job, tmp_path):
    assert gpu_job(tmp_path).exit_code == 0
    edited(tmp_path, lambda d: d.update(timings=[]))
    assert gpu_job(tmp_path).exit_code == 0
    assert stored(tmp_path).timings


def test_without_a_gpu_a_record_is_replaced_whatever_it_is(tmp_path, monkeypatch):
    """The committed record of the interpreter must not make a fresh clone's first run ask for a flag."""
    monkeypatch.setattr(job, "checks", lambda *a, **k: [records.to_data(A_CHECK)])
    monkeypatch.setattr(job, "inspect_all", lambda *a, **k: [])
    monkeypatch.setattr(job, "alexnet_saved", lambda: [])
    monkeypatch.setattr(report, "render", lambda draw, size: (b"<svg/>", b"<svg/>", b"\x89PNG"))
    for _ in range(2):
        result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
    (tmp_path / "data" / "interpreter.json").write_text("of an older kind")
    assert CliRunner().invoke(app, ["bench", "--out", str(tmp_path)]).exit_code == 0
    assert records.load(tmp_path / "data" / "interpreter.json").timings == ()


def test_every_run_inspects_what_its_pictures_are_drawn_from():
    drawn = {(step.suite, step.batch) for step in job.INSPECTED if "fprop" in step.passes and step.arch == "sm_90"}
    assert drawn == {("dilated", 16), *(("alexnet", batch) for batch in (1, 8, 32, 128, 512))}
    assert all(job.cases(s.suite, s.batch, job.INSPECTED_DTYPES, s.passes) for s in job.INSPECTED)


def test_suites_that_are_asked_for_are_inspected_without_a_gpu_too(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(job, "checks", lambda *a, **k: [records.to_data(A_CHECK)])
    monkeypatch.setattr(job, "inspect_all", lambda cases, archs, **k: read.extend(c.network for c in cases) or [])
    monkeypatch.setattr(job, "alexnet_saved", lambda: [])
    monkeypatch.setattr(report, "render", lambda draw, size: (b"<svg/>", b"<svg/>", b"\x89PNG"))
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path), "--suite", "grouped", "--suite", "pools"])
    assert result.exit_code == 0, result.output
    assert set(read) == {"grouped", "pools"}
    assert "--suite grouped --suite pools" in records.load(tmp_path / "data" / "interpreter.json").command


def test_suites_are_timed_at_their_own_batch_and_in_their_own_order():
    found = job.Job(suites=("latency", "dilated"), dtypes=("fp16",)).measured()
    assert {case.network: case.batch for case in found} == {"latency": 1, "dilated": 16}
    assert measure.in_order(found)[0].layer in ("conv2", "dilation-2")


def test_suites_about_latency_are_always_replayed_from_graphs(cuda):
    case = Case("latency", "pool5", "forward", 1, "fp32")
    assert {(r.l2, r.method) for r in rows_of(case, [PLAIN])} == {
        (l2, method) for l2 in ("cold", "warm") for method in ("events", "graph")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "alexnett"], "nearest: alexnet"),
        (["--dtype", "float16"], "dtype='float16' is unknown"),
        (["--provider", "cudn-heuristic"], "nearest: cudnn-heuristic"),
        (["--provider", "flaggems"], "pip install flag_gems"),
        (["--minutes", "0"], "minutes=0 must be more than 0"),
        (["--minutes", "nan"], "minutes=nan must be more than 0"),
    ],
)
def test_bad_arguments_are_said_before_anything_runs(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(job, "checks", lambda *a, **k: pytest.fail("ran before the arguments were looked at"))
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_of_ours_ends_with_an_error(gpu_job, tmp_path, monkeypatch):
    real = passes.work

    def wrong(side, case, shape, t):
        run = real(side, case, shape, t)
        return (lambda: run() + 1) if side == "ours" and case.layer == "pool5" else run

    monkeypatch.setattr(providers, "work", wrong)
    result = gpu_job(tmp_path)
    assert result.exit_code == 1
    assert "failed: pool5 forward fp32 tileconv: not timed: the result is outside its budget" in result.output


def test_records_of_schema_2_still_load(gpu_job, tmp_path):
    assert gpu_job(tmp_path).exit_code == 0
    added = {"status", "precision", "tile", "method", "p99_us", "gbs", "repeatable", "batch_invariant",
             "first_call_ms", "peak_bytes", "saved_bytes", "clocks_mhz", "temperatures_c", "throttled"}  # fmt: skip

    def older(data):
        data["schema"] = 2
        for row in data["timings"]:
            for name in added:
                del row[name]

    edited(tmp_path, older)
    record = stored(tmp_path)
    assert record.schema == records.SCHEMA
    assert {(t.status, t.method, t.throttled) for t in record.timings} == {("timed", "events", ())}
    assert key_of(record.timings[0])[:2] == ("alexnet", "pool5")


def test_checks_say_which_fp32_they_mean(monkeypatch):
    """PyTorch's default for convolutions on a GPU is TF32, and fp32 rows are not about that."""
    asked = []
    real = providers.precision
    monkeypatch.setattr(providers, "precision", lambda dtype: asked.append(dtype) or real(dtype))
    task = {"batch": 2, "dtype": "fp32", "layer": "avgpool", "formulation": "chosen", "memory_format": "channels_last"}
    assert check.run_check(task)["passed"] and asked == ["fp32"]


BARE = """
import sys
for name in ("skimage", "mlxtend", "pynvml", "transformers", "flag_gems", "hatchling"):
    sys.modules[name] = None
import importlib.metadata
def unknown(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = unknown
import tileconv.kernels
from tileconv.bench import check, cli, clocks, environment, job, measure, memory, passes, providers, selftest, whole
assert environment.versions().tileconv[0].isdigit()
assert clocks.open_gauge()[0] is None
task = {"batch": 2, "dtype": "fp32", "layer": "pool5", "formulation": "chosen", "memory_format": "channels_last"}
row = check.run_check(task)
assert row["passed"], row
assert "smooth noise" in row["note"], row
assert memory.images(2)[0].shape == (2, 3, 224, 224)
assert "smooth noise" in whole.pictures("alexnet", 2, 96)[2]
row = whole.run_check({"network": "lenet", "op": "training step", "dtype": "fp16", "batch": 2})
assert row["passed"] and "smooth noise" in row["note"], row
"""


@pytest.mark.slow
def test_the_gpu_path_needs_no_more_than_a_lent_machine_has():
    """torch, triton, pandas, matplotlib, typer and rich, and a checkout on the path that is not installed."""
    ran = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    installed = version.own_version()
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert version.own_version() == installed
    assert version.versions() == {  # which `tileconv train` needs when an epoch is over
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "numpy": numpy.__version__, "tileconv": installed,
    }  # fmt: skip
