"""X or O: made by hand, found by training; edge filters on a photograph."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from tileconv.model import xo


@pytest.fixture(scope="module")
def trained() -> xo.Run:
    return xo.train(steps=80, kept=500)


def test_three_filters_made_by_hand_tell_x_from_o() -> None:
    model = xo.handmade()
    with torch.no_grad():
        scores = model(torch.stack([xo.picture(xo.X_PICTURE), xo.picture(xo.O_PICTURE)]))
    assert scores.argmax(1).tolist() == [0, 1]
    assert (scores.max(1).values - scores.min(1).values > 0.5).all()
    assert scores[1, 1] == pytest.approx(1.0)  # every place that votes for O holds a perfect match


def test_stages_are_torchs_numbers() -> None:
    model, (x, _) = xo.handmade(), xo.drawn(20, 3)
    torch.testing.assert_close(model(x), xo.reference_forward(model, x))
    crossing = model.stages(xo.picture(xo.X_PICTURE)[None])["convolution"][0, 1].detach()
    assert crossing.argmax() == 3 * 7 + 3  # the middle of the X
    assert crossing.max() == pytest.approx(1.0)


def test_pictures_are_seeded_and_half_of_each() -> None:
    (x, y), (again, _), (other, _) = xo.drawn(40, 1), xo.drawn(40, 1), xo.drawn(40, 2)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == (40, 1, 9, 9)
    assert y.sum() == 20
    assert x.abs().max() <= 1


def test_training_finds_filters_that_are_98_percent_right(trained: xo.Run) -> None:
    assert trained.accuracy >= 0.98
    assert trained.losses[-1] < trained.losses[0] / 4
    assert trained.handmade_accuracy > 0.8  # on the same distorted pictures


def test_training_starts_from_torchs_gradients() -> None:
    torch.manual_seed(0)
    model, (x, y) = xo.XONet(), xo.drawn(16, 4)
    ours = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    theirs = torch.autograd.grad(F.cross_entropy(xo.reference_forward(model, x), y), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_edge_filters_find_their_edges() -> None:
    step = torch.zeros(12, 12)
    step[6:] = 1  # one horizontal edge
    maps = xo.edges(step)
    inside = {name: image[2:-2, 2:-2] for name, image in maps.items()}
    assert inside["horizontal edges"].max() == 4
    assert inside["vertical edges"].abs().max() == 0
    photograph = xo.camera()
    for name, image in xo.edges(photograph).items():
        weight = torch.tensor(xo.EDGES[name], dtype=torch.float32)[None, None]
        torch.testing.assert_close(image, F.conv2d(photograph[None, None], weight, padding=1)[0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xo.drawn(3, 0), "count is 3: allowed are even"),
        (lambda: xo.train(steps=0), "steps is 0"),
        (lambda: xo.picture("#.\n#"), "lines of one length"),
        (lambda: xo.picture("#x"), "of # and . alone"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_report_is_written(trained: xo.Run, tmp_path: Path) -> None:
    text = xo.write_report(trained, tmp_path).read_text()
    assert f"{100 * trained.accuracy:.1f} % of 500 kept pictures" in text
    assert xo.render(json.loads((tmp_path / "data" / "xo.json").read_text())) == text
    for name in ("by-hand", "learned", "edges"):
        assert (tmp_path / "figures" / f"xo-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_names_errors() -> None:
    import typer

    app = typer.Typer()
    app.command()(xo.xo)
    for option, value in (("--steps", "-1"), ("--seed", "-1")):
        result = CliRunner().invoke(app, [option, value])
        assert result.exit_code == 2
        assert f"Invalid value for '{option}'" in result.output
        assert "by hand" not in result.output, "nothing ran before"
