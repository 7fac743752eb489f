"""Tiles that a self-test found wrong on a GPU: a file that `tileconv selftest` writes and that tiles.py reads once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from tileconv.kernels import folders

VARIABLE = "TILECONV_EXCLUDE"  # another file; empty: nothing is excluded
FIELDS = ("gpu", "triton", "pass", "tile", "reason")
Entry = dict[str, str]
Tile = TypeVar("Tile")


def path() -> Path | None:
    """The file: $TILECONV_EXCLUDE, or excluded.json in the user's cache folder; None where the variable is empty."""
    return folders.named(VARIABLE, "tileconv/excluded.json")


def load(file: Path | None) -> list[Entry]:
    """The entries of a file, none where there is no file. Raises ValueError that names the file and the field."""
    try:
        text = "[]" if file is None else file.read_text()
    except OSError:
        return []
    remedy = f"mend or delete {file}, or let `tileconv selftest` write it anew"
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): {remedy}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{file} must hold a list of excluded tiles: {remedy}")
    for place, entry in enumerate(entries):
        wrong = [f for f in FIELDS if not isinstance(entry, dict) or not isinstance(entry.get(f), str)]
        if wrong:
            raise ValueError(f"{file}: [{place}].{wrong[0]} must be a string: {remedy}")
    return entries


@cache
def names(gpu: str, pass_: str) -> frozenset[str]:
    """The names, str(tile), of a pass's tiles that are excluded on a GPU by name, for the Triton that is installed."""
    return frozenset(entry["tile"] for entry in listed(gpu) if entry["pass"] == pass_)


def forget() -> None:
    """Read the file again when next asked: it has been written."""
    names.cache_clear()


def without(tiles: list[Tile], gpu: str, pass_: str) -> list[Tile]:
    """`tiles` without the excluded ones. Raises RuntimeError if that leaves none: no tile is known to be right."""
    wrong = names(gpu, pass_)
    if not wrong:
        return tiles
    left = [tile for tile in tiles if str(tile) not in wrong]
    if tiles and not left:
        raise RuntimeError(
            f"every tile for this {pass_} failed the self-test on {gpu} and is excluded by {path()}: "
            f"run `tileconv selftest` again, or set {VARIABLE}= to use them all the same"
        )
    return left


def listed(gpu: str) -> Sequence[Entry]:
    """The entries that are in force on a GPU, for commands that say what is left out."""
    import triton

    return [e for e in load(path()) if (e["gpu"], e["triton"]) == (gpu, triton.__version__)]
