"""The calculator against published sums, against the networks themselves, and against measured receptive fields."""

import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tileconv.model import shapes as calculator
from tileconv.model.chains import channels_of
from tileconv.model.shapes import network, output_size, shapes, totals
from tileconv.model.shapes_command import shapes_command

RUNNER = CliRunner()
PARAMETERS = {
    "alexnet": 61_100_840,
    "alexnet-2012": 60_965_224,
    "alexnet-mini": None,
    "googlenet": 6_624_904,
    "lenet": 61_706,
    "lenet-visualiser": None,
    "vgg16": 138_357_544,
}


def rows_of(name: str, **arguments: object) -> list[calculator.Row]:
    model = network(name, **arguments)
    size = calculator.SIZES[name]
    return shapes(model, (2, channels_of(model), size, size))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_network_and_as_published(name: str) -> None:
    model = network(name, **({"aux_logits": False} if name == "googlenet" else {}))
    counted = totals(rows_of(name)).parameters
    assert counted == sum(p.numel() for p in model.parameters())
    assert PARAMETERS[name] in (None, counted)


def test_alexnet_2012_gives_the_papers_numbers() -> None:
    rows = {row.name: row for row in rows_of("alexnet-2012")}
    sums = totals(rows.values())
    assert rows["conv1"].parameters == 34_944  # 96 x (11 x 11 x 3 + 1)
    assert round(sums.parameters / 1e6) == 61  # the abstract's "60 million"
    assert sums.convolution_neurons == 650_080  # the abstract's "650,000"
    assert sums.neurons == 659_272
    # Figure 2 lists the layers' neurons; it has 253,440 for the first, 55 x 48 x 96, where 55 x 55 x 96 are computed.
    assert [row.neurons for row in rows.values() if row.neurons] == [
        290_400, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000
    ]  # fmt: skip
    assert [rows[f"conv{i}"].receptive_field[0] for i in range(1, 6)] == [11, 51, 99, 131, 163]
    assert rows["pool5"].jump == (32, 32)


def test_alexnet_2012_divides_and_torchvisions_does_not() -> None:
    shapes(network("alexnet-2012"), (1, 3, 227, 227), strict=True)
    shapes(network("alexnet"), (1, 3, 224, 224))
    with pytest.raises(ValueError, match=r"conv1: W=224, F=11, S=4, P=2: .* = 55\.25, which is not whole"):
        shapes(network("alexnet"), (1, 3, 224, 224), strict=True)


def test_the_teaching_example_floors_as_torch_and_strictly_raises() -> None:
    assert output_size(10, 3, 2) == nn.MaxPool2d(3, 2)(torch.zeros(1, 1, 10, 10)).shape[2] == 4
    with pytest.raises(ValueError, match=r"W=10, F=3, S=2, P=0: .*= 4\.5, which is not whole"):
        output_size(10, 3, 2, strict=True)
    assert output_size(10, 3, 1, strict=True) == 8
    assert output_size(227, 11, 4, strict=True) == 55
    with pytest.raises(ValueError, match=r"a window of 11 does not fit into 5 pixels"):
        output_size(5, 11)
    with pytest.raises(ValueError, match=r"stride is 0: allowed"):
        output_size(5, 3, 0)


