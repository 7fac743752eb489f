"""Extents against torch's meta tensors, and the rephrasings of a problem against its definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tileconv.kernels import layout
from tileconv.kernels.geometry import AdaptivePool2dProblem, Conv2dProblem, Pool2dProblem, same_padding


def test_conv_extents_are_torchs() -> None:
    checked = 0
    sweep = itertools.product(range(1, 9), range(1, 6), range(1, 4), range(4), range(1, 4))
    for extent, window, stride, padding, dilation in sweep:
        x = torch.empty(1, 1, extent, extent + 1, device="meta")
        w = torch.empty(1, 1, window, 1, device="meta")
        sides = ((padding, padding), (0, 0))
        try:
            want = F.conv2d(x, w, None, stride, (padding, 0), dilation).shape
        except RuntimeError:
            want = torch.Size()
        if 0 in want or not want:  # what torch 2.13 refuses, 2.11 refuses on real tensors alone and calls empty here
            with pytest.raises(ValueError, match="too small"):
                Conv2dProblem(1, 1, extent, extent + 1, 1, window, 1, (stride, stride), sides, (dilation, dilation))
            continue
        problem = Conv2dProblem(1, 1, extent, extent + 1, 1, window, 1, (stride, stride), sides, (dilation, dilation))
        assert problem.y_shape == want
        checked += 1
    assert checked > 1000


def test_pool_extents_are_torchs() -> None:
    checked = 0
    sweep = itertools.product(range(1, 9), range(1, 5), range(1, 4), range(3), range(1, 4), (False, True))
    for extent, window, stride, padding, dilation, ceil_mode in sweep:
        x = torch.empty(1, 1, extent, 7, device="meta")
        arguments = ((window, 1), (stride, 1), (padding, 0), (dilation, 1), ceil_mode)
        try:
            want = F.max_pool2d(x, *arguments).shape
        except RuntimeError:
            with pytest.raises(ValueError):
                Pool2dProblem(1, 1, extent, 7, *arguments)
            continue
        assert Pool2dProblem(1, 1, extent, 7, *arguments).y_shape == want
        checked += 1
    assert checked > 500


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_is_torchs(window: int, dilation: int) -> None:
    x = torch.randn(1, 1, 11, 11, dtype=torch.float64)
    w = torch.randn(1, 1, window, window, dtype=torch.float64)
    before, after = same_padding(window, dilation)
    padded = F.pad(x, (before, after, before, after))
    torch.testing.assert_close(
        F.conv2d(padded, w, dilation=dilation), F.conv2d(x, w, padding="same", dilation=dilation)
    )


def test_dgrad_parts_cover_every_input_pixel_with_the_right_taps() -> None:
    """Each part's taps, counted by the definition of its own problem, are the (p, r) that read row h."""
    checked = 0
    for H, R, stride, pad, dilation in itertools.product(range(1, 10), range(1, 6), range(1, 5), range(4), range(1, 5)):
        try:
            problem = Conv2dProblem(1, 1, H, 1, 1, R, 1, (stride, 1), ((pad, pad + 1), (0, 0)), (dilation, 1))
        except ValueError:
            continue
        want = {(h, p, r) for p in range(problem.P) for r in range(R) for h in [p * stride - pad + r * dilation]
                if 0 <= h < H}  # fmt: skip
        got, rows = set(), []
        for part in problem.dgrad:
            inner = part.problem
            assert inner.stride == (1, 1)
            rows += range(part.offset[0], H, stride)
            assert len(range(part.offset[0], H, stride)) == inner.P
            for u, j in itertools.product(range(inner.P), range(inner.R)):
                p = u - inner.padding[0][0] + j * inner.dilation[0]
                if 0 <= p < inner.H:
                    got.add((part.offset[0] + u * stride, p, part.filters.first + j * part.filters.step_r))
        assert got == want
        assert sorted(rows) == list(range(H))
        checked += 1
    assert checked > 1500


def test_adaptive_windows_hold_what_torchs_do() -> None:
    for H, P in itertools.product(range(1, 12), range(1, 12)):
        x = torch.eye(H, dtype=torch.float64)[None, :, :, None].requires_grad_()  # channel h is one at row h alone
        held = F.adaptive_avg_pool2d(x, (P, 1))[0, :, :, 0] > 0  # [H, P]
        problem = AdaptivePool2dProblem(1, 1, H, 1, P, 1)
        assert problem.window[0] == held.sum(0).max()
        assert problem.overlap[0] == held.sum(1).max()


def test_memory_format_rule_is_torchs() -> None:
    shapes = [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (4, 1, 1, 1), (1, 3, 1, 5)]
    for shape, memory_format in itertools.product(shapes, (torch.contiguous_format, torch.channels_last)):
        base = torch.empty(shape).contiguous(memory_format=memory_format)
        for view in (
            base,
            base[:, :, ::2],
            base[..., :1],
            base[:1],
            base.permute(0, 1, 3, 2),
            base.permute(3, 1, 2, 0),
        ):
            want = torch._prims_common.suggest_memory_format(view) == torch.channels_last
            assert layout.is_channels_last(view) == want, (shape, memory_format, view.shape, view.stride())


def test_flops_and_bytes() -> None:
    conv2 = Conv2dProblem(128, 64, 27, 27, 192, 5, 5, padding=((2, 2), (2, 2)))
    assert conv2.flops == 2 * 128 * 27 * 27 * 192 * 64 * 25
    assert conv2.bytes_least(2) == 2 * (128 * 64 * 729 + 192 * 64 * 25 + 128 * 192 * 729)
    grouped = Conv2dProblem(1, 8, 5, 5, 12, 3, 3, groups=4)
    assert grouped.flops == 2 * 12 * 9 * 2 * 9
    assert Pool2dProblem(128, 64, 55, 55, (3, 3), (2, 2)).bytes_least(2, switch=True) == 67_477_504


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Conv2dProblem(1, 6, 5, 5, 8, 3, 3, groups=4), "groups=4 must divide"),
        (lambda: Conv2dProblem(1, 1, 2, 2, 1, 3, 3), "input of 2x2 is too small"),
        (lambda: Pool2dProblem(1, 1, 8, 8, (3, 3), (1, 1), (2, 0)), r"padding=\(2, 0\) must be at most half"),
        (lambda: Pool2dProblem(1, 1, 2, 2, (3, 3), (1, 1)), "too small"),
    ],
)
def test_impossible_problems_are_refused(make, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make()
