"""The convolution of textbooks as a baseline: what an explicit im2col takes in memory, and in modelled time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .cases import DTYPES, conv_problem
from .document import Block, Heading, Paragraph, Table
from .networks import known, network_layers
from .records import Im2col, Record

if TYPE_CHECKING:
    from tileconv.kernels.geometry import Conv2dProblem

# The example of the CS231n notes on convolutional networks: 96 filters 11x11 at stride 4 over 227x227x3.
NOTES = (227, 3, 96, 11, 4)


def matrix_product(problem: Conv2dProblem) -> Conv2dProblem:
    """The product that conv2d_im2col makes: a 1x1 convolution of the patches, which are its channels."""
    from tileconv.kernels.geometry import Conv2dProblem

    rows, _ = problem.im2col_shape
    return Conv2dProblem(problem.N, rows, problem.P, problem.Q, problem.K, 1, 1, groups=problem.groups)


def extra_bytes(problem: Conv2dProblem, itemsize: int) -> int:
    """Memory of an explicit im2col beside the operands: none for 1x1 filters at stride 1, whose image is the matrix."""
    from tileconv.kernels.geometry import im2col_bytes

    unpadded = problem.padding == ((0, 0), (0, 0))
    return 0 if problem.taps == 1 and problem.stride == (1, 1) and unpadded else im2col_bytes(problem, itemsize)


def im2col_rows(suite: str = "alexnet", batch: int = 128, dtype: str = "fp16", gpu: Any = None) -> list[dict[str, Any]]:
    """Rows (JSON of records.Im2col) for the convolutions of a suite; `gpu` is hardware.GPU, an H100 unless given.

    Raises ValueError for an unknown suite or dtype and for a batch below 1.
    """
    from tileconv.kernels.hardware import GPUS

    from .modelled import moved_us, product_us

    kind = DTYPES[known("dtype", dtype, DTYPES)]
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    gpu = gpu or GPUS["H100"]
    found = []
    for shape in network_layers(suite, batch):
        if shape.op != "conv2d":
            continue
        problem = conv_problem(shape)
        extra = extra_bytes(problem, kind.itemsize)
        matrix = extra // kind.itemsize
        found.append({
            "network": suite, "layer": shape.name, "batch": batch, "dtype": dtype, "gpu": gpu.name,
            "rows": problem.im2col_shape[0], "columns": problem.im2col_shape[1], "extra_bytes": extra,
            "operand_bytes": problem.bytes_least(kind.itemsize),
            "unfold_us": moved_us((math.prod(problem.x_shape), matrix), kind, gpu) if matrix else 0.0,
            "product_us": product_us(matrix_product(problem), kind, gpu),
            "direct_us": product_us(problem, kind, gpu),
        })  # fmt: skip
    return found


def im2col_section(record: Record) -> list[Block]:
    """The rows as a section of a report."""
    header = (
        "layer", "batch", "dtype", "matrix of an image", "extra MB", "times the operands", "modelled unfold us",
        "modelled product us", "modelled together us", "modelled direct us", "im2col / direct",
    )  # fmt: skip
    cells = tuple(_cells(row) for row in record.im2col)
    size, channels, filters, window, stride = NOTES
    matrix = _notes()
    times = math.prod(matrix) / (size * size * channels)
    text = (
        "conv2d_im2col unfolds the image into a matrix of patches and multiplies once. The matrix is memory that the "
        f"direct way does not take: {size}x{size}x{channels} under {filters} filters {window}x{window} at stride "
        f"{stride}, the usual example, becomes {_matrix(*matrix)}, {times:.1f} times the image. "
        "Extra memory is computed. Times are modelled from the tiles and published rates, and nobody's measurement."
    )
    return [Heading("Beside im2col"), Paragraph(text), Table(header, cells)]


def _notes() -> tuple[int, int]:
    from tileconv.kernels.geometry import Conv2dProblem

    size, channels, filters, window, stride = NOTES
    rows, columns = Conv2dProblem(1, channels, size, size, filters, window, window, (stride, stride)).im2col_shape
    return rows, columns


def _matrix(rows: int, columns: int) -> str:
    return f"{rows} x {columns}"


def _cells(row: Im2col) -> tuple[str, ...]:
    together = row.unfold_us + row.product_us
    return (
        f"{row.network} {row.layer}", str(row.batch), row.dtype, _matrix(row.rows, row.columns),
        f"{row.extra_bytes / 1e6:,.1f}", f"{row.extra_bytes / row.operand_bytes:.1f}", f"{row.unfold_us:.1f}",
        f"{row.product_us:.1f}", f"{together:.1f}", f"{row.direct_us:.1f}", f"{together / row.direct_us:.1f}",
    )  # fmt: skip
