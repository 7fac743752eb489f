"""What Triton's interpreter does to memory, watched: accesses outside every tensor, and bytes counted.

`bounds_check()` and `count_bytes()` look at every launch inside them; interpreter.py tells `watchers` of each access.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.runtime.interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor


class Tensor(NamedTuple):
    """A tensor argument: the addresses from its first byte to past its last."""

    name: str
    low: int
    high: int


def tensors_of(name: str, value: Any) -> Iterator[Tensor]:
    value = (
        getattr(value, "base", value)
        if isinstance(value, TensorDescriptor | triton.runtime.jit.TensorWrapper)
        else value
    )
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from tensors_of(f"{name}[{i}]", item)
    elif isinstance(value, torch.Tensor) and value.numel():
        last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.stride(), strict=True))
        yield Tensor(name, value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size())


class Watcher:
    def begin(self, tensors: list[Tensor]) -> None:
        """A launch with these tensors begins."""
        raise NotImplementedError

    def touch(self, kind: str, addresses: npt.NDArray[np.int64], size: int) -> None:
        """`size` bytes at each of these addresses (flat, masked-off lanes left out) are about to be accessed."""
        raise NotImplementedError


watchers: list[Watcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    if not getattr(stock, "_tileconv_repaired", False):
        raise RuntimeError("watching memory needs Triton's interpreter, repaired: call repair() first")
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)


class OutOfBounds(IndexError):
    """A load or store outside every tensor of its launch."""

    def __init__(self, message: str, tensor: str, offset: int) -> None:
        super().__init__(message)
        self.tensor = tensor  # the argument nearest to the address
        self.offset = offset  # from its first element, in elements


class _Bounds(Watcher):
    def begin(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def touch(self, kind: str, addresses: npt.NDArray[np.int64], size: int) -> None:
        first, last = addresses.min(), addresses.max()
        if any(t.low <= first and last + size <= t.high for t in self.tensors):
            return
        outside = np.ones(addresses.shape, bool)
        for t in self.tensors:
            outside &= (addresses < t.low) | (addresses + size > t.high)
        if outside.any():
            self._fail(kind, addresses[outside], size)

    def _fail(self, kind: str, addresses: npt.NDArray[np.int64], size: int) -> None:
        where = int(addresses[0])
        program = stock.interpreter_builder.grid_idx
        head = f"{kind} of {addresses.size} element(s) outside every tensor of the launch, in program {program}"
        if not self.tensors:
            raise OutOfBounds(head, "", 0)
        near = min(self.tensors, key=lambda t: max(t.low - where, where + size - t.high))
        offset = (where - near.low) // size
        raise OutOfBounds(
            f"{head}: the first is element {offset} of `{near.name}`, which has {(near.high - near.low) // size}",
            near.name,
            offset,
        )


@contextmanager
def bounds_check() -> Iterator[None]:
    """Inside, every address of a load, store or atomic must lie in one of its launch's tensors; else OutOfBounds.

    A tensor reaches from its first element to its last, so gaps between the rows of a strided view count as inside.
    What a mask or a descriptor leaves out is not accessed.
    """
    with watching(_Bounds()):
        yield


class Bytes(NamedTuple):
    """Traffic of one argument: bytes asked for, and distinct bytes (of each launch, added up)."""

    requested: int = 0
    unique: int = 0


class ByteCount(Watcher):
    """What `count_bytes` yields; `read` and `written` map an argument's name to its `Bytes`."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._requested: dict[tuple[str, str], int] = {}
        self._seen: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}
        self._unique: dict[tuple[str, str], int] = {}

    @property
    def read(self) -> dict[str, Bytes]:
        """Bytes loaded; an atomic both loads and stores."""
        return self._totals("read")

    @property
    def written(self) -> dict[str, Bytes]:
        """Bytes stored."""
        return self._totals("written")

    def begin(self, tensors: list[Tensor]) -> None:
        self._settle()
        self._tensors = tensors

    def touch(self, kind: str, addresses: npt.NDArray[np.int64], size: int) -> None:
        ways = {"load": ("read",), "store": ("written",)}.get(kind, ("read", "written"))
        for tensor in self._tensors:
            mine = (addresses >= tensor.low) & (addresses + size <= tensor.high)
            if mine.any():
                for way in ways:
                    self._add(way, tensor, addresses[mine] - tensor.low, size)
                addresses = addresses[~mine]
        if addresses.size:
            for way in ways:
                self._requested[way, "?"] = self._requested.get((way, "?"), 0) + addresses.size * size

    def _add(self, way: str, tensor: Tensor, offsets: npt.NDArray[np.int64], size: int) -> None:
        key = way, tensor.name
        self._requested[key] = self._requested.get(key, 0) + offsets.size * size
        if key not in self._seen:
            self._seen[key] = np.zeros(tensor.high - tensor.low, bool)
        for i in range(size):
            self._seen[key][offsets + i] = True

    def _settle(self) -> None:
        for key, seen in self._seen.items():
            self._unique[key] = self._unique.get(key, 0) + int(seen.sum())
        self._seen = {}

    def _totals(self, way: str) -> dict[str, Bytes]:
        self._settle()
        return {name: Bytes(n, self._unique.get((w, name), 0)) for (w, name), n in self._requested.items() if w == way}


@contextmanager
def count_bytes() -> Iterator[ByteCount]:
    """Inside, count the bytes that each launch argument's tensor has loaded and stored.

    Lanes switched off by a mask and what a descriptor clips are not counted.  Where two arguments overlap, the first
    is charged.  Addresses outside every tensor are charged to "?".
    """
    count = ByteCount()
    with watching(count):
        yield count
