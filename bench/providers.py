"""Who computes a case: our kernels, and PyTorch's (cuDNN) at the same precision. Correctness comes before speed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .cases import DEFAULT_DTYPES, DTYPES, Case, flops_of, shape_of
from .check import budget, largest_difference
from .networks import Shape, known
from .records import Timing, finite
from .timing import Quantiles, Timer
from .workers import Progress, describe_error

Tensors = dict[str, Any]
L2: tuple[Literal["cold"], Literal["warm"]] = ("cold", "warm")


@dataclass(frozen=True)
class Provider:
    """A way to compute a case: `run(shape, tensors)` on tensors in `memory_format`."""

    name: str
    memory_format: Literal["contiguous", "channels_last"]
    run: Callable[[Shape, Tensors], torch.Tensor]


def _ours(shape: Shape, t: Tensors) -> torch.Tensor:
    """One call of our functional API, bias and ReLU fused."""
    from tileconv.kernels import functional

    return _call(functional, shape, t, fused=True)


def _torch(shape: Shape, t: Tensors) -> torch.Tensor:
    """PyTorch's own call and, where the layer has one, a ReLU in place behind it."""
    return _call(F, shape, t, fused=False)


def _call(api: Any, shape: Shape, t: Tensors, *, fused: bool) -> torch.Tensor:
    m: Any = shape.module
    extra = {"activation": shape.activation} if fused and shape.op in ("conv2d", "linear") else {}
    if shape.op == "conv2d":
        y = api.conv2d(t["x"], t["w"], t["b"], m.stride, m.padding, m.dilation, m.groups, **extra)
    elif shape.op == "linear":
        y = api.linear(t["x"], t["w"], t["b"], **extra)
    elif shape.op == "max_pool2d":
        y = api.max_pool2d(t["x"], m.kernel_size, m.stride, m.padding)
    else:
        y = api.adaptive_avg_pool2d(t["x"], m.output_size)
    result: torch.Tensor = y.relu_() if shape.activation == "relu" and not fused else y
    return result


PROVIDERS = (
    Provider("tileconv", "channels_last", _ours),
    Provider("torch", "channels_last", _torch),
    Provider("torch", "contiguous", _torch),
)


def operands(case: Case, memory_format: str, device: str) -> Tensors:
    """Random tensors of a case, the same for every provider: normal, weights scaled so that outputs stay near one."""
    shape = shape_of(case)
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    m: Any = shape.module

    def place(t: torch.Tensor) -> torch.Tensor:
        t = t.to(device=device, dtype=dtype)
        if t.dim() == 4 and memory_format == "channels_last":
            t = t.contiguous(memory_format=torch.channels_last)
        return t

    found: Tensors = {"x": place(torch.randn(shape.input, generator=generator))}
    if shape.op in ("conv2d", "linear"):
        w = torch.randn(m.weight.shape, generator=generator)
        found["w"] = place(w / w[0].numel() ** 0.5)
        found["b"] = place(torch.randn(m.bias.shape, generator=generator))
    return found


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 for `tf32`, strict fp32 for the rest, and cuDNN's search on: for every provider alike."""
    # Not allow_tf32: reading that older switch raises once anyone has set the newer one.
    backends: Any = torch.backends
    levels = (backends.cudnn.conv, backends.cuda.matmul)
    before, searched = [level.fp32_precision for level in levels], backends.cudnn.benchmark
    for level in levels:
        level.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    backends.cudnn.benchmark = True
    try:
        yield
    finally:
        for level, value in zip(levels, before, strict=True):
            level.fp32_precision = value
        backends.cudnn.benchmark = searched


def time_case(
    case: Case, timer: Timer, device: str = "cuda", providers: Sequence[Provider] = PROVIDERS
) -> list[Timing]:
    """Rows for one case: every provider, checked against float64, then timed with a cold and a warm L2 cache.

    A provider that is wrong, raises or runs out of memory gets rows without a speed and a note that says why.
    """
    shape = shape_of(case)
    rows: list[Timing] = []
    with precision(case.dtype), torch.no_grad():
        try:
            reference, allowed = _reference(case, shape, device)
        except Exception as error:
            return [row for p in providers for row in _untimed(_blank(case, p), f"no reference: {_reason(error)}")]
        for provider in providers:
            rows.extend(_time_provider(case, shape, provider, reference, allowed, timer, device))
    return rows


def _reference(case: Case, shape: Shape, device: str) -> tuple[torch.Tensor, float]:
    """The float64 result on the same rounded operands, and the error that torch's layouts, the worse of them, allow."""
    layouts = {p.memory_format for p in PROVIDERS}
    tensors = operands(case, "contiguous", device)
    reference = _torch(shape, {key: t.double() for key, t in tensors.items()})
    largest = float(reference.abs().max()) if reference.numel() else 0.0
    errors = [largest_difference(_torch(shape, operands(case, layout, device)), reference) for layout in layouts]
    return reference, budget(max(errors), case.dtype, largest)


def _blank(case: Case, provider: Provider) -> Timing:
    return Timing(
        network=case.network, layer=case.layer, pass_=case.pass_, batch=case.batch, dtype=case.dtype,
        provider=provider.name, memory_format=provider.memory_format, l2="cold",
        p20_us=None, p50_us=None, p80_us=None, n=0, tflops=None, error=None, allowed=None, passed=False,
    )  # fmt: skip


def _reason(error: Exception) -> str:
    return "out of GPU memory" if isinstance(error, torch.cuda.OutOfMemoryError) else describe_error(error)


def _untimed(blank: Timing, note: str) -> list[Timing]:
    return [dataclasses.replace(blank, l2=l2, note=f"not timed: {note}") for l2 in L2]


def _time_provider(
    case: Case, shape: Shape, provider: Provider, reference: torch.Tensor, allowed: float, timer: Timer, device: str
) -> list[Timing]:
    """The correctness gate, then both cache states."""
    blank = dataclasses.replace(_blank(case, provider), allowed=finite(allowed))
    flops = flops_of(case)
    rows = []
    try:
        tensors = operands(case, provider.memory_format, device)
        error = largest_difference(provider.run(shape, tensors), reference)
        blank = dataclasses.replace(blank, error=finite(error))
        if not error <= allowed:
            return _untimed(blank, "the result is outside its budget")
        for l2 in L2:
            q = Quantiles.of(timer(lambda: provider.run(shape, tensors), cold=l2 == "cold"))
            speed = None if flops is None else flops / q.p50 / 1e6
            times = {"p20_us": q.p20, "p50_us": q.p50, "p80_us": q.p80, "tflops": speed}
            rows.append(dataclasses.replace(blank, l2=l2, n=q.n, passed=True, **times))  # type: ignore[arg-type]
    except Exception as problem:  # one provider's failure must not cost the rest of the run
        return _untimed(blank, _reason(problem))
    return rows


def timings(
    cases: Sequence[Case], timer: Timer, *, device: str = "cuda", progress: Progress | None = None
) -> list[Timing]:
    """Timing rows for all cases, in order; `progress(done, total, label)` is called after each case."""
    for case in cases:
        known("dtype", case.dtype, DEFAULT_DTYPES)
    rows: list[Timing] = []
    for done, case in enumerate(cases, start=1):
        rows.extend(time_case(case, timer, device))
        if progress is not None:
            progress(done, len(cases), f"{case.layer} {case.dtype}")
    return rows
