"""Basic blocks, dominators and natural loops of a function's machine code."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

LABEL = re.compile(r"\.L_\w+")
POLL_LENGTH = 16


class Code(Protocol):
    """What this file needs to know of an instruction."""

    @property
    def guard(self) -> str: ...
    @property
    def opcode(self) -> str: ...
    @property
    def operands(self) -> str: ...


@dataclass(frozen=True)
class Loop:
    """A natural loop: header, all its blocks, and `body`, the instructions of its hot path in address order.

    Out-of-line polls (a barrier that was not ready yet is retried behind the kernel's end) belong to `blocks`,
    not to `body`.
    """

    header: int
    blocks: frozenset[int]
    body: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Blocks are index ranges [start, end) of the instruction list; edges go from block to block."""

    code: Sequence[Code]
    blocks: tuple[tuple[int, int], ...]
    successors: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, code: Sequence[Code], labels: dict[str, int]) -> Graph:
        """Cut the code at labels and behind branches."""
        cuts = {0, len(code)} | {i for i in labels.values() if i < len(code)}
        cuts |= {i + 1 for i, line in enumerate(code) if _jumps(line)}
        edges = sorted(cuts)
        blocks = tuple(itertools.pairwise(edges)) if code else ()
        starts = {start: number for number, (start, _) in enumerate(blocks)}
        successors = []
        for number, (_, end) in enumerate(blocks):
            last = code[end - 1]
            targets = [starts[labels[t]] for t in _targets(last) if labels.get(t, len(code)) < len(code)]
            if not _ends(last) and number + 1 < len(blocks):
                targets.append(number + 1)
            successors.append(tuple(dict.fromkeys(targets)))
        return cls(code, blocks, tuple(successors))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Edges the other way round."""
        back: list[list[int]] = [[] for _ in self.blocks]
        for source, targets in enumerate(self.successors):
            for target in targets:
                back[target].append(source)
        return tuple(tuple(b) for b in back)

    @cached_property
    def dominators(self) -> dict[int, frozenset[int]]:
        """For every reachable block, the blocks that each way from the entry passes."""
        reached = reach({0}, self.successors) if self.blocks else set()
        everything = frozenset(reached)
        found = dict.fromkeys(reached, everything)
        if reached:
            found[0] = frozenset({0})
        changed = True
        while changed:
            changed = False
            for b in sorted(reached - {0}):
                before = [found[p] for p in self.predecessors[b] if p in reached]
                new = frozenset.intersection(*before) | {b}
                if new != found[b]:
                    found[b], changed = new, True
        return found

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Natural loops; back edges to one header make one loop."""
        bodies: dict[int, set[int]] = {}
        for source, dominators in self.dominators.items():
            for header in self.successors[source]:
                if header in dominators:
                    inside = {header} | reach({source}, self.predecessors, stop=header)
                    bodies.setdefault(header, set()).update(inside & self.dominators.keys())
        polls = [(h, b) for h, b in bodies.items() if self._polls(b)]
        return tuple(
            Loop(header, frozenset(blocks), self._instructions(self._hot(header, blocks, polls)))
            for header, blocks in sorted(bodies.items())
        )

    def _polls(self, blocks: set[int]) -> bool:
        """A few instructions around a barrier test, and none that move or multiply data."""
        opcodes = [self.code[i].opcode for i in self._instructions(blocks)]
        works = any("MMA" in o or o.startswith(("UTMA", "LDG", "LDS", "STS", "STG")) for o in opcodes)
        return any(o.startswith("SYNCS.PHASECHK") for o in opcodes) and len(opcodes) <= POLL_LENGTH and not works

    def _hot(self, header: int, blocks: set[int], polls: list[tuple[int, set[int]]]) -> set[int]:
        """The loop's blocks without out-of-line polls and what only leads to or from them."""
        hot = blocks
        for other, poll in polls:
            if other == header or not poll < blocks:
                continue
            rest = hot - poll
            latches = {b for b in rest if header in self.successors[b]}
            forward = reach({header}, self.successors, inside=rest)
            kept = forward & reach(latches & forward, self.predecessors, inside=rest)
            # A poll that every iteration passes cannot be taken out.
            if header in kept:
                hot = kept
        return hot

    def _instructions(self, blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(i for b in sorted(blocks) for i in range(*self.blocks[b]))


def reach(
    start: set[int], edges: Sequence[Sequence[int]], *, stop: int | None = None, inside: set[int] | None = None
) -> set[int]:
    """Blocks that can be reached from `start`, not walking on from `stop` and not leaving `inside`."""
    found = {b for b in start if inside is None or b in inside}
    todo = list(found)
    while todo:
        block = todo.pop()
        if block == stop:
            continue
        for target in edges[block]:
            if target not in found and (inside is None or target in inside):
                found.add(target)
                todo.append(target)
    return found


def _targets(line: Code) -> list[str]:
    return LABEL.findall(line.operands) if _jumps(line) and line.opcode.split(".")[0] in ("BRA", "BRX", "JMP") else []


def _jumps(line: Code) -> bool:
    return line.opcode.split(".")[0] in ("BRA", "BRX", "JMP", "EXIT", "RET", "KILL")


def _ends(line: Code) -> bool:
    """Whether control never falls through: an unguarded jump whose only operand is its target."""
    if line.guard or not _jumps(line):
        return False
    return not line.opcode.startswith(("BRA", "JMP")) or "," not in line.operands
