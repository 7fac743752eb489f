"""The GPU's clock, temperature and reasons for slowing down, from NVIDIA's management library where it is installed."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, field
from typing import Any

# What slows a GPU against its user's will; being idle, or having its clocks set by hand, is not among them.
REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "synchronised boost",
    "SwThermalSlowdown": "thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
}
ABSENT = "nvidia-ml-py is not installed: clocks, temperatures and throttling are not known (pip install nvidia-ml-py)"


@dataclass(frozen=True)
class Reading:
    """One look at the GPU: MHz of its SMs, degrees Celsius, and the names of REASONS in force."""

    clock_mhz: float
    temperature_c: float
    reasons: tuple[str, ...]


class Gauge:
    """Reads one GPU. Raises what pynvml raises."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def read(self) -> Reading:
        nvml = self.nvml
        # Both names are of one function; the older is gone from some versions, the newer was not in others.
        active = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        active = active or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        bits = active(self.handle)
        return Reading(
            float(nvml.nvmlDeviceGetClockInfo(self.handle, nvml.NVML_CLOCK_SM)),
            float(nvml.nvmlDeviceGetTemperature(self.handle, nvml.NVML_TEMPERATURE_GPU)),
            tuple(text for name, text in REASONS.items() if bits & _bit(nvml, name)),
        )


def _bit(nvml: Any, name: str) -> int:
    found = getattr(nvml, f"nvmlClocksEventReason{name}", None)
    return int(getattr(nvml, f"nvmlClocksThrottleReason{name}", 0) if found is None else found)


def open_gauge() -> tuple[Gauge | None, str]:
    """A gauge of PyTorch's current GPU; or None, and why there is none."""
    import torch

    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, ABSENT
    try:
        nvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers PyTorch's devices and not the library's.
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        gauge = Gauge(nvml, handle)
        gauge.read()
    except (nvml.NVMLError, AttributeError) as error:
        return None, f"clocks, temperatures and throttling are not known: {type(error).__name__}: {error}"
    return gauge, ""


@dataclass
class Watch:
    """Readings while something is timed: `look` when there is something to see, and now and then in between."""

    gauge: Gauge | None
    readings: list[Reading] = field(default_factory=list)

    def look(self) -> None:
        if self.gauge is not None:
            with contextlib.suppress(self.gauge.nvml.NVMLError):  # a look that fails is one look less
                self.readings.append(self.gauge.read())

    @property
    def fields(self) -> dict[str, tuple[Any, ...]]:
        """As records.Timing names them: first and last clock and temperature, and every reason that was given."""
        ends = [self.readings[0], self.readings[-1]] if self.readings else []
        reasons = dict.fromkeys(reason for reading in self.readings for reason in reading.reasons)
        return {
            "clocks_mhz": tuple(r.clock_mhz for r in ends),
            "temperatures_c": tuple(r.temperature_c for r in ends),
            "throttled": tuple(reasons),
        }
