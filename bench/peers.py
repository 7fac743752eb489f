"""Other projects' Triton convolutions for the same layers: PyTorch Inductor's, rendered from the installed torch, and
FlagGems' where it is installed; compiled alike.

Both time every entry of a list of tiles on the GPU that they run on.  Without one, each entry is compiled and the one
that could be fastest is kept, of those that spill no registers if there are any.  Its time is a lower bound, `at best`:
tensor cores, the instructions that its loop issues, L2 and DRAM, with neither start, waves nor latency.  That favours
the peer.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import flaggems
from .cases import DTYPES, Case, conv_problem, shape_of
from .inspect import COMPILING, failed, gpu_and_limit, gpu_of, inspect_launch
from .networks import known
from .workers import Progress, Task, describe_error, run_tasks, serve

NAMES = {"fprop": "conv2d_template", "dgrad": "conv2d_bwd_input_template", "wgrad": "conv2d_bwd_weight_template"}
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")
# How many operations one product of machine_code.product_size does, and how many of an SM's four schedulers issue it.
UNITS = {"HGMMA": (2 * 64 * 128, 1), "HMMA": (2 * 16 * 8, 4)}


def peer_cases(cases: Sequence[Case]) -> list[Case]:
    """The cases that Inductor has a convolution template for; it runs linear layers as matrix products."""
    return [c for c in cases if c.pass_ in NAMES and shape_of(c).op == "conv2d" and c.dtype in ("fp16", "bf16", "tf32")]


def has_template(pass_: str) -> bool:
    """Whether the installed torch's Inductor has a Triton convolution for a pass."""
    from torch._inductor.kernel import conv

    return hasattr(conv, NAMES[pass_])


def template(pass_: str) -> Any:
    """Inductor's template for a pass. Raises ValueError where the installed torch has none: it then calls cuDNN."""
    from torch._inductor.kernel import conv

    if not has_template(pass_):
        raise ValueError(f"torch {torch.__version__} has no Triton template for {pass_}: Inductor calls cuDNN there")
    return getattr(conv, NAMES[pass_])


