"""Local response normalisation."""

from __future__ import annotations

import torch

from tileconv.kernels import checks, layout
from tileconv.kernels.launch import norm as launch_norm
from tileconv.kernels.launch import plans
from tileconv.kernels.ops.registry import define

# alpha multiplies the sum of squares here: functional/ has divided it.
SETTINGS = "int size, float alpha, float beta, float k, bool channels_last"


def _local_response_norm(
    input: torch.Tensor, size: int, alpha: float, beta: float, k: float, channels_last: bool
) -> torch.Tensor:
    output = layout.empty_image(input.shape, input, channels_last)
    if output.numel():
        plans.run(launch_norm.plan_local_response_norm, input, None, output, size, alpha, beta, k)
    return output


def _local_response_norm_backward(
    grad: torch.Tensor, input: torch.Tensor, size: int, alpha: float, beta: float, k: float, channels_last: bool
) -> torch.Tensor:
    checks.belongs("grad", grad, input.shape, input, input.dtype)
    grad_input = layout.empty_image(input.shape, input, channels_last)
    if grad_input.numel():
        plans.run(launch_norm.plan_local_response_norm, input, grad, grad_input, size, alpha, beta, k)
    return grad_input


define(
    f"local_response_norm(Tensor input, {SETTINGS}) -> Tensor",
    _local_response_norm,
    lambda input, *settings: layout.empty_image(input.shape, input, settings[-1]),
)
define(
    f"local_response_norm_backward(Tensor grad, Tensor input, {SETTINGS}) -> Tensor",
    _local_response_norm_backward,
    lambda grad, input, *settings: layout.empty_image(input.shape, input, settings[-1]),
)
