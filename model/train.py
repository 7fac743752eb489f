"""`python -m tileconv.model.train`, also under torchrun: train a network, draw its curve, write its report."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tileconv.model.command import fail

if TYPE_CHECKING:
    import torch

    from tileconv.model.datasets import Data
    from tileconv.model.training import Settings, Trainer

MODELS = {"lenet": (1, 32, 0.05), "alexnet-mini": (3, 64, 0.01)}
"""Name -> channels and size of the pictures that a folder's are turned into, and the learning rate unless given."""


def train(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "lenet",
    data: Annotated[str, typer.Option(help="mnist5k, or a folder with one folder of pictures per class.")] = "mnist5k",
    epochs: Annotated[int, typer.Option(help="Passes over the training pictures.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Pictures a step, in all processes together.")] = 64,
    lr: Annotated[float | None, typer.Option(help="The highest learning rate; default: the model's.")] = None,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    schedule: Annotated[str, typer.Option(help="Of the learning rate: cosine, steps or constant.")] = "cosine",
    augment: Annotated[bool, typer.Option(help="Change the training pictures at random.")] = True,
    image_size: Annotated[int | None, typer.Option(help="Of a folder's pictures; default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order, changes and dropout.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that read a folder's pictures.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint.pt, history.json and curve.png.")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0: after every epoch only.", min=0)] = 0,
    time_limit: Annotated[float | None, typer.Option(help="Minutes; then stop, to be resumed later.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a report into this folder.")] = None,
) -> None:
    """Train a network on tileconv's kernels. Ctrl-C stops after the step and keeps a checkpoint."""
    if "numpy" not in sys.modules:
        # Several processes with threads of their own fight for the cores: an interpreted step took 8 times longer.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import tileconv.kernels  # noqa: F401  # first, to choose between GPU and interpreter
    from tileconv.model.training import Settings, Trainer, TrainingError

    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        if time_limit is not None and not time_limit > 0:
            raise TrainingError(f"time_limit is {time_limit}: allowed are minutes above 0")
        with processes() as device:
            pictures = load_data(data, model, image_size, seed if augment else None)
            settings = Settings(
                model=model, data=pictures.name, image_size=pictures.size, epochs=epochs, batch_size=batch_size,
                lr=MODELS[model][2] if lr is None else lr, momentum=momentum, weight_decay=weight_decay,
                schedule=schedule, augment=augment, seed=seed,
            )  # fmt: skip
            trainer = Trainer(build(settings, pictures), pictures, settings, device, workers=workers)
            prepare(trainer, out, resume, report)
            whole = run(trainer, out, console, time_limit, checkpoint_every)
            if trainer.world.rank == 0:
                finish(trainer, out, report, console, whole)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    if not whole:
        raise typer.Exit(3)


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; gives this process's device."""
    import torch
    import torch.distributed as dist

    from tileconv.kernels import hardware

    on_gpu = torch.cuda.is_available() and not hardware.interpreting()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def load_data(data: str, model: str, image_size: int | None, seed: int | None) -> Data:
    """The pictures that the command names, as its model takes them."""
    from tileconv.model import datasets

    if model not in MODELS:
        raise ValueError(f"model is {model!r}: allowed are {', '.join(MODELS)}")
    channels, size, _ = MODELS[model]
    if model == "lenet" and image_size not in (None, 28, 32):
        raise ValueError(f"image_size is {image_size}: lenet takes 28 and 32")
    if image_size is not None and image_size < 23:
        raise ValueError(f"image_size is {image_size}: {model} takes 23 or more")
    if data != "mnist5k":
        return datasets.image_folder(Path(data), image_size or size, channels, seed)
    if image_size not in (None, 28):
        raise ValueError(f"image_size is {image_size}: the pictures of mnist5k have 28")
    return datasets.mnist5k(seed)


def build(settings: Settings, data: Data) -> torch.nn.Module:
    """The network with weights that depend on the seed alone."""
    import torch

    from tileconv.model.alexnet_mini import AlexNetMini
    from tileconv.model.lenet import LeNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return (LeNet if settings.model == "lenet" else AlexNetMini)(len(data.classes), data.channels)


def prepare(trainer: Trainer, out: Path, resume: bool, report: Path | None) -> None:
    """Load the checkpoint or see that there is none, and that the folders can be written, before hours of work."""
    from tileconv.model.training import CHECKPOINT, TrainingError

    if resume:
        trainer.load(out / CHECKPOINT)
    elif (out / CHECKPOINT).exists():
        raise TrainingError(f"out holds {CHECKPOINT} of a run: --resume goes on with it; or choose another folder")
    for folder in (out, report):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise TrainingError(f"{folder.name}: this folder cannot be written")
    trainer.world.barrier()  # no process may write before all have looked


def run(trainer: Trainer, out: Path, console: Console, time_limit: float | None, checkpoint_every: int) -> bool:
    """Train with progress shown; False if it stopped before the end."""
    with (
        stop_on_signals() as stop,
        shown(trainer, console if trainer.world.rank == 0 else Console(quiet=True)) as watch,
    ):
        return trainer.fit(
            out, time_limit=None if time_limit is None else 60 * time_limit, checkpoint_every=checkpoint_every,
            watch=watch, stop=stop,
        )  # fmt: skip


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop after the running step; a second one ends the process at once."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shown(trainer: Trainer, console: Console) -> Iterator[Callable[[Trainer], None]]:
    """A bar for the running epoch on a terminal, and a line for every epoch; elsewhere lines only."""
    from tileconv.model import curve

    data, settings = trainer.data, trainer.settings
    console.print(
        f"{settings.model} on {data.name}: {len(data.train):,} pictures to train on, {len(data.kept):,} kept, "
        f"{curve.counted(settings.epochs, 'epoch')} of {curve.counted(trainer.steps, 'step')}, "
        f"{curve.counted(trainer.world.size, 'process')}"
    )
    if trainer.progress.losses:
        console.print(f"resumed after epoch {trainer.progress.epoch}, step {trainer.progress.step}")
    bars = None
    if console.is_terminal:
        bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
    task = None if bars is None else bars.add_task("", total=trainer.steps)

    def watch(now: Trainer) -> None:
        progress = now.progress
        if progress.step == 0:
            console.print(line(progress.rows[-1], settings.epochs))
            if bars is not None and task is not None:
                bars.reset(task, visible=not now.done)
            return
        text = f"epoch {progress.epoch + 1}: loss {progress.losses[-1]:.3f}"
        if bars is not None and task is not None:
            bars.update(task, completed=progress.step, description=text)
        elif progress.step % max(1, now.steps // 4) == 0:
            console.print(f"{text} ({progress.step}/{now.steps} steps)")

    if bars is None:
        yield watch
        return
    with bars:
        yield watch


def line(row: Any, epochs: int) -> str:
    return (
        f"epoch {row.epoch}/{epochs}: loss {row.train_loss:.4f}, accuracy {100 * row.train_accuracy:.1f} %; "
        f"kept: loss {row.kept_loss:.4f}, accuracy {100 * row.kept_accuracy:.1f} %; {row.seconds:.0f} s"
    )


def finish(trainer: Trainer, out: Path, report: Path | None, console: Console, whole: bool) -> None:
    """Write the record and the curve, and of a whole run the report."""
    from tileconv.model import curve

    record = curve.record(trainer)
    if record["epochs"]:
        curve.write(out / "history.json", json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
        curve.write(out / "curve.png", curve.draw(record))
    if not whole:
        progress = trainer.progress
        console.print(
            f"stopped after epoch {progress.epoch}, step {progress.step} of {trainer.steps}: --resume goes on from here"
        )
        return
    console.print(f"written: {out.name}/checkpoint.pt, history.json, curve.png")
    if report is not None:
        console.print(f"report: {curve.write_report(record, report)}")


if __name__ == "__main__":
    typer.run(train)
