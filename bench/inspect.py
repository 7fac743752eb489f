"""Compiles what would be launched for a GPU that need not be there, and reads the machine code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import cache
from .cases import Case
from .machine_code import read_compiled
from .networks import known
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


def gpu_of(arch: str) -> Any:
    """The GPU that stands for an architecture; None for AMD's, which the table and the cost model do not hold."""
    from tileconv.kernels import hardware

    return hardware.gpu_of_arch(int(arch[3:])) if arch.startswith("sm_") else None


def gpu_and_limit(arch: str) -> tuple[str, int]:
    """The name of the GPU that stands for an architecture, and the shared memory that one of its blocks may use."""
    gpu = gpu_of(arch)
    return GFX942 if gpu is None else (gpu.name, gpu.shared_block)


@dataclass(frozen=True)
class Specialised:
    """A launch as triton's compiler sees it, and the key of its facts in the cache."""

    source: Any
    options: dict[str, Any]
    key: str


def specialise(launch: Any, arch: str) -> Specialised:
    """A Launch with the specialisation that a real launch finds on `arch`.

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
    options = launch.options | {"debug": False}
    arguments, specialization, rest = bind(**launch.arguments, **options)
    # 3.6 to 3.9 agree on these two steps of JITFunction.run.
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, arguments, specialization, rest)
    key = cache.key(
        kernel=kernel.cache_key, name=kernel.__name__, signature=signature, constexprs=constexprs,
        attributes=attributes, options=sorted(parsed.__dict__.items(), key=str), arch=arch, triton=triton.__version__,
    )  # fmt: skip
    return Specialised(ASTSource(kernel, signature, constexprs, attributes), parsed.__dict__, key)


def compile_launch(launch: Any, arch: str) -> Any:
    """Compile a Launch for `arch`; returns triton's CompiledKernel. As `specialise` on what it raises."""
    return _compile(specialise(launch, arch), arch)


def _compile(special: Specialised, arch: str) -> Any:
    import triton

    return triton.compile(special.source, target=target(arch), options=special.options)


def describe_tile(launch: Any) -> str:
    """The launch's own name for its tile, or its block sizes."""
    if tile := getattr(launch, "tile", ""):
        return str(tile)
    blocks = [f"{name} {value}" for name, value in launch.arguments.items() if name.startswith(("BLOCK_", "BOX_"))]
    return ", ".join([*blocks, f"w{launch.num_warps} s{launch.num_stages}"])


def inspect_launch(launch: Any, arch: str) -> dict[str, Any]:
    """Facts about one launch on `arch`, keyed like records.Inspection, without what a case and the cost model add.

    `fits` is False where the kernel asks for more shared memory than a block may use: triton compiles it all the same.
    """
    special = specialise(launch, arch)
    facts = cache.load(special.key)
    if facts is None:
        facts = _read(_compile(special, arch))
        cache.save(special.key, facts)
    gpu = gpu_of(arch)
    return head_of(launch) | facts | {
        "fits": facts["shared_bytes"] <= gpu_and_limit(arch)[1],
        "ctas_per_sm": None if gpu is None else occupancy(facts["registers"], facts["shared_bytes"], launch, gpu),
        "failure": None,
    }  # fmt: skip


def _read(compiled: Any) -> dict[str, Any]:
    """What the cache keeps: facts that depend on the machine code alone."""
    code = read_compiled(compiled)
    products = sum(code.mma.values())
    others = None
    if code.loop_instructions is not None and code.mma_units:
        others = (code.loop_instructions - products) / code.mma_units
    return {
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "spills": code.spills,
        "shared_bytes": compiled.metadata.shared,
        "scope": code.scope,
        "instructions": code.instructions,
        "mma": " + ".join(code.mma) or None,
        "loop_instructions": code.loop_instructions,
        "loop_mma": products,
        "other_per_mma": others,
        "loop_loads": code.memory,
        "serialised": code.serialised,
        "register_operand": code.register_operand,
    }


def occupancy(registers: int, shared: int, launch: Any, gpu: Any) -> int:
    """Programs of a launch that fit an SM at once, by what its compiled kernel takes."""
    from tileconv.kernels import cost

    fitting: int = cost.occupancy(registers, shared, launch.num_warps, gpu)
    return fitting


def head_of(launch: Any) -> dict[str, Any]:
    """What a launch says of itself before it is compiled."""
    ctas = 1
    for extent in launch.grid:
        ctas *= int(extent)
    return {
        "kernel": launch.kernel.__name__, "tile": describe_tile(launch), "num_warps": launch.num_warps,
        "num_stages": launch.num_stages, "ctas": ctas,
    }  # fmt: skip


