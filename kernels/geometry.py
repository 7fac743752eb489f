"""The shapes of the problems: extents, operations, bytes.  The only home of the output-size formula."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # ((top, bottom), (left, right)); negative values crop


def output_extent(extent: int, window: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Positions of a dilated window along one padded axis: floor((extent + padding - span) / stride) + 1.

    `span` is dilation * (window - 1) + 1.  Zero or less means that the window does not fit.
    """
    return (extent + before + after - dilation * (window - 1) - 1) // stride + 1


def pooled_extent(extent: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """As output_extent with equal padding; `ceil_mode` counts a last partial window unless it starts in the padding."""
    if not ceil_mode:
        return output_extent(extent, window, stride, padding, padding, dilation)
    out = output_extent(extent, window, stride, padding, padding + stride - 1, dilation)
    return out - 1 if (out - 1) * stride >= extent + padding else out


def same_padding(window: int, dilation: int) -> Pair:
    """Padding that keeps the extent at stride 1; the odd element goes after, as in torch.nn.functional.conv2d."""
    total = dilation * (window - 1)
    return total // 2, total - total // 2


def channel_window(channels: int, size: int) -> Pair:
    """How many channels before and after its own a window of `size` reaches: PyTorch's, cut where none are left."""
    return min(size // 2, channels - 1), min((size - 1) // 2, channels - 1)


@dataclass(frozen=True)
class Filters:
    """How a problem reads the filters [K, R, S, C/groups] of the layer it came from.

    Tap (r, s) of the problem is tap `first + r * step_r + s * step_s` of the layer, counted along (R, S) flattened;
    `transposed` swaps filters and channels.
    """

    first: int
    step_r: int
    step_s: int
    transposed: bool = False


@dataclass(frozen=True)
class Conv2dProblem:
    """A 2-D cross-correlation: x [N, C, H, W], w [K, C/groups, R, S] -> y [N, K, P, Q].

    `together` says that a kernel may make several columns of y from the same pixels, which multiplies pixels beside a
    filter by zero: of gradients, where the taps of a row lie beside each other in the layer's filters.

    Raises ValueError, naming the extent, where channels do not divide into groups or no output is left.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        if self.C % self.groups or self.K % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the input channels ({self.C}) and the output channels ({self.K})"
            )
        if self.P < 1 or self.Q < 1:
            raise ValueError(
                f"input of {self.H}x{self.W} is too small: a {self.R}x{self.S} kernel with stride {self.stride}, "
                f"padding {self.padding} and dilation {self.dilation} leaves an output of {self.P}x{self.Q}"
            )

    @property
    def P(self) -> int:
        return output_extent(self.H, self.R, self.stride[0], *self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        return output_extent(self.W, self.S, self.stride[1], *self.padding[1], self.dilation[1])

    @property
    def group_channels(self) -> int:
        return self.C // self.groups

    @property
    def group_filters(self) -> int:
        return self.K // self.groups

    @property
    def taps(self) -> int:
        return self.R * self.S

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.group_channels, self.R, self.S

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.K, self.P, self.Q

    @property
    def flops(self) -> int:
        """Multiplications and additions of one pass, taps in the padding included (the usual count)."""
        return 2 * math.prod(self.y_shape) * self.group_channels * self.taps

    @property
    def filters(self) -> Filters:
        """The layer's own filters, in order."""
        return Filters(0, self.S, 1)

    def bytes_least(self, itemsize: int) -> int:
        """Each operand moved once."""
        return itemsize * (math.prod(self.x_shape) + math.prod(self.w_shape) + math.prod(self.y_shape))

    @property
    def im2col_shape(self) -> Pair:
        """The matrix of one image's patches: C * R * S rows, a column for each of the P * Q output pixels."""
        return self.C * self.taps, self.P * self.Q

    @cached_property
    def dgrad(self) -> tuple[DgradPart, ...]:
        """The input gradient as independent stride-1 convolutions of dy: one for each residue of the input pixel."""
        rows = [_residue(self.H, self.P, self.R, self.stride[0], self.padding[0], self.dilation[0], a)
                for a in range(min(self.stride[0], self.H))]  # fmt: skip
        columns = [_residue(self.W, self.Q, self.S, self.stride[1], self.padding[1], self.dilation[1], b)
                   for b in range(min(self.stride[1], self.W))]  # fmt: skip
        return tuple(self._dgrad_part(row, column) for row in rows for column in columns)

    @cached_property
    def transposed(self) -> tuple[DgradPart, ...]:
        """`dgrad` of a transposed convolution, which is a forward pass: a NaN stays in its window."""
        return tuple(replace(part, problem=replace(part.problem, together=False)) for part in self.dgrad)

    @property
    def blocks(self) -> Pair:
        """Rows and columns that space_to_depth makes a pixel: those of the stride, or without one a row of a window."""
        return self.stride if max(self.stride) > 1 else (1, self.S)

    @cached_property
    def space_to_depth(self) -> Conv2dProblem:
        """The same outputs at stride 1: a block of the padded image becomes channels, at every stride.

        The channels, (c, row, column) of a block, are filled up with zeros to a multiple of eight; the filters are
        blocked likewise, their last block filled up with zeros.  Needs dilation 1 and one group.
        """
        (rows, columns) = self.blocks
        R, S = -(-self.R // rows), -(-self.S // columns)
        depth = -(-self.C * rows * columns // 8) * 8
        return Conv2dProblem(N=self.N, C=depth, H=self.P - 1 + R, W=self.Q - 1 + S, K=self.K, R=R, S=S)

    @property
    def in_aligned_rows(self) -> Conv2dProblem:
        """The same outputs from an image whose rows are filled up with zeros to a multiple of eight."""
        return self.widened(-(-self.W // 8) * 8)

    def widened(self, width: int) -> Conv2dProblem:
        """The same outputs from an image filled up with zeros to `width` columns."""
        (top, (before, after)), more = self.padding, width - self.W
        return replace(self, W=width, padding=(top, (before, after - more)))

    @property
    def interleaved(self) -> Conv2dProblem:
        """The same problem on an image of one channel: its pixels' channels, side by side as NHWC has them.

        Needs dilation 1 along W and one group.
        """
        before, after = self.padding[1]
        return replace(
            self, C=1, W=self.W * self.C, S=self.S * self.C, stride=(self.stride[0], self.stride[1] * self.C),
            padding=(self.padding[0], (before * self.C, after * self.C)),
        )  # fmt: skip

    def runs(self, itemsize: int, pass_: str) -> Runs | None:
        """How the rows of the filters lie along image rows; None where no aligned load of four bytes or more fits.

        Of eight at the most: copies of sixteen pass L1 by, and every run comes from L2 anew.
        A filter gradient's columns are runs, and those of 4-byte elements are as long as the filter: what loads of one
        pixel cost is less than what columns of zeros do.
        """
        if pass_ == "wgrad" and itemsize >= 4 and self.dilation[1] == self.groups == 1:
            return Runs(self.S, 0, 1)
        stride = self.stride[1]
        align = min(stride & -stride, 8 // itemsize)
        if align * itemsize < 4 or self.dilation[1] != 1 or self.groups != 1 or self.W % align:
            return None
        lead = -self.padding[1][0] % align
        return Runs(1 << (lead + self.S - 1).bit_length(), lead, align)

    def inner_runs(self, itemsize: int, pass_: str, pitches: tuple[int, int, int]) -> Runs | None:
        """The same where no window reaches beyond the image, in memory where its rows start at any element.

        `pitches` lead from an image, a channel and a row to the next.  None where a window does reach beyond it, or
        where no aligned load of two elements or more fits, of eight bytes at the most.  Loads half as wide must save a
        fifth of the length.  Filter gradients of 4-byte elements have runs of their own (`runs`).
        """
        if pass_ == "wgrad" and itemsize >= 4:
            return None
        spans = [self.dilation[0] * (self.R - 1) + 1, self.S]
        for (before, _), extent, outputs, stride, span in zip(
            self.padding, (self.H, self.W), (self.P, self.Q), self.stride, spans, strict=True
        ):
            if before or (outputs - 1) * stride + span > extent:
                return None
        if self.dilation[1] != 1 or self.groups != 1:
            return None
        images, channels, rows = (
            pitch if extent > 1 else 0 for pitch, extent in zip(pitches, (self.N, self.C, self.H), strict=True)
        )
        last = (self.N - 1) * images + (self.C - 1) * channels + (self.H - 1) * rows + self.W
        found: Runs | None = None
        for align in (8 // itemsize, 4 // itemsize):
            # Rows of outputs leave a run where it is, and the last load of all ends with the image.
            if align < 2 or self.stride[1] % align or self.stride[0] * rows % align or last % align:
                continue
            shift = align - math.gcd(align, images, channels, self.dilation[0] * rows)
            length = -(-(shift + self.S) // align) * align
            if found is None or 5 * length <= 4 * found.length:
                # No more than there are images: the programs of a class read one.
                classes = min(max(self.N, 1), align // math.gcd(align, images))
                found = Runs(length, 0, align, inner=True, classes=classes)
        return found

    def _dgrad_part(self, row: Residue, column: Residue) -> DgradPart:
        problem = Conv2dProblem(
            N=self.N, C=self.K, H=self.P, W=self.Q, K=self.C, R=row.taps, S=column.taps,
            padding=(row.padding, column.padding), dilation=(row.dilation, column.dilation), groups=self.groups,
            together=column.step == -1 and column.taps > 1,
        )  # fmt: skip
        filters = Filters(
            first=row.first * self.S + column.first, step_r=row.step * self.S, step_s=column.step, transposed=True
        )
        return DgradPart(problem, filters, (row.offset, column.offset), self.stride)


@dataclass(frozen=True)
class Runs:
    """A row of a filter meets `length` neighbouring pixels of an image row, from `lead` pixels before the filter.

    With the lead every run starts at a multiple of `align` pixels; the length is a power of two, or the filter's.
    `inner` runs meet no pixel outside their row, and where one starts beside a multiple of `align` the filter has zeros
    before it: as many as follow from its channel and row and from the image's number modulo `classes`.  Their length is
    a multiple of `align`.
    """

    length: int
    lead: int
    align: int
    inner: bool = False
    classes: int = 1


@dataclass(frozen=True)
class Residue:
    """One axis of a strided dgrad: the input pixels offset, offset + stride, ... and the taps that reach them."""

    offset: int
    taps: int
    first: int
    step: int
    dilation: int
    padding: Pair


def im2col_bytes(problem: Conv2dProblem, itemsize: int) -> int:
    """The memory that an explicit im2col takes beside the operands: the patches of all images.

    227x227x3 under 11x11 filters at stride 4 gives a 363 x 3025 matrix, seven times the image.
    """
    return itemsize * problem.N * math.prod(problem.im2col_shape)


@dataclass(frozen=True)
class DgradPart:
    """`problem` writes dx[:, :, offset[0]::stride[0], offset[1]::stride[1]] from dy and `filters`."""

    problem: Conv2dProblem
    filters: Filters
    offset: Pair
    stride: Pair


def _residue(extent: int, outputs: int, window: int, stride: int, padding: Pair, dilation: int, offset: int) -> Residue:
    """Which taps r reach input pixels h = stride * u + offset, where p = (h + padding - r * dilation) / stride.

    They solve r * dilation = offset + padding (mod stride), so they lie stride / gcd(stride, dilation) apart, and
    p = u + base - j * dilation / gcd for the j-th of them: flipped, that is a convolution over u.
    """
    common = math.gcd(stride, dilation)
    step = stride // common
    lowest = next((r for r in range(min(step, window)) if (offset + padding[0] - r * dilation) % stride == 0), None)
    pixels = (extent - offset + stride - 1) // stride
    if lowest is None:  # no tap reaches these pixels: a problem without taps, whose output is zero, whatever taps hold
        return Residue(offset, 0, -1, -1, 1, (0, pixels - outputs - 1))
    taps = (window - 1 - lowest) // step + 1
    spread = dilation // common
    before = spread * (taps - 1) - (offset + padding[0] - lowest * dilation) // stride
    after = pixels + spread * (taps - 1) - outputs - before
    step = min(step, window)  # of a single tap, which a wide stride leaves: kernels count it in 32 bits
    return Residue(offset, taps, lowest + step * (taps - 1), -step, spread, (before, after))


@dataclass(frozen=True)
class Pool2dProblem:
    """A sliding window over x [N, C, H, W] -> y [N, C, P, Q].

    Raises ValueError where padding exceeds half the window or no output is left.
    """

    N: int
    C: int
    H: int
    W: int
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if any(2 * pad > window for pad, window in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(f"padding={self.padding} must be at most half of kernel_size={self.kernel}")
        if self.P < 1 or self.Q < 1:
            raise ValueError(
                f"input of {self.H}x{self.W} is too small: kernel_size={self.kernel}, stride={self.stride}, "
                f"padding={self.padding}, dilation={self.dilation} leave an output of {self.P}x{self.Q}"
            )

    @property
    def P(self) -> int:
        return pooled_extent(self.H, self.kernel[0], self.stride[0], self.padding[0], self.dilation[0], self.ceil_mode)

    @property
    def Q(self) -> int:
        return pooled_extent(self.W, self.kernel[1], self.stride[1], self.padding[1], self.dilation[1], self.ceil_mode)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def partial(self) -> bool:
        """Whether a window reaches beyond the input."""
        ends = ((self.P - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] - self.padding[0],
                (self.Q - 1) * self.stride[1] + (self.kernel[1] - 1) * self.dilation[1] - self.padding[1])  # fmt: skip
        return max(self.padding) > 0 or ends[0] >= self.H or ends[1] >= self.W

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.P, self.Q

    def bytes_least(self, itemsize: int, switch: bool) -> int:
        """The input once, the output once, and one byte an output for the switch."""
        return itemsize * (math.prod(self.x_shape) + math.prod(self.y_shape)) + switch * math.prod(self.y_shape)


@dataclass(frozen=True)
class AdaptivePool2dProblem:
    """x [N, C, H, W] -> y [N, C, P, Q]: window i covers floor(i * H / P) .. ceil((i + 1) * H / P)."""

    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int

    @property
    def window(self) -> Pair:
        """The largest window."""
        return _largest_window(self.H, self.P), _largest_window(self.W, self.Q)

    @property
    def taps(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def overlap(self) -> Pair:
        """The most windows that hold one input row, and one input column."""
        return _largest_window(self.P, self.H), _largest_window(self.Q, self.W)


def _largest_window(extent: int, outputs: int) -> int:
    return max((-(-(i + 1) * extent // outputs) - i * extent // outputs for i in range(outputs)), default=0)
