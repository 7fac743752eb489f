"""The training engine: steps, epochs, the judging of kept pictures, and checkpoints that are resumed exactly.

A run is decided by its Settings, its data and the number of processes. Stopped anywhere and resumed from its last
checkpoint, it gives the same losses and weights, bit for bit, as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tileconv.model import datasets
from tileconv.model.datasets import Data, Images, Key
from tileconv.model.version import versions

CHECKPOINT = "checkpoint.pt"
FORMAT = "tileconv training checkpoint 1"
SCHEDULES = ("cosine", "steps", "constant")
WARM_UP = 0.05
"""The part of a cosine run over which the learning rate rises to its full value."""
KEPT_BATCH = 200


class TrainingError(ValueError):
    """A run that cannot start, go on or be resumed as asked."""


@dataclass(frozen=True)
class Settings:
    """What decides a run's numbers, beside its data and the number of processes."""

    model: str
    data: str
    image_size: int
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise TrainingError(f"{name} is {value!r}: allowed are integers of at least {least}")
        for name, allowed, holds in (
            ("lr", "finite numbers above 0", self.lr > 0),
            ("momentum", "numbers from 0 up to, not including, 1", 0 <= self.momentum < 1),
            ("weight_decay", "finite numbers of at least 0", self.weight_decay >= 0),
        ):
            if not holds or not math.isfinite(getattr(self, name)):
                raise TrainingError(f"{name} is {getattr(self, name)!r}: allowed are {allowed}")
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule is {self.schedule!r}: allowed are {', '.join(SCHEDULES)}")


