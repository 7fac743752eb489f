"""The kernels on a GPU, by pytest-benchmark's clock: one call and a wait, the host's share included.

`tileconv bench` times the kernels alone, with a cold and a warm cache and beside cuDNN; this is the quick look.
"""

from typing import Any

import pytest
import torch

from tileconv.bench.cases import cases, shape_of
from tileconv.bench.passes import operands, placed, work
from tileconv.bench.providers import PROVIDERS

pytestmark = [pytest.mark.benchmark, pytest.mark.gpu]
CASES = cases("alexnet", 128, ("fp16",), ("fprop", "forward"))
QUICK = [provider for provider in PROVIDERS if provider.turn == 0]


@pytest.mark.parametrize("provider", QUICK, ids=lambda p: f"{p.name}-{p.memory_format}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layer)
def test_forward(benchmark: Any, case: Any, provider: Any) -> None:
    shape = shape_of(case)
    if not provider.applies(case, shape):
        pytest.skip(f"{provider.name} has no way to compute {case.layer}")
    tensors = operands(case, "cuda")
    with provider.around(case), torch.no_grad():
        run = provider.make(case, shape, placed(tensors, shape, provider.layout))

        def call() -> torch.Tensor:
            y: torch.Tensor = run()
            torch.cuda.synchronize()
            return y

        call()  # compiles
        y = benchmark(call)
        exact = work("torch", case, shape, {name: t.double() for name, t in tensors.items()})()
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
