"""What the cost model says of a case's launches, joined with the bytes that they request: modelled, never measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import DTYPES, Case, parts, shape_of
from .cases import launches as launches_of
from .plans import matrix_product
from .problems import bytes_least, conv_pool_problem, conv_problem
from .traffic import traffic
from .traffic_base import Traffic

IN_RUNS = ("fprop_runs", "wgrad_runs", "fprop_inner_runs", "wgrad_inner_runs")
PRODUCTS = ("fprop_box", "fprop_across", "fprop_gather", "wgrad_box", "wgrad_gather", *IN_RUNS)
FINISHES = ("fprop_finish", "add_slices")
NOTHING: dict[str, Any] = {
    "useful_rows": None, "useful_columns": None, "wave_efficiency": None, "bytes_read": None, "bytes_written": None,
    "bytes_least": None, "flops_done": None, "flops_needed": None, "modelled_us": None, "floor_us": None,
    "bound_by": None, "peak_tflops": None, "dram_gbs": None,
}  # fmt: skip


def predictions(case: Case, launches: Sequence[Any], gpu: Any) -> list[dict[str, Any]]:
    """The modelled half of a row for every launch of a case; None where the model does not know the kernel.

    `floor_us` is the whole case's, the same in each of its rows; their `modelled_us` add up to the case's time. A whole
    network's rows are those of its layers.
    """
    if shape_of(case).op == "network":
        return _together(case, launches, gpu)
    pools = shape_of(case).op == "conv2d_max_pool2d"
    if pools and launches[-1].kernel.__name__ == "fprop_pool":
        return [_moved(case, launch, gpu) for launch in launches[:-1]] + [_pooled(case, launches[-1], gpu)]
    multiplies = pools or case.pass_ in ("fprop", "dgrad", "wgrad")
    known = _products(case, launches, gpu) if multiplies else {}
    own = _arithmetic(case, launches, gpu) if multiplies and not known else {}
    floor = _floor(case, launches, gpu) if multiplies or launches else None
    dtype = DTYPES[case.dtype]
    rows = []
    finish = None
    for index, launch in enumerate(launches):
        bytes_ = traffic(launch)
        row = NOTHING | {"floor_us": floor, "dram_gbs": gpu.dram / 1e9}
        if multiplies:
            row["peak_tflops"] = gpu.peak(dtype, case.precision) / 1e12
        if bytes_ is not None:
            row |= {"bytes_read": bytes_.read, "bytes_written": bytes_.written, "bytes_least": bytes_.least}
        if index in known:
            prediction, flops, least = known[index]
            # The model's time includes the kernel that adds partial sums; here that kernel has its own row.
            finish = prediction.finish_us
            row |= {
                "useful_rows": prediction.useful_rows, "useful_columns": prediction.useful_columns,
                "wave_efficiency": prediction.wave_efficiency, "flops_done": prediction.flops_done,
                "flops_needed": flops, "bytes_least": least, "modelled_us": prediction.modelled_us - finish,
                "bound_by": prediction.bound_by,
            }  # fmt: skip
        elif finish and launch.kernel.__name__ in FINISHES:
            row |= {"modelled_us": finish, "bound_by": "L2"}
            finish = None
        elif bytes_ is not None and launch.kernel.__name__ not in PRODUCTS:
            row |= _streamed(bytes_, launch, gpu)
            if index in own:
                row |= _with_arithmetic(row, *own[index])
        rows.append(row)
    return rows


def _pooled(case: Case, launch: Any, gpu: Any) -> dict[str, Any]:
    """The kernel that convolves and pools."""
    from tileconv.kernels import pool_tiles

    shape, dtype = shape_of(case), DTYPES[case.dtype]
    problem = conv_problem(shape)
    one, _ = pool_tiles.modelled_us(problem, conv_pool_problem(shape), dtype, case.precision, gpu)
    row = NOTHING | {
        "modelled_us": one, "floor_us": _floor(case, [launch], gpu), "flops_needed": problem.flops,
        "flops_done": problem.flops, "peak_tflops": gpu.peak(dtype, case.precision) / 1e12,
        "dram_gbs": gpu.dram / 1e9,
    }  # fmt: skip
    bytes_ = traffic(launch)
    if bytes_ is not None:
        row |= {"bytes_read": bytes_.read, "bytes_written": bytes_.written, "bytes_least": bytes_.least}
    return row


def _moved(case: Case, launch: Any, gpu: Any) -> dict[str, Any]:
    """A kernel before the one that convolves and pools."""
    row, bytes_ = NOTHING | {"floor_us": _floor(case, [launch], gpu), "dram_gbs": gpu.dram / 1e9}, traffic(launch)
    if bytes_ is not None:
        row |= {"bytes_read": bytes_.read, "bytes_written": bytes_.written, "bytes_least": bytes_.least}
        row |= _streamed(bytes_, launch, gpu)
    return row


def _together(case: Case, launches: Sequence[Any], gpu: Any) -> list[dict[str, Any]]:
    """The rows of a network's layers, in the order of cases.launches."""
    rows: list[dict[str, Any]] = []
    floors = []
    for part in parts(case):
        own = launches[len(rows) : len(rows) + len(launches_of(part, gpu))]
        found = predictions(part, own, gpu)
        floors.append(found[0]["floor_us"] if found else 0.0)
        rows += found
    floor = None if None in floors else sum(floors)
    return [row | {"floor_us": floor} for row in rows]


