"""What every test gets: the interpreter where there is no GPU, a fixed seed, and memory that starts as NaN."""

# First, before anything that could import triton: on a machine without a GPU this switches Triton's interpreter on.
import tileconv.kernels  # noqa: F401  # isort: skip

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tileconv.kernels import hardware


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """torch's random state, the same at the start of every test, alone or among others."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill what torch.empty and its relatives return with NaN (integers: their largest value).

    A kernel that leaves an element of its output unwritten then fails a comparison, whatever lay there before.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)  # without this the fill does nothing
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: on the GPU, or on the CPU in Triton's interpreter."""
    return torch.device("cpu" if hardware.interpreting() else "cuda")


@pytest.fixture(scope="session")
def assert_within_budget() -> Callable[[Tensor, Tensor, Tensor], None]:
    """assert_within_budget(ours, torch's in the same dtype, exact in float64).

    The error allowed is twice torch's own, and twice one rounding of the largest value for where torch is exact.
    """

    def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        assert exact.dtype == torch.float64
        assert ours.shape == theirs.shape == exact.shape
        assert ours.dtype == theirs.dtype
        assert torch.isfinite(ours).all()
        error = (ours.double() - exact).abs().max().item()
        allowed = 2 * ((theirs.double() - exact).abs().max() + torch.finfo(ours.dtype).eps * exact.abs().max()).item()
        assert error <= allowed, f"error {error:.3g} is over the allowed {allowed:.3g}"

    return check
