"""What each kernel must show, as data, and the lines of a record that fall short of it.

The limits are the project's performance targets for AlexNet at batch 128: Triton's best GEMM sits at 1.5 times the
data sheet's floor, so a convolution that stays below 1.6 to 2 loses little of what the compiler can reach.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .records import Inspection

TENSOR_DTYPES = ("fp16", "bf16", "tf32")
PRODUCT_PASSES = ("fprop", "dgrad", "wgrad")
WIDE_LAYERS = ("conv2", "conv3", "conv4", "conv5")
DEPTHWISE = ("fprop", "wgrad")  # the kernels of device/depthwise.py: they only move bytes
AMPERE = ("sm_80", "sm_86", "sm_89")
BLACKWELL = ("sm_100", "sm_120")
BATCH = 128  # the batch that the modelled limits are stated for
NETWORKS = ("alexnet", "alexnet-2012")  # and the networks


@dataclass(frozen=True)
class Line:
    """One target held against one launch, case or group of cases.

    `excess` is how many times the limit was found: above 1 falls short. A missed yes-or-no target has an infinite one.
    """

    target: str
    arch: str
    dtype: str
    pass_: str
    subject: str
    found: str
    limit: str
    excess: float

    @property
    def met(self) -> bool:
        return self.excess <= 1


@dataclass(frozen=True)
class LaunchTarget:
    """A limit on single launches; `limits` by pass, or one under "" for all. A bool limit is a yes-or-no target."""

    name: str
    value: Callable[[Inspection], float | bool | None]
    limits: dict[str, float | bool]
    applies: Callable[[Inspection], bool]
    show: Callable[[Inspection], str]
    at_least: bool = False


@dataclass(frozen=True)
class CaseTarget:
    """A limit on modelled time / floor of a case (its helpers included), or of several together."""

    name: str
    layers: tuple[str, ...]
    limits: dict[str, float]
    together: bool = False


@dataclass(frozen=True)
class CaseSum:
    """The launches of one case on one architecture, added up; None where the model does not know one of them."""

    rows: tuple[Inspection, ...]

    @property
    def first(self) -> Inspection:
        """Its first launch that does the case's own work."""
        return next((i for i in self.rows if i.role == "main"), self.rows[0])

    @property
    def modelled_us(self) -> float | None:
        times = [i.modelled_us for i in self.rows]
        return None if None in times else sum(t for t in times if t is not None)

    @property
    def floor_us(self) -> float | None:
        return self.rows[0].floor_us

    @property
    def flops(self) -> int | None:
        known = [i.flops_needed for i in self.rows if i.flops_needed is not None]
        return sum(known) if known else None

    @property
    def bytes_least(self) -> int | None:
        """The operands once; what helpers pass on to each other is not among them."""
        known = [i.bytes_least for i in self.rows if i.role == "main"]
        return None if None in known else sum(b for b in known if b is not None)

    @property
    def extra_bytes(self) -> int | None:
        """Memory besides operands and result; every launch of a case names the whole case's."""
        return max((i.extra_bytes for i in self.rows if i.extra_bytes is not None), default=None)

    @property
    def ratio(self) -> float | None:
        return None if self.modelled_us is None or not self.floor_us else self.modelled_us / self.floor_us

    @property
    def tflops(self) -> float | None:
        """Modelled, of the operations that the layer needs."""
        return self.flops / self.modelled_us / 1e6 if self.flops and self.modelled_us else None


def case_sums(rows: Iterable[Inspection]) -> list[CaseSum]:
    """The rows by case and architecture, in the order in which they appear."""
    groups: dict[tuple[str, str], list[Inspection]] = {}
    for row in rows:
        groups.setdefault((row.case, row.arch), []).append(row)
    return [CaseSum(tuple(group)) for group in groups.values()]


def at_reference_batch(rows: Iterable[Inspection]) -> list[Inspection]:
    """Each layer at the batch that its targets and pictures are about: BATCH where it is there, else its largest."""
    rows = list(rows)
    batches: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        batches.setdefault((row.network, row.layer), set()).add(row.batch)
    return [row for row in rows if row.batch == reference_batch(batches[row.network, row.layer])]


def reference_batch(batches: Iterable[int]) -> int:
    """The one of a layer's batch sizes that its targets and pictures are about."""
    found = set(batches)
    return BATCH if BATCH in found else max(found)


def _loads(item: Inspection) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in item.loop_loads.items()) or "none"