def test_volumes_are_those_that_torch_computes() -> None:
    chain = [
        ("a", nn.Conv2d(3, 8, (5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2))),
        ("b", nn.BatchNorm2d(8)),
        ("c", nn.ReLU()),
        ("d", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        ("e", nn.Conv2d(8, 12, 3, padding="same", groups=4, bias=False)),
        ("f", nn.AvgPool2d(2)),
        ("g", nn.LPPool2d(2, 2)),
        ("h", nn.AdaptiveAvgPool2d((2, 3))),
        ("i", nn.Flatten()),
        ("j", nn.Linear(72, 5)),
    ]
    x = torch.zeros(2, 3, 37, 50)
    expected = {}
    for name, m in chain:
        x = m(x)
        expected[name] = tuple(x.shape)
    rows = shapes(chain, (2, 3, 37, 50))
    assert {row.name: row.shape for row in rows} == {name: expected[name] for name in "adefghj"}
    assert totals(rows).parameters == sum(p.numel() for _, m in chain for p in m.parameters())
    assert rows[1].flops == 0
    assert rows[0].flops == 2 * math.prod(expected["a"]) * 3 * 5 * 3
    assert rows[0].memory() == 4 * math.prod(expected["a"])


def test_receptive_fields_are_those_that_gradients_reach() -> None:
    chain = [
        ("a", nn.Conv2d(1, 1, 5, stride=2, bias=False)),
        ("b", nn.Conv2d(1, 1, 3, dilation=2, bias=False)),
        ("c", nn.AvgPool2d(3, 2)),
        ("d", nn.Conv2d(1, 1, 3, bias=False)),
    ]
    x = torch.zeros(1, 1, 79, 79, requires_grad=True)
    y = x
    for _, m in chain:
        if isinstance(m, nn.Conv2d):
            nn.init.ones_(m.weight)
        y = m(y)
    last = shapes(chain, (1, 1, 79, 79))[-1]
    spans = []
    for place in (2, 3):
        (grad,) = torch.autograd.grad(y[0, 0, place, place], x, retain_graph=True)
        touched = grad[0, 0].any(1).nonzero()
        spans.append((int(touched.min()), int(touched.max())))
    assert spans[0][1] - spans[0][0] + 1 == last.receptive_field[0]
    assert spans[1][0] - spans[0][0] == last.jump[0]


def test_an_inception_module_sums_its_branches() -> None:
    rows = {row.name: row for row in rows_of("googlenet")}
    module = rows["inception3a"]
    assert module.shape == (2, 256, 28, 28)
    assert module.flops == sum(part.flops for part in module.parts)
    assert len(module.parts) == 7
    assert rows["conv1"].parameters == 64 * 3 * 7 * 7 + 2 * 64  # with the batch normalisation's
    assert rows["maxpool4"].shape == (2, 832, 7, 7)


@pytest.mark.parametrize(
    ("layers", "shape", "error", "message"),
    [
        ([("a", nn.Conv2d(3, 4, 3))], (1, 1, 8, 8), ValueError, "a: it takes 3 channels and is given 1"),
        ([("a", nn.Linear(9, 4))], (1, 1, 8, 8), ValueError, "a: it takes 9 inputs and is given 64, of 1x8x8"),
        ([("a", nn.MaxPool2d(9))], (1, 1, 8, 8), ValueError, "a: input of 8x8 is too small"),
        ([("a", nn.Flatten()), ("b", nn.MaxPool2d(2))], (1, 1, 8, 8), ValueError, "b: a MaxPool2d takes"),
        ([("a", nn.LSTM(3, 4))], (1, 1, 8, 8), ValueError, "takes"),
        ([], (8, 8), ValueError, "input_shape is"),
        ([], (1, 0, 8, 8), ValueError, "input_shape is"),
        (nn.LSTM(3, 4), (1, 1, 8, 8), TypeError, "model is a LSTM"),
    ],
)  # fmt: skip
def test_bad_input_is_named(layers: object, shape: tuple[int, ...], error: type[Exception], message: str) -> None:
    if message == "takes":
        error, message = TypeError, "a is a LSTM: no layer"
    with pytest.raises(error, match=message):
        shapes(layers, shape)  # type: ignore[arg-type]


def run(*arguments: str) -> tuple[int, str]:
    import typer

    app = typer.Typer()
    app.command()(shapes_command)
    result = RUNNER.invoke(app, list(arguments))
    return result.exit_code, result.output


def test_the_command_prints_the_table_and_names_errors() -> None:
    code, text = run("alexnet-2012", "--strict")
    assert code == 0
    assert "34,944" in text
    assert "parameters: 60,965,224" in text
    assert "neurons: 650,080 in the convolutions" in text
    assert run("googlenet", "--parts")[0] == 0
    for wrong, message in (
        (("resnet",), "allowed are alexnet"),
        (("alexnet", "--strict"), "not whole"),
        (("lenet", "--size", "30"), "LeNet takes"),
        (("vgg16", "--batch", "0"), "at least 1"),
    ):
        code, text = run(*wrong)
        assert code == 2
        assert message in text
