"""The one place that asks what device there is: the GPU table, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache

import torch

INTERPRET_VARIABLE = "TILECONV_INTERPRET"
_interprets = False


@dataclass(frozen=True)
class GPU:
    """What choosing a tile needs to know of a GPU.  Sizes in bytes."""

    name: str
    arch: int  # compute capability, major * 10 + minor; 0 for the interpreter
    sms: int
    shared_block: int  # shared memory that one block may use
    shared_sm: int
    interprets: bool = False

    @property
    def has_descriptors(self) -> bool:
        """Tensor descriptors become TMA from sm_90 on; below, Triton lowers host descriptors to two-byte loads."""
        return self.interprets or self.arch >= 90


# Shared memory and SM counts: NVIDIA's CUDA C++ programming guide (compute capabilities) and the products' data sheets.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 80, 108, 166_912, 167_936),
        GPU("RTX 3090", 86, 82, 101_376, 102_400),
        GPU("RTX 4090", 89, 128, 101_376, 102_400),
        GPU("H100", 90, 132, 232_448, 233_472),
        GPU("B200", 100, 148, 232_448, 233_472),
        GPU("RTX 5090", 120, 170, 101_376, 102_400),
    )
}
INTERPRETER = GPU("interpreter", 0, 1, 1 << 40, 1 << 40, interprets=True)


def gpu_of_arch(arch: int) -> GPU:
    """The table's GPU of a compute capability, or the nearest one below it."""
    known = [gpu for gpu in GPUS.values() if gpu.arch <= arch]
    if not known:
        raise ValueError(f"arch=sm_{arch} is not supported: compute capability 8.0 or newer is needed")
    return max(known, key=lambda gpu: gpu.arch)


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU that Triton compiles for."""
    return torch.cuda.is_available()


def start_triton() -> None:
    """Import Triton, interpreting where there is no GPU.

    Called once, first thing in `import tileconv.kernels`.  TILECONV_INTERPRET=0 refuses the interpreter, =1 asks for
    it on a machine with a GPU too.  Raises ImportError on systems without Triton.
    """
    if not sys.platform.startswith("linux"):
        raise ImportError(f"tileconv needs Linux, because Triton does; this is {sys.platform}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("tileconv needs the package triton 3.6 or newer: pip install triton")
    wish = os.environ.get(INTERPRET_VARIABLE, "")
    if wish not in ("", "0", "1"):
        raise ImportError(f"{INTERPRET_VARIABLE}={wish!r} is not understood: use 0 (never) or 1 (always), or unset it")
    wanted = wish == "1" or (wish == "" and not has_gpu())
    if wanted and "triton" not in sys.modules and not _interpreter_asked_for():
        os.environ["TRITON_INTERPRET"] = "1"
        warnings.warn(
            f"tileconv runs in Triton's interpreter: slow, on the CPU ({INTERPRET_VARIABLE}=0 refuses it)", stacklevel=3
        )
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    global _interprets
    _interprets = isinstance(tl.cdiv, InterpretedFunction)  # Triton's own functions tell how it was imported
    if _interprets:
        from tileconv.kernels import interpreter

        interpreter.repair()


def _interpreter_asked_for() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def interpreting() -> bool:
    """Whether Triton was imported as an interpreter, whatever the environment says by now."""
    return _interprets


def check_device(device: torch.device, argument: str) -> None:
    """Raise ValueError or RuntimeError where kernels cannot run on `device`."""
    if device.type == "cuda":
        if interpreting():
            return  # the interpreter copies to the CPU and back
        return
    if device.type != "cpu":
        raise ValueError(f"{argument} is on {device}: allowed are CUDA devices, and the CPU with Triton's interpreter")
    if interpreting():
        return
    if has_gpu():
        raise ValueError(
            f"{argument} is on the CPU: move it to the GPU, or set {INTERPRET_VARIABLE}=1 before the import"
        )
    if os.environ.get(INTERPRET_VARIABLE) == "0":
        raise RuntimeError(
            f"{argument} is on the CPU, there is no GPU, and {INTERPRET_VARIABLE}=0 refuses Triton's interpreter"
        )
    raise RuntimeError(
        f"{argument} is on the CPU and there is no GPU, but triton was imported before tileconv.kernels, without its "
        "interpreter: import tileconv.kernels first, or set TRITON_INTERPRET=1 before anything imports triton"
    )


def gpu_of(device: torch.device) -> GPU:
    """The GPU that launches on tensors of `device` go to."""
    if interpreting():
        return INTERPRETER
    return _cuda_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_gpu(index: int) -> GPU:
    found = torch.cuda.get_device_properties(index)
    arch = found.major * 10 + found.minor
    like = gpu_of_arch(arch)
    return GPU(found.name, like.arch, found.multi_processor_count, like.shared_block, like.shared_sm)
