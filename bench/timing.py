"""Times calls on a CUDA GPU: events, warm-up by time, a cold and a warm L2 cache, CUDA graphs, quantiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Call = Callable[[], Any]


class Timer(Protocol):
    """Anything that can time a call; tests put a stub in its place."""

    def __call__(
        self, calls: Sequence[Call], *, cold: bool, graph: bool = False, watch: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Run `calls` (one computation, each on buffers of its own) and return the times of a call in microseconds.

        `cold` empties the L2 cache before each and goes round the buffers; else the first is repeated. `graph` replays
        CUDA graphs; GraphError where the calls cannot be captured. `watch` is called while the GPU is at work.
        """
        ...


class GraphError(RuntimeError):
    """Calls that a CUDA graph cannot hold."""


@dataclass(frozen=True)
class Quantiles:
    """What is kept of the samples, in microseconds."""

    p20: float
    p50: float
    p80: float
    p99: float
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

        return cls(at(0.2), at(0.5), at(0.8), at(0.99), len(ordered))


@dataclass
class CudaTimer:
    """Times with CUDA events, on the current stream; for graphs that must not be the default one.

    A warm sample is the mean of `burst` calls back to back, so that a short kernel is not hidden by the cost of a
    launch. A cold sample is one call behind writes that fill the L2 cache, as many as give the host time to enqueue
    the call behind them: what the host does is then not in the sample.
    """

    warmup_ms: float = 25.0
    measure_ms: float = 100.0
    least: int = 10
    most: int = 1000
    burst: int = 10
    flush_bytes: int = 256 << 20
    _flush: Any = field(default=None, repr=False)
    _flush_us: float = field(default=0.0, repr=False)

    def __call__(
        self, calls: Sequence[Call], *, cold: bool, graph: bool = False, watch: Callable[[], None] = lambda: None
    ) -> list[float]:
        once, host = self._warm_up(calls[0])
        together = 1 if cold else self.burst
        if graph:
            # A graph of one call for each buffer, or of a burst on the first; launching one costs the host little.
            calls, host = self._captured(calls if cold else calls[:1], together), 10.0
        per_replay = together if graph else 1
        writes = self._writes(host) if cold else 0
        around = once * together + writes * self._flush_us
        count = min(max(self.least, int(self.measure_ms * 1000 / around)), self.most)
        times = self._sample(calls, count, together // per_replay, writes, watch)
        return [us / per_replay for us in times]

    def _warm_up(self, call: Call) -> tuple[float, float]:
        """Run until the clocks have had `warmup_ms` to settle; a call's microseconds, and the host's share of them."""
        call()  # compiles, and lets cuDNN choose
        spent, calls = 0.0, 1
        while spent < self.warmup_ms * 1000 and calls < 1 << 16:
            spent = self._sample([call], 1, calls)[0] * calls
            if spent < self.warmup_ms * 1000:
                calls *= 2
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e6
        return max(spent / calls, 1e-3), host

    def _writes(self, host: float) -> int:
        """How many writes of the whole buffer keep the GPU busy for twice as long as the host needs for a call."""
        import torch

        if self._flush is None:
            self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device="cuda")
        if not self._flush_us:
            self._flush.zero_()
            self._flush_us = self._sample([self._flush.zero_], 1, 10)[0]
        return min(32, 1 + math.ceil(2 * host / self._flush_us))

    def _captured(self, calls: Sequence[Call], repeats: int) -> list[Call]:
        import torch

        replays = []
        try:
            for call in calls:
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded, stream=torch.cuda.current_stream()):
                    for _ in range(repeats):
                        call()
                replays.append(recorded.replay)
                recorded.replay()
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise GraphError(str(error)) from error
        return replays

    def _sample(
        self, calls: Sequence[Call], count: int, repeats: int, writes: int = 0, watch: Callable[[], None] | None = None
    ) -> list[float]:
        """Microseconds of a call: `count` samples of `repeats` calls, each sample on the next of the buffers."""
        import torch

        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for number, (start, end) in enumerate(events):
            call = calls[number % len(calls)] if writes else calls[0]
            for _ in range(writes):
                self._flush.zero_()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            if watch is not None and number == count // 2:
                watch()
        if watch is not None:
            watch()  # before the wait: the GPU is still at work
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1000 / repeats for start, end in events]
