"""What a run ran on: versions, device, machine and commit. No host name, user name or path."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from tileconv.model import version

from .records import Commit, Device, Machine, Versions, slug
from .workers import describe_error


def device() -> Device:
    """The CUDA device, or Triton's interpreter where there is none."""
    import torch

    from tileconv.kernels import hardware

    if torch.cuda.is_available() and not hardware.interpreting():
        name = torch.cuda.get_device_name()
        return Device(name, "cuda", slug(name))
    return Device("Triton's interpreter on a CPU", "interpreter", "interpreter")


def require_launches() -> None:
    """Launch one small kernel on the GPU. Raises ValueError, naming what Triton needs, where that fails.

    For the beginning of a run: it would otherwise find every kernel broken, one after the other.
    """
    import torch

    from tileconv.kernels import hardware, relu

    try:
        relu(torch.ones(16, device="cpu" if hardware.interpreting() else "cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # Triton raises whatever its driver, a C compiler or a loader does
        raise ValueError(
            f"no kernel can be launched here: {describe_error(error)[:200]}. Triton needs NVIDIA's driver, and builds "
            "a launcher for each kernel with a C compiler (gcc, clang or $CC) and Python's headers"
        ) from error


def no_device(name: str) -> Device:
    """For what was compiled and read, and run nowhere; `name` becomes the report's file name."""
    return Device("no GPU", "none", slug(name))


def versions() -> Versions:
    """Versions of all that shapes a result."""
    import torch

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return Versions(
        **version.versions(),
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else str(cudnn),
        driver=_driver() if torch.cuda.is_available() else None,
    )


def machine() -> Machine:
    """Processor, cores this process may use, and memory."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(cpu=cpu, cores=len(os.sched_getaffinity(0)), memory_gib=round(memory, 1))


def commit() -> Commit:
    """The commit of the source that runs; reports do not make a tree dirty, because a run rewrites them."""
    root = Path(__file__).resolve().parent.parent
    head = _git(root, "rev-parse", "HEAD")
    if head is None or not (root / "pyproject.toml").exists():
        return Commit(None, False)
    changed = _git(root, "status", "--porcelain", "--", ".", ":!reports")
    return Commit(head, bool(changed))


def _git(root: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(root), *arguments)


def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0].strip() if text else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
