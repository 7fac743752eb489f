"""Whole networks as calls that a timer can run: on our kernels, on PyTorch's, and compiled by torch.compile."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tileconv.model.graph import captured

from .cases import DTYPES
from .networks import known
from .providers import L2, precision
from .records import Timing, finite
from .timing import Quantiles, Timer
from .whole import FORWARD, NETWORKS, STEP, Compared, loss_of, pictures
from .workers import Progress, describe_error

PROVIDERS = ("tileconv", "torch", "torch.compile")
PASSES = (FORWARD, STEP)


@dataclass(frozen=True)
class NetworkCall:
    """One network, provider and pass; `run()` is what is timed: the scores, or the loss before the step.

    `method` "graph": the whole pass is replayed from one CUDA graph.
    """

    network: str
    provider: str
    pass_: str
    run: Callable[[], Tensor]
    method: Literal["events", "graph"] = "events"


def network_calls(
    name: str,
    batch: int,
    dtype: str,
    device: str = "cuda",
    *,
    providers: Sequence[str] = PROVIDERS,
    graphs: bool = False,
) -> Iterator[NetworkCall]:
    """Forward and training step of a network at full size for each provider, one after the other.

    All have the same weights, and the same pictures channels_last. A training step is forward, loss (with GoogLeNet's
    auxiliary heads), backward and a step of SGD with momentum; dropout draws, each provider its own. Take a call, use
    it and let go of it: each owns a network, and the next one is made when asked for. torch.compile compiles in its
    first run. graphs: the forward pass also from one CUDA graph, ours and PyTorch's, which is what a latency is worth
    at batch 1. Raises ValueError for an unknown name or dtype and a batch below 1.
    """
    from tileconv.model.chains import plain
    from tileconv.model.zoo import build, lively

    known("dtype", dtype, DTYPES)
    size = NETWORKS[known("network", name, NETWORKS)].size
    for provider in providers:
        known("provider", provider, PROVIDERS)
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    x, labels = (t.to(device) for t in pictures(name, batch, size))
    x = x.to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    model = lively(build(name)).to(device, DTYPES[dtype])
    for pass_ in PASSES:
        for provider in providers:
            ours = provider == "tileconv"
            net = copy.deepcopy(model) if ours else plain(model, size)  # either keeps the weights channels_last
            net.train(pass_ == STEP)
            called: Any = torch.compile(net) if provider == "torch.compile" else net
            run = _step(called, net, x, labels, ours=ours) if pass_ == STEP else _forward(called, x)
            yield NetworkCall(name, provider, pass_, run)
            if graphs and pass_ == FORWARD and provider != "torch.compile":
                yield NetworkCall(name, provider, pass_, _graph(net, x), "graph")


def _forward(called: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return called(x)

    return run


def _graph(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Captured in the first run, so that a network that cannot be fails where it is timed."""
    replay: list[Callable[[Tensor], Tensor]] = []

    def run() -> Tensor:
        if not replay:
            replay.append(captured(net, x))
        return replay[0](x)

    return run


def _step(
    called: Callable[[Tensor], Any], net: nn.Module, x: Tensor, labels: Tensor, *, ours: bool
) -> Callable[[], Tensor]:
    from tileconv.kernels import functional as TF

    cross_entropy = TF.cross_entropy if ours else F.cross_entropy
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def run() -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(called(x), labels, cross_entropy)
            loss.backward()
            optimizer.step()
        return loss.detach()

    return run


def flops(name: str, batch: int, pass_: str) -> int:
    """Multiplications and additions of a pass, auxiliary heads left out; a training step is three forward passes less
    the first layer's input gradient."""
    from tileconv.model.chains import channels_of
    from tileconv.model.shapes import network, shapes, totals

    model, size = network(name), NETWORKS[name].size
    rows = shapes(model, (batch, channels_of(model), size, size))
    whole = totals(rows).flops
    return whole if pass_ == FORWARD else 3 * whole - rows[0].flops


def network_timings(
    batch: int,
    dtypes: Sequence[str],
    timer: Timer,
    *,
    networks: Sequence[str] = tuple(NETWORKS),
    device: str = "cuda",
    graphs: bool = False,
    progress: Progress | None = None,
) -> list[Timing]:
    """Timing rows of whole networks; `graphs` as network_calls has it.

    A provider whose scores are outside the budget, or that raises, gets no speed. The scores are those of the first
    eight pictures. A training step is timed where the same provider's forward pass was right; its loss must be finite.
    """
    rows: list[Timing] = []
    todo = [(name, dtype) for name in networks for dtype in dtypes]
    for done, (name, dtype) in enumerate(todo, start=1):
        with precision(dtype):
            exact, theirs = _scores(name, min(batch, 8), dtype, device)
            wrong: dict[str, str] = {}
            for call in network_calls(name, batch, dtype, device, graphs=graphs):
                rows += _timed(call, batch, dtype, exact, theirs, wrong, timer)
        if progress is not None:
            progress(done, len(todo), f"{name} {dtype}")
    return rows


def _scores(name: str, count: int, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """The first pictures' scores: exact in float64, and torch's in this dtype."""
    from tileconv.model.chains import plain
    from tileconv.model.zoo import build, lively

    size = NETWORKS[name].size
    net = plain(lively(build(name)).to(device, DTYPES[dtype]), size)
    x = pictures(name, count, size)[0].to(device, DTYPES[dtype])
    with torch.no_grad():
        return copy.deepcopy(net).double()(x.double()), net(x)


def _timed(
    call: NetworkCall, batch: int, dtype: str, exact: Tensor, theirs: Tensor, wrong: dict[str, str], timer: Timer
) -> list[Timing]:
    blank = Timing(
        network=call.network, layer="network", pass_=call.pass_, batch=batch, dtype=dtype, provider=call.provider,
        memory_format="channels_last", l2="cold", p20_us=None, p50_us=None, p80_us=None, n=0, tflops=None, error=None,
        allowed=None, passed=False, method=call.method,
    )  # fmt: skip

    def untimed(note: str) -> list[Timing]:
        return [replace(blank, l2=l2, note=f"not timed: {note}") for l2 in L2]

    try:
        if call.provider in wrong:
            return untimed(wrong[call.provider])
        result = call.run()
        if call.pass_ == FORWARD:
            compared = Compared.of(result[: len(exact)], theirs, exact, 0.0)
            blank = replace(blank, error=finite(compared.error), allowed=finite(compared.allowed))
            if not compared.error <= compared.allowed:
                wrong[call.provider] = "the scores are outside their budget"
                return untimed(wrong[call.provider])
        elif not math.isfinite(result.item()):
            return untimed("the loss is not finite")
        rows = []
        for l2 in L2:
            q = Quantiles.of(timer(call.run, cold=l2 == "cold"))
            speed = flops(call.network, batch, call.pass_) / q.p50 / 1e6
            times = {"p20_us": q.p20, "p50_us": q.p50, "p80_us": q.p80, "tflops": speed}
            rows.append(replace(blank, l2=l2, n=q.n, passed=True, **times))  # type: ignore[arg-type]
        return rows
    except Exception as problem:  # one provider's failure must not cost the rest of the run
        wrong[call.provider] = describe_error(problem)
        return untimed(wrong[call.provider])
