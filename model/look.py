"""Looking into a network: its filters, and what its layers make of a picture, as `python -m tileconv.model.look`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from tileconv.kernels import functional as TF
from tileconv.model.command import fail
from tileconv.model.data import MEAN, PHOTOGRAPHS, STD, photographs

DIGIT_MEAN, DIGIT_STD = 0.1307, 0.3081  # of MNIST's training pictures
SHOWN = 16
"""Maps, and filters, of a layer that are drawn."""


def stages(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, layer and output of every layer for pictures `x`, after its ReLU where it has one, on our kernels.

    Dropout is left out. Raises TypeError for a model that is none of tileconv.model's.
    """
    from tileconv.model.chains import chain
    from tileconv.model.googlenet import BasicConv2d, GoogLeNet
    from tileconv.model.steps import run, steps

    layers = [(name, m) for name, m in chain(model, x.shape) if not isinstance(m, nn.Dropout)]
    x = model.normalised(x) if isinstance(model, GoogLeNet) else x
    plain = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.LocalResponseNorm, nn.Flatten)
    result: list[tuple[str, nn.Module, Tensor]] = []
    for i, (name, m) in enumerate(layers):
        if isinstance(m, nn.ReLU):
            continue
        if isinstance(m, plain):
            activated = isinstance(layers[min(i + 1, len(layers) - 1)][1], nn.ReLU)
            x = x.flatten(1) if isinstance(m, nn.Linear) else x
            x = run(steps(layers[i : i + 2] if activated else layers[i : i + 1]), x)
        else:
            x = m(x)  # an inception module, or a convolution with batch normalisation: on our kernels already
        if not isinstance(m, nn.Flatten):
            result.append((name, m.conv if isinstance(m, BasicConv2d) else m, x))
    return result


def load_model(name: str, checkpoint: Path | None = None) -> tuple[nn.Module, str]:
    """A network by name, in evaluation, and where its weights come from: `checkpoint`, or chance if None.

    A checkpoint is that of `tileconv train`, or a file with a state_dict of tensors such as torchvision's. Raises
    ValueError for an unknown name, a damaged file and one of another network.
    """
    from tileconv.model.zoo import build

    if checkpoint is None:
        return build(name).eval(), "random weights"
    build_meta(name)  # an unknown name before a damaged file
    weights, made_for = _weights(checkpoint)
    if made_for not in (None, name):
        raise ValueError(f"checkpoint: {checkpoint.name} is of {made_for}, model is {name!r}")
    expected = build_meta(name).state_dict()
    arguments: dict[str, Any] = {}
    last = [key for key in expected if key.endswith("weight") and expected[key].dim() == 2 and "aux" not in key][-1]
    first = next(key for key in expected if expected[key].dim() == 4)
    if last in weights and weights[last].dim() == 2 and weights[last].shape[0] > 0:
        arguments["num_classes"] = weights[last].shape[0]
    small = name in ("lenet", "lenet-visualiser", "alexnet-mini")
    if small and first in weights and weights[first].dim() == 4 and weights[first].shape[1] in (1, 3):
        arguments["channels"] = weights[first].shape[1]
    if name == "googlenet":
        arguments["aux_logits"] = any(key.startswith("aux") for key in weights)
    model = build(name, **arguments)
    own = model.state_dict()
    odd = [key for key in [*own, *(weights.keys() - own.keys())]
           if key not in own or key not in weights or own[key].shape != weights[key].shape]  # fmt: skip
    if odd:
        sides = [tuple(d[odd[0]].shape) if odd[0] in d else "missing" for d in (weights, own)]
        raise ValueError(
            f"checkpoint: {checkpoint.name} is of another network than {name!r}: "
            f"{odd[0]} is {sides[0]} there and {sides[1]} here"
        )
    model.load_state_dict(weights)
    return model.eval(), f"weights of {checkpoint.name}"


def build_meta(name: str) -> nn.Module:
    """The network without values."""
    from tileconv.model.shapes import network

    return network(name)