@dataclass
class Row:
    """One epoch. Training numbers are those of the steps themselves: before each update, on changed pictures."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    kept_loss: float
    kept_accuracy: float
    seconds: float


@dataclass
class Progress:
    """How far a run is; part of the checkpoint."""

    epoch: int = 0
    """Whole epochs that are done."""
    step: int = 0
    """Steps done of the epoch that is running."""
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    """Wall time of the running epoch's steps."""
    losses: list[float] = field(default_factory=list)
    """The loss of every step since the start."""
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class World:
    """The processes that train together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def sums(self, values: list[float], device: torch.device) -> list[float]:
        """Every value summed over the processes, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, item: Any) -> list[Any]:
        """Every process's `item`, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


Watch = Callable[["Trainer"], None]
"""Called after every step and after every epoch (progress.step is then 0), by every process."""


class Trainer:
    """One run: `fit` trains from where it is to the end."""

    def __init__(
        self, model: nn.Module, data: Data, settings: Settings, device: torch.device, *, workers: int = 0
    ) -> None:
        """Every process of `torch.distributed`, if it is initialised, makes one of these from an equal model.

        batch_size is that of all processes together. `workers` processes a trainer read the pictures.
        """
        self.data, self.settings, self.device, self.workers = data, settings, device, workers
        self.world = World.current()
        if settings.batch_size < self.world.size:
            raise TrainingError(f"batch_size is {settings.batch_size}: allowed is {self.world.size} (one a process)")
        self.model = model.to(device)
        ids = [device.index or 0] if device.type == "cuda" else None
        self.network = DistributedDataParallel(self.model, device_ids=ids) if self.world.size > 1 else self.model
        count = len(data.train)
        # A last batch too small to give every process a picture is left out.
        self.steps = max(1, count // settings.batch_size + (count % settings.batch_size >= self.world.size))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        total = settings.epochs * self.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: schedule(settings.schedule, step, total)
        )
        self.progress = Progress()
        torch.manual_seed(settings.seed + 1 + self.world.rank)  # for dropout, other masks in every process

    @property
    def done(self) -> bool:
        return self.progress.epoch >= self.settings.epochs

    def fit(
        self,
        folder: Path,
        *,
        time_limit: float | None = None,
        checkpoint_every: int = 0,
        watch: Watch = lambda trainer: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end and return True; or, past `time_limit` seconds or once stop() says so, return False.

        Writes `folder`/checkpoint.pt after every epoch, every `checkpoint_every` steps (0: not) and where it stops.
        """
        begin = time.monotonic()

        def wanted() -> bool:
            return stop() or (time_limit is not None and time.monotonic() - begin >= time_limit)

        while not self.done:
            if not self._epoch(folder, checkpoint_every, watch, wanted):
                return False
        return True

    def _epoch(self, folder: Path, checkpoint_every: int, watch: Watch, stop: Callable[[], bool]) -> bool:
        """The rest of the running epoch; False if it was stopped before its last step."""
        progress, begin = self.progress, time.monotonic()
        before = progress.seconds
        order = datasets.order(self.settings.seed, progress.epoch, len(self.data.train))
        rate = float(self.scheduler.get_last_lr()[0])
        for images, labels in self._batches(self.data.train, "train", self._shares(order, progress.step)):
            stopping = self._step(images, labels, stop)
            progress.seconds = before + time.monotonic() - begin
            last = progress.step == self.steps
            if not last and (stopping or (checkpoint_every and progress.step % checkpoint_every == 0)):
                self.save(folder / CHECKPOINT)
            if not last:
                watch(self)
                if stopping:
                    return False
        kept_loss, kept_accuracy = self.judge()
        seconds = before + time.monotonic() - begin
        progress.rows.append(
            Row(
                progress.epoch + 1, rate, progress.loss_sum / progress.seen, progress.correct / progress.seen,
                kept_loss, kept_accuracy, seconds,
            )
        )  # fmt: skip
        progress.epoch += 1
        progress.step = progress.correct = progress.seen = 0
        progress.loss_sum = progress.seconds = 0.0
        self.save(folder / CHECKPOINT)
        watch(self)
        return True

    def _step(self, images: Tensor, labels: Tensor, stop: Callable[[], bool]) -> bool:
        """One update of the weights; True if any process wants to stop after it."""
        progress, size = self.progress, self.settings.batch_size
        count = min(size, len(self.data.train) - progress.step * size)  # in all processes together
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.network(images)
        loss = F.cross_entropy(logits, labels, reduction="sum") / count
        # DistributedDataParallel divides by the number of processes what they had already divided by all pictures.
        (loss * self.world.size).backward()
        correct = int((logits.detach().argmax(1) == labels).sum())
        value, hits, stopping = self.world.sums([loss.item(), correct, float(stop())], self.device)
        if not math.isfinite(value):
            at = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
            raise TrainingError(f"the loss is {value} in {at}: lr={self.settings.lr} may be too high")
        self.optimizer.step()
        self.scheduler.step()
        progress.step += 1
        progress.losses.append(value)
        progress.loss_sum += value * count
        progress.correct += round(hits)
        progress.seen += count
        return stopping > 0

    @torch.no_grad()
    def judge(self) -> tuple[float, float]:
        """Mean loss and accuracy on the kept pictures."""
        self.model.eval()
        count = len(self.data.kept)
        share = np.array_split(np.arange(count), self.world.size)[self.world.rank]
        keys = [[(0, int(i)) for i in share[at : at + KEPT_BATCH]] for at in range(0, len(share), KEPT_BATCH)]
        loss, correct = 0.0, 0
        for images, labels in self._batches(self.data.kept, "kept", keys):
            logits = self.model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
        loss, hits = self.world.sums([loss, correct], self.device)
        return loss / count, hits / count

    def _shares(self, order: Any, first: int) -> list[list[Key]]:
        """This process's part of every batch from step `first` on."""
        size = self.settings.batch_size
        batches = [order[step * size : (step + 1) * size] for step in range(first, self.steps)]
        shares = [np.array_split(batch, self.world.size)[self.world.rank] for batch in batches]
        return [[(self.progress.epoch, int(i)) for i in share] for share in shares]

    def _batches(self, images: Images, name: str, keys: list[list[Key]]) -> Any:
        # A generator of its own: the loader would otherwise draw from the random state that decides the dropout.
        loader: DataLoader[Any] = DataLoader(
            images, batch_sampler=keys, num_workers=self.workers, generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for pictures, labels in loader:
            yield pictures.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def save(self, path: Path) -> None:
        """Write a checkpoint; the old one stays whole until the new one is. Every process calls this, one writes."""
        rng = self.world.gather(_random_state(self.device))
        if self.world.rank == 0:
            progress = dataclasses.asdict(self.progress)
            content = {
                "format": FORMAT, "settings": dataclasses.asdict(self.settings), "data": self.data.fingerprint,
                "processes": self.world.size, "versions": versions(), "progress": progress,
                "order": torch.from_numpy(
                    datasets.order(self.settings.seed, self.progress.epoch, len(self.data.train))
                ),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(), "rng": rng,
            }  # fmt: skip
            # One name for all attempts: what a killed one leaves behind, the next one overwrites.
            part = path.with_name(f".{path.name}.part")
            with part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        self.world.barrier()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. TrainingError, with the trainer unchanged, where it is not one of this run."""
        content = read_checkpoint(path)
        own = dataclasses.asdict(self.settings)
        theirs = content["settings"]
        different = [
            f"{name} is {own.get(name)!r}, the checkpoint's is {theirs.get(name)!r}"
            for name in [*own, *(theirs.keys() - own.keys())]
            if own.get(name) != theirs.get(name)
        ]
        if content["processes"] != self.world.size:
            different.append(f"processes is {self.world.size}, the checkpoint's is {content['processes']}")
        order = datasets.order(self.settings.seed, content["progress"]["epoch"], len(self.data.train))
        if content["data"] != self.data.fingerprint or not np.array_equal(content["order"].numpy(), order):
            different.append(f"data {self.data.name!r} holds other pictures than the checkpoint was trained on")
        here = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        there = {name: tuple(value.shape) for name, value in content["model"].items()}
        odd = [name for name in [*here, *(there.keys() - here.keys())] if here.get(name) != there.get(name)]
        if odd:
            name = odd[0]
            different.append(f"the model's {name} has shape {here.get(name)}, the checkpoint's {there.get(name)}")
        if different:
            raise TrainingError(f"{path.name} is of another run: {'; '.join(different)}")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        progress = content["progress"]
        self.progress = Progress(**(progress | {"rows": [Row(**row) for row in progress["rows"]]}))
        _set_random_state(content["rng"][self.world.rank], self.device)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, `model` (the state_dict) among it; TrainingError if it is not a whole one."""
    if not path.is_file():
        raise TrainingError(f"{path.name}: there is no checkpoint to resume from")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise TrainingError(f"{path.name} is not a whole checkpoint: cut short, or another kind of file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainingError(f"{path.name} is not a checkpoint of a training run ({FORMAT})")
    return content


def schedule(name: str, step: int, total: int) -> float:
    """The factor on the learning rate for step `step` of `total`."""
    if name == "constant":
        return 1.0
    if name == "steps":  # as AlexNet's paper did it by hand: divided by ten three times
        return 0.1 ** min(3, 4 * step // total)
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator of this process, as torch.load takes it back with weights_only."""
    numpy_state = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, np.uint32), *rest))
    random.setstate(state["python"])
