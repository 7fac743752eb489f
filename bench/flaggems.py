"""FlagGems' Triton convolutions for the same layers, where the package is installed: never a dependency.

`import flag_gems` wants a GPU, so its conv2d.py is loaded alone, as it lies in the package, beside a stand-in for the
two helpers that it imports; the tiles are those of the package's list for NVIDIA.  Its input gradient is its forward
kernel on turned filters, into a 4-byte output.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .cases import DTYPES, Case, conv_problem, shape_of

LISTS = {"fprop": "conv2d_forward", "dgrad": "conv2d_forward", "wgrad": "conv2d_backward_weight"}
NEEDS = "pip install --no-deps flag_gems pyyaml"


def folder() -> Path | None:
    """Where the installed package lies, without importing it."""
    spec = importlib.util.find_spec("flag_gems")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def missing() -> str | None:
    """Why FlagGems cannot be compared here; None if it can."""
    place = folder()
    if place is None or importlib.util.find_spec("yaml") is None:
        return f"FlagGems is not installed here ({NEEDS}), so it is not compared"
    files = [place / "ops" / "conv2d.py", _list_of_tiles(place)]
    lost = [file.name for file in files if not file.is_file()]
    return f"this version of FlagGems has no {lost[0]}, so it is not compared" if lost else None


def takes(case: Case) -> bool:
    """Whether FlagGems has a tensor-core kernel for a case: it multiplies fp32 without TF32."""
    return case.pass_ in LISTS and shape_of(case).op == "conv2d" and case.dtype in ("fp16", "bf16")


def configs(pass_: str) -> list[Any]:
    """The package's list of tiles for a pass, named as Inductor's are: rows x columns, depth."""
    place = folder()
    assert place is not None
    data = importlib.import_module("yaml").safe_load(_list_of_tiles(place).read_text())
    found = []
    for item in data[LISTS[pass_]]:
        names = dict(item["META"])
        rows, depth = ("BLOCK_CI_HK_WK", "BLOCK_NO") if pass_ == "wgrad" else ("BLOCK_NI_HO_WO", "BLOCK_CI")
        found.append(SimpleNamespace(block_m=names[rows], block_n=names["BLOCK_CO"], block_k=names[depth], names=names,
                                     num_warps=item["num_warps"], num_stages=item["num_stages"]))  # fmt: skip
    return found


def launch_of(case: Case, config: Any) -> Any:
    """FlagGems' launch of a case as ours are described; activations channels_last where it can."""
    from tileconv.kernels.launch.common import Launch

    p = conv_problem(shape_of(case))
    dtype = DTYPES[case.dtype]
    module = _module()

    def image(shape: tuple[int, ...], *, nhwc: bool = True, of: torch.dtype = dtype) -> torch.Tensor:
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        return torch.empty(shape, dtype=of, device="meta", memory_format=memory_format)

    # The wrapper allocates what it returns contiguous.  The filter gradient of a channels_last input does not compile:
    # a stride of 1 becomes a constant, which the kernel indexes.
    if case.pass_ == "wgrad":
        dw = image(p.w_shape, nhwc=False)
        kernel, operands = module.conv2d_backward_kernel_weight, (image(p.x_shape, nhwc=False), image(p.y_shape), dw)
        extents: tuple[int, ...] = (p.H, p.W, p.R, p.S, p.group_channels, p.N, *p.stride, p.P, p.Q, p.group_filters,
                                    p.padding[0][0], p.padding[1][0], *p.dilation)  # fmt: skip
        strides = [*operands[0].stride(), *dw.stride(), *operands[1].stride()]
        values = [*operands, *strides, *extents]
        grid = (-(-p.group_channels * p.taps // config.block_m), p.groups, -(-p.group_filters // config.block_n))
    else:
        if case.pass_ == "dgrad":
            p = p.dgrad[0].problem
        x, w = image(p.x_shape), image(p.w_shape, nhwc=case.pass_ == "fprop")
        y = image(p.y_shape, nhwc=False, of=dtype if case.pass_ == "fprop" else torch.float32)
        kernel, bias = module.conv2d_forward_kernel, torch.empty(p.K, dtype=dtype, device="meta")
        values = [x, w, y, bias, p.N, p.H, p.W, p.K, p.P, p.Q, *x.stride(), *w.stride(), *y.stride(), p.group_channels,
                  p.R, p.S, *p.stride, p.padding[0][0], p.padding[1][0], *p.dilation, p.groups]  # fmt: skip
        grid = (-(-p.N * p.P * p.Q // config.block_m), -(-p.group_filters // config.block_n), p.groups)
    names = [parameter.name for parameter in kernel.fn.params]
    arguments = dict(zip(names, values, strict=False)) | config.names
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    return Launch(kernel.fn, grid, arguments, config.num_warps, config.num_stages, tile)


def _list_of_tiles(place: Path) -> Path:
    return place / "runtime" / "backend" / "_nvidia" / "tune_configs.yaml"


@cache
def _module() -> Any:
    """The package's conv2d.py; triton.autotune around its kernels is left in place, their `fn` is what is compiled."""
    place = folder()
    assert place is not None
    package, runtime, utils = (ModuleType(name) for name in ("flag_gems", "flag_gems.runtime", "flag_gems.utils"))
    one = SimpleNamespace(kwargs={}, num_warps=4, num_stages=2)
    runtime.get_tuned_config = lambda name: [one]  # type: ignore[attr-defined]
    utils.libentry = lambda: lambda kernel: kernel  # type: ignore[attr-defined]
    package.runtime, package.utils = runtime, utils  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in ("flag_gems", "flag_gems.runtime", "flag_gems.utils")}
    sys.modules.update({"flag_gems": package, "flag_gems.runtime": runtime, "flag_gems.utils": utils})
    try:
        spec = importlib.util.spec_from_file_location("tileconv_peer_flaggems", place / "ops" / "conv2d.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module
