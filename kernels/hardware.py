"""The one place that asks what device there is: the GPU table, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass, replace
from functools import cache

import torch

from tileconv.kernels import fp32

INTERPRET_VARIABLE = "TILECONV_INTERPRET"
_interprets = False


@dataclass(frozen=True)
class GPU:
    """What choosing a tile needs to know of a GPU.  Sizes in bytes, rates per second or per cycle of one SM."""

    name: str
    arch: int  # compute capability, major * 10 + minor; 0 for the interpreter
    sms: int
    shared_block: int  # shared memory that one block may use
    shared_sm: int
    warps_sm: int = 48
    clock: float = 1e9  # the one that the peak below is stated at
    tensor_flops: int = 512  # of fp16 and bf16 with fp32 sums, a cycle; TF32 is half
    dram: float = 1e12
    l2: float = 2e12  # from L2 to all SMs
    sync_share: float = 1.0  # of tensor_flops, what mma.sync reaches: products of one warp, operands in registers
    interprets: bool = False

    @property
    def has_descriptors(self) -> bool:
        """Tensor descriptors become TMA from sm_90 on; below, Triton lowers host descriptors to two-byte loads."""
        return self.interprets or self.arch >= 90

    def peak(self, dtype: torch.dtype, precision: str) -> float:
        """Operations a second of the unit that multiplies `dtype`; where it multiplies parts, all products are one."""
        if fp32.multiplied(dtype, precision).itemsize == 2:
            return self.clock * self.sms * self.tensor_flops / fp32.products(precision)
        if dtype == torch.float32 and precision == "tf32":
            return self.clock * self.sms * self.tensor_flops / 2
        return self.clock * self.sms * 256 / (1 if dtype == torch.float32 else 2)


# Shared memory and warps: NVIDIA's CUDA C++ programming guide (compute capabilities).  SMs, clocks, tensor-core rates
# and DRAM: the products' data sheets (H100 SXM 989 TFLOP/s and 3.35 TB/s, A100 80 GB 312 and 2.04, B200 2250 and 8, RTX
# 3090 71, 4090 165, 5090 210).  L2 of the H100: Triton's 128x256 GEMM at 654 TFLOP/s draws 7.7 TB/s.  The L2 of the
# others is not published: assumed are the H100's bytes a cycle and SM.  mma.sync on Hopper: 62.9 % of the peak, on
# average of types and shapes, in arXiv:2402.13499, and 63 % in hazyresearch.stanford.edu/blog/2024-05-12-tk.
_L2_BYTES = 33
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 80, 108, 166_912, 167_936, 64, 1.41e9, 2048, 2.04e12, 108 * 1.41e9 * _L2_BYTES),
        GPU("RTX 3090", 86, 82, 101_376, 102_400, 48, 1.695e9, 512, 0.936e12, 82 * 1.695e9 * _L2_BYTES),
        GPU("RTX 4090", 89, 128, 101_376, 102_400, 48, 2.52e9, 512, 1.008e12, 128 * 2.52e9 * _L2_BYTES),
        GPU("H100", 90, 132, 232_448, 233_472, 64, 1.83e9, 4096, 3.35e12, 8e12, sync_share=0.62),
        GPU("B200", 100, 148, 232_448, 233_472, 64, 1.85e9, 8192, 8e12, 148 * 1.85e9 * _L2_BYTES),
        GPU("RTX 5090", 120, 170, 101_376, 102_400, 48, 2.407e9, 512, 1.792e12, 170 * 2.407e9 * _L2_BYTES),
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
    it on a machine with a GPU too.  Raises ImportError on systems without Triton, and where Triton was started another
    way than it says.
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
    if wish and _interprets != (wish == "1"):
        raise ImportError(
            f"{INTERPRET_VARIABLE}={wish}, but Triton "
            + ("interprets: unset TRITON_INTERPRET" if _interprets else "was imported before, without its interpreter")
        )
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
    if device.type in ("cuda", "meta"):
        return  # the interpreter copies to the CPU and back; of meta tensors shapes are asked for, nothing is launched
    if device.type != "cpu":
        raise ValueError(f"{argument} is on {device}: allowed are CUDA devices, and the CPU with Triton's interpreter")
    if interpreting() or torch._guards.detect_fake_mode() is not None:
        return  # tensors without values: shapes are asked for, nothing is launched
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


@cache
def triton_version() -> tuple[int, int]:
    """(major, minor): what a tile compiles to depends on it."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


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
    sms = found.multi_processor_count
    return replace(like, name=found.name, sms=sms, l2=like.l2 * sms / like.sms)