def _weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a checkpoint, and the network it was made for if it says so."""
    from tileconv.model.training import FORMAT

    if not path.is_file():
        raise ValueError(f"checkpoint: there is no file {path.name}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise ValueError(f"checkpoint: {path.name} is not whole: cut short, or another kind of file") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return content["model"], content["settings"]["model"]
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return content, None
    raise ValueError(f"checkpoint: {path.name} holds no network: neither a training run's nor a state_dict")


def load_image(path: Path, channels: int, size: int) -> Tensor:
    """A picture file as a network's input [1, channels, size, size].

    Colour: as tileconv.model.data.photographs. Grey: scaled to size x size and normalised as MNIST's digits; a picture
    brighter than half is taken for ink on paper and inverted. Raises ValueError for what pillow cannot read.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("picture files need pillow: pip install 'tileconv[train]'") from error
    if not path.is_file():
        raise ValueError(f"image: there is no file {path.name}")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise ValueError(f"image: {path.name} is not a picture that pillow knows") from error
    except Exception as error:  # pillow's decoders raise OSError, SyntaxError, ValueError and others for damaged files
        raise ValueError(f"image: {path.name} cannot be read: cut short or damaged ({error})") from error
    pixels = torch.from_numpy(np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1) / 255)
    pixels = pixels.permute(2, 0, 1)
    if channels == 1:
        grey = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True, align_corners=False)
        return ((1 - grey if grey.mean() > 0.5 else grey) - DIGIT_MEAN) / DIGIT_STD
    scale = round(size * 256 / 224) / min(pixels.shape[1:])
    extents = [max(size, round(n * scale)) for n in pixels.shape[1:]]
    pixels = F.interpolate(pixels[None], extents, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (extents[0] - size) // 2, (extents[1] - size) // 2
    pixels = pixels[:, top : top + size, left : left + size]
    return ((pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


def mosaic(maps: Tensor, columns: int = 8) -> Tensor:
    """Pictures [K, H, W] or [K, 3, H, W] in rows side by side, each from its least (0) to its largest value (1).

    A gap of NaN keeps them apart; [rows, columns] or [rows, columns, 3].
    """
    low, high = maps.flatten(1).amin(1), maps.flatten(1).amax(1)
    span = torch.where(high > low, high - low, torch.ones_like(high))
    shape = (-1, *(1,) * (maps.dim() - 1))
    scaled = (maps - low.view(shape)) / span.view(shape)
    gap = max(1, maps.shape[-1] // 14)
    scaled = F.pad(scaled, (0, gap, 0, gap), value=math.nan)
    lines = -(-len(maps) // columns)
    blank = scaled.new_full((lines * columns - len(maps), *scaled.shape[1:]), math.nan)
    grid = torch.cat([scaled, blank]).unflatten(0, (lines, columns))
    rows = torch.cat([torch.cat(list(line), -1) for line in grid], -2)[..., :-gap, :-gap]
    return rows if maps.dim() == 3 else rows.permute(1, 2, 0).nan_to_num(1.0)


@torch.no_grad()
def draw(model: nn.Module, x: Tensor, title: str, classes: Sequence[str] | None = None) -> bytes:
    """The picture x [1, C, H, W], then a line for each layer: filters on the left, feature maps on the right. PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'tileconv[train]'") from error
    done = stages(model, x)
    maps = [stage for stage in done if stage[2].dim() == 4 and stage[2].shape[2] > 1]
    rest = [stage for stage in done if stage[2].dim() == 2]
    heights = [1.9, *[1.5 if y.shape[1] > 8 else 0.95 for _, _, y in maps]]
    figure = Figure(figsize=(9.5, sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(heights), 2, gridspec_kw={"width_ratios": [1, 2], "height_ratios": heights}, squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    picture = mosaic(x if x.shape[1] == 3 else x[:, 0], 1).cpu()
    grid[0][0].imshow(picture.numpy(), cmap="gray")
    grid[0][0].set_title(f"input {_volume(x)}", fontsize=9)
    _answer(grid[0][1], rest[-1], classes)
    for (name, m, y), (left, right) in zip(maps, grid[1:], strict=True):
        right.imshow(mosaic(y[0, :SHOWN]).cpu().numpy(), cmap="viridis", interpolation="nearest")
        some = f", the first {SHOWN}" if y.shape[1] > SHOWN else ""
        right.set_title(f"{name}: maps {_volume(y)}{some}", fontsize=9)
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1):
            weight = m.weight.detach()[:SHOWN].float()
            colour = weight.shape[1] == 3
            left.imshow(mosaic(weight if colour else weight[:, 0]).cpu().numpy(), cmap="gray", interpolation="nearest")
            part = "" if colour or weight.shape[1] == 1 else ", channel 1"
            left.set_title(f"{name}: filters {'x'.join(map(str, m.weight.shape))}{part}", fontsize=9)
    return _png(figure, colours=x.shape[1] == 3)


def _png(figure: Any, colours: bool) -> bytes:
    """In 256 colours, half the bytes, where a photograph and many maps would make the file large."""
    from PIL import Image

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=100, metadata={"Software": None})
    if not colours:
        return whole.getvalue()
    with Image.open(whole) as opened:
        picture = opened.convert("RGB")
    # The widest spread of colours: by their frequency the few pixels of a photograph would get none.
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(small, format="png", optimize=True)
    return small.getvalue()


def _answer(axes: Any, last: tuple[str, nn.Module, Tensor], classes: Sequence[str] | None) -> None:
    """The most likely classes as bars."""
    name, _, scores = last
    parts = TF.softmax(scores, 1)[0].cpu()
    order = parts.argsort(descending=True)[: 5 if len(parts) > 10 else 10]
    order = order if len(parts) > 10 else order.sort().values
    names = [classes[int(i)] if classes else f"class {int(i)}" for i in order]
    axes.set_axis_on()
    axes.bar(list(names), parts[order].tolist(), color="#1f6fc9")
    axes.set_ylim(0, 1 if parts.max() > 0.2 else 1.2 * float(parts.max()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    most = "" if len(parts) <= 10 else ", the five largest"
    axes.set_title(f"{name}: softmax of {len(parts)} scores{most}", fontsize=9)


def _volume(x: Tensor) -> str:
    return "x".join(map(str, (*x.shape[2:], x.shape[1])))


def trained_lenet(epochs: int = 1) -> nn.Module:
    """A LeNet after a short training on the 4,000 digits: about half a minute an epoch in the interpreter."""
    from tileconv.model import datasets
    from tileconv.model.zoo import build

    data = datasets.mnist5k()
    model = build("lenet")
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    for epoch in range(epochs):
        for batch in torch.from_numpy(datasets.order(0, epoch, len(data.train))).split(64):
            pairs = [data.train[epoch, int(i)] for i in batch]
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(torch.stack([x for x, _ in pairs])), torch.tensor([y for _, y in pairs]))
            loss.backward()
            optimizer.step()
    return model.eval()


GALLERY = {
    "alexnet": ("chelsea", 224),
    "alexnet-2012": ("astronaut", 227),
    "googlenet": ("coffee", 128),
    "vgg16": ("rocket", 128),
}
"""Network -> photograph and size, small where Triton's interpreter would take long."""


def gallery(folder: Path, checkpoint: Path | None = None) -> Path:
    """gallery.md in `folder` and its pictures in figures/; `checkpoint` is a LeNet's, trained for an epoch if None."""
    from tileconv.model import datasets
    from tileconv.model.curve import write

    if checkpoint is None:
        lenet, note = trained_lenet(), "trained for one epoch on 4,000 digits"
    else:
        lenet, note = load_model("lenet", checkpoint)
    lines = [
        "# Gallery",
        "",
        "What the layers of tileconv's networks make of a picture, computed on its kernels. Every map is drawn from "
        "its own least value (dark) to its largest (bright), after the ReLU where the layer has one.",
        "",
        f"## LeNet, {note}",
        "",
    ]
    data = datasets.mnist5k(None)
    for digit in (3, 7):
        index = int(np.flatnonzero(data.kept.labels == digit)[0])
        png = draw(lenet, data.kept[0, index][0][None], f"LeNet, {note}: a kept digit {digit}", data.classes)
        write(folder / "figures" / f"gallery-lenet-{digit}.png", png)
        lines += [f"![Filters and maps of LeNet for a handwritten {digit}](figures/gallery-lenet-{digit}.png)", ""]
    lines += [
        "## Photographs, random weights",
        "",
        "No trained weights come with the package, so these filters are noise and the answers mean nothing. The early "
        "maps still show the picture, coarser from layer to layer: what a network sees comes in part from its shape "
        "alone. AlexNet 2012 starts from small weights and biases of one: from conv3 on its maps show little but the "
        "zeros around them.",
        "",
    ]
    for name, (photograph, size) in GALLERY.items():
        index = PHOTOGRAPHS.index(photograph)
        model, weights = load_model(name)
        png = draw(model, photographs(index + 1, size)[index:], f"{name}, {weights}: {photograph}, {size}x{size}")
        write(folder / "figures" / f"gallery-{name}.png", png)
        lines += [f"![Filters and maps of {name}](figures/gallery-{name}.png)", ""]
    lines += [
        "Made by `tileconv show --gallery reports`; of a picture of one's own:",
        "```sh",
        "tileconv show --model lenet --checkpoint runs/checkpoint.pt --image digit.png --out digit-layers.png",
        "```",
    ]
    path = folder / "gallery.md"
    write(path, ("\n".join(lines) + "\n").encode())
    return path


def show(
    model: Annotated[str, typer.Option(help="A network: lenet, alexnet, vgg16, ...")] = "lenet",
    image: Annotated[Path | None, typer.Option(help="A picture file.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights; random ones if not given.")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("layers.png"),
    size: Annotated[int | None, typer.Option(help="Height and width of the input; default: the network's.")] = None,
    gallery_in: Annotated[
        Path | None, typer.Option("--gallery", help="Instead write gallery.md and its pictures into this folder.")
    ] = None,
) -> None:
    """Draw a network's filters and what its layers make of a picture."""
    from tileconv.model.chains import channels_of
    from tileconv.model.curve import write
    from tileconv.model.shapes import SIZES, shapes

    try:
        if gallery_in is not None:
            typer.echo(f"gallery: {gallery(gallery_in, checkpoint)}")
            return
        if image is None:
            raise ValueError("image is missing: give --image FILE, or --gallery FOLDER")
        network, note = load_model(model, checkpoint)
        channels = channels_of(network)
        extent = size or (28 if model == "lenet" else SIZES[model])
        if size is not None and size < 1:
            raise ValueError(f"size is {size}: allowed are numbers of at least 1")
        shapes(network, (1, channels, extent, extent))  # a size that does not fit, before any work
        picture = load_image(image, channels, extent)
        write(out, draw(network, picture, f"{model}, {note}: {image.name}"))
        typer.echo(f"written: {out}")
    except (ValueError, ImportError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    typer.run(show)
