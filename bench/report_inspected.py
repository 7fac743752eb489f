"""The part of a report that needs no GPU: what was inspected, what is modelled, and where that falls short."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .document import MISSED, Block, Heading, Paragraph, Table, listed
from .figures import draw_loops
from .pictures import MAIN, Picture
from .records import Inspection, Published, Record
from .targets import CaseSum, Line, at_reference_batch, case_sums, lines, shortfalls

SHORT_HEADER = ("layer", "pass", "dtype", "architecture", "target", "found", "wanted", "times the limit")
MODEL_NOTE = (
    "Modelled: computed from the tiles, published rates of the named GPU and the compiled loops; an upper bound on "
    "speed, and nobody's measurement."
)


def archs_of(rows: Iterable[Inspection]) -> list[str]:
    """The architectures, in the order in which they appear."""
    return list(dict.fromkeys(i.arch for i in rows))


def inspection_faults(item: Inspection) -> list[str]:
    """What is wrong with a compiled launch, in words; empty for a clean one."""
    if item.failure is not None:
        return ["did not compile"]
    hopper = item.mma is not None and "GMMA" in item.mma
    faults = {
        "spills": item.stack_bytes > 0 or item.spills > 0,
        "too much shared memory": not item.fits,
        "serialised": item.serialised,
        # Allowed in wgrad, as targets.py has it: there one operand goes through registers.
        "operand A in registers": item.register_operand and hopper and item.pass_ != "wgrad",
    }
    return [name for name, there in faults.items() if there]


def named_faults(bad: Sequence[Inspection]) -> str:
    """The first three of the launches with faults, and what is wrong with them."""
    named = [f"{i.layer} {i.pass_} {i.arch} ({listed(inspection_faults(i))})" for i in bad[:3]]
    return listed([*named, f"{len(bad) - 3} more"] if len(bad) > 3 else named)


def inspected_line(rows: Sequence[Inspection]) -> str:
    """One sentence on what was compiled, and how much of it is clean."""
    if not rows:
        return "nothing."
    bad = [i for i in rows if inspection_faults(i)]
    held = lines(rows)
    short = sum(not line.met for line in held)
    text = (
        f"{len(rows)} launches compiled for {listed(archs_of(rows))} with triton {rows[0].triton}, machine code read; "
        f"{len(rows) - len(bad)} without spills, serialised products or other faults"
    )
    if bad:
        text += f", {len(bad)} not: {named_faults(bad)}"
    if held:
        text += f". Of {len(held)} targets, these modelled ones included, {short} are missed"
    hopper = sorted(
        (i for i in rows if i.arch == "sm_90" and i.other_per_mma is not None and "GMMA" in (i.mma or "")),
        key=lambda i: i.other_per_mma or 0.0,
    )
    if hopper:
        low, high = hopper[0], hopper[-1]
        text += (
            f". Other instructions per HGMMA.64x128 on sm_90: {low.other_per_mma:.1f} ({low.layer} {low.pass_}) to "
            f"{high.other_per_mma:.1f} ({high.layer} {high.pass_})"
        )
    return text + "."


@dataclass(frozen=True)
class ModelledSum:
    """Modelled microseconds of a network's layers that multiply, in one pass, and as a multiple of their floors."""

    network: str
    gpu: str
    arch: str
    dtype: str
    batch: int
    pass_: str
    us: float
    ratio: float


def modelled_sums(rows: Sequence[Inspection]) -> list[ModelledSum]:
    """By pass, for the main network at its reference batch, and the first architecture and dtype that are modelled."""
    cases = [case for case in case_sums(main_rows(rows)) if case.ratio is not None and case.flops]
    if not cases:
        return []
    first = cases[0].first
    same = [c for c in cases if (c.first.arch, c.first.dtype) == (first.arch, first.dtype)]
    sums = []
    for pass_ in dict.fromkeys(c.first.pass_ for c in same):
        group = [c for c in same if c.first.pass_ == pass_]
        us, floor = sum(c.modelled_us or 0 for c in group), sum(c.floor_us or 0 for c in group)
        where = (first.network, first.gpu, first.arch, first.dtype, first.batch)
        sums.append(ModelledSum(*where, pass_, us, us / floor))
    return sums


def main_rows(rows: Sequence[Inspection]) -> list[Inspection]:
    """AlexNet's rows, or those of the first network where it is not among them, at the reference batch."""
    networks = {i.network for i in rows}
    main = MAIN if MAIN in networks else next((i.network for i in rows), MAIN)
    return [i for i in at_reference_batch(rows) if i.network == main]


def modelled_line(rows: Sequence[Inspection]) -> str:
    """One sentence on modelled times, by pass, for the first architecture and dtype that have them."""
    sums = modelled_sums(rows)
    if not sums:
        return "nothing."
    s = sums[0]
    parts = listed(f"{one.pass_} {one.us:.0f} us ({one.ratio:.2f}x the floor)" for one in sums)
    return (
        f"on {s.gpu} ({s.arch}), {s.network}, {s.dtype}, batch {s.batch}, over all layers that multiply: {parts}. The "
        f"floor is the data sheet's; {MODEL_NOTE[0].lower()}{MODEL_NOTE[1:]}"
    )


