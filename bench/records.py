"""The measured truth: the schema of reports/data/<device>.json, read strictly and written atomically."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 3
READABLE = (2, 3)  # 3 only added fields that have defaults


class RecordError(ValueError):
    """A record that does not follow the schema; the message names the field."""


@dataclass(frozen=True)
class Device:
    """What ran the kernels; kind "none" where they were only inspected. `slug` names the report's files."""

    name: str
    kind: Literal["interpreter", "cuda", "none"]
    slug: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.slug):
            raise RecordError(f"slug: {self.slug!r} must be lower-case words joined by hyphens")


@dataclass(frozen=True)
class Versions:
    """Versions of all that shapes a result; None where there is none."""

    python: str
    torch: str
    triton: str
    numpy: str
    tileconv: str
    cuda: str | None = None
    cudnn: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class Commit:
    """The source's commit, and whether the tree differed from it; hash None outside a repository."""

    hash: str | None
    dirty: bool


@dataclass(frozen=True)
class Machine:
    """The host, without its name."""

    cpu: str
    cores: int
    memory_gib: float


@dataclass(frozen=True)
class Check:
    """One comparison with float64: `allowed` is 2 x (torch's error in this dtype + eps x max |reference|).

    `error` is None where it was not a finite number. `seconds` is wall time of the check and never a speed.
    """

    case: str
    layer: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    formulation: str
    error: float | None
    torch_error: float | None
    allowed: float | None
    passed: bool
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Inspection:
    """One launch of a case: what its machine code says, what it moves, and what the cost model makes of it.

    Inspected: `registers` to `register_operand`. `scope` "loop": loop_* describe the main loop. "kernel": there is no
    multiplying loop; loop_loads counts the loads and stores of the whole kernel and loop_instructions is None.
    `other_per_mma` is other instructions of the loop for every HGMMA.64x128 (or HMMA.16816) it does the work of.
    `failure` is why a launch did not compile; the facts are then zero.

    Computed: bytes_read and bytes_written are requested by all programs (traffic between L2 and the SMs), bytes_least
    counts each operand once (DRAM's least); for a helper, all that it touches. Modelled, never measured: the rest. A
    case's launches are its rows with the same `case` and `arch`: their modelled_us add up, and each names the whole
    case's floor_us. None: not known (no cost model for the GPU or the kernel).
    """

    case: str
    network: str
    layer: str
    pass_: str
    dtype: str
    arch: str
    gpu: str
    batch: int
    step: int
    steps: int
    role: Literal["main", "helper"]
    kernel: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    fits: bool
    ctas: int
    ctas_per_sm: int | None
    scope: Literal["loop", "kernel"]
    instructions: int
    mma: str | None
    loop_instructions: int | None
    loop_mma: int
    other_per_mma: float | None
    loop_loads: dict[str, int]
    serialised: bool
    register_operand: bool
    useful_rows: float | None
    useful_columns: float | None
    wave_efficiency: float | None
    bytes_read: int | None
    bytes_written: int | None
    bytes_least: int | None
    flops_done: int | None
    flops_needed: int | None
    modelled_us: float | None
    floor_us: float | None
    bound_by: str | None
    peak_tflops: float | None
    dram_gbs: float | None
    triton: str
    failure: str | None = None
    extra_bytes: int | None = None  # memory that the case's launches need besides operands and result


@dataclass(frozen=True)
class Saved:
    """Bytes an image that a layer keeps for its backward pass in fp32, counted: on these kernels, and on PyTorch's."""

    layer: str
    tileconv: int
    pytorch: int


@dataclass(frozen=True)
class Published:
    """A GEMM's speed that others measured and published, and the cost model's for the same problem: its calibration."""

    problem: str
    dtype: str
    gpu: str
    published_tflops: float
    modelled_tflops: float
    source: str


@dataclass(frozen=True)
class Im2col:
    """A convolution the textbook way, as a baseline: unfold into a matrix of patches, then one product.

    `rows` x `columns` is one image's matrix, `extra_bytes` that of all images: memory beside the operands, which the
    direct way does not take. `operand_bytes` are input, filters and output. The times are modelled for the GPU named,
    never measured: unfolding, the product over the matrix, and the same layer without it.
    """

    network: str
    layer: str
    batch: int
    dtype: str
    gpu: str
    rows: int
    columns: int
    extra_bytes: int
    operand_bytes: int
    unfold_us: float
    product_us: float
    direct_us: float