def _products(case: Case, launches: Sequence[Any], gpu: Any) -> dict[int, tuple[Any, int, int]]:
    """For every launch that multiplies: its prediction, the layer's operations, and its operands' bytes, once."""
    from tileconv.kernels import cost, run_tiles, tiles

    dtype = DTYPES[case.dtype]
    places = [i for i, launch in enumerate(launches) if launch.kernel.__name__ in PRODUCTS]
    problems = _problems(case, [launches[place] for place in places], gpu) if places else []
    found = {}
    for place, (own, asked, pass_) in zip(places, problems, strict=True):
        runs = None
        if launches[place].kernel.__name__ in IN_RUNS:
            runs = _runs_of(launches[place].arguments)
            tile = run_tiles.choose_runs(own, pass_, dtype, case.precision, gpu, runs=runs)
        else:
            tile = tiles.choose(own, pass_, dtype, case.precision, gpu)
        if str(tile) != launches[place].tile:
            raise RuntimeError(f"{case}: the launch uses {launches[place].tile!r}, the model was asked about {tile}")
        prediction = cost.predict(own, pass_, tile, dtype, case.precision, gpu, runs)
        found[place] = prediction, asked.flops, asked.bytes_least(dtype.itemsize)
    return _shared(found, conv_problem(shape_of(case)).flops)


def _runs_of(arguments: Mapping[str, Any]) -> Any:
    """The inner runs that a launch was planned with; None if it has others, which follow from its problem."""
    from tileconv.kernels.geometry import Runs

    return (
        Runs(arguments["RUN"], 0, arguments["ALIGN"], inner=True, classes=arguments["CLASSES"])
        if "CLASSES" in arguments
        else None
    )


def _shared(found: dict[int, tuple[Any, int, int]], needed: int) -> dict[int, tuple[Any, int, int]]:
    """The layer's operations over its products, by what each counts: a gradient's own count has its padding's taps."""
    left, counted = needed, sum(flops for _, flops, _ in found.values())
    shared = {}
    for place, (prediction, flops, least) in found.items():
        share = left * flops // counted if counted else 0
        left, counted = left - share, counted - flops
        shared[place] = prediction, share, least
    return shared


