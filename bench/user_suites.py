"""A user's own suite from a YAML or CSV file, checked field by field.

YAML has `layers`, a list of layers, and may have `batch`, for layers without one; CSV has a line for each layer below a
header. A layer has `name`, `op` (layers.OPERATIONS), `input` (the extents of one image, 3x224x224 or a list), may have
`batch`, and has the settings of its operation:

    batch: 64
    layers:
      - {name: stem, op: conv2d, input: 3x224x224, filters: 64, kernel: 7, stride: 2, padding: 3, activation: relu}
      - {name: pool, op: max_pool2d, input: [64, 112, 112], kernel: 3, stride: 2, batch: 32}

In CSV an empty cell says nothing of its field.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .layers import FIELDS, LayerError, Row, check_settings, read_setting
from .networks import known
from .suites import Suite, of_rows

OWN_BATCH = 128  # of layers that name none
HEAD = ("name", "op", "input", "batch")  # what every layer may have, whatever its operation


@cache
def load(path: str, changed: int) -> Suite:
    """The suite in a file, read again when `changed` (its modification time) is another.

    Raises ValueError that names the file, the layer or line, the field, its value and what is allowed, and OSError for
    a file that cannot be read.
    """
    file = Path(path)
    table = file.suffix.lower() == ".csv"
    batch, raw = (OWN_BATCH, list(_csv_rows(file))) if table else _yaml_rows(file)
    if not raw:
        raise ValueError(f"{file}: no layers: at least one is needed")
    rows: list[Row] = []
    names: dict[str, str] = {}
    for where, fields in raw:
        label = f"{file}: {where}" + (f" ({fields['name']!r})" if fields.get("name") else "")
        try:
            row = _row(fields)
            row.at(row.batch or batch)
        except LayerError as error:
            raise ValueError(f"{label}: {error}") from None
        if row.name in names:
            raise ValueError(f"{label}: name={row.name!r} is taken by {names[row.name]}: allowed is one that is not")
        names[row.name] = where
        rows.append(row)
    own = sorted({row.batch or batch for row in rows})
    return Suite(file.stem, f"{len(rows)} layers", file.name, of_rows(tuple(rows), batch), ", ".join(map(str, own)))


def _row(fields: dict[Any, Any]) -> Row:
    allowed = (*HEAD, *(name for name in FIELDS if name not in HEAD))
    for name in fields:
        try:
            known("field", str(name), allowed)
        except ValueError as error:
            raise LayerError(str(error)) from None
    for name in ("name", "op", "input"):
        if fields.get(name) in (None, ""):
            raise LayerError(f"{name} is missing: every layer needs name, op and input")
    name, op = str(fields["name"]), str(fields["op"])
    if "/" in name:
        raise LayerError(f"name={name!r} is not allowed: it must not hold a /, which separates the parts of a case")
    settings = {name: value for name, value in fields.items() if name not in HEAD}
    check_settings(op, settings)
    batch = fields.get("batch")
    return Row(
        name, op, read_setting("input", fields["input"]), settings,
        None if batch is None else read_setting("batch", batch),
    )  # fmt: skip


def _yaml_rows(file: Path) -> tuple[int, list[tuple[str, dict[Any, Any]]]]:
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
        raise ValueError(f"{file}: layers is missing: the file must have `layers`, a list, and may have `batch`")
    for name in data:
        try:
            known("field", str(name), ("layers", "batch"))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    batch = OWN_BATCH
    if "batch" in data:
        try:
            batch = read_setting("batch", data["batch"])
        except LayerError as error:
            raise ValueError(f"{file}: {error}") from None
    rows = []
    for number, fields in enumerate(data["layers"], 1):
        if not isinstance(fields, dict):
            raise ValueError(f"{file}: layer {number}: {fields!r} is no layer: it must have name, op and input")
        rows.append((f"layer {number}", fields))
    return batch, rows


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as handle:
        try:
            lines = csv.DictReader(handle, strict=True)
            header = [name.strip() for name in lines.fieldnames or ()]
            lines.fieldnames = header
            for name in ("name", "op", "input"):
                if name not in header:
                    raise ValueError(f"{file}: line 1: {name} is missing: the header must have name, op and input")
            for fields in lines:
                where = f"line {lines.line_num}"
                if None in fields:
                    extra = fields[None]
                    raise ValueError(f"{file}: {where}: {extra!r} is beyond the header's {len(header)} fields")
                kept = {name: (text or "").strip() for name, text in fields.items()}
                yield where, {name: text for name, text in kept.items() if text}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: is no CSV: {error}") from None
