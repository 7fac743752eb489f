"""A record's rows as pandas tables: times, the comparison with the best rival, geometric means, sums of cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .records import Inspection, Timing
from .targets import case_sums

CASE = ["network", "layer", "pass", "batch", "dtype"]
# How a time was taken: rows that differ here are never compared, nor averaged together.
CONDITIONS = ["l2", "method"]
OURS = "tileconv"
CONDITION_ORDER = (("cold", "events"), ("cold", "graph"), ("warm", "events"), ("warm", "graph"))


def is_ours(provider: str) -> bool:
    """Whether a provider is this project, in the formulation it chose or in a forced one."""
    return provider == OURS or provider.startswith(f"{OURS}:")


def is_cudnn(provider: str) -> bool:
    """Whether a provider is PyTorch calling cuDNN, or what PyTorch has where cuDNN has nothing."""
    return provider.startswith(("cudnn", "cuDNN")) or provider == "torch"


def defaults(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of PyTorch without any setting: those named so, else cuDNN's own choice, which the settings leave on."""
    named = keep(rows, ("default" in p for p in rows["provider"]))
    return named if len(named) else keep(rows, (p in ("cudnn-heuristic", "torch") for p in rows["provider"]))


def keep(table: pd.DataFrame, flags: Iterable[bool]) -> pd.DataFrame:
    """The rows with a true flag; unlike a list in brackets, also right for a table without rows."""
    return table.loc[np.fromiter(flags, dtype=bool, count=len(table))]


def frame_of(rows: Iterable[Any], kind: type[Any]) -> pd.DataFrame:
    """Dataclass rows as a table with all of their columns, also where there are no rows; `pass_` becomes `pass`."""
    names = [f.name for f in dataclasses.fields(kind)]
    table = pd.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names)
    return table.rename(columns={"pass_": "pass"})


def timing_frame(timings: Sequence[Timing]) -> pd.DataFrame:
    """All timing rows; `us` is the median, NaN for a row without a speed, `hot` whether the driver slowed the GPU."""
    table = frame_of(timings, Timing)
    timed = (table["status"] == "timed") & table["passed"].astype(bool)
    table["us"] = pd.to_numeric(table["p50_us"]).where(timed)
    table["hot"] = table["throttled"].map(bool).astype(bool)
    return table


# A rival's column in a comparison: its column among the timings.
RIVAL = {"us": "us", "provider": "provider", "layout": "memory_format", "hot": "hot"}


def comparisons(timings: Sequence[Timing]) -> pd.DataFrame:
    """A row for every case and condition that we have a time for: ours, the best rival, cuDNN and PyTorch's default.

    Ours is the plain provider and a rival anyone else at equal precision, each in its faster layout; `default` is
    PyTorch without any setting, at whatever precision that has. `ratio` and `cudnn_ratio` are their time / ours: below
    1 is a loss. The losses come first.
    """
    table = timing_frame(timings).dropna(subset=["us"])
    rows = []
    for key, group in table.groupby([*CASE, *CONDITIONS], sort=False):
        mine = group[group["provider"] == OURS]
        if mine.empty:
            continue
        own = _fastest(mine)
        others = keep(group, (not is_ours(p) for p in group["provider"]))
        equal = others[others["precision"] == own["precision"]]
        row = dict(zip([*CASE, *CONDITIONS], key, strict=True))
        row |= {"us": own["us"], "layout": own["memory_format"], "hot": own["hot"], "tflops": own["tflops"]}
        named = {
            "best": equal, "cudnn": keep(equal, map(is_cudnn, equal["provider"])),
            "default": defaults(others),
        }  # fmt: skip
        for name, rivals in named.items():
            found = _fastest(rivals) if len(rivals) else {}
            row |= {f"{name}_{to}": found.get(at) for to, at in RIVAL.items()}
        row["hot"] = any(row[name] for name in ("hot", "best_hot", "cudnn_hot"))
        rows.append(row)
    columns = [*CASE, *CONDITIONS, "us", "layout", "hot", "tflops"]
    columns += [f"{name}_{what}" for name in ("best", "cudnn", "default") for what in RIVAL]
    result = pd.DataFrame(rows, columns=columns)
    for name in ("best", "cudnn", "default"):
        result[f"{name}_us"] = pd.to_numeric(result[f"{name}_us"])
        result[f"{name}_ratio"] = result[f"{name}_us"] / result["us"]
    result["ratio"] = result["best_ratio"]
    result["hot"] = result["hot"].astype(bool)
    return result.sort_values("ratio", kind="stable", na_position="last").reset_index(drop=True)


def _fastest(rows: pd.DataFrame) -> dict[Any, Any]:
    return min(rows.to_dict("records"), key=lambda row: row["us"])


def first_condition(table: pd.DataFrame) -> tuple[str, str] | None:
    """The condition that headlines and pictures are about: a cold L2 cache where there is one."""
    there = set(zip(table["l2"], table["method"], strict=True))
    return next((c for c in CONDITION_ORDER if c in there), None)


def under(table: pd.DataFrame, condition: tuple[str, str] | None) -> pd.DataFrame:
    """The rows that were timed under a condition."""
    if condition is None:
        return table.iloc[:0]
    return table[(table["l2"] == condition[0]) & (table["method"] == condition[1])]


def geometric_mean(ratios: pd.Series[Any]) -> float | None:
    """The geometric mean of what is known; None for nothing."""
    known = ratios.dropna()
    return float(np.exp(np.log(known.astype(float)).mean())) if len(known) else None


def geometric_means(compared: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means of `ratio` and `cudnn_ratio` for every group, without the rows of a throttled GPU; the worst first."""
    cool = compared[~compared["hot"]]
    rows = [
        [*key, len(group), int((group["ratio"] < 1).sum()), geometric_mean(group["ratio"]),
         geometric_mean(group["cudnn_ratio"])]
        for key, group in cool.groupby([*by], sort=False)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=[*by, "cases", "losses", "mean", "cudnn_mean"])
    return table.sort_values("mean", kind="stable").reset_index(drop=True)


def case_frame(rows: Sequence[Inspection]) -> pd.DataFrame:
    """A row for every inspected case: its launches added up, NaN where the model does not know one of them."""
    columns = [*CASE, "arch", "gpu", "modelled_us", "floor_us", "ratio", "tflops", "flops", "bytes_least",
               "extra_bytes", "peak_tflops", "dram_gbs"]  # fmt: skip
    data = []
    for case in case_sums(rows):
        f = case.first
        data.append([f.network, f.layer, f.pass_, f.batch, f.dtype, f.arch, f.gpu, case.modelled_us, case.floor_us,
                     case.ratio, case.tflops, case.flops, case.bytes_least, case.extra_bytes, f.peak_tflops,
                     f.dram_gbs])  # fmt: skip
    table = pd.DataFrame(data, columns=columns)
    numbers = columns[columns.index("modelled_us") :]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return table
