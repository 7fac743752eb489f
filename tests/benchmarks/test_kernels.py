"""The kernels on a GPU, by pytest-benchmark's clock: one call and a wait, the host's share included.

`tileconv bench` times the kernels alone, with a cold and a warm cache and beside cuDNN; this is the quick look.
"""

from typing import Any

import pytest
import torch

from tileconv.bench.cases import cases, shape_of
from tileconv.bench.providers import PROVIDERS, operands

pytestmark = [pytest.mark.benchmark, pytest.mark.gpu]
CASES = cases("alexnet", 128, ("fp16",), ("fprop", "forward"))


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: f"{p.name}-{p.memory_format}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layer)
def test_forward(benchmark: Any, case: Any, provider: Any) -> None:
    shape = shape_of(case)
    tensors = operands(case, provider.memory_format, "cuda")

    def call() -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = provider.run(shape, tensors)
        torch.cuda.synchronize()
        return y

    call()  # compiles
    y = benchmark(call)
    exact = PROVIDERS[1].run(shape, {name: t.double() for name, t in tensors.items()})
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)
