"""The measured table: tiles that were timed on a GPU and won over the cost model's choice.

`tileconv tune` writes it as tiles_tuned.json, and a choice looks into the first of: the file that $TILECONV_TILES names
(empty: none), tiles_tuned.json in the user's cache folder, tiles_tuned.json beside this module.  An entry counts on the
GPU, and with the Triton, that it was measured with; the others are left alone.  It is read once in a process.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tileconv.kernels import conv_tile, excluded, folders, tiles
from tileconv.kernels.conv_tile import ConvTile
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPU

SCHEMA = 2
NAME = "tiles_tuned.json"
VARIABLE = "TILECONV_TILES"
CACHE_VARIABLE = "TILECONV_CACHE"  # another cache folder; empty: no cache
QUANTILES = ("p20", "p50", "p80")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@dataclass(frozen=True)
class Key:
    """What a measurement is about; the problem is the one that tiles.choose is asked for."""

    gpu: str
    triton: str
    pass_: str
    dtype: str
    precision: str
    problem: Conv2dProblem


@dataclass(frozen=True)
class Entry:
    """A tile that won over the model's choice; microseconds of both by quantile."""

    key: Key
    tile: ConvTile
    model_tile: str
    tile_us: Mapping[str, float]
    model_us: Mapping[str, float]


def user_folder() -> Path | None:
    """Where a user's files are kept: $TILECONV_CACHE, or tileconv in the user's cache folder; None for none."""
    return folders.named(CACHE_VARIABLE, "tileconv")


def table_path() -> Path | None:
    """The file that choices look into. Raises ValueError where $TILECONV_TILES names none."""
    wish = os.environ.get(VARIABLE)
    if wish is not None:
        if wish and not Path(wish).is_file():
            raise ValueError(f"{VARIABLE}={wish!r}: there is no such file")
        return Path(wish) if wish else None
    folder = user_folder()
    places = [*([] if folder is None else [folder / NAME]), Path(__file__).parent / NAME]
    return next((place for place in places if place.is_file()), None)


def find(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> ConvTile | None:
    """The measured tile, if there is one for this GPU and Triton that no self-test excluded.

    Raises ValueError for a table that cannot be used.
    """
    tile = _of_gpu(gpu).get(key(problem, pass_, dtype, precision, gpu))
    return None if tile is not None and str(tile) in excluded.names(gpu.name, pass_) else tile


def key(problem: Conv2dProblem, pass_: str, dtype: torch.dtype, precision: str, gpu: GPU) -> Key:
    """The key of a choice here."""
    import triton

    return Key(gpu.name, triton.__version__, pass_, str(dtype).removeprefix("torch."), precision, problem)


def forget() -> None:
    """Read the table anew at the next choice."""
    _of_gpu.cache_clear()
    tiles._choose.cache_clear()


@cache
def _of_gpu(gpu: GPU) -> dict[Key, ConvTile]:
    import triton

    path = table_path()
    if path is None:
        return {}
    found = {}
    for index, entry in enumerate(read(path)):
        own = entry.key
        if (own.gpu, own.triton) != (gpu.name, triton.__version__):
            continue
        if reason := conv_tile.why_invalid(entry.tile, own.problem, own.pass_, DTYPES[own.dtype], own.precision, gpu):
            raise ValueError(f"{path.name}: entries[{index}].tile cannot run on {gpu.name}: {reason}")
        found[own] = entry.tile
    return found


def read(path: Path) -> list[Entry]:
    """All entries of a table. Raises ValueError that names the file and the field."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: cannot be read as JSON: {error}") from None
    top = _object(data, path.name, ("schema", "entries"))
    if top["schema"] != SCHEMA:
        raise ValueError(f"{path.name}: schema is {top['schema']!r}: allowed is {SCHEMA}; tune again")
    if not isinstance(top["entries"], list):
        raise ValueError(f"{path.name}: entries must be a list, not {top['entries']!r}")
    return [_entry(item, f"{path.name}: entries[{index}]") for index, item in enumerate(top["entries"])]


def text(entries: Sequence[Entry]) -> str:
    """A table as `read` takes it."""
    return json.dumps({"schema": SCHEMA, "entries": [_data(entry) for entry in entries]}, indent=1) + "\n"


def _data(entry: Entry) -> dict[str, Any]:
    own = dataclasses.asdict(entry.key)
    own["pass"] = own.pop("pass_")
    return own | {
        "tile": dataclasses.asdict(entry.tile), "model_tile": entry.model_tile, "tile_us": dict(entry.tile_us),
        "model_us": dict(entry.model_us),
    }  # fmt: skip


def _entry(data: Any, where: str) -> Entry:
    names = ("gpu", "triton", "pass", "dtype", "precision", "problem", "tile", "model_tile", "tile_us", "model_us")
    item = _object(data, where, names)
    for name in ("gpu", "triton", "pass", "dtype", "precision", "model_tile"):
        if not isinstance(item[name], str):
            raise ValueError(f"{where}.{name} must be a string, not {item[name]!r}")
    for name, allowed in (("pass", conv_tile.PASSES), ("dtype", tuple(DTYPES))):
        if item[name] not in allowed:
            raise ValueError(f"{where}.{name} is {item[name]!r}: allowed are {', '.join(allowed)}")
    problem, tile = (
        _made(Conv2dProblem, item["problem"], f"{where}.problem"),
        _made(ConvTile, item["tile"], f"{where}.tile"),
    )
    own = Key(item["gpu"], item["triton"], item["pass"], item["dtype"], item["precision"], problem)
    times = [_times(item[name], f"{where}.{name}") for name in ("tile_us", "model_us")]
    return Entry(own, tile, item["model_tile"], times[0], times[1])


def _times(data: Any, where: str) -> dict[str, float]:
    found = _object(data, where, QUANTILES)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{where}.{name} must be a number of microseconds above 0, not {value!r}")
    return found


def _made(cls: type[Any], data: Any, where: str) -> Any:
    """A frozen dataclass of ints, bools, strings and tuples of ints, from its JSON."""
    item = _object(data, where, [field.name for field in dataclasses.fields(cls)])
    values = {}
    for field in dataclasses.fields(cls):
        value = _tuples(item[field.name])
        if not _fits(value, str(field.type)):
            raise ValueError(f"{where}.{field.name} must be {field.type}, not {item[field.name]!r}")
        values[field.name] = value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _fits(value: Any, annotation: str) -> bool:
    """Whether a value is of a field's type, as the annotations of geometry and tiles spell it."""
    if annotation in ("int", "bool", "str"):
        return type(value).__name__ == annotation
    shape = {"Pair": (0, 0), "Padding": ((0, 0), (0, 0)), "tuple[int, int, int]": (0, 0, 0)}[annotation]
    return _like(value, shape)


def _like(value: Any, shape: Any) -> bool:
    if isinstance(shape, int):
        return type(value) is int
    return isinstance(value, tuple) and len(value) == len(shape) and all(map(_like, value, shape))


def _object(data: Any, where: str, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, not {data!r}")
    missing, unknown = [n for n in names if n not in data], [n for n in data if n not in names]
    if missing or unknown:
        said = f"has no field {missing[0]!r}" if missing else f"has an unknown field {unknown[0]!r}"
        raise ValueError(f"{where} {said}: its fields are {', '.join(names)}")
    return data