@dataclass(frozen=True)
class Timing:
    """One measured case on a GPU; the quantiles are None where the row has no speed (wrong, or out of memory).

    `method` "graph": calls were replayed from a CUDA graph, so the host's time is not in them. Clocks (MHz) and
    temperatures (C) are those before and after; `throttled` names the reasons that the driver gave. Peak memory is what
    the call allocated beyond its operands; `first_call_ms` holds compiling. None: not known, or not asked.
    """

    network: str
    layer: str
    pass_: str
    batch: int
    dtype: str
    provider: str
    memory_format: str
    l2: Literal["cold", "warm"]
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    n: int
    tflops: float | None
    error: float | None
    allowed: float | None
    passed: bool
    note: str = ""
    status: Literal["timed", "wrong", "out of memory", "failed", "skipped"] = "timed"
    precision: str = ""
    tile: str = ""
    method: Literal["events", "graph"] = "events"
    p99_us: float | None = None
    gbs: float | None = None
    repeatable: bool | None = None
    batch_invariant: bool | None = None
    first_call_ms: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    clocks_mhz: tuple[float, ...] = ()
    temperatures_c: tuple[float, ...] = ()
    throttled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.passed and any(v is not None for v in (self.p20_us, self.p50_us, self.p80_us, self.tflops)):
            raise RecordError(f"p50_us: the row {self.layer} {self.provider} is wrong, and a wrong row has no speed")
        known = [q for q in (self.p20_us, self.p50_us, self.p80_us) if q is not None]
        if any(q <= 0 for q in known) or known != sorted(known):
            raise RecordError(f"p50_us: quantiles must be positive and ascending, got {known}")


@dataclass(frozen=True)
class Record:
    """One run of the main job. `peers` are other projects' kernels, modelled_us a lower bound of their time."""

    device: Device
    versions: Versions
    commit: Commit
    started: str
    seconds: float
    machine: Machine
    command: str
    checks: tuple[Check, ...] = ()
    inspections: tuple[Inspection, ...] = ()
    peers: tuple[Inspection, ...] = ()
    timings: tuple[Timing, ...] = ()
    saved: tuple[Saved, ...] = ()
    published: tuple[Published, ...] = ()
    im2col: tuple[Im2col, ...] = ()
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise RecordError(f"schema: {self.schema} is not the schema that this version reads ({SCHEMA})")
        if self.device.kind != "cuda" and self.timings:
            raise RecordError("timings: a record without a GPU cannot hold GPU timings")


def slug(name: str) -> str:
    """A device's name as it appears in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def finite(value: float) -> float | None:
    """A number as JSON can hold it: None for NaN and infinities."""
    return value if math.isfinite(value) else None


def to_data(item: Any) -> Any:
    """A record as plain JSON data; `pass_` is written `pass`."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {f.name.rstrip("_"): to_data(getattr(item, f.name)) for f in dataclasses.fields(item)}
    if isinstance(item, (list, tuple)):
        return [to_data(part) for part in item]
    if isinstance(item, dict):
        return {key: to_data(part) for key, part in item.items()}
    return item


def from_data(cls: type[Any], data: Any, where: str = "") -> Any:
    """Build `cls` from JSON data; RecordError names the field that is missing, unknown or of the wrong type."""
    where = where or "record"
    if not isinstance(data, dict):
        raise RecordError(f"{where}: expected an object, got {_short(data)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    if unknown := sorted(data.keys() - fields.keys()):
        raise RecordError(f"{where}.{unknown[0]}: unknown field; known are {', '.join(fields)}")
    values = {}
    for key, f in fields.items():
        if key in data:
            values[f.name] = _value(hints[f.name], data[key], f"{where}.{key}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where}.{key}: missing")
    try:
        return cls(**values)
    except RecordError as error:
        raise RecordError(f"{where}.{error}") from None


def _value(kind: Any, data: Any, where: str) -> Any:
    """Check one value against its annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), data, where)
    if origin is Literal:
        if data not in arguments:
            raise RecordError(f"{where}: {_short(data)} is not one of {', '.join(map(repr, arguments))}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise RecordError(f"{where}: expected a list, got {_short(data)}")
        return tuple(_value(arguments[0], part, f"{where}[{i}]") for i, part in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise RecordError(f"{where}: expected an object, got {_short(data)}")
        return {str(key): _value(arguments[1], part, f"{where}.{key}") for key, part in data.items()}
    if dataclasses.is_dataclass(kind):
        return from_data(typing.cast("type[Any]", kind), data, where)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise RecordError(f"{where}: expected {kind.__name__}, got {_short(data)}")
    if isinstance(data, float) and not math.isfinite(data):
        raise RecordError(f"{where}: {data} is not a finite number")
    return float(data) if kind is float else data


def _short(data: Any) -> str:
    text = json.dumps(data, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def save(record: Record, path: Path) -> None:
    """Write a record as JSON; the old file stays whole until the new one is complete."""
    text = json.dumps(to_data(record), indent=1, allow_nan=False) + "\n"
    replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its final place, then rename it: readers see the old text or the new, never half of it."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """As `replace_text`, for bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp makes files for their owner alone; a report is for everyone the umask lets read.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> Record:
    """Read a record. Raises RecordError, naming the file and the field, where it does not follow the schema."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not JSON: {error}") from None
    if isinstance(data, dict) and data.get("schema") in READABLE:
        data["schema"] = SCHEMA
    if isinstance(data, dict) and data.get("schema") != SCHEMA:
        older = isinstance(found := data.get("schema"), int) and found < SCHEMA
        advice = "; it was written by an older version: run the same command again" if older else ""
        raise RecordError(f"{path}: schema: {_short(found)} is not the schema read here ({SCHEMA}){advice}")
    try:
        record: Record = from_data(Record, data)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None
    return record
