"""The part of a report that a GPU fills: the comparison with every rival, geometric means, and each measurement."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .document import Block, Heading, Paragraph, Table
from .frames import CONDITIONS, comparisons, geometric_means
from .records import Timing

HOW = (
    "A time is the median of n calls, with the quantiles at 20 and 80 % beside it. Ours is compared with the best "
    "rival at equal precision, each in its faster layout; PyTorch's default is PyTorch without any setting, at "
    "whatever precision that has. Speed-up is their time / ours: below 1 we are slower. Results outside their error "
    "budget have no speed. Rows that the driver throttled are marked, and left out of geometric means."
)

NO_CLOCKS = (
    "Clocks, temperatures and throttling are not known: nvidia-ml-py was not installed, or could not read this GPU. No "
    "row could be marked."
)


def measured_section(timings: Sequence[Timing]) -> list[Block]:
    """Means by network, pass and dtype, then every case with the losses first, then every row."""
    compared = comparisons(timings)
    blocks: list[Block] = [Heading("Measured"), Paragraph(HOW)]
    if not any(t.clocks_mhz for t in timings):
        blocks.append(Paragraph(NO_CLOCKS))
    if len(compared):
        blocks += [_means_table(compared), _comparison_table(compared)]
    return [*blocks, _every_row(timings)]


def _means_table(compared: pd.DataFrame) -> Table:
    means = geometric_means(compared, ["network", "pass", "dtype", *CONDITIONS])
    left_out = int(compared["hot"].sum())
    note = f" {left_out} throttled cases are left out." if left_out else ""
    rows = tuple(
        (r["network"], r["pass"], r["dtype"], f"{r['l2']}, {r['method']}", str(r["cases"]), str(r["losses"]),
         times(r["mean"]), times(r["cudnn_mean"]))
        for r in means.to_dict("records")
    )  # fmt: skip
    header = ("network", "pass", "dtype", "L2, method", "cases", "slower in", "over the best rival", "over cuDNN")
    return Table(header, rows, caption=f"Geometric means of the speed-up, the worst first.{note}")


def _comparison_table(compared: pd.DataFrame) -> Table:
    header = ("layer", "network", "pass", "dtype", "batch", "L2, method", "tileconv us", "TFLOP/s", "best rival us",
              "best rival", "speed-up", "over cuDNN", "over PyTorch's default", "note")  # fmt: skip
    rows = tuple(
        (r["layer"], r["network"], r["pass"], r["dtype"], str(r["batch"]), f"{r['l2']}, {r['method']}", number(r["us"]),
         number(r["tflops"]), number(r["best_us"]),
         f"{r['best_provider']}, {r['best_layout']}" if r["best_provider"] else "none", times(r["ratio"]),
         times(r["cudnn_ratio"]), times(r["default_ratio"]), "throttled" if r["hot"] else "")
        for r in compared.to_dict("records")
    )  # fmt: skip
    return Table(header, rows, caption="Every case that we have a time for, losses first")


def _every_row(timings: Sequence[Timing]) -> Table:
    header = ("layer", "network", "pass", "dtype", "batch", "provider", "precision", "layout", "L2", "method", "status",
              "p20 us", "p50 us", "p80 us", "p99 us", "n", "TFLOP/s", "GB/s", "error", "allowed", "peak MB",
              "first call ms", "same bits", "tile", "MHz", "note")  # fmt: skip
    rows = tuple(
        (t.layer, t.network, t.pass_, t.dtype, str(t.batch), t.provider, t.precision or "-", t.memory_format, t.l2,
         t.method, _status(t), number(t.p20_us), number(t.p50_us), number(t.p80_us), number(t.p99_us), str(t.n),
         number(t.tflops), number(t.gbs), tiny(t.error), tiny(t.allowed),
         number(None if t.peak_bytes is None else t.peak_bytes / 1e6), number(t.first_call_ms),
         "-" if t.repeatable is None else "yes" if t.repeatable else "NO", t.tile or "-",
         " to ".join(f"{c:.0f}" for c in t.clocks_mhz) or "-", _note(t))
        for t in timings
    )  # fmt: skip
    return Table(header, rows, f"Every measurement ({len(rows)} rows)")


def _status(t: Timing) -> str:
    return t.status if t.status != "timed" or t.p50_us is not None else "no speed"


def _note(t: Timing) -> str:
    hot = f"throttled: {', '.join(t.throttled)}" if t.throttled else ""
    return "; ".join(part for part in (t.note, hot) if part)


def number(value: float | None) -> str:
    """Four digits, or a dash for what is not known."""
    return "-" if value is None or pd.isna(value) else f"{value:.4g}"


def times(value: float | None) -> str:
    """A factor, or a dash for what is not known."""
    return "-" if value is None or pd.isna(value) else f"{value:.2f}x"


def tiny(value: float | None) -> str:
    """An error's size, or a dash for what is not known."""
    return "-" if value is None or pd.isna(value) else "0" if value == 0 else f"{value:.1e}"
