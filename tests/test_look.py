"""Pictures of filters and maps, and what is said of files that are none."""

import io
import re
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tileconv.model import look
from tileconv.model.zoo import build

APP = typer.Typer()
APP.command()(look.show)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(APP, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    """Ink on paper: a dark stroke."""
    picture = Image.new("L", (60, 60), 255)
    picture.paste(0, (25, 8, 35, 52))
    picture.save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


@pytest.mark.parametrize(
    ("name", "size"),
    [("lenet", 28), ("alexnet-mini", 28), ("vgg16", 32), pytest.param("googlenet", 32, marks=pytest.mark.slow)],
)
def test_the_last_stage_is_the_networks_answer(name: str, size: int) -> None:
    model = build(name).eval()
    x = torch.randn(1, 3 if name in ("googlenet", "vgg16") else 1, size, size)
    with torch.no_grad():
        done = look.stages(model, x)
        torch.testing.assert_close(done[-1][2], model(x))
    assert not any(isinstance(m, nn.Dropout) for _, m, _ in done)
    assert (done[0][2] >= 0).all()  # after its ReLU


def test_a_mosaic_scales_every_map_and_keeps_them_apart() -> None:
    maps = torch.arange(3 * 4 * 4).float().view(3, 4, 4)
    maps[2] = 7  # a constant map is dark, not NaN
    grid = look.mosaic(maps, columns=2)
    assert grid.shape == (9, 9)
    torch.testing.assert_close(grid[:4, :4], maps[0] / 15)
    torch.testing.assert_close(grid[:4, 5:], (maps[1] - 16) / 15)
    assert grid[5:, :4].abs().max() == 0
    assert grid[4].isnan().all()
    assert look.mosaic(torch.rand(5, 3, 4, 4)).shape == (4, 39, 3)


def test_ink_on_paper_is_read_as_a_digit_is(digit: Path) -> None:
    x = look.load_image(digit, 1, 28)
    assert x.shape == (1, 1, 28, 28)
    assert x[0, 0, 14, 14] > 2  # the stroke is bright
    assert x[0, 0, 0, 0] < 0
    assert look.load_image(digit, 3, 50).shape == (1, 3, 50, 50)


def test_the_command_draws_a_checkpoint(digit: Path, tmp_path: Path) -> None:
    model = build("lenet", num_classes=4, seed=5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    out = tmp_path / "layers.png"
    code, text = run("--image", digit, "--checkpoint", tmp_path / "weights.pt", "--out", out)
    assert code == 0, text
    with Image.open(io.BytesIO(out.read_bytes())) as picture:
        assert picture.size[0] == 950
    loaded, note = look.load_model("lenet", tmp_path / "weights.pt")
    assert note == "weights of weights.pt"
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_the_gallery_is_a_page_with_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "GALLERY", {"vgg16": ("rocket", 32)})
    torch.save(build("lenet", seed=5).state_dict(), tmp_path / "weights.pt")
    code, text = run("--gallery", tmp_path / "page", "--checkpoint", tmp_path / "weights.pt")
    assert code == 0, text
    page = (tmp_path / "page" / "gallery.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert pictures == [f"figures/gallery-{name}.png" for name in ("lenet-3", "lenet-7", "vgg16")]
    for file in pictures:
        with Image.open(tmp_path / "page" / file) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").tobytes())) > 50  # maps, not an empty sheet
    assert "weights of weights.pt" in page


def test_files_that_are_no_pictures_are_named(digit: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "short.png").write_bytes(digit.read_bytes()[:-60])
    Image.effect_noise((90, 90), 50).save(tmp_path / "noise.jpg")
    (tmp_path / "short.jpg").write_bytes((tmp_path / "noise.jpg").read_bytes()[:2000])
    for name, message in (
        ("text.png", "text.png is not a picture"),
        ("short.png", "short.png cannot be read: cut short or damaged"),
        ("short.jpg", "short.jpg cannot be read: cut short or damaged"),
        ("none.png", "there is no file none.png"),
    ):
        code, text = run("--image", tmp_path / name, "--out", tmp_path / "out.png")
        assert code == 2
        assert message in text
    assert not (tmp_path / "out.png").exists()


def test_models_and_checkpoints_that_do_not_belong_are_named(digit: Path, tmp_path: Path) -> None:
    from tileconv.model.training import FORMAT

    whole, short, other, run_of = (tmp_path / name for name in ("whole.pt", "short.pt", "other.pt", "run.pt"))
    torch.save(build("alexnet-mini").state_dict(), whole)
    short.write_bytes(whole.read_bytes()[:5000])
    torch.save({"epoch": 3}, other)
    torch.save({"format": FORMAT, "settings": {"model": "alexnet-mini"}, "model": {}}, run_of)
    for arguments, message in (
        (("--model", "lennet"), "did you mean 'lenet'"),
        (("--checkpoint", whole), "of another network than 'lenet': conv1.weight is missing there"),
        (("--checkpoint", short), "short.pt is not whole"),
        (("--checkpoint", other), "other.pt holds no network"),
        (("--checkpoint", run_of), "run.pt is of alexnet-mini, model is 'lenet'"),
        (("--checkpoint", tmp_path / "none.pt"), "there is no file none.pt"),
        (("--size", 30), "LeNet takes"),
    ):
        code, text = run("--image", digit, *arguments, "--out", tmp_path / "out.png")
        assert code == 2, arguments
        assert message in text, arguments
    code, text = run()
    assert code == 2
    assert "image is missing" in text
