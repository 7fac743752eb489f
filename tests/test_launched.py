"""What a call launches is what `tileconv inspect` compiles: the same kernels, specialised alike by triton's own way."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tileconv.bench import inspect
from tileconv.kernels import hardware
from tileconv.kernels.geometry import Conv2dProblem
from tileconv.kernels.launch import conv
from tileconv.kernels.ops import registry

# Calls on CPU tensors as if a GPU were there. Triton's own JITFunction.run binds and specialises the arguments, and
# would now compile: that step says what it was given instead.
PROBE = """
import json, sys
from types import SimpleNamespace
import tileconv.kernels
import torch, triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from tileconv.bench import cases, inspect, passes
from tileconv.kernels import hardware
from tileconv.kernels.launch import plans

found = []

def seen(kernel, source, options):
    names = [*source.signature]
    path = lambda at: ".".join([names[at[0]], *map(str, at[1:])])
    given = {"signature": source.signature, "constants": {path(k): str(v) for k, v in source.constants.items()},
             "attributes": {path(k): str(v) for k, v in source.attrs.items()}}
    return [kernel.__name__, {k: {n: str(v) for n, v in part.items()} for k, part in given.items()}
            | {"options": {k: str(v) for k, v in options.items()}}]

def stop(kernel, key, signature, device, constexprs, options, attrs, warmup):
    found.append(seen(kernel, ASTSource(kernel, signature, constexprs, attrs), options.__dict__))

JITFunction._do_compile = stop
rows = []
for arch, layers in (("sm_90", ()), ("sm_80", ("conv2d", "conv1d", "linear"))):
    gpu = inspect.gpu_of(arch)
    hardware.gpu_of, hardware.check_device = lambda device: gpu, lambda device, argument: None
    plans.forget()
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda device: 0,
        get_current_target=lambda: inspect.target(arch)))
    for case in cases.cases("layers", 4, ["fp16"], layers=layers):
        t = passes.placed(passes.operands(case, "cpu"), cases.shape_of(case), "native")
        with torch.no_grad():
            call = passes.work("ours", case, cases.shape_of(case), t)
            found.clear()
            call()
        planned = []
        for launch in cases.launches(case, gpu):
            special = inspect.specialise(launch, arch)
            planned.append(seen(launch.kernel, special.source, special.options))
        rows.append([case.layer, case.pass_, arch, found[:], planned])
json.dump(rows, sys.stdout)
"""
# A plan has dropout and the positions of maxima, as in training; a call that wants no gradients has neither.
TRAINS = {("linear", "fprop"), ("linear", "backward"), ("max_pool2d", "forward"), ("adaptive_max_pool2d", "forward"),
          ("conv2d_max_pool2d", "forward")}  # fmt: skip


@pytest.mark.slow
def test_calls_launch_what_is_inspected(tmp_path: Path) -> None:
    file = tmp_path / "probe.py"
    file.write_text(PROBE)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=os.environ | inspect.COMPILING)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len({layer for layer, *_ in rows}) > 20
    apart = []
    for layer, pass_, arch, launched, planned in rows:
        assert launched, (layer, pass_, arch)
        if (layer, pass_) not in TRAINS and launched != planned:
            apart.append((layer, pass_, arch, launched, planned))
    assert apart == []


def test_kernels_run_on_the_gpu_that_their_tensors_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current one."""
    current = [0]

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    call = registry.on_its_gpu(lambda scale, x: (current[-1], scale))
    assert call(2.0, torch.empty(1).as_subclass(Elsewhere)) == (1, 2.0)
    assert current == [0]
    current.append(1)
    monkeypatch.setattr(torch.cuda, "device", None)
    assert call(3.0, torch.empty(1).as_subclass(Elsewhere)) == (1, 3.0), "at no cost where it is the current one"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_images_of_one_pixel_are_loaded_16_bytes_at_a_time(dtype: torch.dtype) -> None:
    """PyTorch says 1 for the pitches of their rows and columns where they are views of a matrix."""
    problem = Conv2dProblem(128, 512, 1, 1, 256, 1, 1)

    def planned(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> list[dict[str, object]]:
        wanted = {"gpu": hardware.GPUS["A100"], "precision": "tf32" if dtype == torch.float32 else "ieee"}
        launches = [*conv.plan_fprop(problem, x, w, None, y, **wanted), *conv.plan_dgrad(problem, y, w, x, **wanted),
                    *conv.plan_wgrad(problem, y, x, w, **wanted)]  # fmt: skip
        numbers = [{k: v for k, v in launch.arguments.items() if isinstance(v, int)} for launch in launches]
        assert all(n["UNIT_X"] == n["UNIT_Y"] == 16 for n in numbers if "UNIT_X" in n)
        return numbers

    shapes = (problem.x_shape, problem.w_shape, problem.y_shape)
    views = [torch.empty(shape[:2], dtype=dtype, device="meta")[:, :, None, None] for shape in shapes]
    assert [view.stride() for view in views] == [(512, 1, 1, 1), (512, 1, 1, 1), (256, 1, 1, 1)]
    assert planned(*views) == planned(
        *(torch.empty(s, dtype=dtype, device="meta", memory_format=torch.channels_last) for s in shapes)
    )
