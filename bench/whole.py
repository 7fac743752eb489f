"""Whole networks on real pictures: forward, and one training step at reduced size, against float64.

The reference is the same network of torch's layers with the same, already rounded weights (model.chains.plain).
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import DTYPES
from .check import CHOSEN, answered
from .images import NO_DIGITS, images, smooth_noise
from .networks import known
from .records import finite
from .workers import Progress, Task, serve

if TYPE_CHECKING:
    from tileconv.model.datasets import Images

CHECKED = ("fp32", "fp16", "bf16")
FORWARD, STEP = "forward", "training step"


@dataclass(frozen=True)
class Whole:
    """A network as it is checked: height of its pictures; for the training step smaller pictures and a smaller net.

    `step_arguments` go to the constructor; dropout is off there, since no two libraries draw the same numbers.
    """

    size: int
    step_size: int
    step_arguments: dict[str, Any] = field(default_factory=dict)
    step_batch: int = 2


NETWORKS = {
    "alexnet": Whole(224, 96, {"num_classes": 10, "dropout": 0.0}),
    "alexnet-2012": Whole(227, 227, {"num_classes": 10, "dropout": 0.0, "width": 24, "hidden": 64}),
    "lenet": Whole(28, 28),
    "vgg16": Whole(224, 64, {"num_classes": 10, "dropout": 0.0, "hidden": 256, "maps": 2}),
    # Four pictures: statistics of the 2x2 maps of two would magnify every rounding a hundredfold.
    "googlenet": Whole(224, 96, {"num_classes": 10, "dropout": 0.0, "dropout_aux": 0.0}, step_batch=4),
}
"""The five networks of the suite."""
NOISE_SEED = 4
"""Where there are no real pictures. Under seed 0 a ReLU of AlexNet's fc6 is within a rounding of zero, in fp16."""
AUXILIARY = (1.0, 0.3, 0.3)
"""Shares of the losses of GoogLeNet's heads, section 5 of its paper; the others have one head."""


def built(name: str, step: bool, device: str) -> nn.Module:
    """The network under lively weights: evaluating and whole, or training at reduced size."""
    from tileconv.model.vgg import VGG
    from tileconv.model.zoo import build, lively

    arguments = NETWORKS[known("network", name, NETWORKS)].step_arguments if step else {}
    with torch.random.fork_rng(devices=[]):
        model = VGG(**arguments) if name == "vgg16" else build(name, **arguments)
    return lively(model).train(step).to(device)


