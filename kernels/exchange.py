"""Fully connected layers as convolutions and back, exactly: every value of the new layer is one of the old, or zero."""

from __future__ import annotations

import torch

from tileconv.kernels import geometry
from tileconv.kernels.modules import Conv2d, Linear


def fc_to_conv(linear: torch.nn.Linear, input_shape: tuple[int, int, int]) -> Conv2d:
    """The convolution that gives linear(x.flatten(1)) at every position of a larger image.

    input_shape is (C, H, W), C * H * W = linear.in_features: the volume that was flattened.  The convolution has
    kernel (H, W), C channels and linear.out_features filters; on [N, C, H, W] it returns [N, K, 1, 1], the same
    numbers, and on larger images a map of them.  Its parameters are copies.  Raises ValueError where sizes differ.
    """
    channels, height, width = _volume(input_shape)
    if channels * height * width != linear.in_features:
        raise ValueError(
            f"input_shape is {tuple(input_shape)}: linear has {linear.in_features} inputs, not "
            f"{channels * height * width}"
        )
    weight = linear.weight
    conv = Conv2d(
        channels, linear.out_features, (height, width), bias=linear.bias is not None, device=weight.device,
        dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(weight.view(-1, channels, height, width))
        if conv.bias is not None:
            conv.bias.copy_(linear.bias)
    return conv.train(linear.training)


def conv_to_fc(conv: torch.nn.Conv2d, input_shape: tuple[int, int, int]) -> Linear:
    """The fully connected layer that gives conv(x).flatten(1) for x.flatten(1), x of one size.

    input_shape is (C, H, W).  The weight is the dense matrix [K * P * Q, C * H * W]: row (k, p, q) holds filter k where
    output pixel (p, q) sees it, and zeros elsewhere; a bias is repeated for every pixel.  A kernel as large as the
    image without padding gives back the matrix that fc_to_conv took.  Raises ValueError where channels differ, nothing
    is left of the image, or the padding is not of zeros.
    """
    channels, height, width = _volume(input_shape)
    if channels != conv.in_channels:
        raise ValueError(f"input_shape is {tuple(input_shape)}: conv has {conv.in_channels} input channels")
    if conv.padding_mode != "zeros":
        raise ValueError(f"conv has padding_mode {conv.padding_mode!r}: allowed is 'zeros'")
    (R, S), stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    padding = _padding(conv)
    problem = geometry.Conv2dProblem(
        1, channels, height, width, conv.out_channels, R, S, (stride[0], stride[1]), padding,
        (dilation[0], dilation[1]), conv.groups,
    )  # fmt: skip
    filters = conv.weight.detach()
    grouped = filters.unflatten(0, (conv.groups, -1))  # [groups, K/groups, C/groups, R, S]
    dense = filters.new_zeros(
        conv.groups, problem.group_filters, problem.P, problem.Q, conv.groups, problem.group_channels, height, width
    )
    group = torch.arange(conv.groups)
    for r in range(R):
        rows = [(p, h) for p in range(problem.P)
                if 0 <= (h := p * stride[0] + r * dilation[0] - padding[0][0]) < height]  # fmt: skip
        for s in range(S):
            columns = [(q, w) for q in range(problem.Q)
                       if 0 <= (w := q * stride[1] + s * dilation[1] - padding[1][0]) < width]  # fmt: skip
            for p, h in rows:
                for q, w in columns:
                    dense[group, :, p, q, group, :, h, w] = grouped[..., r, s]
    layer = Linear(
        channels * height * width, conv.out_channels * problem.P * problem.Q, conv.bias is not None,
        filters.device, filters.dtype,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(dense.reshape(layer.weight.shape))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias.repeat_interleave(problem.P * problem.Q))
    return layer.train(conv.training)


def _volume(input_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(input_shape) != 3 or any(isinstance(e, bool) or not isinstance(e, int) or e < 1 for e in input_shape):
        raise ValueError(f"input_shape is {input_shape!r}: allowed is (C, H, W), three positive ints")
    return input_shape[0], input_shape[1], input_shape[2]


def _padding(conv: torch.nn.Conv2d) -> geometry.Padding:
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding == "same":
        return (
            geometry.same_padding(conv.kernel_size[0], conv.dilation[0]),
            geometry.same_padding(conv.kernel_size[1], conv.dilation[1]),
        )
    rows, columns = int(conv.padding[0]), int(conv.padding[1])
    return (rows, rows), (columns, columns)
