"""Planned once for a layout, launched in every call.

What a planner returns follows from the shapes, strides and dtypes of its operands and from its settings, not from
addresses or values, and it writes to none of them.  So it runs once for them, on placeholders without memory, and a
call only puts its own tensors in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tileconv.kernels import hardware, tiles
from tileconv.kernels.launch.common import Launch
from tileconv.kernels.launch.descriptors import filled

Planner = Callable[..., Launch | list[Launch]]
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]

_allocated: ContextVar[list[torch.Tensor] | None] = ContextVar("_allocated", default=None)


def scratch(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which a planner has just allocated and only its launches write: every call gets its own.

    A plan with other memory than its operands and scratch, such as a copy of one, is made anew in every call.
    """
    if (found := _allocated.get()) is not None:
        found.append(tensor)
    return tensor


@contextmanager
def allocations() -> Iterator[list[torch.Tensor]]:
    """The scratch of all that is planned in the block, in order."""
    found: list[torch.Tensor] = []
    token = _allocated.set(found)
    try:
        yield found
    finally:
        _allocated.reset(token)


def run(planner: Planner, *arguments: Any, **settings: Hashable) -> None:
    """Launch what `planner(*arguments, gpu=..., **settings)` plans; the arguments that are no tensors can be hashed."""
    operands: list[torch.Tensor] = []
    layouts: list[Layout | None] = []
    others: list[Hashable] = []
    aligned = True
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            operands.append(argument)
            layouts.append((argument.shape, argument.stride(), argument.dtype))
            others.append(None)
            aligned = aligned and argument.data_ptr() % 16 == 0
        else:
            layouts.append(None)
            others.append(argument)
    device = operands[0].device
    plan = None
    if aligned:  # placeholders are
        forced = tuple(tiles.forced().items())
        plan = _plan(planner, tuple(layouts), tuple(others), tuple(settings.items()), device, forced)
    if plan is not None:
        plan.run(operands, device)
    else:
        for launch in _launches(planner, arguments, settings, device):
            launch.run()


def forget() -> None:
    """Plan anew: for tests that change what planners do."""
    _plan.cache_clear()


def _launches(
    planner: Planner, arguments: Sequence[Any], settings: dict[str, Hashable], device: torch.device
) -> list[Launch]:
    planned = planner(*arguments, gpu=hardware.gpu_of(device), **settings)
    return planned if isinstance(planned, list) else [planned]


@dataclass(frozen=True)
class _Slot:
    """An argument that is a call's own: tensor `index` of its operands, scratch and views, in a descriptor if any."""

    name: str
    index: int
    descriptor: TensorDescriptor | None


@dataclass(frozen=True)
class _Plan:
    scratch: tuple[Layout, ...]
    views: tuple[tuple[int, tuple[int, ...], tuple[int, ...], int], ...]  # of a tensor before them: size, stride, start
    steps: tuple[tuple[Launch, tuple[_Slot, ...]], ...]

    def run(self, operands: Sequence[torch.Tensor], device: torch.device) -> None:
        tensors = [*operands]
        tensors += [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.scratch
        ]
        for index, size, stride, start in self.views:
            whole = tensors[index]
            tensors.append(whole.as_strided(size, stride, whole.storage_offset() + start))
        for launch, slots in self.steps:
            arguments = launch.arguments.copy()
            for slot in slots:
                tensor = tensors[slot.index]
                arguments[slot.name] = tensor if slot.descriptor is None else filled(slot.descriptor, tensor)
            launch.on(arguments).run()


@lru_cache(maxsize=4096)
def _plan(
    planner: Planner, layouts: tuple[Layout | None, ...], others: tuple[Hashable, ...],
    settings: tuple[tuple[str, Hashable], ...], device: torch.device, forced: tuple[tuple[str, Hashable], ...],
) -> _Plan | None:  # fmt: skip
    """The plan for operands that start at multiples of 16 bytes; None where it needs more than operands and scratch.

    `forced`, the tile overrides in force, is only part of the key.
    """
    arguments = [
        other if layout is None else _placeholder(layout) for layout, other in zip(layouts, others, strict=True)
    ]
    with allocations() as allocated:
        launches = _launches(planner, arguments, dict(settings), device)
    known = [*(argument for argument in arguments if isinstance(argument, torch.Tensor)), *allocated]
    at = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(known)}
    views: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []
    steps = []
    for launch in launches:
        slots = []
        for name, value in launch.arguments.items():
            descriptor = value if isinstance(value, TensorDescriptor) else None
            tensor = value if descriptor is None else descriptor.base
            if not isinstance(tensor, torch.Tensor):
                continue
            index = at.get(tensor.untyped_storage()._cdata)
            if index is None:
                return None
            whole = known[index]
            assert whole.dtype == tensor.dtype
            # Kernels read a pointer and strides of their own: a view that starts where the whole does is the whole.
            if tensor.storage_offset() != whole.storage_offset():
                start = int(tensor.storage_offset() - whole.storage_offset())
                views.append((index, tuple(tensor.shape), tensor.stride(), start))
                index = len(known) + len(views) - 1
            slots.append(_Slot(name, index, descriptor))
        steps.append((launch, tuple(slots)))
    made = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in allocated)
    return _Plan(made, tuple(views), tuple(steps))


def _placeholder(layout: Layout) -> torch.Tensor:
    size, stride, dtype = layout
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
