"""This package's version, installed or not, and those of what shapes a run's numbers."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path


def own_version() -> str:
    """This package's version: as installed, or as a checkout that is only on the path says."""
    try:
        return importlib.metadata.version("tileconv")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"]) if project.exists() else "unknown"


def versions() -> dict[str, str]:
    """Versions of what shapes a run's numbers, by what the modules say: some builds of Triton bear another name."""
    import numpy
    import torch
    import triton

    return {
        "python": platform.python_version(), "torch": str(torch.__version__), "triton": triton.__version__,
        "numpy": numpy.__version__, "tileconv": own_version(),
    }  # fmt: skip