def _problems(case: Case, products: Sequence[Any], gpu: Any) -> list[tuple[Any, Any, str]]:
    """For every product of a case: the problem that the kernel solves, the one it stands for, and the pass it is.

    A transposed convolution runs the passes of the convolution that it turns.
    """
    from tileconv.kernels import tiles
    from tileconv.kernels.launch import padded

    shape, pass_ = shape_of(case), "fprop" if case.pass_ == "forward" else case.pass_
    problem = matrix_product(shape) if shape.op == "conv2d_im2col" else conv_problem(shape)
    parts = problem.dgrad
    if shape.op == "conv_transpose2d" and pass_ != "wgrad":
        pass_, parts = "dgrad" if pass_ == "fprop" else "fprop", problem.transposed
    own = [part.problem for part in parts] if pass_ == "dgrad" else [problem]
    if padded.applies(problem, pass_, DTYPES[case.dtype], case.precision, gpu):
        wide = padded.problems(problem, pass_, DTYPES[case.dtype], case.precision)
        return [(inner, asked, as_) for (inner, as_), asked in zip(wide, own, strict=True)]
    if pass_ == "dgrad":
        return [(part, part, pass_) for part in own]
    if products[0].kernel.__name__ in IN_RUNS:
        _, channels, _, width = products[0].arguments["x"].shape
        flat = problem.interleaved if channels != problem.C else problem
        return [(flat.widened(width), problem, pass_)]
    return [(tiles.blocked(problem, pass_, DTYPES[case.dtype], case.precision, gpu), problem, pass_)]


def _arithmetic(case: Case, launches: Sequence[Any], gpu: Any) -> dict[int, tuple[int, float]]:
    """For the kernels of depthwise and locally connected layers: operations, and the rate of the unit that does them.

    Depthwise sums are fused multiply-adds of fp32 (of fp64 for fp64); the others multiply on tensor cores.
    """
    from tileconv.kernels import cost_rates, layout

    shape, dtype = shape_of(case), DTYPES[case.dtype]
    problem = conv_problem(shape)
    rate = gpu.peak(layout.sum_dtype(dtype), "ieee")
    if shape.op == "locally_connected2d":
        rate = gpu.peak(dtype, case.precision) * cost_rates.TENSOR_LOAD
    each = [part.problem.flops for part in problem.dgrad] if case.pass_ == "dgrad" else [problem.flops]
    if shape.op == "locally_connected2d":
        each = [problem.flops]
    first = launches[0].kernel if launches else None
    places = [i for i, launch in enumerate(launches) if launch.kernel is first]
    return {place: (flops, rate) for place, flops in zip(places, each, strict=True)}


def _with_arithmetic(row: dict[str, Any], flops: int, rate: float) -> dict[str, Any]:
    from tileconv.kernels import cost

    products = cost.LAUNCH_US + 1e6 * flops / rate
    slower = products > row["modelled_us"]
    found = {"flops_needed": flops, "flops_done": flops}
    return found | ({"modelled_us": products, "bound_by": "arithmetic"} if slower else {})


def _floor(case: Case, launches: Sequence[Any], gpu: Any) -> float | None:
    """No kernel is faster: the operations at the data sheet's rate, or each operand moved once."""
    shape, dtype = shape_of(case), DTYPES[case.dtype]
    if case.pass_ in ("fprop", "dgrad", "wgrad") or shape.op == "conv2d_max_pool2d":
        arithmetic = conv_problem(shape).flops / gpu.peak(dtype, case.precision)
        return float(1e6 * max(arithmetic, bytes_least(shape, dtype.itemsize) / gpu.dram))
    bytes_ = traffic(launches[0])
    return None if bytes_ is None else 1e6 * bytes_.least / gpu.dram


def _streamed(bytes_: Traffic, launch: Any, gpu: Any) -> dict[str, Any]:
    """A kernel that only moves bytes: DRAM delivers each once, L2 all that is asked for."""
    from tileconv.kernels import cost

    dram, l2 = cost.streaming_us(bytes_.least, gpu), cost.LAUNCH_US + 1e6 * bytes_.requested / gpu.l2
    slowest = max(dram, l2)
    bound = "launch" if slowest < 2 * cost.LAUNCH_US else "DRAM" if dram >= l2 else "L2"
    ctas = launch.grid[0]
    waves = -(-ctas // gpu.sms)
    return {"modelled_us": slowest, "bound_by": bound, "wave_efficiency": ctas / gpu.sms / waves if waves else None}
