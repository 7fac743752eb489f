"""Float64 oracles, written from the definitions, on the CPU: what every kernel is measured against.

Inputs of any dtype and memory format are taken as float64; results are float64 and contiguous.  N C H W is the input,
K R S the filters, P Q the output.  A `Pair` is one integer for both axes or (height, width); padding may also be
((top, bottom), (left, right)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Pair = int | tuple[int, int]
Padding = Pair | tuple[tuple[int, int], tuple[int, int]]
Sides = tuple[tuple[int, int], tuple[int, int]]


def error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact|; infinite where got is NaN, or either is infinite, and the other is not.

    Elements that are NaN in both, or the same infinity in both, are right.  Raises ValueError for different shapes.
    """
    if got.shape != exact.shape:
        raise ValueError(f"got has the shape {tuple(got.shape)}, and the exact result {tuple(exact.shape)}")
    got, exact = _float64(got), _float64(exact)
    right = (got == exact) | (got.isnan() & exact.isnan())
    difference = torch.where(right, 0.0, (got - exact).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.max().item() if difference.numel() else 0.0


def allowed_error(exact: Tensor, theirs: Tensor) -> float:
    """2 * (max |theirs - exact| + eps * max |exact|), for torch's result `theirs` in the dtype under test.

    eps is that dtype's; it leaves room for one rounding where torch happens to be exact.  For float64 it counts
    32-fold: the exact result is itself a float64 sum there, in some order of its own.  Only elements that are finite
    in both count.
    """
    eps = torch.finfo(theirs.dtype).eps * (32 if theirs.dtype == torch.float64 else 1)
    theirs, exact = _float64(theirs), _float64(exact)
    finite = theirs.isfinite() & exact.isfinite()
    if not finite.any():
        return 0.0
    exact = exact[finite]
    return 2 * ((theirs[finite] - exact).abs().max() + eps * exact.abs().max()).item()


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """y[n, k, p, q] = b[k] + sum over (c, r, s) of w[k, c, r, s] * x[n, c, p*stride + r*dilation - top, ...].

    x: [N, C, H, W].  w: [K, C/groups, R, S]; filter k reads the channels of its group, k // (K/groups).  b: [K].
    activation: None or "relu".  Returns [N, K, P, Q], P = (H + top + bottom - dilation*(R - 1) - 1) // stride + 1.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation={activation!r} is not known: use None or 'relu'")
    (x, w), sides = (_float64(x), _float64(w)), _sides(padding)
    padded = _pad(x, sides, 0.0)
    y = torch.zeros(x.shape[0], groups, w.shape[0] // groups, *_extents(x, w, stride, sides, dilation)).double()
    w = w.unflatten(0, (groups, -1))
    for r, s, tap in _taps(padded, w.shape[-2:], y.shape[-2:], stride, dilation):
        y += torch.einsum("ngchw,gkc->ngkhw", tap.unflatten(1, (groups, -1)), w[..., r, s])
    y = y.flatten(1, 2)
    if b is not None:
        y += _float64(b)[:, None, None]
    return relu(y) if activation == "relu" else y


def conv2d_dgrad(
    dy: Tensor,
    w: Tensor,
    x_shape: tuple[int, ...] | torch.Size,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """dx[n, c, h, w]: the sum of w[k, c, r, s] * dy[n, k, p, q] over every output that read that input.

    dy: [N, K, P, Q].  w: [K, C/groups, R, S].  Returns x_shape, [N, C, H, W].
    """
    dy, w, sides = _float64(dy).unflatten(1, (groups, -1)), _float64(w).unflatten(0, (groups, -1)), _sides(padding)
    padded = _pad(torch.zeros(x_shape, dtype=torch.float64), sides, 0.0)
    for r, s, tap in _taps(padded, w.shape[-2:], dy.shape[-2:], stride, dilation):
        tap += torch.einsum("ngkhw,gkc->ngchw", dy, w[..., r, s]).flatten(1, 2)
    return _crop(padded, sides)


def conv2d_wgrad(
    x: Tensor,
    dy: Tensor,
    w_shape: tuple[int, ...] | torch.Size,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """dw[k, c, r, s] = sum over (n, p, q) of dy[n, k, p, q] * x[n, c, p*stride + r*dilation - top, ...].

    x: [N, C, H, W].  dy: [N, K, P, Q].  Returns w_shape, [K, C/groups, R, S].
    """
    dy = _float64(dy).unflatten(1, (groups, -1))
    dw: Tensor = torch.zeros(w_shape, dtype=torch.float64).unflatten(0, (groups, -1))
    padded = _pad(_float64(x), _sides(padding), 0.0)
    for r, s, tap in _taps(padded, dw.shape[-2:], dy.shape[-2:], stride, dilation):
        dw[..., r, s] = torch.einsum("ngkhw,ngchw->gkc", dy, tap.unflatten(1, (groups, -1)))
    return dw.flatten(0, 1)


def conv2d_bias_grad(dy: Tensor) -> Tensor:
    """db[k] = sum over (n, p, q) of dy[n, k, p, q].  dy: [N, K, P, Q]; returns [K]."""
    return _float64(dy).sum((0, 2, 3))


def max_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The largest element of each window and where it is: values [N, C, P, Q] and int64 indices h*W + w into [H, W].

    PyTorch's rules: NaN wins, and the last NaN of a window names the index; otherwise ties go to the first element,
    rows before columns.  Padding never wins: a window of -inf gives -inf at its first element inside the image.  With
    ceil_mode the last window may hang over the edge, but has to start inside the image or its left padding.
    """
    x, kernel, dilation, (top, left) = _float64(x), _pair(kernel), _pair(dilation), _pair(padding)
    stride = kernel if stride is None else _pair(stride)
    H, W = x.shape[-2:]
    P = _pooled(H, kernel[0], stride[0], top, dilation[0], ceil_mode)
    Q = _pooled(W, kernel[1], stride[1], left, dilation[1], ceil_mode)
    # Far enough for every window; what a window reads outside the image is masked by its coordinate.
    bottom = max(0, (P - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1 - H - top)
    right = max(0, (Q - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1 - W - left)
    sides = (top, bottom), (left, right)
    padded = _pad(x, sides, -math.inf)
    positions = _pad(torch.arange(H * W).reshape(1, 1, H, W), sides, -1)
    values = x.new_full((*x.shape[:2], P, Q), -math.inf)
    indices = torch.full(values.shape, -1)
    windows = zip(
        _taps(padded, kernel, (P, Q), stride, dilation), _taps(positions, kernel, (P, Q), stride, dilation), strict=True
    )
    for (_, _, value), (_, _, position) in windows:
        wins = (position >= 0) & ((indices < 0) | (value > values) | value.isnan())
        values, indices = torch.where(wins, value, values), torch.where(wins, position, indices)
    return values, indices


def max_pool2d_backward(dy: Tensor, indices: Tensor, x_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """dx[n, c, i] = sum of dy over the windows whose maximum is element i.

    dy, indices: [N, C, P, Q], as `max_pool2d` returns them.  Returns x_shape, [N, C, H, W].
    """
    dx = torch.zeros(x_shape, dtype=torch.float64).flatten(2)
    return dx.scatter_add_(2, indices.cpu().flatten(2), _float64(dy).flatten(2)).reshape(x_shape)


def adaptive_avg_pool2d(x: Tensor, output_size: Pair) -> Tensor:
    """The mean over rows floor(p*H/P) to ceil((p + 1)*H/P), and columns alike.

    x: [N, C, H, W]; returns [N, C, P, Q].
    """
    x, (P, Q) = _float64(x), _pair(output_size)
    y = x.new_empty(*x.shape[:2], P, Q)
    for p, rows in enumerate(_bins(x.shape[2], P)):
        for q, columns in enumerate(_bins(x.shape[3], Q)):
            y[:, :, p, q] = x[:, :, rows, columns].mean((2, 3))
    return y


def adaptive_avg_pool2d_backward(dy: Tensor, x_shape: tuple[int, ...] | torch.Size) -> Tensor:
    """dx: each output's gradient, spread evenly over its window.  dy: [N, C, P, Q]; returns x_shape, [N, C, H, W]."""
    dy, dx = _float64(dy), torch.zeros(x_shape, dtype=torch.float64)
    for p, rows in enumerate(_bins(dx.shape[2], dy.shape[2])):
        for q, columns in enumerate(_bins(dx.shape[3], dy.shape[3])):
            window = dx[:, :, rows, columns]
            window += dy[:, :, p, q, None, None] / (window.shape[2] * window.shape[3])
    return dx


def adaptive_max_pool2d(x: Tensor, output_size: Pair) -> tuple[Tensor, Tensor]:
    """The largest element of each of adaptive_avg_pool2d's windows and its index h*W + w, by max_pool2d's rules."""
    x, (P, Q) = _float64(x), _pair(output_size)
    y, indices = x.new_empty(*x.shape[:2], P, Q), torch.empty(*x.shape[:2], P, Q, dtype=torch.int64)
    places = torch.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2:])
    for p, rows in enumerate(_bins(x.shape[2], P)):
        for q, columns in enumerate(_bins(x.shape[3], Q)):
            window = x[:, :, rows, columns].flatten(2)
            nan = window.isnan()
            last_nan = window.shape[2] - 1 - nan.flip(2).to(torch.uint8).argmax(2)
            # The first of the largest: argmax promises it for this, the truth of being it.
            first = (window == window.masked_fill(nan, -math.inf).amax(2, keepdim=True)).to(torch.uint8).argmax(2)
            won = torch.where(nan.any(2), last_nan, first)
            y[:, :, p, q] = window.gather(2, won[..., None])[..., 0]
            indices[:, :, p, q] = places[rows, columns].flatten()[won]
    return y, indices


def avg_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The sum of each window over the number of its elements, or over divisor_override.

    A window ends at the padding's outer edge.  count_include_pad: the padding's zeros count as elements.
    x: [N, C, H, W]; returns [N, C, P, Q].
    """
    x, kernel, (top, left) = _float64(x), _pair(kernel), _pair(padding)
    stride = kernel if stride is None else _pair(stride)
    H, W = x.shape[-2:]
    P = _pooled(H, kernel[0], stride[0], top, 1, ceil_mode)
    Q = _pooled(W, kernel[1], stride[1], left, 1, ceil_mode)
    padded = _pad(x, ((top, top), (left, left)), 0.0)
    counted = _pad(torch.ones(1, 1, H, W), ((top, top), (left, left)), float(count_include_pad))
    y = x.new_empty(*x.shape[:2], P, Q)
    for p in range(P):
        for q in range(Q):
            window = (..., slice(p * stride[0], p * stride[0] + kernel[0]),
                      slice(q * stride[1], q * stride[1] + kernel[1]))  # fmt: skip
            y[:, :, p, q] = padded[window].sum((2, 3)) / (divisor_override or counted[window].sum())
    return y


def lp_pool2d(x: Tensor, norm: float, kernel: Pair, stride: Pair | None = None, ceil_mode: bool = False) -> Tensor:
    """(elements of the kernel * mean of x^norm over the window)^(1/norm).  x: [N, C, H, W]; returns [N, C, P, Q]."""
    rows, columns = _pair(kernel)
    means = avg_pool2d(_float64(x) ** norm, kernel, stride, 0, ceil_mode)
    return (rows * columns * means) ** (1 / norm)


def max_unpool2d(x: Tensor, indices: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Zeros [N, C, *output_size] with x[n, c, p, q] at indices[n, c, p, q], one after the other: the last one stays."""
    x, indices, (H, W) = _float64(x), indices.cpu(), output_size
    y = x.new_zeros(*x.shape[:2], H * W)
    for p in range(x.shape[2]):
        for q in range(x.shape[3]):
            y.scatter_(2, indices[:, :, p, q, None], x[:, :, p, q, None])
    return y.view(*y.shape[:2], H, W)


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, divide_alpha: bool = True
) -> Tensor:
    """y[n, c] = x[n, c] / (k + a * sum of x[n, j]^2 over j = c - size // 2 .. c + (size - 1) // 2)^beta.

    a is alpha / size, or alpha without divide_alpha.  x: [N, C, ...].
    """
    x, scale = _float64(x), alpha / size if divide_alpha else alpha
    y = torch.empty_like(x)
    for c in range(x.shape[1]):
        window = x[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        y[:, c] = x[:, c] / (k + scale * window.square().sum(1)) ** beta
    return y


def local_response_norm_backward(
    dy: Tensor,
    x: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    divide_alpha: bool = True,
) -> Tensor:
    """dx: dy[n, i] times the derivative of y[n, i] by x[n, c], added up over the windows i that hold c."""
    x, dy, scale = _float64(x), _float64(dy), alpha / size if divide_alpha else alpha
    dx = torch.zeros_like(x)
    for i in range(x.shape[1]):
        window = slice(max(0, i - size // 2), i + (size - 1) // 2 + 1)
        s = k + scale * x[:, window].square().sum(1)
        dx[:, i] += dy[:, i] * s**-beta
        dx[:, window] -= (2 * scale * beta * dy[:, i] * x[:, i] * s ** (-beta - 1))[:, None] * x[:, window]
    return dx


def linear(x: Tensor, w: Tensor, b: Tensor | None = None, activation: str | None = None) -> Tensor:
    """y[..., k] = b[k] + sum over c of x[..., c] * w[k, c].  x: [..., C].  w: [K, C].  Returns [..., K]."""
    flat = x.reshape(-1, x.shape[-1], 1, 1)
    return conv2d(flat, w[:, :, None, None], b, activation=activation).reshape(*x.shape[:-1], -1)


def relu(x: Tensor) -> Tensor:
    """x where x is positive or NaN, else 0."""
    x = _float64(x)
    return torch.where(x <= 0, 0.0, x)


def _float64(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64).contiguous()


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _sides(padding: Padding) -> Sides:
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    vertical, horizontal = padding
    return (
        (vertical, vertical) if isinstance(vertical, int) else vertical,
        (horizontal, horizontal) if isinstance(horizontal, int) else horizontal,
    )


def _pad(x: Tensor, sides: Sides, value: float) -> Tensor:
    (top, bottom), (left, right) = sides
    H, W = x.shape[-2:]
    padded = x.new_full((*x.shape[:-2], top + H + bottom, left + W + right), value)
    padded[..., top : top + H, left : left + W] = x
    return padded


def _crop(padded: Tensor, sides: Sides) -> Tensor:
    (top, bottom), (left, right) = sides
    return padded[..., top : padded.shape[-2] - bottom, left : padded.shape[-1] - right].contiguous()


def _extents(x: Tensor, w: Tensor, stride: Pair, sides: Sides, dilation: Pair) -> tuple[int, int]:
    P, Q = (
        (x.shape[-2 + i] + sum(sides[i]) - _pair(dilation)[i] * (w.shape[-2 + i] - 1) - 1) // _pair(stride)[i] + 1
        for i in (0, 1)
    )
    return P, Q


def _taps(
    padded: Tensor,
    window: tuple[int, ...] | torch.Size,
    outputs: tuple[int, ...] | torch.Size,
    stride: Pair,
    dilation: Pair,
) -> Iterator[tuple[int, int, Tensor]]:
    """(r, s, the view of the padded image that tap (r, s) meets: one element for each output)."""
    (stride_h, stride_w), (dilation_h, dilation_w) = _pair(stride), _pair(dilation)
    for r in range(window[0]):
        for s in range(window[1]):
            rows = slice(r * dilation_h, r * dilation_h + (outputs[0] - 1) * stride_h + 1, stride_h)
            columns = slice(s * dilation_w, s * dilation_w + (outputs[1] - 1) * stride_w + 1, stride_w)
            yield r, s, padded[..., rows, columns]


def _pooled(extent: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    reach = extent + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-reach // stride) if ceil_mode else reach // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= extent + padding else count


def _bins(extent: int, count: int) -> Iterator[slice]:
    for i in range(count):
        yield slice(i * extent // count, -(-(i + 1) * extent // count))
