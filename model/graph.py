"""A network's forward pass as one CUDA graph: at batch 1 the launches cost more than the kernels they launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tileconv.kernels import hardware


def captured(network: Callable[[Tensor], Tensor], x: Tensor, warm_up: int = 3) -> Callable[[Tensor], Tensor]:
    """`network` for inputs of x's shape and dtype, captured in one torch.cuda.CUDAGraph and replayed in each call.

    The network has to be evaluating: what it draws at random would be drawn once. It runs `warm_up` times first, which
    compiles its kernels and chooses their tiles; capturing them must do neither. A call copies its argument into the
    graph's own input and returns the graph's own output, which the next call overwrites. Gradients do not pass.

    Raises RuntimeError without a GPU and ValueError for an input, here or in a call, that does not fit.
    """
    if hardware.interpreting():
        raise RuntimeError("captured() needs a GPU: Triton's interpreter launches nothing that a CUDA graph could hold")
    if isinstance(network, torch.nn.Module) and network.training:
        raise ValueError("network is training: a graph would replay the same random numbers; call eval() first")
    if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 1:
        raise ValueError(f"warm_up is {warm_up!r}: allowed are ints of at least 1")
    given = x.detach().clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(warm_up):
            network(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = network(given)

    def replay(x: Tensor) -> Tensor:
        if (x.shape, x.dtype, x.device) != (given.shape, given.dtype, given.device):
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} on {x.device}: the graph was captured for {given.dtype} "
                f"{tuple(given.shape)} on {given.device}"
            )
        given.copy_(x)
        graph.replay()
        return output

    return replay
