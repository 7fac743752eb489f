"""Where a user's files are kept."""

from __future__ import annotations

import os
from pathlib import Path


def named(variable: str, usual: str) -> Path | None:
    """What an environment variable names, else `usual` in the user's cache folder; None where it is empty.

    None too for a user without a home.
    """
    wish = os.environ.get(variable)
    if wish is not None:
        return Path(wish) if wish else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / usual
    except RuntimeError:
        return None
