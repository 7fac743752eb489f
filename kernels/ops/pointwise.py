"""Elementwise ops."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.launch import plans
from tileconv.kernels.launch import pointwise as launch_pointwise
from tileconv.kernels.ops.registry import define


def _relu(input: torch.Tensor) -> torch.Tensor:
    source = layout.dense(input)
    output = torch.empty_like(source)
    if output.numel():
        plans.run(launch_pointwise.plan_relu, layout.flat(source), layout.flat(output))
    return output


def _relu_backward(grad: torch.Tensor, output: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    checks.belongs("grad", grad, output.shape, output, output.dtype)
    output = layout.dense(output)
    grad = layout.laid_out_like(grad, output)
    grad_input = torch.empty_like(output)
    if output.numel():
        rows = [layout.flat(tensor)[None, :] for tensor in (grad, output, grad_input)]
        plans.run(launch_pointwise.plan_relu_backward, *rows, dropout)
    return grad_input


def _dropout(input: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    source = layout.dense(input)
    output = torch.empty_like(source)
    if output.numel():
        plans.run(launch_pointwise.plan_dropout, layout.flat(source), layout.flat(output), seed, p)
    return output


define("relu(Tensor input) -> Tensor", _relu, lambda input: torch.empty_like(input))
define(
    "relu_backward(Tensor grad, Tensor output, float dropout=0.0) -> Tensor",
    _relu_backward,
    lambda grad, output, dropout=0.0: torch.empty_like(output),
)
define(
    "dropout(Tensor input, Tensor seed, float p) -> Tensor", _dropout, lambda input, seed, p: torch.empty_like(input)
)