def pictures(name: str, batch: int, size: int) -> tuple[Tensor, Tensor, str]:
    """Real pictures float32 and their classes: MNIST's digits for LeNet, else photographs, numbered as they come.

    Where the package that carries them is missing they are noise, and the third, else empty, says so.
    """
    numbered = torch.arange(batch) % 10
    if name != "lenet":
        x, noise = images(batch, size, NOISE_SEED)
        return x, numbered, noise
    try:
        kept = _digits()
    except ImportError:
        return smooth_noise(batch, 1, size, NOISE_SEED), numbered, NO_DIGITS
    chosen = [kept[0, i * len(kept) // batch] for i in range(batch)]
    return torch.stack([x for x, _ in chosen]), torch.tensor([label for _, label in chosen]), ""


@cache
def _digits() -> Images:
    """The thousand that LeNet is not trained on; reading them takes seconds."""
    from tileconv.model.datasets import mnist5k

    return mnist5k(seed=None).kept


def loss_of(outputs: Tensor | tuple[Tensor, ...], labels: Tensor, cross_entropy: Callable[..., Tensor]) -> Tensor:
    """Cross entropy of a network's output, or of its heads together."""
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [share * cross_entropy(y, labels) for share, y in zip(AUXILIARY, heads, strict=False)]
    return torch.stack(losses).sum()


def tasks(batch: int, networks: Sequence[str], dtypes: Sequence[str]) -> list[Task]:
    """Forward in each dtype; the training step in float64 and, of the dtypes asked for, in half precision.

    No step in fp32: there one ReLU or maximum in a million decides by a rounding, ours or torch's, and a gradient that
    went another way is no error of either. In fp64 none does; in half precision so many do that their sums compare.
    """
    for name in networks:
        known("network", name, NETWORKS)
    for dtype in dtypes:
        known("dtype", dtype, DTYPES)
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    found: list[Task] = []
    for name in networks:
        found += [{"network": name, "op": FORWARD, "dtype": dtype, "batch": batch} for dtype in dtypes]
        steps = ["fp64", *(dtype for dtype in dtypes if DTYPES[dtype].itemsize == 2)]
        found += [{"network": name, "op": STEP, "dtype": dtype, "batch": NETWORKS[name].step_batch} for dtype in steps]
    return found


def run_check(task: Task, device: str = "cpu") -> dict[str, Any]:
    """One row of records.Check for a task."""
    from tileconv.model.chains import plain

    from .providers import precision

    name, dtype, step = task["network"], task["dtype"], task["op"] == STEP
    whole = NETWORKS[name]
    size = whole.step_size if step else whole.size
    model = built(name, step, device).to(DTYPES[known("dtype", dtype, DTYPES)])
    x, labels, noise = pictures(name, task["batch"], size)
    x, labels = x.to(device, DTYPES[dtype]), labels.to(device)
    theirs = plain(model, size)
    exact = copy.deepcopy(theirs).double()
    with precision(dtype):
        compared = _step(model, theirs, exact, x, labels) if step else _forward(model, theirs, exact, x)
    return _row(task, tuple(x.shape)) | {
        "error": finite(compared.error),
        "torch_error": finite(compared.torch_error),
        "allowed": finite(compared.allowed),
        "passed": bool(compared.error <= compared.allowed),
        "seconds": round(compared.seconds, 3),
        "note": "; ".join(filter(None, (compared.note, noise))),
    }


@dataclass(frozen=True)
class Compared:
    """Errors of our result and of torch's, the error allowed, and our seconds."""

    error: float
    torch_error: float
    allowed: float
    seconds: float
    note: str = ""

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor, exact: Tensor, seconds: float, note: str = "") -> Compared:
        """The project's budget, elementwise."""
        from tileconv.kernels import reference

        assert ours.dtype == theirs.dtype, f"our output is {ours.dtype}, torch's {theirs.dtype}"
        ours, exact = ours.cpu(), exact.cpu()
        errors = reference.error(ours, exact), reference.error(theirs.cpu(), exact)
        return cls(*errors, reference.allowed_error(exact, theirs.cpu()), seconds, note)


def _forward(model: nn.Module, theirs: nn.Module, exact: nn.Module, x: Tensor) -> Compared:
    with torch.no_grad():
        start = time.perf_counter()
        ours = model(x)
        seconds = time.perf_counter() - start
        return Compared.of(ours, theirs(x), exact(x.double()), seconds)


def _step(model: nn.Module, theirs: nn.Module, exact: nn.Module, x: Tensor, labels: Tensor) -> Compared:
    """The gradients of all parameters: in float64 element by element, in half precision as one long vector."""
    from tileconv.kernels import functional as TF

    start = time.perf_counter()
    ours = gradients(model, x, labels, TF.cross_entropy)
    seconds = time.perf_counter() - start
    reference = gradients(exact, x.double(), labels, F.cross_entropy)
    if x.dtype == torch.float64:  # torch is the reference itself; in another order it adds the same, and rounds anew
        torchs = gradients(theirs, x.flip(0), labels.flip(0), F.cross_entropy)
        note = "largest difference in any gradient; torch's: the same pictures in reverse order"
        return Compared.of(ours, torchs, reference, seconds, note)
    torchs = gradients(theirs, x, labels, F.cross_entropy)
    error, torch_error = ((g.double() - reference).norm().item() for g in (ours, torchs))
    allowed = 2 * (torch_error + torch.finfo(x.dtype).eps * reference.norm().item())
    return Compared(error, torch_error, allowed, seconds, "length of the difference, all gradients as one vector")


def gradients(model: nn.Module, x: Tensor, labels: Tensor, cross_entropy: Callable[..., Tensor]) -> Tensor:
    """The gradients of all parameters after a forward and a backward pass, as one vector."""
    loss_of(model(x), labels, cross_entropy).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in found.values()), [name for name, g in found.items() if g is None]
    return torch.cat([g.flatten() for g in found.values() if g is not None])


def _row(task: Task, shape: tuple[int, ...]) -> dict[str, Any]:
    layer = task["network"] if task["op"] == FORWARD else f"{task['network']} step"
    return {
        "case": "/".join((task["network"], task["op"], task["dtype"])), "layer": layer, "op": task["op"],
        "shape": list(shape), "dtype": task["dtype"], "memory_format": "contiguous", "formulation": CHOSEN,
    }  # fmt: skip


def network_checks(
    batch: int = 1,
    networks: Sequence[str] = tuple(NETWORKS),
    dtypes: Sequence[str] = CHECKED,
    *,
    jobs: int = 2,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Check rows (JSON of records.Check): every network forward on `batch` pictures, and a training step of each.

    Forward is at the published size and full width. The shape of a step's row says which smaller pictures it saw.
    Otherwise as check.checks. Raises ValueError for an unknown network or dtype and for a batch below 1.
    """
    return answered(
        "tileconv.bench.whole",
        tasks(batch, networks, dtypes),
        blank=lambda task: _row(task, ()),
        label=lambda task: f"{task['network']} {task['op']} {task['dtype']}",
        jobs=jobs,
        progress=progress,
    )


def main() -> None:
    """The worker: a task a line in, {"row": {...}} a line out."""
    if sys.argv[1:] != ["--worker"]:
        raise SystemExit("usage: python -m tileconv.bench.whole --worker (reads JSON tasks on stdin)")
    from .environment import device

    where = "cuda" if device().kind == "cuda" else "cpu"
    serve(lambda task: {"row": run_check(task, where)})


if __name__ == "__main__":
    main()
