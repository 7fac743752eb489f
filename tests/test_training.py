"""Training: step by step as torch trains, resumed bit for bit, in two processes as in one, and what is refused."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from tileconv.model import alexnet, curve, lenet, train
from tileconv.model.alexnet_mini import AlexNetMini
from tileconv.model.data import photographs
from tileconv.model.datasets import Data, image_folder, mnist5k, order
from tileconv.model.lenet import LeNet
from tileconv.model.training import (
    CHECKPOINT,
    Progress,
    Settings,
    Trainer,
    TrainingError,
    read_checkpoint,
    schedule,
)

LENET_KEYS = {
    "conv1.weight": (6, 1, 5, 5),
    "conv1.bias": (6,),
    "conv2.weight": (16, 6, 5, 5),
    "conv2.bias": (16,),
    "fc1.weight": (120, 400),
    "fc1.bias": (120,),
    "fc2.weight": (84, 120),
    "fc2.bias": (84,),
    "fc3.weight": (10, 84),
    "fc3.bias": (10,),
}
SMALL = ("--epochs", "2", "--batch-size", "8", "--lr", "0.01", "--image-size", "28")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of seven small pictures: noise around three colours."""
    where = tmp_path_factory.mktemp("pictures") / "colours"
    random = np.random.default_rng(0)
    for name, colour in (("red", (200, 60, 60)), ("green", (60, 200, 60)), ("blue", (60, 60, 200))):
        (where / name).mkdir(parents=True)
        for i in range(7):
            pixels = np.clip(random.normal(colour, 40, (34, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(where / name / f"{i}.png")
    return where


def settings(**changes: Any) -> Settings:
    return Settings(**({"model": "alexnet-mini", "data": "colours", "image_size": 28, "epochs": 2, "batch_size": 6,
                        "lr": 0.01} | changes))  # fmt: skip


@pytest.fixture
def trainer(folder: Path, device: torch.device) -> Callable[..., Trainer]:
    """trainer(**changes to the settings): alexnet-mini, which has dropout, on changed pictures: 18 images, 3 steps."""

    def make(**changes: Any) -> Trainer:
        data: Data = image_folder(folder, 28, seed=0)
        chosen = settings(**changes)
        return Trainer(train.build(chosen, data), data, chosen, device)

    return make


def follow(
    model: nn.Module, reference: Callable[[Any, Tensor], Tensor], batches: list[tuple[Tensor, Tensor]], lr: float
) -> None:
    """Train `model` and its twin on torch.nn.functional side by side; compare every loss and the last weights."""
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    steps = [
        (lambda x: model(x), torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)),
        (lambda x: reference(twin, x), torch.optim.SGD(twin.parameters(), lr, momentum=0.9, weight_decay=5e-4)),
    ]
    losses: list[list[float]] = [[], []]
    for x, y in batches:
        for (forward, optimizer), seen in zip(steps, losses, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)
    for (name, ours), theirs, first in zip(
        model.named_parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-4, name
        # Few steps move a wide layer by less than that: the way that the weights went has to agree too.
        assert (ours - theirs).norm() < 1e-3 * (theirs - first).norm(), name


def test_lenet_follows_torch_for_20_steps(device: torch.device) -> None:
    data, size = mnist5k(), 32
    places = order(0, 0, len(data.train))
    batches = []
    for step in range(20):
        pairs = [data.train[0, int(i)] for i in places[step * size : (step + 1) * size]]
        x, y = torch.stack([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
        batches.append((x.to(device), y.to(device)))
    follow(LeNet().to(device), lenet.reference_forward, batches, lr=0.02)


@pytest.mark.slow
def test_alexnet_follows_torch_for_3_steps(device: torch.device) -> None:
    """Full width, on photographs of 224x224. Without dropout: torch draws other masks.

    The last layer is shrunk: with the loss near log(1000), 1e-5 is some ten roundings of it in fp32.
    """
    model = alexnet.alexnet(dropout=0.0).to(device)
    model.classifier[6].weight.data.mul_(0.05)
    x = photographs(6).to(device)
    y = torch.tensor([1, 20, 300, 4, 500, 60], device=device)
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 6, 2)]
    follow(model, alexnet.reference_forward, batches, lr=2e-4)


def test_lenets_keys() -> None:
    assert {key: tuple(value.shape) for key, value in LeNet().state_dict().items()} == LENET_KEYS


@pytest.mark.parametrize("size", [28, 32])
def test_lenet_is_torchs(size: int, device: torch.device) -> None:
    model, x = LeNet().to(device), torch.randn(3, 1, size, size, device=device)
    with torch.no_grad():
        torch.testing.assert_close(model(x), lenet.reference_forward(model, x), rtol=1e-5, atol=1e-5)


def test_lenet_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 30, 30\): LeNet takes \[N, C, 28, 28\] or"):
        LeNet()(torch.zeros(1, 1, 30, 30))


@pytest.mark.parametrize("size", [23, 28, 64])
def test_alexnet_mini_is_torchs(size: int, device: torch.device) -> None:
    model, x = AlexNetMini(5, channels=3).eval().to(device), torch.randn(2, 3, size, size, device=device)
    with torch.no_grad():
        torch.testing.assert_close(model(x), alexnet.reference_forward(model, x), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by the command, from start to end."""
    out = tmp_path_factory.mktemp("whole")
    command(folder, out, *SMALL)
    return out


def command(folder: Path, out: Path, *arguments: str, code: int = 0) -> str:
    """Run the command in this process; its output."""
    result = CliRunner().invoke(
        cli(), ["--model", "alexnet-mini", "--data", str(folder), "--out", str(out), *arguments]
    )
    assert result.exit_code == code, result.output
    return result.output


def cli() -> Any:
    import typer

    app = typer.Typer()
    app.command()(train.train)
    return app


def losses(out: Path) -> list[float]:
    found: list[float] = json.loads((out / "history.json").read_text())["step_losses"]
    return found


def same_weights(left: Path, right: Path) -> bool:
    a, b = (read_checkpoint(out / CHECKPOINT)["model"] for out in (left, right))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_command_writes_record_curve_and_checkpoint(whole: Path) -> None:
    record = json.loads((whole / "history.json").read_text())
    assert record["data"] == {"name": "colours", "classes": 3, "train": 18, "kept": 3} | {
        "fingerprint": record["data"]["fingerprint"]
    }
    assert [row["epoch"] for row in record["epochs"]] == [1, 2]
    assert len(record["step_losses"]) == 2 * record["steps_per_epoch"] == 6
    means = np.array(record["step_losses"]).reshape(2, 3) @ np.array([8, 8, 2]) / 18
    assert [row["train_loss"] for row in record["epochs"]] == pytest.approx(means)
    assert ("interpreter_wall_seconds" in record) == record["interpreter"]
    assert str(whole) not in json.dumps(record)
    with Image.open(whole / "curve.png") as picture:
        assert picture.format == "PNG"


def test_killed_run_is_resumed_bit_for_bit(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL inside an epoch; dropout, random changes and momentum go on as if nothing had been."""
    arguments = ["--model", "alexnet-mini", "--data", str(folder), "--out", str(tmp_path), *SMALL]
    code = (
        "import time, tileconv.kernels\n"
        "from tileconv.model import train, training\n"
        "save = training.Trainer.save\n"
        "def slowly(self, path):\n"
        "    save(self, path)\n"
        "    if self.progress.epoch == 1 and self.progress.step == 2: print('now', flush=True); time.sleep(60)\n"
        "training.Trainer.save = slowly\n"
        "import typer; typer.run(train.train)"
    )
    run = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments, "--checkpoint-every", "2"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert any(text == "now\n" for text in run.stdout)
    run.send_signal(signal.SIGKILL)
    run.wait()
    stopped = Progress(**read_checkpoint(tmp_path / CHECKPOINT)["progress"])
    assert (stopped.epoch, stopped.step) == (1, 2)
    command(folder, tmp_path, *SMALL, "--resume")
    assert losses(tmp_path) == losses(whole)
    assert same_weights(tmp_path, whole)


def test_stopped_by_the_time_limit_and_resumed(folder: Path, whole: Path, tmp_path: Path) -> None:
    """After every single step."""
    text = command(folder, tmp_path, *SMALL, "--time-limit", "1e-9", code=3)
    assert "stopped after epoch 0, step 1 of 3: --resume goes on from here" in text
    text = command(folder, tmp_path, *SMALL, "--time-limit", "1e-9", "--resume", code=3)
    assert "resumed after epoch 0, step 1" in text
    command(folder, tmp_path, *SMALL, "--resume", "--workers", "2")  # which change nothing either
    assert losses(tmp_path) == losses(whole)
    assert same_weights(tmp_path, whole)


def test_two_processes_train_as_one(folder: Path, whole: Path, tmp_path: Path) -> None:
    """The same batches, shared out, the last one unevenly; without dropout, whose masks differ."""
    arguments = ["--model", "lenet", "--data", str(folder), *SMALL[:-4], "--batch-size", "5", "--lr", "0.01"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "tileconv.model.train", *arguments, "--out", str(tmp_path / "two")],
        env=environment, check=True, timeout=120,
    )  # fmt: skip
    result = CliRunner().invoke(cli(), [*arguments, "--out", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=0, abs=1e-5)
    one, two = (read_checkpoint(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    assert (one["processes"], two["processes"], len(two["rng"])) == (1, 2, 2)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=0, atol=1e-5)
    rows = [[row["kept_accuracy"] for row in saved["progress"]["rows"]] for saved in (one, two)]
    assert rows[0] == rows[1]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def text_file(path: Path) -> None:
    path.write_text("weights")


def other_file(path: Path) -> None:
    torch.save({"model": {}}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_short, "checkpoint.pt is not a whole checkpoint: cut short, or another kind of file"),
        (empty, "checkpoint.pt is not a whole checkpoint"),
        (text_file, "checkpoint.pt is not a whole checkpoint"),
        (other_file, "checkpoint.pt is not a checkpoint of a training run"),
    ],
)
def test_damaged_checkpoint_is_refused_and_kept(
    folder: Path, whole: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    path = tmp_path / CHECKPOINT
    path.write_bytes((whole / CHECKPOINT).read_bytes())
    damage(path)
    before = path.read_bytes()
    assert says in command(folder, tmp_path, *SMALL, "--resume", code=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model": "lenet"},
            "model is 'lenet', the checkpoint's is 'alexnet-mini'; the model's conv1.weight has shape",
        ),
        ({"lr": 0.02, "seed": 1}, "lr is 0.02, the checkpoint's is 0.01; seed is 1, the checkpoint's is 0"),
    ],
    ids=["model", "settings"],
)
def test_checkpoint_of_another_run_changes_nothing(
    trainer: Callable[..., Trainer], whole: Path, changes: dict[str, Any], says: str
) -> None:
    other = trainer(**{"batch_size": 8} | changes)
    before, random = copy.deepcopy(other.model.state_dict()), torch.get_rng_state()
    with pytest.raises(TrainingError, match=r"checkpoint\.pt is of another run: ") as caught:
        other.load(whole / CHECKPOINT)
    assert says in str(caught.value)
    assert other.progress == Progress()
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_checkpoint_of_other_pictures(folder: Path, whole: Path, device: torch.device, tmp_path: Path) -> None:
    for path in folder.rglob("*.png"):
        if path.stem != "6":
            (tmp_path / path.parent.name).mkdir(exist_ok=True)
            (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    data, chosen = image_folder(tmp_path, 28), settings(batch_size=4)
    with pytest.raises(TrainingError, match=r"data .* holds other pictures than the checkpoint was trained on"):
        Trainer(train.build(chosen, data), data, chosen, device).load(whole / CHECKPOINT)


def test_new_run_does_not_overwrite_an_old_one(folder: Path, whole: Path) -> None:
    before = (whole / CHECKPOINT).read_bytes()
    assert "out holds checkpoint.pt of a run: --resume goes on with it" in command(folder, whole, *SMALL, code=2)
    assert (whole / CHECKPOINT).read_bytes() == before


def test_nothing_to_resume(folder: Path, tmp_path: Path) -> None:
    said = command(folder, tmp_path, "--resume", code=2)
    assert "checkpoint.pt: there is no checkpoint to resume from" in said


def test_failed_write_keeps_the_old_checkpoint(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = trainer(), tmp_path / CHECKPOINT
    run.save(path)
    before = path.read_bytes()

    def fail(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        run.save(path)
    assert path.read_bytes() == before


def test_interrupt_stops_after_the_step(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    run = trainer()

    def interrupt(now: Trainer) -> None:
        if now.progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with train.stop_on_signals() as stop:
        finished = run.fit(tmp_path, watch=interrupt, stop=stop)
    assert not finished
    assert read_checkpoint(tmp_path / CHECKPOINT)["progress"]["step"] == 2


def test_loss_that_is_not_finite_ends_the_run(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    run = trainer(lr=1e30)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch 1, step \d: lr=1e\+30 may be too high"):
        run.fit(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 0}, "epochs is 0: allowed are integers of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5: allowed are integers of at least 1"),
        ({"seed": -1}, "seed is -1: allowed are integers of at least 0"),
        ({"lr": math.nan}, "lr is nan: allowed are finite numbers above 0"),
        ({"momentum": 1.0}, "momentum is 1.0: allowed are numbers from 0 up to, not including, 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: allowed are finite numbers of at least 0"),
        ({"schedule": "linear"}, "schedule is 'linear': allowed are cosine, steps, constant"),
    ],
)
def test_settings_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        settings(**changes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "vgg"), "model is 'vgg': allowed are lenet, alexnet-mini"),
        (("--model", "lenet", "--image-size", "64"), "image_size is 64: lenet takes 28 and 32"),
        (("--image-size", "22"), "image_size is 22: alexnet-mini takes 23 or more"),
        (("--data", "mnist5k", "--image-size", "32"), "image_size is 32: the pictures of mnist5k have 28"),
        (("--data", "nowhere"), "data='nowhere' is neither 'mnist5k' nor a folder"),
        (("--time-limit", "0"), "time_limit is 0.0: allowed are minutes above 0"),
    ],
)
def test_arguments_refused(folder: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    assert says in command(folder, tmp_path, *arguments, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("steps", [1, 1, 0.01, 0.001]),
        ("cosine", [0.2, 1, 0.5, math.sin(math.pi / 190) ** 2]),
    ],
)
def test_schedules(name: str, factors: list[float]) -> None:
    """At the first step, just after the warm-up, half-way (of what follows the warm-up, for cosine) and at the last."""
    middle = 52.5 if name == "cosine" else 52
    steps = [0, 5, middle, 99]
    assert [schedule(name, step, 100) for step in steps] == pytest.approx(factors)  # type: ignore[arg-type]


def test_report_is_rendered_from_the_record(whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "history.json").read_text())
    path = curve.write_report(record, tmp_path)
    assert path.name == "train-alexnet-mini-colours.md"
    text = path.read_text()
    accuracy = record["epochs"][-1]["kept_accuracy"]
    assert f"**{100 * accuracy:.1f} % of the 3 kept pictures are named right** ({round(3 * accuracy)})" in text
    assert "(figures/train-alexnet-mini-colours.png)" in text
    assert json.loads((tmp_path / "data" / "train-alexnet-mini-colours.json").read_text()) == record
    assert (tmp_path / "figures" / "train-alexnet-mini-colours.png").read_bytes() == curve.draw(record)
