"""Modelled times of layers outside the suites, and the two tables made of them: dense evaluation, and im2col."""

import dataclasses
import types

import pytest
import torch
from typer.testing import CliRunner

from tileconv.bench.cases import Case, conv_problem, launches, shape_of
from tileconv.bench.cli import app
from tileconv.bench.dense import dense_rows, dense_table
from tileconv.bench.im2col import extra_bytes, im2col_rows, im2col_section, matrix_product
from tileconv.bench.job import rows_of
from tileconv.bench.modelled import forward_us, moved_us, product_us
from tileconv.bench.predictions import predictions
from tileconv.bench.records import Im2col
from tileconv.kernels import functional as TF
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.hardware import GPUS
from tileconv.model.shapes import network, shapes

H100 = GPUS["H100"]


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv5", "fc6"])
def test_a_layer_has_the_reports_time(layer: str) -> None:
    """That of the launches, which the report adds up."""
    case = Case("alexnet", layer, "fprop", 128, "fp16")
    rows = predictions(case, launches(case, H100), H100)
    ours = product_us(conv_problem(shape_of(case)), torch.float16, H100)
    assert ours == pytest.approx(sum(row["modelled_us"] for row in rows), rel=0.02)


def test_a_networks_time_is_its_layers() -> None:
    rows = shapes(network("alexnet-2012"), (4, 3, 227, 227))
    expected = 0.0
    for row in rows:
        if isinstance(row.problem, Conv2dProblem):
            expected += product_us(row.problem, torch.float16, H100)
        elif row.problem is None:  # the two norms read and write each element
            expected += moved_us([2 * row.elements], torch.float16, H100)
        else:
            p = row.problem
            expected += moved_us([4 * p.C * p.H * p.W, row.elements], torch.float16, H100)
    assert forward_us(rows, torch.float16, H100) == pytest.approx(expected)


def test_an_inception_module_is_its_branches_and_their_stacking() -> None:
    (row,) = [row for row in shapes(network("googlenet"), (2, 3, 224, 224)) if row.name == "inception3a"]
    branches = forward_us(row.parts, torch.float16, H100)
    stacked = moved_us([2 * 2 * 256 * 28 * 28], torch.float16, H100)
    assert forward_us([row], torch.float16, H100) == pytest.approx(branches + stacked)


# Dense evaluation


def test_dense_evaluation_beside_crops() -> None:
    """The notes' example: 6x6 scores of a 384x384 picture by a network for 224x224."""
    rows = {(row.network, row.way): row for row in dense_rows(["alexnet", "vgg16"])}
    assert {row.scores for row in rows.values()} == {36}
    assert rows["alexnet", "dense"].flops == 8_259_450_240
    assert rows["vgg16", "dense"].flops == 99_102_228_480
    for name, crop in (("alexnet", 1_428_376_960), ("vgg16", 30_940_528_640)):
        dense, batch, single = (rows[name, way] for way in ("dense", "crops, one batch", "crops, one by one"))
        assert batch.flops == single.flops == 36 * crop
        assert single.modelled_us > batch.modelled_us > dense.modelled_us
        whole = shapes(network(name), (1, 3, 224, 224))
        # A crop through the convolutions is a crop through the network: the same problems, but for AlexNet's and VGG's
        # average pools, which change nothing at this size, and the fully connected layers as convolutions.
        convolutions = [r for r in whole if r.kind == "conv2d"]
        assert single.modelled_us > 36 * forward_us(convolutions, torch.float16, H100)
    cells = dense_table(list(rows.values())).rows
    assert cells[1][5] == f"{36 * 1_428_376_960 / 8_259_450_240:.1f}" == "6.2"
    assert cells[2][2] == "36 x 1 of 224x224"


def test_the_dense_command() -> None:
    result = CliRunner().invoke(app, ["dense", "--network", "alexnet"])
    assert result.exit_code == 0, result.output
    assert "8.26" in result.output
    assert "51.42" in result.output
    assert "nobody measured" in result.output
    for arguments, says in (
        (["--network", "resnet"], "network='resnet' is unknown"),
        (["--size", "200"], "size=200 must be at least the 224 pixels"),
        (["--arch", "gfx942"], "arch='gfx942' is unknown"),
    ):
        result = CliRunner().invoke(app, ["dense", *arguments])
        assert result.exit_code == 2
        assert says in result.output


# im2col


def test_im2col_of_the_notes_example(device: torch.device) -> None:
    """227x227x3 under 11x11 filters at stride 4: 363 x 3025, and the library's own matrix is as large."""
    problem = Conv2dProblem(1, 3, 227, 227, 96, 11, 11, (4, 4))
    assert problem.im2col_shape == (363, 3025)
    assert extra_bytes(problem, 4) == 4 * 363 * 3025
    columns = TF.unfold(torch.zeros(1, 3, 227, 227, device=device), 11, stride=4)
    assert columns.shape == (1, 363, 3025)
    assert columns.nbytes == extra_bytes(problem, 4)


def test_im2col_needs_none_for_single_pixels() -> None:
    problem = Conv2dProblem(2, 8, 5, 5, 4, 1, 1)
    assert extra_bytes(problem, 2) == 0
    assert extra_bytes(dataclasses.replace(problem, stride=(2, 2)), 2) == 2 * 2 * 8 * 3 * 3


def test_the_matrix_product_is_the_convolution() -> None:
    problem = Conv2dProblem(3, 6, 9, 8, 10, 3, 2, (2, 1), ((1, 1), (0, 0)), groups=2)
    product = matrix_product(problem)
    assert product.flops == problem.flops
    assert product.y_shape == problem.y_shape


def test_im2col_rows_of_alexnet() -> None:
    rows = rows_of(Im2col, im2col_rows("alexnet", batch=128))
    assert [(row.layer, row.rows, row.columns) for row in rows] == [
        ("conv1", 363, 3025), ("conv2", 1600, 729), ("conv3", 1728, 169), ("conv4", 3456, 169), ("conv5", 2304, 169),
    ]  # fmt: skip
    for row in rows:
        problem = conv_problem(shape_of(Case("alexnet", row.layer, "fprop", 128, "fp16")))
        assert row.extra_bytes == 2 * 128 * row.rows * row.columns
        assert row.operand_bytes == problem.bytes_least(2)
        # The matrix is written once, and DRAM's published rate bounds that.
        assert row.unfold_us > 1e6 * row.extra_bytes / H100.dram
        assert row.direct_us == product_us(problem, torch.float16, H100)
        assert row.unfold_us + row.product_us > row.direct_us
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        im2col_rows("alexnet", batch=0)


def test_the_section_of_a_report() -> None:
    rows = rows_of(Im2col, im2col_rows("alexnet", batch=1))
    heading, text, table = im2col_section(types.SimpleNamespace(im2col=rows))  # type: ignore[arg-type]
    assert heading.text == "Beside im2col"  # type: ignore[union-attr]
    assert "363 x 3025, 7.1 times the image" in text.text  # type: ignore[union-attr]
    cells = table.rows[1]  # type: ignore[union-attr]
    assert cells[:5] == ("alexnet conv2", "1", "fp16", "1600 x 729", f"{2 * 1600 * 729 / 1e6:.1f}")
    together = rows[1].unfold_us + rows[1].product_us
    assert cells[8:] == (f"{together:.1f}", f"{rows[1].direct_us:.1f}", f"{together / rows[1].direct_us:.1f}")