LOST: dict[str, Any] = {
    "registers": 0, "stack_bytes": 0, "spills": 0, "shared_bytes": 0, "fits": False, "ctas_per_sm": None,
    "scope": "kernel", "instructions": 0, "mma": None, "loop_instructions": None, "loop_mma": 0, "other_per_mma": None,
    "loop_loads": {}, "serialised": False, "register_operand": False,
}  # fmt: skip
NO_LAUNCH = {"kernel": "", "tile": "", "num_warps": 0, "num_stages": 0, "ctas": 0, "step": 0, "steps": 1,
             "role": "main"}  # fmt: skip


def failed(reason: str) -> dict[str, Any]:
    """A row's facts where nothing could be compiled."""
    from .predictions import NOTHING

    return NO_LAUNCH | LOST | NOTHING | {"failure": reason}


def inspect_case(case: Case, arch: str, override: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One row for every launch of a case; a launch that does not compile gives a row that says why.

    `override` are fields of ConvTile for its convolutions; ValueError where a tile with them cannot run.
    """
    from tileconv.kernels import tiles
    from tileconv.kernels.launch import plans

    from .cases import launches
    from .predictions import NOTHING, PRODUCTS, predictions

    # A gfx target gets the pointer kernels that the oldest GPU of the table gets: it has no tensor descriptors.
    gpu = gpu_of(arch)
    planner = gpu or replace(gpu_of("sm_80"), shared_block=GFX942[1])
    with tiles.override(**{n: tuple(v) if isinstance(v, list) else v for n, v in (override or {}).items()}):
        with plans.allocations() as scratch:
            planned = launches(case, planner)
        modelled = [NOTHING] * len(planned) if gpu is None else predictions(case, planned, gpu)
    multiplies = any(launch.kernel.__name__ in PRODUCTS for launch in planned)
    extra = sum(tensor.nbytes for tensor in scratch)
    rows = []
    for step, (launch, prediction) in enumerate(zip(planned, modelled, strict=True)):
        main = launch.kernel.__name__ in PRODUCTS if multiplies else launch.kernel is planned[0].kernel
        place = {"step": step, "steps": len(planned), "role": "main" if main else "helper", "extra_bytes": extra}
        try:
            facts = inspect_launch(launch, arch)
        except Exception as error:
            facts = head_of(launch) | LOST | {"failure": describe_error(error)}
        rows.append(place | facts | prediction)
    return rows


def inspect_all(
    cases: Sequence[Case], archs: Sequence[str], *, jobs: int = 1, cached: bool = True,
    override: dict[str, Any] | None = None, progress: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Inspection rows (JSON of records.Inspection) for every case on every architecture, in that order.

    Compiles in `jobs` worker processes, because this process may be interpreting. `progress(done, total, label)` is
    called after each case. `cached` False compiles what an earlier run kept; `override` as in inspect_case. Raises
    ValueError for an unknown architecture.
    """
    import triton

    for arch in archs:
        known("arch", arch, ARCHS)
    tasks: list[Task] = [
        case.to_json() | {"arch": arch, "case": str(case), "override": override} for arch in archs for case in cases
    ]
    answers = run_tasks(
        "tileconv.bench.inspect",
        tasks,
        jobs=jobs,
        environment=COMPILING if cached else COMPILING | {cache.VARIABLE: ""},
        label=lambda task: f"{task['layer']} {task['pass_']} {task['dtype']} {task['arch']}",
        progress=progress,
    )
    rows: list[dict[str, Any]] = []
    for task, answer in zip(tasks, answers, strict=True):
        head = {
            "case": task["case"], "network": task["network"], "layer": task["layer"], "pass": task["pass_"],
            "dtype": task["dtype"], "arch": task["arch"], "gpu": gpu_and_limit(task["arch"])[0],
            "batch": task["batch"], "triton": triton.__version__,
        }  # fmt: skip
        rows.extend(head | facts for facts in answer.get("rows") or [failed(answer.get("error", "no launches"))])
    return rows


def main() -> None:
    """The worker: a case and an arch a line in, {"rows": [...]} a line out."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("usage: python -m tileconv.bench.inspect --worker (reads JSON cases on stdin)")
    serve(lambda task: {"rows": inspect_case(Case.from_json(task), task["arch"], task["override"])})


if __name__ == "__main__":
    main()
