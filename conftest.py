"""`pytest bench/` measures: it stands for tests/benchmarks with pytest-benchmark switched on.

The folder bench/ itself is a package that is installed; tests do not belong in it.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
BENCHMARKS = "tests/benchmarks"


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    folder = config.invocation_params.dir
    if [(folder / argument).resolve() for argument in config.args] == [ROOT / "bench"]:
        config.args[:] = [str(ROOT / BENCHMARKS)]
        config.option.benchmark_disable = False
