"""What every launcher makes, one Launch, and what they share in describing operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from tileconv.kernels.layout import sum_dtype

TRITON_TYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its arguments by name (constexprs included) and its compile options.

    `run()` launches it. The bench compiles the same object for another GPU, so what is inspected is what is launched.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    tile: str = ""  # how reports name the choice
    most_registers: int | None = None  # a thread: programs that share an SM need them all to fit

    @property
    def options(self) -> dict[str, int]:
        """What triton compiles it with."""
        limit = {} if self.most_registers is None else {"maxnreg": self.most_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit

    def on(self, arguments: dict[str, Any]) -> Launch:
        """The launch of a call whose tensors differ and nothing else; made without a dataclass's checks, for speed."""
        launch: Launch = object.__new__(Launch)
        launch.__dict__.update(self.__dict__, arguments=arguments)
        return launch

    def run(self) -> None:
        if self.grid[0] > 0:
            self.kernel[self.grid](**self.arguments, **self.options)


def accumulator(dtype: torch.dtype) -> Any:
    """The type that sums of `dtype` are kept in."""
    return TRITON_TYPE[sum_dtype(dtype)]


def index_type(*tensors: torch.Tensor) -> Any:
    """int64 where an offset inside one of the tensors passes 2^31."""
    reach = (sum((e - 1) * abs(s) for e, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t.numel())
    return tl.int64 if max(reach, default=0) >= (1 << 31) - (1 << 20) else tl.int32


def pitch(tensor: torch.Tensor, axis: int) -> int:
    """The stride of an axis, 0 for one of one element, which has none of its own.

    PyTorch's for an image of one pixel, as linear layers make them, may be 1: kernels compiled for that cannot tell
    that addresses are multiples of 16 bytes, and load two at a time.
    """
    return tensor.stride(axis) if tensor.shape[axis] > 1 else 0


def strides(operand: str, tensor: torch.Tensor, axes: str) -> dict[str, int]:
    """Kernel arguments stride_<operand><axis>, one for each axis of the tensor; of images and places those of pitch."""
    return {
        f"stride_{operand}{axis}": pitch(tensor, number) if axis in "nhwpq" else tensor.stride(number)
        for number, axis in enumerate(axes)
    }
