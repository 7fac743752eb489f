"""A layer as the problem that the kernels solve: geometry's dataclasses, made from modules."""

from __future__ import annotations

import math
from typing import Any

import torch

from .networks import Shape

PRODUCTS = ("conv2d", "linear", "conv1d", "conv_transpose2d", "conv2d_im2col", "locally_connected2d")
"""Operations that multiply: their passes are fprop, dgrad and wgrad."""


def conv_problem(shape: Shape) -> Any:
    """The Conv2dProblem of a layer that multiplies, and of unfold and fold, as a convolution with one filter.

    A linear layer is a 1x1 convolution of 1x1 images, conv1d one of images of one row. A transposed convolution is
    named by the convolution whose input gradient it computes: its input is that one's output. Raises ValueError where
    nothing is left of the image.
    """
    from tileconv.kernels.geometry import Conv2dProblem, same_padding

    m: Any = shape.module
    if shape.op == "linear":
        return Conv2dProblem(N=shape.input[0], C=m.in_features, H=1, W=1, K=m.out_features, R=1, S=1)
    if shape.op == "conv_transpose2d":
        return _transposed(shape)
    if shape.op == "fold":
        return _folded(shape)
    n, c, *extents = shape.input
    h, w = (1, *extents) if shape.op == "conv1d" else extents
    rows = shape.op != "conv1d"
    r, s = pair(m.kernel_size) if rows else (1, m.kernel_size[0])
    stride = pair(m.stride) if rows else (1, m.stride[0])
    dilation = pair(m.dilation) if rows else (1, m.dilation[0])
    if isinstance(m.padding, str):
        edges = ((0, 0), (0, 0))
        if m.padding == "same":
            edges = same_padding(r, dilation[0]), same_padding(s, dilation[1])
    else:
        top, left = pair(m.padding) if rows else (0, m.padding[0])
        edges = (top, top), (left, left)
    filters = 1 if shape.op == "unfold" else m.out_channels
    return Conv2dProblem(
        N=n, C=c, H=h, W=w, K=filters, R=r, S=s, stride=stride, padding=edges, dilation=dilation,
        groups=getattr(m, "groups", 1),
    )  # fmt: skip


def _transposed(shape: Shape) -> Any:
    from tileconv.kernels.geometry import Conv2dProblem

    m: Any = shape.module
    n, k, *extents = shape.input
    size, edges = [], []
    for axis, extent in enumerate(extents):
        more, pad = m.output_padding[axis], m.padding[axis]
        span = m.dilation[axis] * (m.kernel_size[axis] - 1) + 1
        size.append((extent - 1) * m.stride[axis] - 2 * pad + span + more)
        edges.append((pad, pad - more))
    if min(size) < 1:
        raise ValueError(f"padding={tuple(m.padding)} leaves an output of {size[0]}x{size[1]}")
    return Conv2dProblem(
        N=n, C=m.out_channels, H=size[0], W=size[1], K=k, R=m.kernel_size[0], S=m.kernel_size[1], stride=m.stride,
        padding=(edges[0], edges[1]), dilation=m.dilation, groups=m.groups,
    )  # fmt: skip


def _folded(shape: Shape) -> Any:
    from tileconv.kernels.geometry import Conv2dProblem

    m: Any = shape.module
    n, depth, columns = shape.input
    (r, s), (h, w), (top, left) = pair(m.kernel_size), pair(m.output_size), pair(m.padding)
    if depth % (r * s):
        raise ValueError(f"input has {depth} rows, which must be a multiple of the {r}x{s} taps of kernel")
    problem = Conv2dProblem(
        N=n, C=depth // (r * s), H=h, W=w, K=1, R=r, S=s, stride=pair(m.stride), padding=((top, top), (left, left)),
        dilation=pair(m.dilation),
    )  # fmt: skip
    if columns != problem.P * problem.Q:
        raise ValueError(f"input has {columns} columns, and output={h}x{w} needs {problem.P * problem.Q}")
    return problem


