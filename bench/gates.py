"""What a row passes before it is timed: error against float64, the same bits again, and no regard for neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import Case
from .check import budget, largest_difference
from .networks import Shape
from .passes import RANDOM, Call, Tensors, first_image, placed, stands_alone, work
from .records import finite

Make = Callable[[Tensors], Call]


@dataclass(frozen=True)
class Reference:
    """The float64 result of a case, and the error that is allowed to every provider of one precision."""

    exact: torch.Tensor
    allowed: float


@dataclass(frozen=True)
class Verdict:
    """What the gates found; `reason` says why there is no speed, and is empty for a row that may be timed.

    `repeatable` and `batch_invariant` are about bits; None where the question does not arise.
    """

    error: float | None
    repeatable: bool | None
    batch_invariant: bool | None
    reason: str = ""


def reference(case: Case, shape: Shape, t: Tensors, level: str) -> Reference:
    """float64 on the same rounded operands; allowed is what PyTorch's result in `level`'s precision earns.

    `level` is a key of cases.EPS, the backends are already set to it. PyTorch computes in both layouts and the worse
    one counts: twice its error, and twice one rounding of the largest value.
    """
    wide = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    exact = work("torch", case, shape, wide)()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    worst = 0.0
    if shape.op not in RANDOM:
        layouts = [placed(t, shape, layout) for layout in ("contiguous", "channels_last")]
        worst = max(largest_difference(work("torch", case, shape, operands)(), exact) for operands in layouts)
    return Reference(exact, budget(worst, level, largest))


def verdict(
    make: Make, first: torch.Tensor, t: Tensors, case: Case, shape: Shape, ref: Reference, ours: bool,
    *, alone: bool = True,
) -> Verdict:  # fmt: skip
    """Judge a result: `first` is the result of the first call, `make` makes a call for operands laid out like `t`.

    Nobody may be outside the budget, nor give an image another result than it has alone. Only ours must also repeat
    its bits: PyTorch never promised to, and hiding its fastest way would flatter us. Equal bits for an image alone are
    recorded, and asked of nobody, because a choice of tiles may depend on the batch.
    """
    exact = _of_own_mask(first, t, case, shape) if shape.op in RANDOM else ref.exact
    error = largest_difference(first, exact)
    if not error <= ref.allowed:
        what = "is outside its budget" if math.isfinite(error) else "is not finite, or has another shape"
        return Verdict(finite(error), None, None, f"the result {what}")
    repeatable = None
    if shape.op not in RANDOM:
        _soil(first)
        repeatable = _same_bits(make(t)(), first)
        if ours and not repeatable:
            return Verdict(finite(error), False, None, "a second call gives other bits")
    if not alone:
        return Verdict(finite(error), repeatable, None)
    invariant, apart = _alone(make, first, t, case, shape)
    if not apart <= 2 * ref.allowed:
        return Verdict(finite(error), repeatable, False, "an image's result depends on the rest of its batch")
    return Verdict(finite(error), repeatable, invariant)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


def _soil(like: torch.Tensor) -> None:
    """Leave NaN in memory that the next result is likely to get: an element that nobody writes is then seen."""
    torch.full_like(like, math.nan)


def _of_own_mask(result: torch.Tensor, t: Tensors, case: Case, shape: Shape) -> torch.Tensor:
    """What dropout had to give for the mask that its own zeros show; NaN where far too many or few are zero."""
    source = (t["x"] if case.pass_ == "forward" else t["dy"]).double()
    p = float(shape.module.p)  # type: ignore[arg-type]
    dropped = result == 0
    spread = 6 * (p * (1 - p) / max(1, result.numel())) ** 0.5 + 1 / max(1, result.numel())
    if abs(float(dropped.double().mean()) - p) > spread:
        return torch.full_like(source, math.nan)
    return torch.where(dropped, 0.0, source / (1 - p)) if p < 1 else torch.zeros_like(source)


def _alone(make: Make, first: torch.Tensor, t: Tensors, case: Case, shape: Shape) -> tuple[bool | None, float]:
    """Whether the first image alone gives the same bits, and how far apart the two are."""
    if not stands_alone(case, shape, t) or first.shape[:1] != t["x"].shape[:1]:
        return None, 0.0
    alone = make(first_image(t))()
    return _same_bits(alone, first[:1]), largest_difference(alone, first[:1])
