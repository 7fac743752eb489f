"""A training run on paper: its record as JSON, its curve, and a report that is rendered from the record alone."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tileconv.model.training import Trainer

SCHEMA = 1
TRAIN, KEPT, STEPS = "#1f6fc9", "#d9632a", "#c3cad2"  # blue and orange stay apart for colour-blind readers
NAMES = {"lenet": "LeNet", "alexnet-mini": "AlexNet-mini"}


def record(trainer: Trainer) -> dict[str, Any]:
    """Every number of a run. No host name, user name or path."""
    import torch

    from tileconv.kernels import hardware
    from tileconv.model.version import versions

    interprets = hardware.interpreting()
    seconds = "interpreter_wall_seconds" if interprets else "wall_seconds"
    rows = [dataclasses.asdict(row) for row in trainer.progress.rows]
    for row in rows:
        row[seconds] = round(row.pop("seconds"), 3)
    return {
        "schema": SCHEMA,
        "device": "Triton's interpreter on a CPU" if interprets else torch.cuda.get_device_name(trainer.device),
        "interpreter": interprets,
        "processes": trainer.world.size,
        "versions": versions(),
        "settings": dataclasses.asdict(trainer.settings),
        "data": {
            "name": trainer.data.name,
            "classes": len(trainer.data.classes),
            "train": len(trainer.data.train),
            "kept": len(trainer.data.kept),
            "fingerprint": trainer.data.fingerprint,
        },
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps_per_epoch": trainer.steps,
        seconds: round(sum(row[seconds] for row in rows), 3),
        "epochs": rows,
        "step_losses": trainer.progress.losses,
    }


def draw(record: dict[str, Any]) -> bytes:
    """Loss and accuracy over the epochs as a PNG for screen and print; the same record gives the same bytes."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise ImportError("the curve needs matplotlib: pip install 'tileconv[train]'") from error
    rows, losses, steps = record["epochs"], record["step_losses"], record["steps_per_epoch"]
    epochs = [row["epoch"] for row in rows]
    settings: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        left.plot([(i + 1) / steps for i in range(len(losses))], losses, color=STEPS, linewidth=0.7, label="each step")
        for axes, number in ((left, "loss"), (right, "accuracy")):
            # Dash and marker tell the lines apart on paper without colour.
            axes.plot(epochs, [r[f"train_{number}"] for r in rows], color=TRAIN, marker="o", markersize=3, ls="--",
                      label="training pictures")  # fmt: skip
            axes.plot(epochs, [r[f"kept_{number}"] for r in rows], color=KEPT, marker="s", markersize=3,
                      label="kept pictures")  # fmt: skip
            axes.set_xlabel("epoch")
            axes.set_title(number.capitalize(), loc="left")
            axes.grid(axis="y", linewidth=0.5, color="#d0d7de")
            axes.set_axisbelow(True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(0, epochs[-1] + 0.3)
            axes.legend(loc="upper right" if number == "loss" else "lower right")
        # The first steps of an untrained network would leave the rest no height.
        left.set_ylim(0, 1.25 * max(max(row["train_loss"], row["kept_loss"]) for row in rows))
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        best = rows[-1]["kept_accuracy"]
        right.annotate(f"{100 * best:.1f} %", (epochs[-1], best), xytext=(0, -14), textcoords="offset points",
                       ha="right", color=KEPT, weight="bold")  # fmt: skip
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def write_report(record: dict[str, Any], folder: Path) -> Path:
    """train-MODEL-DATA.md in `folder`, its record in data/ and its curve in figures/; returns the first."""
    name = f"train-{record['settings']['model']}-{record['data']['name']}"
    write(folder / "data" / f"{name}.json", json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    write(folder / "figures" / f"{name}.png", draw(record))
    path = folder / f"{name}.md"
    write(path, render(record, f"figures/{name}.png").encode())
    return path


def render(record: dict[str, Any], figure: str) -> str:
    """A record as Markdown."""
    settings, data, rows = record["settings"], record["data"], record["epochs"]
    title = f"{NAMES.get(settings['model'], settings['model'])} on {data['name']}"
    last = rows[-1]
    right = round(last["kept_accuracy"] * data["kept"])
    seconds = "interpreter_wall_seconds" if record["interpreter"] else "wall_seconds"
    options = [f"--{key.replace('_', '-')} {settings[key]}" for key in COMMAND if key in settings]
    options += [] if settings["augment"] else ["--no-augment"]
    where = "data `mnist5k`" if data["name"] == "mnist5k" else f"folder `{data['name']}`"
    lines = [
        f"# Training {title}",
        "",
        f"**{100 * last['kept_accuracy']:.1f} % of the {data['kept']:,} kept pictures are named right** "
        f"({right:,}) after {len(rows)} epochs on {data['train']:,} others. The number is that of the last epoch, "
        "not of the best. The kept pictures were never trained on; but there is no third set, so settings that were "
        "tried out were tried out on them.",
        "",
        f"![Loss and accuracy of training and kept pictures over {len(rows)} epochs]({figure})",
        "",
        "Forward and backward of every layer ran on tileconv's kernels; the loss and SGD are PyTorch's.",
        "",
        f"- **Ran on**: {record['device']}, {counted(record['processes'], 'process')}",
        f"- **Wall time**: {record[seconds]:,.0f} s"
        + (" in the interpreter. It says nothing about the speed on a GPU." if record["interpreter"] else ""),
        f"- **Network**: {record['parameters']:,} parameters",
        f"- **Pictures**: {where}, {data['classes']} classes, {settings['image_size']}x{settings['image_size']}, "
        + ("changed at random while training" if settings["augment"] else "unchanged"),
        f"- **SGD**: batch {settings['batch_size']}, learning rate {settings['lr']:g} ({settings['schedule']}), "
        f"momentum {settings['momentum']:g}, weight decay {settings['weight_decay']:g}, seed {settings['seed']}",
        "- **Versions**: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
        "| epoch | learning rate at its start | training loss | training accuracy | kept loss | kept accuracy |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['epoch']} | {row['lr']:.4f} | {row['train_loss']:.4f} | {100 * row['train_accuracy']:.1f} % "
            f"| {row['kept_loss']:.4f} | {100 * row['kept_accuracy']:.1f} % |"
        )
    lines += [
        "",
        "Training numbers are means over the steps of an epoch, each taken before the weights are updated"
        + (" and on changed pictures, which are harder." if settings["augment"] else "."),
        "",
        "The same run again; with these versions on such a machine, the same losses too:",
        "```sh",
        f"tileconv train {' '.join(options)} --out runs",
        "```",
    ]
    return "\n".join(lines) + "\n"


COMMAND = ("model", "data", "epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "seed")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def write(path: Path, content: bytes) -> None:
    """Write a file beside its final place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
