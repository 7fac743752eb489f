"""MNIST's digits and folders of pictures: the split, the random changes, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tileconv.model import datasets
from tileconv.model.datasets import Pictures, image_folder, mnist5k, order, stratified


def write_folder(folder: Path, classes: tuple[str, ...] = ("a", "b"), each: int = 5, size: int = 40) -> Path:
    """Pictures of noise, `each` of every class."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_digits_are_split_the_same_way_always() -> None:
    data, again = mnist5k(), mnist5k(seed=None)
    assert (len(data.train), len(data.kept)) == (4000, 1000)
    assert np.bincount(data.train.labels).tolist() == [400] * 10
    assert np.bincount(data.kept.labels).tolist() == [100] * 10
    assert data.fingerprint == again.fingerprint
    kept = {data.kept[0, i][0].numpy().tobytes() for i in range(1000)}
    train = {again.train[0, i][0].numpy().tobytes() for i in range(4000)}
    assert not kept & train
    plain = torch.stack([again.train[0, i][0] for i in range(4000)])
    torch.testing.assert_close(plain.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.std(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_shifts_depend_on_seed_epoch_and_index_alone() -> None:
    data = mnist5k(seed=3)
    first = data.train[2, 7][0]
    data.train[5, 1]
    assert torch.equal(first, data.train[2, 7][0])
    assert any(not torch.equal(first, data.train[epoch, 7][0]) for epoch in range(3, 6))
    assert torch.equal(data.kept[0, 7][0], data.kept[1, 7][0])


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    assert sorted(order(0, 1, 50)) == list(range(50))
    assert np.array_equal(order(0, 1, 50), order(0, 1, 50))
    assert not np.array_equal(order(0, 1, 50), order(0, 2, 50))
    assert not np.array_equal(order(0, 1, 50), order(1, 1, 50))


def test_folder_without_val_keeps_some_of_every_class(tmp_path: Path) -> None:
    data = image_folder(write_folder(tmp_path / "shapes", each=10), 28)
    assert (data.name, data.classes) == ("shapes", ("a", "b"))
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.kept.labels).tolist() == [2, 2]
    assert isinstance(data.train, Pictures)
    assert isinstance(data.kept, Pictures)
    assert not set(data.train.files) & set(data.kept.files)


def test_folder_laid_out_as_imagenet(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", each=3)
    write_folder(tmp_path / "val", each=1)
    data = image_folder(tmp_path, 28, channels=1)
    assert (len(data.train), len(data.kept)) == (6, 2)
    assert data.train[0, 5][1] == 1
    assert data.train[0, 5][0].shape == (1, 28, 28)


def test_kept_pictures_are_scaled_cut_and_normalised(tmp_path: Path) -> None:
    """A picture of one colour stays that colour; a white right half stays on the right."""
    for name, value in (("a", (255, 0, 51)), ("b", (0, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(2):
            picture = Image.new("RGB", (100, 50), value)
            if name == "b":
                picture.paste((255, 255, 255), (50, 0, 100, 50))
            picture.save(tmp_path / name / f"{i}.png")
    data = image_folder(tmp_path, 28)
    red, half = data.kept[0, 0][0], data.kept[0, 1][0]
    assert red.dtype == torch.float32
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(datasets.MEAN)) / torch.tensor(datasets.STD)
    torch.testing.assert_close(red, expected[:, None, None].expand(3, 28, 28), atol=1e-6, rtol=0)
    assert half[0, :, 20:].min() > 2
    assert half[0, :, :8].max() < -2


def test_training_pictures_are_cut_mirrored_and_lit(tmp_path: Path) -> None:
    data = image_folder(write_folder(tmp_path / "noise"), 28, seed=1)
    pictures = [data.train[epoch, 0][0] for epoch in range(6)]
    assert all(picture.shape == (3, 28, 28) for picture in pictures)
    assert len({picture.numpy().tobytes() for picture in pictures}) == 6
    assert torch.equal(pictures[4], data.train[4, 0][0])


def test_split_refuses_a_class_of_one() -> None:
    with pytest.raises(ValueError, match="class number 1 has one picture"):
        stratified(np.array([0, 0, 1]), 5)


def one_class(folder: Path) -> None:
    write_folder(folder, ("a",))


def empty_class(folder: Path) -> None:
    (write_folder(folder) / "c").mkdir()


def only_train(folder: Path) -> None:
    write_folder(folder / "train")


def other_classes(folder: Path) -> None:
    write_folder(folder / "train")
    write_folder(folder / "val", ("a", "c"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "is neither 'mnist5k' nor a folder"),
        (one_class, r"shapes/ holds 1 folders: two or more"),
        (empty_class, r"c/ holds no picture: allowed are files \.jpg"),
        (only_train, r"shapes has train/ but not val/"),
        (other_classes, r"classes of train/ and val/ differ in b, c"),
    ],
    ids=["missing", "one-class", "empty-class", "no-val", "other-classes"],
)
def test_folders_refused(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    make(tmp_path / "shapes")
    with pytest.raises(ValueError, match=says):
        image_folder(tmp_path / "shapes", 28)


def test_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shapes")
    for path in (folder / "b").iterdir():
        path.write_bytes(b"no picture")
    data = image_folder(folder, 28)
    with pytest.raises(ValueError, match=r"data: b/\d\.png is not a picture"):
        data.kept[0, 1]


def test_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "shapes")
    for path in (folder / "b").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    data = image_folder(folder, 28)
    with pytest.raises(ValueError, match=r"data: b/\d\.png is not a picture"):
        data.kept[0, 1]
