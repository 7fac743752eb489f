"""X or O: the opening example of courses on convolutional networks, as `python -m tileconv.model.xo`.

A picture of 9x9 pixels, three 3x3 filters, ReLU, a 2x2 max-pool and one fully connected layer tell an X from an O:
once with filters and weights made by hand, once with those found by training. All of it runs on tileconv's kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from tileconv.kernels import functional as TF
from tileconv.model.command import fail

SIZE = 9
CLASSES = ("X", "O")
X_PICTURE = """
.........
.#.....#.
..#...#..
...#.#...
....#....
...#.#...
..#...#..
.#.....#.
.........
"""
O_PICTURE = """
.........
...###...
..#...#..
.#.....#.
.#.....#.
.#.....#.
..#...#..
...###...
.........
"""
NAMES = ("falling diagonal", "crossing", "rising diagonal")
FILTERS = (
    ((1, -1, -1), (-1, 1, -1), (-1, -1, 1)),
    ((1, -1, 1), (-1, 1, -1), (1, -1, 1)),
    ((-1, -1, 1), (-1, 1, -1), (1, -1, -1)),
)
"""Of pictures that are 1 on the line and -1 elsewhere; divided by nine, a perfect match gives 1."""
FOR_X = (
    ("#...", ".#..", "..#.", "...#"),
    ("....", ".#..", "....", "...."),
    ("..##", "..#.", "##..", "#..."),
)
FOR_O = (
    ("..#.", "....", "#...", "...."),
    ("....", "....", "....", "...."),
    ("#...", "....", "..#.", "...."),
)
"""Where in the three 4x4 maps a match speaks for the letter: an O's falling strokes are upper right and lower left."""
EDGES = {
    "smoothing": ((1 / 9,) * 3,) * 3,
    "horizontal edges": ((-1, -2, -1), (0, 0, 0), (1, 2, 1)),
    "vertical edges": ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)),
}
"""A mean of nine pixels, and Sobel's differences from one side of a pixel to the other."""


class XONet(nn.Module):
    """Input [N, 1, 9, 9], output [N, 2]: scores of X and O. 128 parameters.

    Three 3x3 filters make 7x7 maps, ReLU and a 2x2 max-pool, whose last windows hang over the edge, 4x4 maps.
    """

    def __init__(self) -> None:
        super().__init__()
        # torch's own layers hold the parameters; calling them would run torch's kernels.
        self.conv = nn.Conv2d(1, 3, kernel_size=3)
        self.fc = nn.Linear(3 * 4 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)["scores"]

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """What every layer makes of the pictures: convolution, relu, pool and scores."""
        convolved = TF.conv2d(x, self.conv.weight, self.conv.bias)
        rectified = TF.relu(convolved)
        pooled = TF.max_pool2d(rectified, 2, ceil_mode=True)
        assert isinstance(pooled, Tensor)  # a pair only with return_indices
        scores = TF.linear(pooled.flatten(1), self.fc.weight, self.fc.bias)
        return {"convolution": convolved, "relu": rectified, "pool": pooled, "scores": scores}


def reference_forward(model: XONet, x: Tensor) -> Tensor:
    """The network on torch.nn.functional, with the same parameters."""
    x = F.max_pool2d(F.relu(F.conv2d(x, model.conv.weight, model.conv.bias)), 2, ceil_mode=True)
    return F.linear(x.flatten(1), model.fc.weight, model.fc.bias)


def picture(text: str) -> Tensor:
    """A drawing in characters as [1, H, W]: 1 where there is a #, -1 elsewhere.

    Raises ValueError for lines of different lengths and other characters than # and a point.
    """
    lines = text.split()
    if not lines or len({len(line) for line in lines}) > 1 or set("".join(lines)) - set("#."):
        raise ValueError("text is no picture: allowed are lines of one length, of # and . alone")
    return torch.tensor([[[1.0 if c == "#" else -1.0 for c in line] for line in lines]])


def handmade() -> XONet:
    """The network with filters and votes made by hand: each place of a pooled map votes for X, for O or for none.

    A score is the mean of the maps at its votes: 1 would be a match of every filter at all places that vote for it.
    """
    model = XONet()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor(FILTERS)[:, None] / 9)
        model.fc.weight.copy_(torch.stack([_votes(FOR_X), _votes(FOR_O)]))
        for bias in (model.conv.bias, model.fc.bias):
            assert bias is not None
            nn.init.zeros_(bias)
    return model


