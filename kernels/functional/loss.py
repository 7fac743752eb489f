"""Softmax, its logarithm, and cross-entropy."""

from __future__ import annotations

from typing import Any

import torch

from tileconv.kernels import checks
from tileconv.kernels.autograd import softmax as autograd
from tileconv.kernels.functional.common import in_autocast

REDUCTIONS = ("none", "mean", "sum")


def softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """exp(input) / sum(exp(input)) along `dim`, of a tensor of any shape; contiguous.

    Sums are fp32 for fp16 and bf16.  -inf gives 0, a row of nothing else NaN, as PyTorch has it.  dtype: what input is
    cast to before; in an autocast region fp16 and bf16 become fp32.  `dim` has to be given: PyTorch's guess is
    deprecated.  `_stacklevel` is PyTorch's and ignored.

    Raises TypeError or ValueError for a dim that is no axis, and a dtype that is not floating point.
    """
    return _softmax(input, dim, dtype, log=False)


def log_softmax(
    input: torch.Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """log(softmax(input, dim)) without its underflow: input - log(sum(exp(input))); arguments as in softmax."""
    return _softmax(input, dim, dtype, log=True)


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The cross-entropy of logits and targets, softmax, logarithm and sum in one kernel each way.

    input [N, C], [N, C, d1, ...] or [C].  target: int64 classes [N], [N, d1, ...] or [], or probabilities of input's
    shape and dtype.  weight [C]: what a class counts; it gets no gradient.  A row's loss is
    weight[t] * (log(sum(exp(x))) - x[t]), or the sum of weight * t * (log(sum(exp(x))) - x) for probabilities t;
    label_smoothing e makes t * (1 - e) + e / C of them.  reduction: "none", "sum", or "mean", which divides by the sum
    of weight[t] of the rows that are not ignored (for probabilities by the number of rows); NaN if all are ignored.

    Classes outside 0..C-1 other than ignore_index: on the CPU a ValueError.  On a GPU looking would make the CPU wait
    for the GPU at every call; there the loss becomes NaN, and nothing is read out of bounds.

    Sums are fp32 for fp16 and bf16; in an autocast region these become fp32.  Raises TypeError or ValueError that
    names the argument.  size_average and reduce are PyTorch's, long deprecated, and must be None.
    """
    if size_average is not None or reduce is not None:
        raise ValueError("size_average and reduce are deprecated and must be None: use reduction")
    checks.choice("reduction", reduction, REDUCTIONS)
    label_smoothing = checks.probability("label_smoothing", label_smoothing)
    ignore_index = checks.index("ignore_index", ignore_index)
    checks.tensor("input", input)
    if input.dim() == 0 or input.shape[min(1, input.dim() - 1)] == 0:
        raise ValueError(f"input has shape {tuple(input.shape)}: allowed are [C], [N, C] and [N, C, d1, ...], C not 0")
    input = _widened(input)
    classes = input.shape[min(1, input.dim() - 1)]
    target = _target(input, target)
    if target.is_floating_point() and ignore_index >= 0:
        raise ValueError(f"ignore_index is {ignore_index}: probabilities name no class to ignore; leave it at -100")
    if weight is not None:
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            weight = weight.to(input.dtype)
        checks.vector("weight", weight, input, classes)
        if weight.requires_grad:
            raise ValueError("weight requires a gradient: cross_entropy gives it none; detach() it")
    loss: torch.Tensor = autograd.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)[0]
    return loss


def _target(input: torch.Tensor, target: Any) -> torch.Tensor:
    """A target that fits the input."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target must be a torch.Tensor, not {type(target).__name__}")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, but input is on {input.device}: they must be the same")
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target has shape {tuple(target.shape)}: probabilities need input's {tuple(input.shape)}; "
                "classes are torch.int64"
            )
        return target.to(input.dtype)
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}: allowed are torch.int64 (classes) and floating point")
    rows = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if tuple(target.shape) != rows:
        raise ValueError(
            f"target has shape {tuple(target.shape)}: classes for input {tuple(input.shape)} need {rows}, one a row"
        )
    return target


def _softmax(input: torch.Tensor, dim: Any, dtype: torch.dtype | None, log: bool) -> torch.Tensor:
    if dtype is not None:
        checks.choice("dtype", dtype, checks.FLOATING)
        if isinstance(input, torch.Tensor):
            input = input.to(dtype)
    checks.tensor("input", input)
    dim = checks.index("dim", dim)
    axes = max(input.dim(), 1)
    if not -axes <= dim < axes:
        raise ValueError(f"dim is {dim}: allowed are {-axes} to {axes - 1}")
    input = input if dtype is not None else _widened(input)
    output: torch.Tensor = autograd.softmax(input, dim % axes, log)
    return output


def _widened(input: torch.Tensor) -> torch.Tensor:
    """What PyTorch's autocast does to these on a GPU: fp32 for anything narrower."""
    if in_autocast(input) and input.dtype.itemsize == 2:
        return input.float()
    return input
