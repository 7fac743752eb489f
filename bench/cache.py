"""Facts about compiled kernels, kept between runs: compiling and reading a kernel takes a second, looking it up none.

A key holds all that shapes the machine code and what is read from it, so nothing here has to be invalidated.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from .records import replace_text

VARIABLE = "TILECONV_CACHE"  # as kernels.tuned.CACHE_VARIABLE, which is imported late: with it comes Triton


def folder() -> Path | None:
    """Where facts are kept: in the user's folder; None where there is none."""
    from tileconv.kernels.tuned import user_folder

    base = user_folder()
    return None if base is None else base / "inspect"


@cache
def reader() -> str:
    """A digest of the code that reads machine code."""
    here = Path(__file__).parent
    files = [here / name for name in ("machine_code.py", "control_flow.py", "inspect.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key(**parts: Any) -> str:
    """A digest of all that shapes the facts: specialisation, kernel source, options, arch, triton and the reader."""
    text = json.dumps({name: str(value) for name, value in parts.items()} | {"reader": reader()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(name: str) -> dict[str, Any] | None:
    """The facts under a key; None where there are none that can be read."""
    where = folder()
    if where is None:
        return None
    try:
        facts = json.loads((where / name[:2] / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def save(name: str, facts: dict[str, Any]) -> None:
    """Keep facts; a folder that cannot be written is no error, only slow."""
    where = folder()
    if where is None:
        return
    try:
        replace_text(where / name[:2] / f"{name}.json", json.dumps(facts))
    except OSError:
        return