def _by_tma(item: Inspection) -> bool:
    """Nothing but the copy engine fetches; in wgrad one operand may go on through registers."""
    fetched = {kind for kind in item.loop_loads if re.match(r"UTMALDG|LDG|LDS|LD\.|STS|LDL", kind)}
    if item.pass_ == "wgrad":
        return "UTMALDG" in fetched and not any(kind.startswith("LDG") for kind in fetched)
    return fetched == {"UTMALDG"} and not item.register_operand


def _wide_copies(item: Inspection) -> bool:
    fetched = {kind for kind in item.loop_loads if kind.startswith("LDG")}
    return fetched == {"LDGSTS.128"}


def _useful(item: Inspection) -> float | None:
    if item.useful_rows is None or item.useful_columns is None:
        return None
    return item.useful_rows * item.useful_columns


def _by_warp_groups(item: Inspection) -> bool:
    return (item.mma or "").startswith("HGMMA")


def _others(item: Inspection) -> float | None:
    """Other instructions for what a warp does of an HGMMA.64x128: sixteen HMMA, where it multiplies by those."""
    return item.other_per_mma if item.other_per_mma is None or _by_warp_groups(item) else 16 * item.other_per_mma


def _requested(item: Inspection) -> float | None:
    if item.bytes_read is None or item.bytes_written is None or not item.bytes_least:
        return None
    return (item.bytes_read + item.bytes_written) / item.bytes_least


def _product(item: Inspection) -> bool:
    multiplies = item.pass_ in PRODUCT_PASSES and item.kernel not in DEPTHWISE
    return multiplies and item.role == "main" and item.dtype in TENSOR_DTYPES


def _on(*archs: str) -> Callable[[Inspection], bool]:
    return lambda item: _product(item) and item.arch in archs


def _memory_bound(item: Inspection) -> bool:
    moves = item.layer.startswith(("pool", "avgpool", "norm")) or item.kernel in DEPTHWISE
    return moves and item.arch.startswith("sm_") and item.role == "main"


def _wide_convolution(item: Inspection) -> bool:
    return _on("sm_90")(item) and item.layer in WIDE_LAYERS and _is_stated(item)


def _is_stated(item: Inspection) -> bool:
    """Whether limits that depend on the problem's size are stated for this network and batch."""
    return item.network in NETWORKS and item.batch == BATCH


def _subject(item: Inspection, part: str) -> str:
    """A layer's name; with its network's, where that is not the one that most lines are about."""
    return part if item.network == NETWORKS[0] else f"{item.network} {part}"


def _small_batch(item: Inspection) -> bool:
    return _on("sm_90")(item) and item.layer.startswith("conv") and item.batch < BATCH


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


LAUNCH_TARGETS = (
    LaunchTarget("compiles", lambda i: i.failure is None, {"": True}, lambda i: True, lambda i: i.failure or "yes"),
    LaunchTarget(
        "fits shared memory", lambda i: i.fits, {"": True}, lambda i: True, lambda i: f"{i.shared_bytes} bytes"
    ),
    LaunchTarget(
        "stack bytes (spills)", lambda i: max(i.stack_bytes, i.spills), {"": 0},
        lambda i: i.arch.startswith("sm_"), lambda i: f"{i.stack_bytes} bytes, {i.spills} accesses",
    ),
    LaunchTarget(
        "multiplies with HGMMA", _by_warp_groups, {"": True}, _on("sm_90"),
        lambda i: i.mma or "no product",
    ),
    LaunchTarget(
        "asynchronous HGMMA", lambda i: not i.serialised, {"": True}, lambda i: _on("sm_90")(i) and _by_warp_groups(i),
        lambda i: "waits for every product",
    ),
    LaunchTarget(
        "operands by TMA", _by_tma, {"": True}, _on("sm_90"),
        lambda i: _loads(i) + (", operand A in registers" if i.register_operand else ""),
    ),
    LaunchTarget(
        "other instructions per HGMMA.64x128", _others, {"fprop": 14, "dgrad": 14, "wgrad": 24}, _on("sm_90"),
        lambda i: _number(_others(i)) + ("" if _others(i) is None or _by_warp_groups(i) else " per 16 HMMA"),
    ),
    LaunchTarget(
        "useful rows x useful columns", _useful, {"": 0.95}, _wide_convolution, lambda i: _number(_useful(i)),
        at_least=True,
    ),
    LaunchTarget(
        "busy share of the SMs, small batches", lambda i: i.wave_efficiency, {"": 0.5}, _small_batch,
        lambda i: f"{_number(i.wave_efficiency)} ({i.ctas} CTAs)", at_least=True,
    ),
    LaunchTarget("16-byte LDGSTS", _wide_copies, {"": True}, _on(*AMPERE), _loads),
    LaunchTarget(
        "other instructions per HMMA.16816", lambda i: i.other_per_mma, {"": 3}, _on(*AMPERE),
        lambda i: _number(i.other_per_mma),
    ),
    LaunchTarget(
        "tensor cores in the loop",
        lambda i: i.scope == "loop" and re.match(r"HMMA|UTC\w*MMA|[QO]MMA", i.mma or "") is not None,
        {"": True}, _on(*BLACKWELL), lambda i: i.mma or "no product",
    ),
    LaunchTarget(
        "16-byte loads and stores",
        lambda i: all(kind.endswith(".128") for kind in i.loop_loads if kind.startswith(("LDG", "STG"))),
        {"": True}, _memory_bound, _loads,
    ),
    LaunchTarget(
        "bytes requested / least", _requested, {"": 1.1}, _memory_bound, lambda i: _number(_requested(i))
    ),
)  # fmt: skip
CASE_TARGETS = (
    CaseTarget("modelled time / floor", WIDE_LAYERS, {"fprop": 1.75, "dgrad": 1.8, "wgrad": 2.0}),
    CaseTarget("modelled time / floor, conv1", ("conv1",), {"fprop": 1.8, "wgrad": 2.5}),
    CaseTarget("modelled time / floor, together", WIDE_LAYERS, {"fprop": 1.6, "dgrad": 1.7, "wgrad": 1.85}, True),
)


