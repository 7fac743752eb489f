"""How an op comes to be: schema, implementations per device, fake and batching rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Ints = Sequence[int]
Made = TypeVar("Made")
OPS = torch.ops.tileconv
LIBRARY = torch.library.Library("tileconv", "DEF")  # must stay alive: its death takes the ops with it


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define torch.ops.tileconv.<name>: `run` on real tensors, `fake` for what it returns without running."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, on_its_gpu(run), "CUDA")
    torch.library.register_fake(f"tileconv::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"tileconv::{name}", functools.partial(_batched, getattr(OPS, name)), lib=LIBRARY)


def on_its_gpu(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the GPU of its first tensor as the current one: Triton launches on that, wherever tensors lie."""

    def call(*arguments: Any) -> Any:
        device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(device):
            return run(*arguments)

    return call


def remembered(build: Callable[..., Made]) -> Callable[..., Made]:
    """`build`, a pure function of ints, sequences of ints and the like, which keeps what it made."""
    kept = functools.lru_cache(maxsize=4096)(build)

    @functools.wraps(build)
    def call(*arguments: Any) -> Made:
        if torch.compiler.is_compiling():  # it would trace through the cache, with a warning
            return build(*arguments)
        try:
            return kept(*[tuple(value) if isinstance(value, list) else value for value in arguments])
        except TypeError:  # symbolic extents have no hash
            return build(*arguments)

    return call


def _batched(op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """vmap's rule for every op: one call a sample.  What a batch has in common, an op's own N axis already batches."""
    columns = [
        argument.unbind(dim) if isinstance(dim, int) else [argument] * info.batch_size
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    results = [op(*sample) for sample in zip(*columns, strict=True)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