def pool_problem(shape: Shape) -> Any:
    """The Pool2dProblem of a pool with a window, or the AdaptivePool2dProblem of one that is told its output."""
    from tileconv.kernels.geometry import AdaptivePool2dProblem, Pool2dProblem

    m: Any = shape.module
    n, c, h, w = shape.input
    if shape.op.startswith("adaptive"):
        p, q = pair(m.output_size)
        return AdaptivePool2dProblem(n, c, h, w, h if p is None else p, w if q is None else q)
    stride = pair(m.kernel_size if m.stride is None else m.stride)
    padding, dilation = pair(getattr(m, "padding", 0)), pair(getattr(m, "dilation", 1))
    ceil = bool(getattr(m, "ceil_mode", False))
    return Pool2dProblem(n, c, h, w, pair(m.kernel_size), stride, padding, dilation, ceil)


def conv_pool_problem(shape: Shape) -> Any:
    """The Pool2dProblem behind the convolution of a conv2d_max_pool2d."""
    from tileconv.kernels.geometry import Pool2dProblem

    window: Any = shape.module.pool
    n, c, h, w = conv_problem(shape).y_shape
    stride = pair(window.kernel_size if window.stride is None else window.stride)
    return Pool2dProblem(
        n, c, h, w, pair(window.kernel_size), stride, pair(window.padding), pair(window.dilation), window.ceil_mode
    )


def output_shape(shape: Shape) -> tuple[int, ...]:
    """What a layer makes of its input. Raises ValueError where nothing is left."""
    n = shape.input[0]
    if shape.op == "linear":
        return n, int(conv_problem(shape).K)
    if shape.op in PRODUCTS or shape.op in ("unfold", "fold"):
        problem = conv_problem(shape)
        if shape.op == "unfold":
            return (n, *problem.im2col_shape)
        if shape.op == "conv1d":
            return n, int(problem.K), int(problem.Q)
        image: tuple[int, ...] = problem.x_shape if shape.op in ("conv_transpose2d", "fold") else problem.y_shape
        return image
    if shape.op == "max_unpool2d":
        return unpooled_shape(shape)
    if shape.op == "conv2d_max_pool2d":
        pooled: tuple[int, ...] = conv_pool_problem(shape).y_shape
        return pooled
    if "pool" in shape.op:
        problem = pool_problem(shape)
        return (*shape.input[:2], problem.P, problem.Q)
    if shape.op == "cross_entropy":
        return ()
    return shape.input


def unpooled_shape(shape: Shape) -> tuple[int, ...]:
    """The output of a max_unpool2d without output_size."""
    m: Any = shape.module
    kernel, stride, padding = pair(m.kernel_size), pair(m.stride), pair(m.padding)
    size = [(e - 1) * s - 2 * p + k for e, s, p, k in zip(shape.input[2:], stride, padding, kernel, strict=True)]
    if min(size) < 1:
        raise ValueError(f"padding={padding} leaves an output of {size[0]}x{size[1]}")
    return (*shape.input[:2], *size)


def bytes_least(shape: Shape, itemsize: int) -> int:
    """Operands and result of a layer that multiplies, each once; locally connected layers have filters per pixel."""
    problem = conv_problem(shape)
    more: int = problem.bytes_least(itemsize)
    if shape.op == "conv2d_max_pool2d":  # pooled values and a byte for each instead of the convolution's output
        outputs = math.prod(output_shape(shape))
        more += outputs * (itemsize + 1) - math.prod(problem.y_shape) * itemsize
    if shape.op == "locally_connected2d":
        more += (problem.P * problem.Q - 1) * problem.K * problem.C * problem.taps * itemsize
    return more


def has_bias(shape: Shape) -> bool:
    """Whether a layer that multiplies adds a bias."""
    return isinstance(getattr(shape.module, "bias", None), torch.Tensor)


def pair(value: Any) -> Any:
    """An int for both axes, or one for each."""
    return (value, value) if isinstance(value, int) or value is None else (value[0], value[-1])
