"""What backward keeps, counted against arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import tileconv.kernels as tk
from tileconv.bench.memory import alexnet_saved, saved_bytes


def test_a_max_pool_keeps_a_byte_an_output_and_torch_nine_and_more() -> None:
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    outputs = 2 * 4 * 4 * 4
    assert saved_bytes(lambda x: tk.max_pool2d(x, 3, 2), x, []) == outputs
    assert saved_bytes(lambda x: F.max_pool2d(x, 3, 2), x, []) == 8 * outputs + 4 * x.numel()
    assert saved_bytes(lambda x: tk.max_pool2d(x, 3, 2, activation="relu"), x, []) == 5 * outputs


def test_a_fused_convolution_keeps_its_input_and_its_output() -> None:
    x, w = torch.randn(2, 4, 9, 9, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    y = tk.conv2d(x, w, activation="relu")
    assert saved_bytes(lambda x: tk.conv2d(x, w, activation="relu"), x, [w]) == 4 * (x.numel() + y.numel())
    assert saved_bytes(lambda x: tk.conv2d(x, w.detach()), x, [w]) == 0


def test_alexnet_keeps_no_more_than_pytorch() -> None:
    rows = {row["layer"]: row for row in alexnet_saved()}
    assert all(row["tileconv"] <= row["pytorch"] for row in rows.values())
    assert rows["pool1"]["tileconv"] == 64 * 27 * 27
    assert rows["conv3"]["tileconv"] == 4 * 13 * 13 * (192 + 384)
    for conv, pool, conv_output, pooled in (("conv2", "pool2", 192 * 27 * 27, 192 * 13 * 13),
                                            ("conv5", "pool5", 256 * 13 * 13, 256 * 6 * 6)):  # fmt: skip
        together = rows[f"{conv} + {pool}"]["tileconv"]
        assert rows[conv]["tileconv"] + rows[pool]["tileconv"] - together == 4 * (conv_output - pooled)
