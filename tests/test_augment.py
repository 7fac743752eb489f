"""AlexNet's changes to pictures, and ten-crop testing."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tileconv.model import alexnet2012, augment
from tileconv.model.alexnet2012 import AlexNet2012
from tileconv.model.data import photographs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_principal_components_are_those_of_the_pixels() -> None:
    """Pixels drawn along known axes with known variances."""
    torch.manual_seed(1)
    axes, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    variances = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    colours = axes @ (variances.sqrt()[:, None] * torch.randn(3, 40_000, dtype=torch.float64))
    found = augment.principal_components(colours.view(3, 4, 100, 100).transpose(0, 1))
    torch.testing.assert_close(found.values, variances, rtol=0.03, atol=0)
    torch.testing.assert_close(
        (found.vectors * axes).sum(0).abs(), torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert (found.vectors.gather(0, found.vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_components_of_photographs_rebuild_their_covariance() -> None:
    """Of real pictures the first component is nearly grey: all channels brighten together."""
    pictures = photographs(7, 64)
    found = augment.principal_components(pictures)
    rebuilt = found.vectors @ torch.diag(found.values) @ found.vectors.T
    pixels = pictures.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(rebuilt, torch.cov(pixels), rtol=1e-9, atol=1e-9)
    assert (found.vectors[:, 0] > 0.4).all()
    assert found.values[0] > 3 * found.values[1]


def test_colour_shifts_are_the_papers() -> None:
    """One shift a picture, the same for all pixels, of deviation sigma * value along each vector."""
    components = augment.principal_components(photographs(7, 32))
    pictures = torch.zeros(4000, 3, 1, 2, dtype=torch.float64)
    shifted = augment.shift_colours(pictures, components, generator())
    assert torch.equal(shifted[..., 0], shifted[..., 1])
    along = shifted[:, :, 0, 0] @ components.vectors
    torch.testing.assert_close(along.std(0), 0.1 * components.values, rtol=0.05, atol=0)
    assert torch.equal(shifted, augment.shift_colours(pictures, components, generator()))
    assert torch.equal(pictures, augment.shift_colours(pictures, components, generator(), sigma=0))


def test_random_crops_are_pieces_and_half_of_them_mirrored() -> None:
    picture = torch.arange(36.0).view(1, 1, 6, 6)
    pieces = augment.random_crops(picture.expand(900, 1, 6, 6), 4, generator())
    kinds = {piece.numpy().tobytes(): i for i, piece in enumerate(pieces)}
    every = [picture[0, :, t : t + 4, s : s + 4] for t in range(3) for s in range(3)]
    assert kinds.keys() == {p.contiguous().numpy().tobytes() for q in every for p in (q, q.flip(2))}
    mirrored = (pieces[:, 0, 0, 0] > pieces[:, 0, 0, 1]).float().mean()
    assert 0.45 < mirrored < 0.55
    plain = augment.random_crops(picture.expand(50, 1, 6, 6), 4, generator(), mirror=False)
    assert (plain[:, 0, 0, 0] < plain[:, 0, 0, 1]).all()


def test_augment_crops_and_shifts() -> None:
    pictures = photographs(2, 64)
    components = augment.principal_components(pictures)
    x = augment.augment(pictures, 56, components, generator(3))
    assert x.shape == (2, 3, 56, 56)
    again = generator(3)
    cropped = augment.random_crops(pictures, 56, again)
    assert torch.equal(x, augment.shift_colours(cropped, components, again))


def test_ten_crops_are_corners_centre_and_reflections() -> None:
    picture = torch.arange(49.0).view(1, 1, 7, 7)
    crops = augment.ten_crops(picture, 4)
    assert crops.shape == (1, 10, 1, 4, 4)
    assert crops[0, :5, 0, 0, 0].tolist() == [0, 3, 21, 24, 8]
    assert torch.equal(crops[:, 5:], crops[:, :5].flip(4))


def test_ten_crop_probabilities_are_a_mean_of_softmaxes(device: torch.device) -> None:
    model = AlexNet2012(10, width=12, hidden=32).eval().to(device)
    for parameter in model.parameters():  # weights under which the answer depends on the picture
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=math.sqrt(2 / parameter[0].numel()))
    pictures = photographs(2, 256).to(device)
    with torch.no_grad():
        p = augment.ten_crop_probabilities(model, pictures, 227)
        by_hand = torch.zeros(10, dtype=torch.float64, device=device)
        for top, left in ((0, 0), (0, 29), (29, 0), (29, 29), (14, 14)):
            crop = pictures[1:, :, top : top + 227, left : left + 227]
            for x in (crop, crop.flip(3)):
                by_hand += alexnet2012.reference_forward(model, x, torch.float64).softmax(1)[0] / 10
    torch.testing.assert_close(p.sum(1), torch.ones(2, device=device))
    torch.testing.assert_close(p[1].double(), by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: augment.ten_crops(torch.zeros(1, 3, 8, 8), 9), ValueError, "size is 9: allowed are 1 to 8"),
        (lambda: augment.ten_crops(torch.zeros(3, 8, 8), 4), ValueError, r"pictures has shape \(3, 8, 8\)"),
        (lambda: augment.random_crops(torch.zeros(1, 3, 8, 8), 4.0, generator()), TypeError, "size must be an int"),
        (lambda: augment.principal_components(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "floating-point"),
        (lambda: augment.principal_components(torch.zeros(1, 3, 1, 1)), ValueError, "two pixels or more"),
        (
            lambda: augment.shift_colours(
                torch.zeros(1, 1, 2, 2), augment.principal_components(torch.rand(1, 3, 4, 4)), generator()
            ),
            ValueError,
            "the components are of 3 channels",
        ),
    ],
    ids=["too-large", "unbatched", "fraction", "bytes", "one-pixel", "channels"],
)  # fmt: skip
def test_augmentation_refuses(call: Callable[[], Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
