"""What the cost model says of a case's launches, joined with the bytes that they request: modelled, never measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cases import DTYPES, Case, conv_problem, shape_of
from .traffic import Traffic, traffic

PRODUCTS = ("fprop_box", "fprop_gather", "fprop_runs", "wgrad_box", "wgrad_gather", "wgrad_runs")
FINISHES = ("fprop_finish", "add_slices")
NOTHING: dict[str, Any] = {
    "useful_rows": None, "useful_columns": None, "wave_efficiency": None, "bytes_read": None, "bytes_written": None,
    "bytes_least": None, "flops_done": None, "flops_needed": None, "modelled_us": None, "floor_us": None,
    "bound_by": None, "peak_tflops": None, "dram_gbs": None,
}  # fmt: skip


def predictions(case: Case, launches: Sequence[Any], gpu: Any) -> list[dict[str, Any]]:
    """The modelled half of a row for every launch of a case; None where the model does not know the kernel.

    `floor_us` is the whole case's, the same in each of its rows; their `modelled_us` add up to the case's time.
    """
    multiplies = case.pass_ in ("fprop", "dgrad", "wgrad")
    known = _products(case, launches, gpu) if multiplies else {}
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
        rows.append(row)
    return rows


def _products(case: Case, launches: Sequence[Any], gpu: Any) -> dict[int, tuple[Any, int, int]]:
    """For every launch that multiplies: its prediction, the layer's operations, and its operands' bytes, once."""
    from tileconv.kernels import cost, run_tiles, tiles

    problem, dtype = conv_problem(shape_of(case)), DTYPES[case.dtype]
    in_runs = any(launch.kernel.__name__.endswith("_runs") for launch in launches)
    choose = run_tiles.choose_runs if in_runs else tiles.choose
    if case.pass_ == "dgrad":
        problems = [(part.problem, part.problem) for part in problem.dgrad]
    elif not in_runs and tiles.first_layer(problem, case.pass_, dtype, gpu):
        problems = [(problem.space_to_depth, problem)]
    else:
        problems = [(problem, problem)]
    places = [i for i, launch in enumerate(launches) if launch.kernel.__name__ in PRODUCTS]
    found = {}
    for place, (own, asked) in zip(places, problems, strict=len(places) == len(problems)):
        tile = choose(own, case.pass_, dtype, case.precision, gpu)
        if str(tile) != launches[place].tile:
            raise RuntimeError(f"{case}: the launch uses {launches[place].tile!r}, the model was asked about {tile}")
        prediction = cost.predict(own, case.pass_, tile, dtype, case.precision, gpu)
        found[place] = prediction, asked.flops, asked.bytes_least(dtype.itemsize)
    return found


def _floor(case: Case, launches: Sequence[Any], gpu: Any) -> float | None:
    """No kernel is faster: the operations at the data sheet's rate, or each operand moved once."""
    from tileconv.kernels import cost

    if case.pass_ in ("fprop", "dgrad", "wgrad"):
        floor: float = cost.floor_us(conv_problem(shape_of(case)), DTYPES[case.dtype], case.precision, gpu)
        return floor
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