def lines(rows: Sequence[Inspection]) -> list[Line]:
    """Every target that applies to the rows at the reference batch, met or not; the worst first."""
    rows = at_reference_batch(rows)
    found = [line for row in rows for target in LAUNCH_TARGETS if (line := _launch_line(target, row))]
    found += _case_lines([case for case in case_sums(rows) if case.first.arch == "sm_90"])
    return sorted(found, key=lambda line: -line.excess)


def shortfalls(rows: Sequence[Inspection]) -> list[Line]:
    """The lines that fall short of their target, worst first."""
    return [line for line in lines(rows) if not line.met]


def _launch_line(target: LaunchTarget, row: Inspection) -> Line | None:
    limit = target.limits.get(row.pass_, target.limits.get(""))
    if limit is None or not target.applies(row) or (row.failure is not None and target.name != "compiles"):
        return None
    value = target.value(row)
    subject = _subject(row, row.layer if row.role == "main" else f"{row.layer} ({row.kernel})")
    if isinstance(limit, bool):
        excess = 1.0 if value else math.inf
        text = "yes"
    else:
        excess = _excess(value, limit, target.at_least)
        text = f"at {'least' if target.at_least else 'most'} {limit:g}"
    return Line(target.name, row.arch, row.dtype, row.pass_, subject, target.show(row), text, excess)


def _excess(value: float | None, limit: float, at_least: bool) -> float:
    if value is None:
        return math.inf
    if at_least:
        return limit / value if value else math.inf
    if not limit:
        return 1.0 if value == 0 else math.inf
    return value / limit


def _case_lines(cases: Sequence[CaseSum]) -> list[Line]:
    found = []
    for target in CASE_TARGETS:
        groups: dict[tuple[str, str, str, str], list[CaseSum]] = {}
        for case in cases:
            row = case.first
            if row.layer in target.layers and _is_stated(row) and row.dtype in TENSOR_DTYPES:
                alone = "" if target.together else row.layer
                groups.setdefault((row.network, row.dtype, row.pass_, alone), []).append(case)
        for (_, dtype, pass_, alone), group in groups.items():
            if pass_ not in target.limits or (target.together and len(group) < len(target.layers)):
                continue
            ratio = _together(group)
            limit = target.limits[pass_]
            subject = _subject(group[0].first, alone or f"{target.layers[0]} to {target.layers[-1]}")
            text = f"at most {limit:g}"
            found.append(Line(target.name, "sm_90", dtype, pass_, subject, _number(ratio), text,
                              _excess(ratio, limit, at_least=False)))  # fmt: skip
    return found


def _together(cases: Sequence[CaseSum]) -> float | None:
    times, floors = [c.modelled_us for c in cases], [c.floor_us for c in cases]
    if None in times or None in floors:
        return None
    return sum(t for t in times if t is not None) / sum(f for f in floors if f is not None)