def inspection_cells(rows: Sequence[Inspection]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The table of launches: its header, and a line of text for every row."""
    header = ("layer", "network", "batch", "pass", "dtype", "arch", "kernel", "tile", "CTAs", "per SM", "registers",
              "stack B", "shared B", "tensor cores", "loop", "multiplies", "other per multiply", "loads and stores",
              "useful", "modelled us", "bound by", "verdict")  # fmt: skip
    cells = tuple(
        (i.layer, i.network, str(i.batch), i.pass_, i.dtype, i.arch,
         i.kernel if i.role == "main" else f"+ {i.kernel}", i.tile, str(i.ctas),
         _count(i.ctas_per_sm), str(i.registers), str(i.stack_bytes), str(i.shared_bytes), i.mma or "-",
         _count(i.loop_instructions), str(i.loop_mma or "-"), _fixed(i.other_per_mma, 1),
         ", ".join(f"{n} {k}" for k, n in i.loop_loads.items()) or "-", _useful(i), _fixed(i.modelled_us, 1),
         i.bound_by or "-", i.failure or listed(inspection_faults(i)) or "clean")
        for i in rows
    )  # fmt: skip
    return header, cells


def shortfall_table(rows: Sequence[Inspection], caption: str = "") -> Table:
    """Every line that falls short of its target, worst first."""
    return Table(SHORT_HEADER, tuple(short_cells(line) for line in shortfalls(rows)), caption=caption)


def short_cells(line: Line) -> tuple[str, ...]:
    """A target that is missed, as SHORT_HEADER names its cells."""
    times = MISSED if math.isinf(line.excess) else f"{line.excess:.2f}x"
    return (line.subject, line.pass_, line.dtype, line.arch, line.target, line.found, line.limit, times)


def case_table(cases: Sequence[CaseSum], summary: str = "", caption: str = "") -> Table:
    """A line for every case: its launches added up."""
    header = ("layer", "launches", "tile", "modelled us", "floor us", "modelled / floor", "modelled TFLOP/s",
              "bound by", "useful", "last wave full", "MB requested", "MB least")  # fmt: skip
    cells = tuple(
        (c.first.layer, str(len(c.rows)), c.first.tile, _fixed(c.modelled_us, 1), _fixed(c.floor_us, 1),
         _fixed(c.ratio, 2), _fixed(c.tflops, 0), c.first.bound_by or "-", _useful(c.first),
         _percent(c.first.wave_efficiency), _fixed(_requested(c), 1),
         _fixed(None if c.bytes_least is None else c.bytes_least / 1e6, 1))
        for c in cases
    )  # fmt: skip
    return Table(header, cells, summary, caption)


def peer_table(record: Record) -> Table:
    """Ours beside the peer's for every case that both have, those where the peer could be ahead first."""
    ours = {(c.first.case, c.first.arch): c for c in case_sums(record.inspections)}
    pairs = [(ours[key], p) for p in record.peers if (key := (p.case, p.arch)) in ours]
    pairs.sort(key=lambda pair: -(pair[0].modelled_us or 0) / (pair[1].modelled_us or math.inf))
    header = ("layer", "pass", "dtype", "arch", "ours modelled us", "peer at best us", "peer bound by", "peer",
              "peer tile", "others per multiply, ours", "peer's", "peer's loads and stores", "peer's faults",
              "verdict")  # fmt: skip
    cells = tuple(
        (p.layer, p.pass_, p.dtype, p.arch, _fixed(c.modelled_us, 1), _fixed(p.modelled_us, 1), p.bound_by or "-",
         p.kernel, p.tile, _fixed(c.first.other_per_mma, 1), _fixed(p.other_per_mma, 1),
         ", ".join(f"{n} {k}" for k, n in p.loop_loads.items()) or "-",
         p.failure or listed(inspection_faults(p)) or "none", _ahead(c, p))
        for c, p in pairs
    )  # fmt: skip
    return Table(header, cells)


def _ahead(case: CaseSum, peer: Inspection) -> str:
    if case.modelled_us is None or peer.modelled_us is None:
        return "not known"
    return "ours ahead" if case.modelled_us < peer.modelled_us else "NOT AHEAD"


def peer_section(record: Record) -> list[Block]:
    """The comparison with other projects' kernels, compiled for the same layers."""
    text = (
        "Inductor's Triton templates from the torch of this record, every entry of its list of tiles compiled, the one "
        "that could be fastest kept (of those without spills, if any). Its time is a lower bound: tensor cores, issued "
        "instructions, L2 and DRAM, without start, waves and latency; ours is the full model with all helper kernels. "
        "Neither is a measurement. Beside these templates Inductor may call cuDNN, which cannot be inspected. "
    )
    if any(peer.kernel.startswith("FlagGems") for peer in record.peers):
        text += "FlagGems' kernels, from its installed package, are compiled likewise from its own list of tiles."
    else:
        text += "FlagGems is not a dependency and not compared here."
    return [Heading("Peers"), Paragraph(text), peer_table(record)]


def inspect_section(record: Record, picture: Picture) -> list[Block]:
    """What falls short, every pass of the modelled architectures, what the model is held to, and every launch."""
    rows = record.inspections
    blocks: list[Block] = [Heading("Inspected and modelled"), Paragraph(_sentence(inspected_line(rows)))]
    blocks += [*_short_section(rows), *_modelled_section(rows), *published_section(record.published)]
    main = main_rows(rows)
    products = [i for i in main if i.loop_instructions and i.loop_mma]
    if products:
        most = max(sum(i.arch == arch for i in products) for arch in archs_of(products))
        grid = max(1, math.ceil(len(archs_of(products)) / 2))
        title = "what the main loop is made of, in instructions."
        text = "Stacked bars: multiply, load and store, and other instructions in each main loop, by architecture"
        size = (10, max(2.5, grid * (1.2 + 0.2 * most)))
        blocks.append(picture("loops", title, text, draw_loops(main), size, "inspected"))
    return [*blocks, *_launch_section(rows)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def published_section(rows: Sequence[Published]) -> list[Block]:
    """What the cost model says of products whose speed others published."""
    if not rows:
        return []
    text = (
        "The cost model, asked about products that others have measured. Its constants (what the tensor cores give "
        "under load, and what L2 delivers) were taken from figures of this kind, so agreement shows the calibration, "
        "and not that convolutions run as modelled. It cannot see bank conflicts, which bytes L2 still holds (a launch "
        "takes its operands from DRAM once), clocks beyond one constant a GPU, or how well loads overlap. Of kernels "
        "that do not multiply, such as pools, it knows bytes and a launch, not their instructions."
    )
    header = ("problem", "dtype", "GPU", "published TFLOP/s", "modelled TFLOP/s", "modelled / published", "source")
    cells = tuple(
        (p.problem, p.dtype, p.gpu, f"{p.published_tflops:.0f}", f"{p.modelled_tflops:.0f}",
         f"{p.modelled_tflops / p.published_tflops:.2f}", p.source)
        for p in rows
    )  # fmt: skip
    return [Heading("The model beside published products", 3), Paragraph(text), Table(header, cells)]


def _short_section(rows: Sequence[Inspection]) -> list[Block]:
    held = lines(rows)
    short = [line for line in held if not line.met]
    if not held:
        return []
    note = (
        f"{len(held) - len(short)} of {len(held)} lines meet their target. A line is one target held against one "
        "launch, or one case, at the batch that the targets are stated for. Missed yes-or-no targets come first, then "
        "the others by how far they pass the limit. A case's modelled time includes its helper kernels "
        "(space-to-depth, the sum of partial results). Bytes requested are those that all programs ask for, L2's "
        "traffic; the least is each operand once."
    )
    caption = f"Every line that falls short of its target, worst first ({len(short)})"
    return [Paragraph(note), shortfall_table(rows, caption=caption)] if short else [Paragraph(note)]


def _modelled_section(rows: Sequence[Inspection]) -> list[Block]:
    blocks: list[Block] = [Heading("Modelled, case by case", 3), Paragraph(MODEL_NOTE)]
    groups: dict[tuple[str, int, str, str, str, str], list[CaseSum]] = {}
    for case in case_sums(at_reference_batch(rows)):
        row = case.first
        if case.floor_us is not None:
            key = (row.network, row.batch, row.arch, row.gpu, row.dtype, row.pass_)
            groups.setdefault(key, []).append(case)
    main = {i.network for i in main_rows(rows)}
    for (network, batch, arch, gpu, dtype, pass_), cases in groups.items():
        title = f"{pass_} of {network} at batch {batch}, {dtype}, {arch} (modelled for {gpu})"
        blocks.append(case_table(cases, **({"caption": title} if network in main else {"summary": title})))
    return blocks if groups else []


def _launch_section(rows: Sequence[Inspection]) -> list[Block]:
    batches = sorted({i.batch for i in rows})
    text = (
        f"Compiled for GPUs that need not be there, with a launch's arguments at batch {listed(map(str, batches))}. "
        "The loop is the innermost one that multiplies; other instructions are counted for the work of one "
        "HGMMA.64x128 or HMMA.16816. Loads and stores are counted by width in bits: in the loop, or in the whole "
        "kernel where nothing multiplies. A plus sign marks a helper of the launch above or below it."
    )
    blocks: list[Block] = [Heading("Launch by launch", 3), Paragraph(text)]
    for arch in archs_of(rows):
        header, cells = inspection_cells([i for i in rows if i.arch == arch])
        blocks.append(Table(header, cells, f"Every launch on {arch} ({len(cells)})"))
    return blocks


def _requested(case: CaseSum) -> float | None:
    known = [None if i.bytes_read is None or i.bytes_written is None else i.bytes_read + i.bytes_written
             for i in case.rows]  # fmt: skip
    return None if None in known else sum(b for b in known if b is not None) / 1e6


def _useful(item: Inspection) -> str:
    if item.useful_rows is None or item.useful_columns is None:
        return "-"
    return _percent(item.useful_rows * item.useful_columns)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)
