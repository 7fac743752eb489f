"""Reads a compiled kernel's machine code: resources, and what its main loop is made of.

Nothing here runs a kernel. A cubin is disassembled with the tools that ship with triton, the control flow graph is
built from the text, and the main loop is the innermost natural loop that holds the tensor-core instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .control_flow import Graph, Loop

MMA = re.compile(r"^(?:[HQIDO]G?MMA|UTC[A-Z]*MMA)\b")
WIDE = re.compile(r"^(?:[HQI]G|UTC[A-Z]*)MMA\b")  # products of a whole warp group
MEMORY = re.compile(
    r"^(?:UTMALDG|UTMASTG|UTMAREDG|UBLKCP|LDGSTS|LDG|STG|LDSM|STSM|LDS|STS|LDL|STL|LDTM|STTM|LD|ST|RED|ATOMG?)\b"
)
# An unrolled loop that multiplies on the ordinary cores still is a main loop; fewer than this is address arithmetic.
LEAST_FMA = 16


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its guard (`@P0`), its opcode with modifiers, and its operands as text."""

    guard: str
    opcode: str
    operands: str

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Split `@!P0 BRA `(.L_x_1)` into its three parts."""
        match = re.match(r"\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)$", text.strip())
        if match is None:
            return cls("", text.strip() or "NOP", "")
        return cls((match[1] or "").strip(), match[2], match[3].rstrip(" ;}"))

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def arguments(self) -> list[str]:
        """The operands, in order."""
        return [part.strip() for part in self.operands.split(",")] if self.operands else []


@dataclass(frozen=True)
class Function:
    """One function of a cubin: instructions in address order, and the index that each label points at."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @cached_property
    def graph(self) -> Graph:
        """The control flow graph."""
        return Graph.of(self.instructions, self.labels)


@dataclass(frozen=True)
class MachineCode:
    """What one kernel's machine code says about itself.

    `scope` says what the counts cover: "loop" is the main loop; "kernel" is the whole kernel, for kernels that have no
    multiplying loop (pools). `memory` counts loads and stores by kind and width in bits, such as `LDGSTS.128`.
    """

    registers: int
    stack_bytes: int
    spills: int
    scope: str
    instructions: int
    loop_instructions: int | None
    mma: dict[str, int]
    memory: dict[str, int]
    serialised: bool
    register_operand: bool

    @property
    def mma_units(self) -> float:
        """The loop's products in units of one HGMMA.64x128 (32 bytes deep), or of one HMMA.16816."""
        return sum(count * product_size(opcode) for opcode, count in self.mma.items())


def product_size(opcode: str) -> float:
    """A product's size: HGMMA.64xNx* counts N / 128, HMMA.16816 counts 1; so does 1688 on 4-byte elements."""
    if wide := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x\d+", opcode):
        return int(wide[1]) * int(wide[2]) / (64 * 128)
    return 0.5 if opcode.startswith("HMMA.1688") and "TF32" not in opcode else 1.0


def parse_sass(text: str) -> list[Function]:
    """Read the output of `nvdisasm -c`: one Function for every .text section, the helpers behind it included."""
    functions: list[Function] = []
    name, instructions, labels = "", list[Instruction](), dict[str, int]()
    for line in text.splitlines():
        if section := re.match(r"^\s*\.section\s+\.text\.([^\s,]+)", line):
            if instructions:
                functions.append(Function(name, tuple(instructions), labels))
            name, instructions, labels = section[1].strip('"'), [], {}
        elif label := re.match(r"^(\.?[\w$]+):\s*$", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(Instruction.parse(code[1]))
    if instructions:
        functions.append(Function(name, tuple(instructions), labels))
    return functions


def memory_kind(opcode: str) -> str | None:
    """Name a load or store by kind and width in bits (`LDG.E.U16` -> `LDG.16`), or None for anything else."""
    if not MEMORY.match(opcode):
        return None
    base, *modifiers = opcode.split(".")
    if base.startswith(("UTMA", "UBLK", "LDTM", "STTM")):
        return base
    if base in ("LDSM", "STSM"):
        # The trailing figure counts 8x8 matrices; each gives a lane 32 bits.
        count = next((int(m) for m in reversed(modifiers) if m in ("2", "4")), 1)
        return f"{base}.{32 * count}"
    for modifier in modifiers:
        if width := re.fullmatch(r"[USBF]?(8|16|64|128|256)(?:x\d+)?", modifier):
            return f"{base}.{width[1]}"
    return f"{base}.32"


def count_memory(code: Iterable[Instruction]) -> dict[str, int]:
    """Count loads and stores by kind and width."""
    return dict(sorted(Counter(k for i in code if (k := memory_kind(i.opcode))).items()))


def is_mma(instruction: Instruction) -> bool:
    """Whether an instruction runs on the tensor cores."""
    return MMA.match(instruction.opcode) is not None


def takes_register(instruction: Instruction) -> bool:
    """Whether a Hopper or Blackwell tensor-core instruction takes operand A from registers or tensor memory.

    ptxas writes `HGMMA.64x128x16.F32 R88, gdesc[UR36], R88` when both operands come from shared memory (one group of
    descriptors names the two), and `HGMMA.64x128x16.F32 R88, R152, gdesc[UR28], R88` when A is in registers. tcgen05
    writes A first.
    """
    arguments = instruction.arguments
    if instruction.base in ("HGMMA", "QGMMA", "IGMMA"):
        return len(arguments) > 1 and re.match(r"R\d+", arguments[1]) is not None
    if instruction.base.startswith("UTC"):
        return bool(arguments) and arguments[0].startswith("tmem[")
    return False


def _multiplying(function: Function) -> dict[Loop, float]:
    """The loops with tensor-core instructions, and how much each multiplies."""
    code = function.instructions
    return {loop: n for loop in function.graph.loops if (n := _products(code[i] for i in loop.body))}


def _products(code: Iterable[Instruction]) -> float:
    """What some code multiplies, in HMMA.16816: a warp's share of an HGMMA.64x128 is sixteen, of a UTC*MMA no less."""
    return sum(product_size(i.opcode) * (16 if WIDE.match(i.opcode) else 1) for i in code if is_mma(i))


def _innermost(loops: Iterable[Loop]) -> list[Loop]:
    found = list(loops)
    return [a for a in found if not any(b is not a and b.blocks < a.blocks for b in found)]


def main_loop(function: Function) -> Loop | None:
    """The innermost natural loop with tensor-core instructions (of several the one that multiplies most, then the
    longest), unless the code outside of loops multiplies more than all of them: the main loop is then unrolled, and
    another is left.  As much as they do is a step that the compiler peeled off each, as Triton does on sm_100.

    Without tensor cores: the innermost loop with at least 16 fused multiply-adds; else None.
    """

    def best(weight: Mapping[Loop, float]) -> Loop | None:
        return max(_innermost(weight), key=lambda loop: (weight[loop], len(loop.body)), default=None)

    loops = function.graph.loops
    code = function.instructions
    with_mma = _multiplying(function)
    if with_mma or any(is_mma(i) for i in code):
        looped = {i for loop in loops for b in loop.blocks for i in range(*function.graph.blocks[b])}
        unrolled = _products(line for i, line in enumerate(code) if i not in looped)
        return best(with_mma) if sum(with_mma[loop] for loop in _innermost(with_mma)) >= unrolled else None
    fma = {loop: sum(code[i].base in ("FFMA", "FFMA2", "DFMA", "HFMA2") for i in loop.body) for loop in loops}
    return best({loop: n for loop, n in fma.items() if n >= LEAST_FMA})


def read_function(function: Function, registers: int, stack_bytes: int) -> MachineCode:
    """Facts about one kernel from its parsed code and its resource usage."""
    loop = main_loop(function)
    code = function.instructions if loop is None else tuple(function.instructions[i] for i in loop.body)
    mma = Counter(i.opcode for i in code if is_mma(i))
    if loop is not None and not mma:
        mma = Counter(i.base for i in code if i.base in ("FFMA", "FFMA2", "DFMA", "HFMA2"))
    # ptxas puts this wait after every product when it cannot keep them in flight (its remark C7515).  A kernel's other
    # loops count too: those of the last tiles, or of the small products of parts.
    every = [function.instructions[i] for inner in _innermost(_multiplying(function)) for i in inner.body]
    waits = any(i.opcode == "WARPGROUP.DEPBAR.LE" and i.arguments[:2] == ["gsb0", "0x0"] for i in every)
    return MachineCode(
        registers=registers,
        stack_bytes=stack_bytes,
        spills=sum(i.base in ("LDL", "STL") for i in function.instructions),
        scope="kernel" if loop is None else "loop",
        instructions=len(function.instructions),
        loop_instructions=None if loop is None else len(loop.body),
        mma=dict(sorted(mma.items())),
        memory=count_memory(code),
        serialised=waits,
        register_operand=any(takes_register(i) for i in code),
    )


def nvidia_tool(name: str) -> Path:
    """The path of cuobjdump or nvdisasm as triton ships it."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"triton {triton.__version__} ships no {name}; inspection needs triton's own wheel")
    return path


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return (resource usage, SASS) of a cubin as the two tools print them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [str(nvidia_tool("cuobjdump")), "--dump-resource-usage", file.name],
            [str(nvidia_tool("nvdisasm")), "-c", file.name],
        )
        usage, sass = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, sass


def resources(usage: str, kernel: str) -> tuple[int, int]:
    """Registers and stack bytes of `kernel` from cuobjdump's text."""
    pattern = rf"Function {re.escape(kernel)}:\s*REG:(\d+) STACK:(\d+)"
    match = re.search(pattern, usage) or re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump reported no register count for {kernel!r}")
    return int(match[1]), int(match[2])


def read_cubin(cubin: bytes, kernel: str) -> MachineCode:
    """Facts about `kernel` in a cubin."""
    usage, sass = disassemble(cubin)
    functions = parse_sass(sass)
    function = next((f for f in functions if f.name == kernel), functions[0] if functions else None)
    if function is None:
        raise ValueError(f"the cubin of {kernel!r} holds no code")
    return read_function(function, *resources(usage, kernel))


def read_amdgcn(assembly: str) -> MachineCode:
    """Resources of a gfx kernel from its assembly; the loop is not read."""

    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(match[1]) if match else 0

    opcodes = re.findall(r"^\t([vsdbg][a-z]*_\w+)", assembly, re.MULTILINE)
    return MachineCode(
        registers=number("vgpr_count"),  # from gfx90a on this counts the accumulators in
        stack_bytes=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        scope="kernel",
        instructions=len(opcodes),
        loop_instructions=None,
        mma=dict(sorted(Counter(o for o in opcodes if o.startswith("v_mfma")).items())),
        memory=dict(
            sorted(Counter(o for o in opcodes if re.match(r"(global|buffer|ds)_(load|store|read|write)", o)).items())
        ),
        serialised=False,
        register_operand=False,
    )


def read_compiled(compiled: Any) -> MachineCode:
    """Facts about a kernel that triton compiled, for NVIDIA (cubin) or AMD (assembly)."""
    if "cubin" in compiled.asm:
        return read_cubin(compiled.asm["cubin"], compiled.metadata.name)
    return read_amdgcn(compiled.asm["amdgcn"])
