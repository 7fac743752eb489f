"""Times a call on a CUDA GPU: events, warm-up by time, a cold and a warm L2 cache, quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Call = Callable[[], Any]


class Timer(Protocol):
    """Anything that can time a call; tests put a stub in its place."""

    def __call__(self, call: Call, *, cold: bool) -> list[float]:
        """Run `call` repeatedly and return its times in microseconds; `cold` empties the L2 cache before each."""
        ...


@dataclass(frozen=True)
class Quantiles:
    """What is kept of the samples, in microseconds."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        """Quantiles by linear interpolation; ValueError for no samples, or one that is not a positive number."""
        if not samples:
            raise ValueError("samples: at least one is needed")
        if any(not math.isfinite(s) or s <= 0 for s in samples):
            raise ValueError("samples: every time must be a positive number of microseconds")
        ordered = sorted(samples)

        def at(fraction: float) -> float:
            position = fraction * (len(ordered) - 1)
            low = math.floor(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(at(0.2), at(0.5), at(0.8), len(ordered))


@dataclass
class CudaTimer:
    """Times with CUDA events.

    A warm sample is the mean of `burst` calls back to back, so that a short kernel is not hidden by the cost of a
    launch. A cold sample is one call behind a write that fills the L2 cache; the write also gives the host time to
    enqueue the call.
    """

    warmup_ms: float = 25.0
    measure_ms: float = 100.0
    least: int = 10
    most: int = 1000
    burst: int = 10
    flush_bytes: int = 256 << 20
    _flush: Any = field(default=None, repr=False)

    def __call__(self, call: Call, *, cold: bool) -> list[float]:
        once = self._warm_up(call)
        calls = 1 if cold else self.burst
        count = min(max(self.least, int(self.measure_ms * 1000 / (once * calls))), self.most)
        return self._sample(call, count, calls, cold)

    def _warm_up(self, call: Call) -> float:
        """Run until the clocks have had `warmup_ms` to settle; return the microseconds of a call."""
        call()  # compiles, and lets cuDNN choose
        spent, calls = 0.0, 1
        while spent < self.warmup_ms * 1000 and calls < 1 << 16:
            spent = self._sample(call, 1, calls, False)[0] * calls
            if spent < self.warmup_ms * 1000:
                calls *= 2
        return max(spent / calls, 1e-3)

    def _sample(self, call: Call, count: int, calls: int, cold: bool) -> list[float]:
        import torch

        if cold and self._flush is None:
            self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device="cuda")
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            if cold:
                self._flush.zero_()
            start.record()
            for _ in range(calls):
                call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1000 / calls for start, end in events]