def render(case: Case, config: Any) -> tuple[str, tuple[int, ...]]:
    """The source of Inductor's kernel for a case and an entry of its list, operands channels_last; and its grid."""
    problem = conv_problem(shape_of(case))
    shapes = {"X": problem.x_shape, "W": problem.w_shape, "dY": problem.y_shape}
    out = {"fprop": problem.y_shape, "dgrad": problem.x_shape, "wgrad": problem.w_shape}[case.pass_]
    constants = {
        "KERNEL_H": problem.R, "KERNEL_W": problem.S, "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1],
        "PADDING_H": problem.padding[0][0], "PADDING_W": problem.padding[1][0], "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1], "GROUPS": problem.groups, "UNROLL": problem.taps == 1,
        "ALLOW_TF32": case.dtype == "tf32", "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }  # fmt: skip

    def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
        _, channels, height, width = shape
        return height * width * channels, 1, width * channels, channels

    def def_kernel(*names: str) -> str:
        known_here = [f"    {name}: tl.constexpr = {value}" for name, value in constants.items()]
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit"]
        head += [f"def peer({', '.join(names)}, OUT):", "    INDEX_DTYPE: tl.constexpr = tl.int32"]
        return "\n".join([*head, *known_here])

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        offset = " + ".join(f"({i}) * {s}" for i, s in zip(indices, strides(out), strict=True))
        return f"tl.store(OUT + {offset}, {value}, mask={mask})"

    source = template(case.pass_).template.render(
        def_kernel=def_kernel,
        size=lambda name, axis: str((shapes[name] if name else out)[axis]),
        stride=lambda name, axis: str(strides(shapes[name])[axis]),
        store_output=store_output,
        **constants,
    )
    rows, columns = {
        "fprop": (problem.N * problem.P * problem.Q, problem.K // problem.groups),
        "dgrad": (problem.N * problem.H * problem.W, problem.C // problem.groups),
        "wgrad": (problem.group_channels * problem.taps, problem.group_filters),
    }[case.pass_]
    return source, (-(-rows // config.block_m), -(-columns // config.block_n), problem.groups)


def launch_of(case: Case, config: Any, folder: Path) -> Any:
    """Inductor's launch of a case as ours are described; its source lies in `folder`, where triton reads it."""
    from tileconv.kernels.launch.common import Launch

    source, grid = render(case, config)
    problem = conv_problem(shape_of(case))
    # Inductor holds fprop with more than one tap to four warps, because eight gave wrong results.
    warps = min(config.num_warps, 4) if case.pass_ == "fprop" and problem.taps > 1 else config.num_warps
    name = f"{case.pass_}_{case.layer}_{config.block_m}_{config.block_n}_{config.block_k}_{warps}_{config.num_stages}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"tileconv_peer_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = {"X": problem.x_shape, "W": problem.w_shape, "dY": problem.y_shape}
    operands = {"fprop": ("X", "W"), "dgrad": ("dY", "W"), "wgrad": ("X", "dY")}[case.pass_]
    arguments = {operand: _meta(shapes[operand], case.dtype) for operand in operands}
    out = {"fprop": "dY", "dgrad": "X", "wgrad": "W"}[case.pass_]
    arguments["OUT"] = _meta(shapes[out], case.dtype)
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{warps} s{config.num_stages}"
    return Launch(module.peer, grid, arguments, warps, config.num_stages, tile)


def _meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta", memory_format=torch.channels_last)


def configs() -> list[Any]:
    """Inductor's list of convolution tiles."""
    from torch._inductor.template_heuristics.triton import BaseConfigHeuristic

    return list(BaseConfigHeuristic().conv_configs)


def at_best(case: Case, config: Any, facts: dict[str, Any], gpu: Any) -> dict[str, Any]:
    """The modelled half of a row: a lower bound of the time, and what bounds it."""
    from tileconv.kernels import cost, cost_rates

    problem, dtype = conv_problem(shape_of(case)), DTYPES[case.dtype]
    depth = {
        "fprop": problem.taps * -(-problem.group_channels // config.block_k),
        "dgrad": -(-problem.group_filters * problem.taps // config.block_k),
        "wgrad": -(-problem.N * problem.P * problem.Q // config.block_k),
    }[case.pass_]
    tile = config.block_m * config.block_n
    flops = 2 * facts["ctas"] * depth * tile * config.block_k
    read = facts["ctas"] * depth * (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    least = problem.bytes_least(dtype.itemsize)
    idle = max(1.0, gpu.sms / facts["ctas"])
    times = {
        "tensor": 1e6 * idle * flops / gpu.peak(dtype, case.precision) / cost_rates.TENSOR_LOAD,
        "L2": 1e6 * read / gpu.l2,
        "DRAM": 1e6 * least / gpu.dram,
    }
    unit = UNITS.get((facts["mma"] or "").split(".")[0])
    if unit and facts["other_per_mma"] is not None and facts["loop_mma"]:
        size = (facts["loop_instructions"] - facts["loop_mma"]) / facts["other_per_mma"]
        each = facts["loop_instructions"] / size
        times["issue"] = 1e6 * idle * flops / (unit[0] * 32 / dtype.itemsize) * each / unit[1] / gpu.sms / gpu.clock
    if facts["serialised"] and facts["ctas_per_sm"] * facts["num_warps"] <= 4 and "issue" in times:
        # One group of four warps that waits for every product: while it waits it issues nothing.
        times["tensor, then issue"] = times["tensor"] + times["issue"]
    bound = max(times, key=lambda name: times[name])
    return {
        "useful_rows": None, "useful_columns": None, "wave_efficiency": None, "bytes_read": read,
        "bytes_written": None, "bytes_least": least, "flops_done": flops, "flops_needed": problem.flops,
        "modelled_us": times[bound], "floor_us": cost.floor_us(problem, dtype, case.precision, gpu), "bound_by": bound,
        "peak_tflops": gpu.peak(dtype, case.precision) / 1e12, "dram_gbs": gpu.dram / 1e9,
    }  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Another project's list of tiles for a case, and its launch with one of them."""

    kernel: str
    configs: list[Any]
    launch: Callable[[Any], Any]


def peer_of(name: str, case: Case, folder: Path) -> Peer:
    """The peer of that name ("Inductor" or "FlagGems") for a case; sources that it needs go to `folder`."""
    if name == "FlagGems":
        kernel = f"FlagGems {flaggems.LISTS[case.pass_]}"
        return Peer(kernel, flaggems.configs(case.pass_), partial(flaggems.launch_of, case))
    kernel = f"Inductor {NAMES[case.pass_].removesuffix('_template')}"
    return Peer(kernel, configs(), lambda config: launch_of(case, config, folder))


def inspect_peer(case: Case, arch: str, name: str = "Inductor") -> dict[str, Any]:
    """The entry of a peer's list that could be fastest for a case, as a row of records.Inspection."""
    gpu = gpu_of(arch)
    place = {"step": 0, "steps": 1, "role": "main"}
    best: dict[str, Any] | None = None
    reason = "every entry failed to compile"
    with tempfile.TemporaryDirectory() as folder:
        peer = peer_of(name, case, Path(folder))
        for config in peer.configs:
            try:
                launch = peer.launch(config)
                facts = inspect_launch(launch, arch)
            except Exception as error:
                reason = describe_error(error)
                continue
            if not facts["fits"]:
                continue
            row = place | facts | at_best(case, config, facts, gpu)
            if best is None or _rank(row) < _rank(best):
                best = row
    return (best or failed(reason)) | {"kernel": peer.kernel}


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    return row["stack_bytes"] > 0 or row["spills"] > 0, row["modelled_us"]


def inspect_peers(
    cases: Sequence[Case], archs: Sequence[str], *, jobs: int = 2, cached: bool = True, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Rows (JSON of records.Inspection) of the peers' kernels for the cases that they have kernels for.

    As inspect_all; raises ValueError for an architecture on which this comparison has no model.  FlagGems' come after
    Inductor's, where flaggems.missing() is None.
    """
    from .cache import VARIABLE

    for arch in archs:
        known("arch", arch, ARCHS)
    names = [("Inductor", peer_cases(cases))]
    if flaggems.missing() is None:
        names.append(("FlagGems", [case for case in cases if flaggems.takes(case)]))
    tasks: list[Task] = [
        case.to_json() | {"arch": arch, "case": str(case), "peer": name}
        for name, own in names
        for arch in archs
        for case in own
    ]
    answers = run_tasks(
        "tileconv.bench.peers",
        tasks,
        jobs=jobs,
        environment=COMPILING if cached else COMPILING | {VARIABLE: ""},
        label=lambda task: f"{task['layer']} {task['pass_']} {task['dtype']} {task['arch']} {task['peer']}",
        progress=progress,
    )
    import triton

    rows = []
    for task, answer in zip(tasks, answers, strict=True):
        head = {
            "case": task["case"], "network": task["network"], "layer": task["layer"], "pass": task["pass_"],
            "dtype": task["dtype"], "arch": task["arch"], "gpu": gpu_and_limit(task["arch"])[0],
            "batch": task["batch"], "triton": triton.__version__,
        }  # fmt: skip
        rows.append(head | (answer.get("row") or failed(answer.get("error", "no answer"))))
    return rows


def main() -> None:
    """The worker: a case and an arch a line in, {"row": {...}} a line out."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("usage: python -m tileconv.bench.peers --worker (reads JSON cases on stdin)")
    serve(lambda task: {"row": inspect_peer(Case.from_json(task), task["arch"], task["peer"])})


if __name__ == "__main__":
    main()
