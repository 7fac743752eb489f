"""Every refusal names the argument, its value and what is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import tileconv.kernels as tk
from tileconv.kernels import hardware, tiles

X, W, B = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3), torch.randn(4)

REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "input is a list": (TypeError, "input must be a torch.Tensor, not list", lambda: tk.conv2d([1], W)),
    "input rank": (ValueError, r"input has shape \(8, 6\)", lambda: tk.conv2d(X[0, :, :, 0], W)),
    "input dtype": (TypeError, "input has dtype torch.int64: allowed are torch.float16",
                    lambda: tk.conv2d(X.long(), W)),
    "complex": (TypeError, "input has dtype torch.complex64", lambda: tk.relu(X.to(torch.complex64))),
    "sparse": (TypeError, "input has layout", lambda: tk.relu(torch.eye(3).to_sparse())),
    "input device": (ValueError, "input is on mps: allowed are CUDA devices",
                     lambda: hardware.check_device(torch.device("mps"), "input")),
    "input on meta alone": (ValueError, "weight is on cpu, but input is on meta",
                            lambda: tk.conv2d(X.to("meta"), W)),
    "no channels": (ValueError, "only the batch may be empty", lambda: tk.conv2d(X[:, :0], W)),
    "weight device": (ValueError, "weight is on meta, but input is on cpu", lambda: tk.conv2d(X, W.to("meta"))),
    "weight dtype": (TypeError, "weight has dtype torch.float16, but input has torch.float32",
                     lambda: tk.conv2d(X, W.half())),
    "bias dtype": (TypeError, "bias has dtype torch.float64", lambda: tk.conv2d(X, W, B.double())),
    "weight rank": (ValueError, r"weight has shape \(4, 8, 3\)", lambda: tk.conv2d(X, W[..., 0])),
    "channels": (ValueError, r"input's 7 channels in 1 groups need weight.shape\[1\] = 7",
                 lambda: tk.conv2d(X[:, :7], W)),
    "groups": (ValueError, "groups is 3: it must divide", lambda: tk.conv2d(X, W, groups=3)),
    "groups of zero": (ValueError, "groups is 0: allowed is 1 or more", lambda: tk.conv2d(X, W, groups=0)),
    "bias shape": (ValueError, r"bias has shape \(3,\): allowed is \(4,\)", lambda: tk.conv2d(X, W, B[:3])),
    "stride of zero": (ValueError, "stride is 0: allowed is 1 or more", lambda: tk.conv2d(X, W, stride=0)),
    "stride of three": (ValueError, r"stride is \(1, 1, 1\)", lambda: tk.conv2d(X, W, stride=(1, 1, 1))),
    "fractional stride": (TypeError, "stride must be an int, not 1.5", lambda: tk.conv2d(X, W, stride=1.5)),
    "boolean dilation": (TypeError, "dilation must be an int, not True", lambda: tk.conv2d(X, W, dilation=True)),
    "stride beyond what is counted": (ValueError, "stride is 1099511627776: allowed are 1 to 268435456",
                              lambda: tk.conv2d(X, W, stride=2**40)),
    "size beyond what is counted": (ValueError, "output_size is 268435457: allowed are 1 to 268435456",
                            lambda: tk.adaptive_avg_pool2d(X, (1, 2**28 + 1))),
    "bool of numpy": (TypeError, "stride must be an int, not np.True_", lambda: tk.conv2d(X, W, stride=np.True_)),
    "bool tensor": (TypeError, r"groups must be an int, not tensor\(True\)",
                    lambda: tk.conv2d(X, W, groups=torch.tensor(True))),
    "tensor of one": (TypeError, r"dilation must be an int, not tensor\(\[1\]\)",
                      lambda: tk.conv2d(X, W, dilation=torch.tensor([1]))),
    "negative padding": (ValueError, "padding is -1: allowed is 0 or more", lambda: tk.conv2d(X, W, padding=-1)),
    "padding word": (ValueError, "padding is 'full': allowed are 'valid', 'same'",
                     lambda: tk.conv2d(X, W, padding="full")),
    "same with stride": (ValueError, "padding='same' needs stride 1",
                         lambda: tk.conv2d(X, W, stride=2, padding="same")),
    "no output": (ValueError, "input of 6x6 is too small", lambda: tk.conv2d(X, W, dilation=3)),
    "activation": (ValueError, "activation is 'gelu': allowed are None, 'relu'",
                   lambda: tk.conv2d(X, W, activation="gelu")),
    "precision": (ValueError, "precision is 'fp8': allowed are 'ieee', 'tf32'",
                  lambda: tk.conv2d(X, W, precision="fp8")),
    "linear channels": (ValueError, r"needs \[..., 5\]", lambda: tk.linear(torch.ones(2, 4), torch.ones(3, 5))),
    "linear weight": (ValueError, r"weight has shape \(3,\)", lambda: tk.linear(torch.ones(2, 3), torch.ones(3))),
    "pool padding": (ValueError, r"padding=\(2, 2\) must be at most half of kernel_size=\(3, 3\)",
                     lambda: tk.max_pool2d(X, 3, padding=2)),
    "pool kernel": (ValueError, "kernel_size is 0", lambda: tk.max_pool2d(X, 0)),
    "pool too large": (ValueError, "too small", lambda: tk.max_pool2d(X, 7)),
    "pool of a vector": (ValueError, r"input has shape \(4,\)", lambda: tk.max_pool2d(B, 2)),
    "adaptive size": (ValueError, "output_size is 0", lambda: tk.adaptive_avg_pool2d(X, 0)),
    "adaptive triple": (ValueError, r"output_size is \(1, 2, 3\)", lambda: tk.adaptive_avg_pool2d(X, (1, 2, 3))),
    "dropout share": (ValueError, "p is 1.5: allowed is 0 to 1", lambda: tk.dropout(X, 1.5)),
    "dropout word": (TypeError, "p must be a number", lambda: tk.dropout(X, "half")),
}  # fmt: skip


@pytest.mark.parametrize(("error", "words", "call"), REFUSED.values(), ids=REFUSED)
def test_refusals(error: type[Exception], words: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocated.append(args) or real(*args, **kwargs))
    with pytest.raises(error, match=words):
        call()
    assert not allocated


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_whatever_is_an_index_is_an_int(kind: Callable[[int], Any]) -> None:
    one, two, four = (kind(value) for value in (1, 2, 4))
    pairs = [
        (tk.conv2d(X, W[:, :4], None, (one, two), two, one, groups=two), tk.conv2d(X, W[:, :4], None, (1, 2), 2, 1, 2)),
        (tk.conv_transpose2d(X[:, :4], W, None, two, one, one), tk.conv_transpose2d(X[:, :4], W, None, 2, 1, 1)),
        (tk.conv2d_max_pool2d(X, W, stride=one, pool_kernel_size=two), tk.conv2d_max_pool2d(X, W, pool_kernel_size=2)),
        (tk.max_pool2d(X, two, one, one), tk.max_pool2d(X, 2, 1, 1)),
        (tk.avg_pool2d(X, two, divisor_override=four), tk.avg_pool2d(X, 2, divisor_override=4)),
        (tk.adaptive_avg_pool2d(X, two), tk.adaptive_avg_pool2d(X, 2)),
        (tk.softmax(X, one), tk.softmax(X, 1)),
        (tk.nn.Conv2d(8, 4, (four, two))(X).shape, (2, 4, 3, 5)),
    ]
    for got, want in pairs:
        assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


OPS = torch.ops.tileconv
GEOMETRY = ((1, 1), (0, 0, 0, 0), (1, 1), 1, "ieee")
WINDOW = ((2, 2), (2, 2), (0, 0), (1, 1), False)
DY, POOLED, SWITCH = torch.randn(2, 4, 4, 4), torch.randn(2, 8, 3, 3), torch.zeros(2, 8, 3, 3, dtype=torch.uint8)
STRANGERS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "shape for dgrad": (ValueError, r"grad has shape \(2, 4, 4, 3\): allowed is \(2, 4, 4, 4\)",
                        lambda: OPS.conv2d_dgrad(DY[..., :3], W, X.shape, *GEOMETRY, False)),
    "dtype for dgrad": (TypeError, "grad has dtype torch.float16: allowed is torch.float32",
                        lambda: OPS.conv2d_dgrad(DY.half(), W, X.shape, *GEOMETRY, False)),
    "shape for wgrad": (ValueError, "grad has shape", lambda: OPS.conv2d_wgrad(DY[:1], X, W.shape, *GEOMETRY)),
    "dtype for wgrad": (TypeError, "grad has dtype", lambda: OPS.conv2d_wgrad(DY.double(), X, W.shape, *GEOMETRY)),
    "shape for relu": (ValueError, "grad has shape", lambda: OPS.relu_backward(DY, DY[0])),
    "shape for relu and bias": (ValueError, "grad has shape", lambda: OPS.relu_bias_grad(DY, DY[:1])),
    "switch of another pool": (
        ValueError, r"switch has shape \(2, 8, 2, 3\): allowed is \(2, 8, 3, 3\)",
        lambda: OPS.max_pool2d_backward(POOLED, SWITCH[:, :, :2], None, X.shape, *WINDOW, False)),
    "switch of another window": (TypeError, "switch has dtype torch.int32: allowed is torch.uint8",
                                 lambda: OPS.max_pool2d_indices(SWITCH.int(), X.shape, *WINDOW)),
    "gradient of another pool": (ValueError, "grad has shape",
                                 lambda: OPS.max_pool2d_backward(DY, SWITCH, None, X.shape, *WINDOW, False)),
}  # fmt: skip


@pytest.mark.parametrize(("error", "words", "call"), STRANGERS.values(), ids=STRANGERS)
def test_tensors_that_do_not_belong(error: type[Exception], words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        call()


def test_autograd_refuses_a_gradient_of_another_shape() -> None:
    y = tk.conv2d(X, W.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        y.backward(torch.ones(1))


def test_a_tile_override_is_honoured_or_refused() -> None:
    x, w = torch.randn(1, 5, 6, 6), torch.randn(4, 5, 3, 3)
    with pytest.raises(ValueError, match="multiples of 16 bytes"), tiles.override(formulation="pixel"):
        tk.conv2d(x, w)
    with pytest.raises(ValueError, match="needs stride 1"), tiles.override(formulation="box"):
        tk.conv2d(X, W, stride=2)
    with pytest.raises(ValueError, match="block_k=24 must be a power of two"), tiles.override(block_k=24):
        tk.conv2d(X, W)
    with pytest.raises(ValueError, match="num_warps=3: allowed are 1, 2, 4"), tiles.override(num_warps=3):
        tk.conv2d(X, W)
    with pytest.raises(ValueError, match="num_stages=0 must be at least 1"), tiles.override(num_stages=0):
        tk.conv2d(X, W)
    with pytest.raises(ValueError, match=r"box=\(-4, -4, 1\) must be images, rows"), tiles.override(box=(-4, -4, 1)):
        tk.conv2d(X, W)
    with pytest.raises(ValueError, match="allowed are pixel, box, gather"), tiles.override(formulation="winograd"):
        pass
    with pytest.raises(TypeError, match="override has no field"), tiles.override(blocks=3):
        pass


@pytest.mark.parametrize(
    ("gpu", "wish", "error", "words"),
    [
        (True, "", ValueError, "input is on the CPU: move it to the GPU"),
        (False, "0", RuntimeError, "TILECONV_INTERPRET=0 refuses"),
        (False, "", RuntimeError, "import tileconv.kernels first"),
    ],
    ids=["a GPU is there", "interpreter refused", "triton came first"],
)
def test_cpu_tensors_where_triton_compiles(
    gpu: bool, wish: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_interprets", False)
    monkeypatch.setattr(hardware, "has_gpu", lambda: gpu)
    monkeypatch.setenv("TILECONV_INTERPRET", wish)
    with pytest.raises(error, match=words):
        tk.conv2d(X, W)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "TILECONV"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment, check=False)


CALL = "import torch, tileconv.kernels as tk; print(tk.relu(torch.tensor([-1.0, 2.0])).tolist())"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize(
    ("code", "environment", "output", "complaint"),
    [
        (CALL, {}, "[0.0, 2.0]", "tileconv runs in Triton's interpreter"),
        (CALL, {"TRITON_INTERPRET": "1"}, "[0.0, 2.0]", ""),
        (CALL, {"TILECONV_INTERPRET": "0"}, "", "TILECONV_INTERPRET=0 refuses Triton's interpreter"),
        (CALL, {"TILECONV_INTERPRET": "0", "TRITON_INTERPRET": "1"}, "", "unset TRITON_INTERPRET"),
        (CALL, {"TILECONV_INTERPRET": "2"}, "", "use 0 (never) or 1 (always)"),
        ("import triton\n" + CALL, {}, "", "import tileconv.kernels first"),
        ("import sys; sys.modules['triton'] = None\n" + CALL, {}, "", "needs the package triton"),
        ("import torch, sys; sys.platform = 'darwin'\n" + CALL, {}, "", "tileconv needs Linux"),
    ],
    ids=["by itself", "asked for", "refused", "both", "misspelt", "triton came first", "no triton", "not Linux"],
)
def test_how_the_interpreter_starts(code: str, environment: dict[str, str], output: str, complaint: str) -> None:
    result = run(code, **environment)
    assert result.stdout.strip() == output
    assert complaint in result.stderr
    if not complaint:
        assert result.stderr == ""