def _votes(maps: tuple[tuple[str, ...], ...]) -> Tensor:
    marked = torch.tensor([[[float(c == "#") for c in line] for line in part] for part in maps]).flatten()
    return marked / marked.sum()


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures [count, 1, 9, 9] in [-1, 1] and their classes [count], 0 for X and 1 for O, half of each.

    Every one is drawn anew: its middle is shifted by up to a pixel, it is thickened, stretched, sheared and turned by
    up to 15 degrees, its X's strokes cross off the middle and its O's outline bulges; noise is added. The same seed
    gives the same pictures.
    """
    if count < 2 or count % 2:
        raise ValueError(f"count is {count}: allowed are even numbers from 2 on")
    random = np.random.default_rng([seed, count])
    labels = random.permutation(np.arange(count) % 2)
    pictures = np.stack([_draw(int(label), random) for label in labels])
    return torch.from_numpy(pictures[:, None]), torch.from_numpy(labels)


def _draw(label: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float64) - (SIZE - 1) / 2
    rows, columns = rows - random.uniform(-1, 1), columns - random.uniform(-1, 1)
    angle, shear = np.deg2rad(random.uniform(-15, 15)), random.uniform(-0.2, 0.2)
    v = (np.cos(angle) * rows - np.sin(angle) * columns) / random.uniform(0.8, 1.1)
    u = (np.sin(angle) * rows + np.cos(angle) * columns) / random.uniform(0.8, 1.1) + shear * v
    half, width = 3.2, random.uniform(0.45, 0.95)
    if label == 0:
        bend = random.uniform(-0.15, 0.15, 2)
        strokes = [_segment(u, v, (-half, -half), (half, half + bend[0] * half)),
                   _segment(u, v, (half, -half), (-half, half + bend[1] * half))]  # fmt: skip
        distance = np.minimum(*strokes)
    else:
        bulge = 1 + random.uniform(-0.12, 0.12) * np.cos(2 * np.arctan2(v, u) + random.uniform(0, 2 * np.pi))
        distance = np.abs(np.hypot(u, v) - half * bulge)
    ink = np.clip(width + 0.5 - distance, 0, 1)  # anti-aliased
    noise = random.normal(0, 0.1, ink.shape)
    image: npt.NDArray[np.float32] = np.clip(2 * ink - 1 + noise, -1, 1).astype(np.float32)
    return image


def _segment(u: Any, v: Any, begin: tuple[float, float], end: tuple[float, float]) -> Any:
    """The distance of each point from a segment."""
    du, dv = end[0] - begin[0], end[1] - begin[1]
    t = np.clip(((u - begin[0]) * du + (v - begin[1]) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - begin[0] - t * du, v - begin[1] - t * dv)


@dataclass(frozen=True)
class Run:
    """A training run: its network, losses by step, and the part of `kept` other pictures it names right."""

    model: XONet
    losses: list[float]
    accuracy: float
    handmade_accuracy: float
    """Of the network made by hand, on the same pictures."""
    kept: int
    seconds: float


def train(*, steps: int = 200, batch: int = 32, lr: float = 0.1, seed: int = 0, kept: int = 1000) -> Run:
    """Train from random weights on pictures that are drawn anew for every step, and judge by `kept` others.

    SGD with momentum 0.9, forward and backward on our kernels; the loss is torch's. The learning rate falls to zero
    along a cosine. Raises ValueError for steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: allowed are numbers from 1 on")
    begin = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XONet()
    pictures, labels = drawn(steps * batch, seed + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for x, y in zip(pictures.split(batch), labels.split(batch), strict=True):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.monotonic() - begin
    judged = drawn(kept, seed + 2)
    return Run(model, losses, accuracy(model, *judged), accuracy(handmade(), *judged), kept, seconds)


@torch.no_grad()
def accuracy(model: XONet, pictures: Tensor, labels: Tensor) -> float:
    """The part of the pictures that the network names right."""
    hits = [(model(x).argmax(1) == y).sum() for x, y in zip(pictures.split(250), labels.split(250), strict=True)]
    return float(torch.stack(hits).sum()) / len(labels)


@torch.no_grad()
def edges(photograph: Tensor) -> dict[str, Tensor]:
    """A grey photograph [H, W] under each of EDGES, [H, W]: one convolution of three filters."""
    weight = torch.tensor(list(EDGES.values()), dtype=photograph.dtype)[:, None]
    maps = TF.conv2d(photograph[None, None], weight.to(photograph.device), padding=1)[0]
    return dict(zip(EDGES, maps, strict=True))


def write_report(run: Run, folder: Path) -> Path:
    """xo.md in `folder`, its numbers in data/xo.json and its pictures in figures/; returns the first."""
    import json

    from tileconv.kernels import hardware
    from tileconv.model.curve import write
    from tileconv.model.version import versions

    by_hand = handmade()
    stages = by_hand.stages(torch.stack([picture(X_PICTURE), picture(O_PICTURE)]))
    record = {
        "interpreter": hardware.interpreting(),
        "versions": versions(),
        "steps": len(run.losses),
        "losses": run.losses,
        "kept": run.kept,
        "accuracy": run.accuracy,
        "handmade_accuracy": run.handmade_accuracy,
        "handmade_scores": stages["scores"].tolist(),
        "learned_filters": run.model.conv.weight[:, 0].tolist(),
        "wall_seconds": round(run.seconds, 3),
    }
    write(folder / "data" / "xo.json", json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    write(folder / "figures" / "xo-by-hand.png", draw_stages(by_hand))
    write(folder / "figures" / "xo-learned.png", draw_filters(run.model))
    write(folder / "figures" / "xo-edges.png", draw_edges(camera()))
    path = folder / "xo.md"
    write(path, render(record).encode())
    return path


def render(record: dict[str, Any]) -> str:
    """A record as Markdown."""
    (x_x, x_o), (o_x, o_o) = record["handmade_scores"]
    where = "in Triton's interpreter on a CPU" if record["interpreter"] else "on a GPU"
    right = round(record["accuracy"] * record["kept"])
    lines = [
        "# X or O",
        "",
        f"**By hand**, three 3x3 filters and a vote tell a drawn X from a drawn O. **Trained**, the same network names "
        f"{100 * record['accuracy']:.1f} % of {record['kept']:,} kept pictures right ({right:,}), which are shifted, "
        f"thickened, turned, sheared and noisy; the one made by hand {100 * record['handmade_accuracy']:.1f} %.",
        "",
        "## By hand",
        "",
        "![Pictures of X and O, three filters, and the maps after convolution, ReLU and pooling]"
        "(figures/xo-by-hand.png)",
        "",
        "A pixel is 1 on the line and -1 elsewhere. A filter divided by nine gives 1 where it matches, and less where "
        "it does not. ReLU sets what is below zero to zero; the pool keeps the largest of 2x2. In the fully connected "
        "layer each place of a map votes for X, for O or for neither; a score is the mean at the letter's places.",
        "",
        "| picture | score of X | score of O | answer |",
        "| --- | ---: | ---: | --- |",
        f"| X | {x_x:.2f} | {x_o:.2f} | {CLASSES[int(x_o > x_x)]} |",
        f"| O | {o_x:.2f} | {o_o:.2f} | {CLASSES[int(o_o > o_x)]} |",
        "",
        "## Trained",
        "",
        "![Drawn pictures, the filters made by hand and those found by training](figures/xo-learned.png)",
        "",
        f"{record['steps']} steps of SGD from random weights, on pictures drawn anew for every step, forward and "
        f"backward on tileconv's kernels {where}: {record['wall_seconds']:.0f} s"
        + (", which says nothing about the speed on a GPU" if record["interpreter"] else "")
        + f". The loss fell from {record['losses'][0]:.3f} to {record['losses'][-1]:.2g}. Nothing asks training for "
        "the filters that we would make: any three that tell the letters apart will do, so they look like strokes in "
        "some slant, or like nothing in particular.",
        "",
        "## Edge filters",
        "",
        "![A photograph, smoothed, and its horizontal and vertical edges](figures/xo-edges.png)",
        "",
        "The same convolution with three filters on a photograph: a mean of nine pixels, and Sobel's differences.",
        "",
        "- **Versions**: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "- **Made by**: `tileconv xo --report reports`",
    ]
    return "\n".join(lines) + "\n"


def camera() -> Tensor:
    """scikit-image's photograph of a man with a camera, [256, 256] in [0, 1]."""
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError("the photograph needs scikit-image: pip install 'tileconv[bench]'") from error
    load: Any = skimage.data.camera
    pixels = torch.from_numpy(np.asarray(load(), np.float32) / 255)
    return F.avg_pool2d(pixels[None], 2)[0]


def draw_stages(model: XONet) -> bytes:
    """Filters and maps of a network for an X and an O, as a PNG."""
    stages = model.stages(torch.stack([picture(X_PICTURE), picture(O_PICTURE)]))
    figure, png = _figure(10.5, 8.6)
    grid = figure.subplots(6, 6, gridspec_kw={"width_ratios": [1, 0.55, 1, 1, 0.75, 0.75]})
    titles = ("picture, 9x9", "filter, 3x3", "convolution, 7x7", "ReLU, 7x7", "pool, 4x4", "votes, 4x4")
    votes = model.fc.weight.detach().view(2, 3, 4, 4)
    for i, letter in enumerate((X_PICTURE, O_PICTURE)):
        for k in range(3):
            line = grid[3 * i + k]
            images = (
                picture(letter)[0] if k == 1 else None, 9 * model.conv.weight[k, 0], stages["convolution"][i, k],
                stages["relu"][i, k], stages["pool"][i, k], votes[i, k].sign(),
            )  # fmt: skip
            for axes, image in zip(line, images, strict=True):
                _show(axes, image)
            line[1].set_title(NAMES[k], fontsize=8)
            if k == 1:
                scores = stages["scores"][i]
                line[0].set_title(f"{CLASSES[i]}: scores X {scores[0]:.2f}, O {scores[1]:.2f}", fontsize=9)
            line[5].set_ylabel(f"for {CLASSES[i]}", fontsize=8)
    for axes, title in zip(grid[0], titles, strict=True):
        note = axes.get_title()
        axes.set_title(f"{title}\n{note}" if note else title, fontsize=9)
    return png("blue is -1, white 0, red 1")


def draw_filters(learned: XONet) -> bytes:
    """Drawn pictures above; below, filters made by hand and found by training, each scaled by its largest value."""
    pictures, labels = drawn(12, 7)
    figure, png = _figure(9.0, 5.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 0.72])
    upper.suptitle("Drawn, shifted, thickened and distorted", fontsize=10)
    for axes, image, label in zip(upper.subplots(2, 6).flat, pictures, labels, strict=True):
        _show(axes, image[0])
        axes.set_ylabel(CLASSES[int(label)], rotation=0, labelpad=8, va="center")
    named = ((handmade(), "Filters made by hand"), (learned, "Filters found by training"))
    for side, (model, title) in zip(lower.subfigures(1, 2), named, strict=True):
        side.suptitle(title, fontsize=10)
        for k, axes in enumerate(side.subplots(1, 3)):
            weight = model.conv.weight[k, 0].detach()
            _show(axes, weight / weight.abs().max())
            axes.set_xlabel(NAMES[k] if title.endswith("hand") else f"filter {k + 1}", fontsize=8)
    return png("")


def draw_edges(photograph: Tensor) -> bytes:
    """The photograph and what each of EDGES makes of it."""
    figure, png = _figure(9.0, 2.5)
    maps = {"photograph": photograph, **edges(photograph)}
    for axes, (title, image) in zip(figure.subplots(1, 4), maps.items(), strict=True):
        image = image.abs() if "edges" in title else image
        axes.imshow(image[1:-1, 1:-1].cpu().numpy(), cmap="gray", vmin=0, vmax=2 if "edges" in title else 1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return png("")


def _figure(width: float, height: float) -> tuple[Any, Callable[[str], bytes]]:
    """An empty figure, and what turns it into a PNG."""
    import io

    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'tileconv[train]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)

    def png(note: str) -> bytes:
        if note:
            figure.supxlabel(note, fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        return buffer.getvalue()

    return figure, png


def _show(axes: Any, image: Tensor | None) -> None:
    if image is None:
        axes.set_axis_off()
        return
    axes.imshow(image.detach().cpu().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def xo(
    report: Annotated[Path | None, typer.Option(help="Also write xo.md and its pictures into this folder.")] = None,
    steps: Annotated[int, typer.Option(help="Of training.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of weights and pictures.", min=0)] = 0,
) -> None:
    """Tell an X from an O: with three filters made by hand, then with three found by training."""
    try:
        by_hand = handmade()
        for name, text in zip(CLASSES, (X_PICTURE, O_PICTURE), strict=True):
            scores = by_hand(picture(text)[None])[0].tolist()
            typer.echo(f"by hand, {name}: score of X {scores[0]:.2f}, of O {scores[1]:.2f}")
        run = train(steps=steps, seed=seed)
        typer.echo(f"trained for {steps} steps in {run.seconds:.0f} s: {100 * run.accuracy:.1f} % of 1,000 kept right")
        for k, weight in enumerate(run.model.conv.weight[:, 0].tolist(), 1):
            typer.echo(f"filter {k}: " + " / ".join(" ".join(f"{value:5.2f}" for value in line) for line in weight))
        if report is not None:
            typer.echo(f"report: {write_report(run, report)}")
    except (ValueError, ImportError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    typer.run(xo)
