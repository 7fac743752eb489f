"""Compiles what would be launched for a GPU that need not be there, and reads the machine code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .cases import Case, known
from .machine_code import read_compiled
from .workers import Progress, Task, describe_error, run_tasks, serve

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# triton decides by the first, tileconv.kernels by the second, whether this process interprets.
COMPILING = {"TRITON_INTERPRET": "0", "TILECONV_INTERPRET": "0"}
GFX942 = ("MI300X", 65536)  # local data share of a workgroup: AMD's CDNA3 instruction set manual


def target(arch: str) -> Any:
    """triton's target for `sm_90` or `gfx942`."""
    from triton.backends.compiler import GPUTarget

    known("arch", arch, ARCHS)
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def gpu_and_limit(arch: str) -> tuple[str, int]:
    """The GPU that stands for an architecture, and the shared memory that one of its blocks may use."""
    from tileconv.kernels import hardware

    if not arch.startswith("sm_"):
        return GFX942
    gpu = hardware.gpu_of_arch(int(arch[3:]))
    return gpu.name, gpu.shared_block


def compile_launch(launch: Any, arch: str) -> Any:
    """Compile a Launch for `arch` with the specialisation that a real launch finds; returns triton's CompiledKernel.

    The signature comes from triton's own binder, so integers equal to 1, divisibility by 16, None and descriptors are
    treated as in a launch. Raises RuntimeError in a process where triton interprets: such a process cannot compile.
    """
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"launch.kernel={kernel!r} is interpreted here; use inspect_all, which compiles in a subprocess"
        )
    backend = make_backend(target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "debug": False}
    arguments, specialization, rest = bind(**launch.arguments, **options)
    # 3.6 to 3.9 agree on these two steps of JITFunction.run.
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, arguments, specialization, rest)
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target(arch), options=parsed.__dict__)


def describe_tile(launch: Any) -> str:
    """The launch's own name for its tile, or its block sizes."""
    if tile := getattr(launch, "tile", ""):
        return str(tile)
    blocks = [f"{name} {value}" for name, value in launch.arguments.items() if name.startswith(("BLOCK_", "BOX_"))]
    return ", ".join([*blocks, f"w{launch.num_warps} s{launch.num_stages}"])


def inspect_launch(launch: Any, arch: str) -> dict[str, Any]:
    """Facts about one launch on `arch`, keyed like records.Inspection.

    `fits` is False where the kernel asks for more shared memory than a block may use: triton compiles it all the same.
    """
    compiled = compile_launch(launch, arch)
    code = read_compiled(compiled)
    ctas = 1
    for extent in launch.grid:
        ctas *= int(extent)
    return {
        "kernel": launch.kernel.__name__,
        "tile": describe_tile(launch),
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "spills": code.spills,
        "shared_bytes": compiled.metadata.shared,
        "fits": compiled.metadata.shared <= gpu_and_limit(arch)[1],
        "ctas": ctas,
        "scope": code.scope,
        "instructions": code.instructions,
        "mma": " + ".join(code.mma) or None,
        "loop_instructions": code.loop_instructions,
        "loop_mma": sum(code.mma.values()),
        "loop_loads": code.memory,
        "serialised": code.serialised,
        "register_operand": code.register_operand,
        "failure": None,
    }


def failed(kernel: str, tile: str, reason: str) -> dict[str, Any]:
    """The facts of a launch that did not compile."""
    return {
        "kernel": kernel, "tile": tile, "registers": 0, "stack_bytes": 0, "spills": 0, "shared_bytes": 0, "fits": False,
        "ctas": 0, "scope": "kernel", "instructions": 0, "mma": None, "loop_instructions": None, "loop_mma": 0,
        "loop_loads": {}, "serialised": False, "register_operand": False, "failure": reason,
    }  # fmt: skip


def inspect_case(case: Case, arch: str) -> list[dict[str, Any]]:
    """One row for every launch of a case; a launch that does not compile gives a row that says why."""
    from tileconv.kernels import hardware

    from .cases import launches

    # A gfx target gets the pointer kernels that the oldest GPU of the table gets: it has no tensor descriptors.
    gpu = hardware.gpu_of_arch(int(arch[3:]) if arch.startswith("sm_") else 80)
    rows = []
    for launch in launches(case, gpu):
        try:
            rows.append(inspect_launch(launch, arch))
        except Exception as error:
            rows.append(failed(launch.kernel.__name__, describe_tile(launch), describe_error(error)))
    return rows


def inspect_all(
    cases: Sequence[Case], archs: Sequence[str], *, jobs: int = 2, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Inspection rows (JSON of records.Inspection) for every case on every architecture, in that order.

    Compiles in `jobs` worker processes, because this process may be interpreting. `progress(done, total, label)` is
    called after each case. Raises ValueError for an unknown architecture.
    """
    import triton

    for arch in archs:
        known("arch", arch, ARCHS)
    tasks: list[Task] = [case.to_json() | {"arch": arch} for arch in archs for case in cases]
    answers = run_tasks(
        "tileconv.bench.inspect",
        tasks,
        jobs=jobs,
        environment=COMPILING,
        label=lambda task: f"{task['layer']} {task['dtype']} {task['arch']}",
        progress=progress,
    )
    rows: list[dict[str, Any]] = []
    for task, answer in zip(tasks, answers, strict=True):
        head = {
            "network": task["network"], "layer": task["layer"], "pass": task["pass_"], "dtype": task["dtype"],
            "arch": task["arch"], "gpu": gpu_and_limit(task["arch"])[0], "batch": task["batch"],
            "triton": triton.__version__,
        }  # fmt: skip
        facts = answer.get("rows") or [failed("", "", answer.get("error", "no launches"))]
        rows.extend(head | fact for fact in facts)
    return rows


def main() -> None:
    """The worker: a case and an arch a line in, {"rows": [...]} a line out."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("usage: python -m tileconv.bench.inspect --worker (reads JSON cases on stdin)")
    serve(lambda task: {"rows": inspect_case(Case.from_json(task), task["arch"])})


if __name__ == "__main__":
    main()
