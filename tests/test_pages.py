"""The rendered page: its first screen, pictures and tables, and what a browser makes of it. The GPU here is imaginary."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tileconv.bench import document, frames, pictures, records, report, report_inspected, report_lead
from tileconv.bench.records import Check, Commit, Device, Inspection, Machine, Published, Record, Timing, Versions

LAYERS = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8")
# Invented, for a GPU that does not exist: nobody could take them for measurements.
FLOORS = dict(zip(LAYERS, (26, 20, 58, 14, 29, 39, 26, 4.4, 18, 12, 4), strict=True))
RIVALS = (("cudnn", "channels_last", 1.1), ("cudnn", "contiguous", 1.9), ("torch.compile", "channels_last", 1.3))


def passes_of(layer):
    if layer.startswith("pool"):
        return ("forward", "backward")
    return ("fprop", "wgrad") if layer == "conv1" else ("fprop", "dgrad", "wgrad")


def a_timing(layer="conv2", pass_="fprop", provider="tileconv", us=100.0, **changes):
    row = Timing(
        network="alexnet", layer=layer, pass_=pass_, batch=128, dtype="fp16", provider=provider,
        memory_format="channels_last", l2="cold", p20_us=us * 0.98, p50_us=us, p80_us=us * 1.03, n=100,
        tflops=None if layer.startswith("pool") else 3e4 / us, error=1e-3, allowed=4e-3, passed=True, precision="fp16",
        peak_bytes=4_000_000, clocks_mhz=(1755.0, 1740.0), repeatable=True,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def without_speed(row, status, note):
    return dataclasses.replace(
        row, p20_us=None, p50_us=None, p80_us=None, tflops=None, n=0, passed=False, status=status, note=note
    )


def timings():
    rows = []
    for d, dtype in enumerate(("fp16", "tf32")):
        for i, layer in enumerate(LAYERS):
            for j, pass_ in enumerate(passes_of(layer)):
                for l2 in ("cold", "warm"):
                    us = FLOORS[layer] * (1.6 + 0.1 * ((3 * i + j) % 5)) * (1 + d) * (0.9 if l2 == "warm" else 1)
                    kind = {"dtype": dtype, "precision": dtype, "l2": l2}
                    rows.append(a_timing(layer, pass_, us=us, **kind))
                    for name, layout, factor in RIVALS:
                        times = us * factor * (0.75 + 0.17 * ((i + 2 * j + d) % 4))
                        rows.append(a_timing(layer, pass_, name, times, memory_format=layout, **kind))
    for batch in (1, 8, 32):
        for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
            us = 6 + FLOORS[layer] * 1.7 * batch / 128
            rows += [a_timing(layer, us=us, batch=batch), a_timing(layer, "fprop", "cudnn", us * 1.2, batch=batch)]
    for dilation in (1, 2, 4, 8, 16):
        for pass_ in ("fprop", "dgrad", "wgrad"):
            kind = {"network": "dilated", "layer": f"dilation {dilation}", "pass_": pass_}
            rows += [a_timing(us=60.0, **kind), a_timing(us=60.0 + 9 * dilation, provider="cudnn", **kind)]
    rows[0] = dataclasses.replace(rows[0], throttled=("power",))
    rows.append(without_speed(a_timing("fc8", "wgrad", "im2col"), "out of memory", "not timed: out of GPU memory"))
    rows.append(a_timing("conv2", provider="tileconv:box", us=140.0))
    rows.append(a_timing("conv2", provider="cudnn default precision", us=170.0, precision="fp16"))
    return tuple(rows)


def an_inspection(layer="conv2", pass_="fprop", batch=128, network="alexnet", dtype="fp16", **changes):
    floor = FLOORS.get(layer, 40.0) * batch / 128
    multiplies = not layer.startswith("pool")
    row = Inspection(
        case=f"{network}/{layer}/{pass_}/{dtype}/n{batch}", network=network, layer=layer, pass_=pass_, dtype=dtype,
        arch="sm_90", gpu="H100", batch=batch, step=0, steps=1, role="main", kernel="fprop_box",
        tile="pixel 128*128*64 w4 s4", num_warps=4, num_stages=4, registers=154, stack_bytes=0, spills=0,
        shared_bytes=131104, fits=True, ctas=2187, ctas_per_sm=1, scope="loop" if multiplies else "kernel",
        instructions=900, mma="HGMMA.64x128x16.F32" if multiplies else None,
        loop_instructions=103 if multiplies else None, loop_mma=8 if multiplies else 0,
        other_per_mma=95 / 8 if multiplies else None, loop_loads={"UTMALDG": 2} if multiplies else {"LDG.128": 9},
        serialised=False, register_operand=False, useful_rows=1.0, useful_columns=1.0, wave_efficiency=0.97,
        bytes_read=800_000_000, bytes_written=10_000_000, bytes_least=int(1e6 * batch * (1 + len(layer) % 3)),
        flops_done=None, flops_needed=int(6e8 * floor) if multiplies else None, modelled_us=floor * 1.7 + 3,
        floor_us=floor, bound_by="L2", peak_tflops=989.0, dram_gbs=3350.0, triton="3.7.1", extra_bytes=200_000,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def inspections():
    rows = [an_inspection(layer, pass_) for layer in LAYERS for pass_ in passes_of(layer)]
    rows += [an_inspection(layer, batch=batch) for batch in (1, 8, 32) for layer in LAYERS if layer.startswith("conv")]
    rows += [
        an_inspection(f"dilation {d}", pass_, network="dilated")
        for d in (1, 2, 4, 8, 16)
        for pass_ in ("fprop", "dgrad", "wgrad")
    ]
    return tuple(rows)


def a_check(layer, dtype, share):
    return Check(
        case=f"alexnet/{layer}/{dtype}", layer=layer, op="conv2d", shape=(2, 64, 27, 27), dtype=dtype,
        memory_format="channels_last", formulation="chosen", error=4e-3 * share, torch_error=1e-3, allowed=4e-3,
        passed=True, seconds=0.2,
    )  # fmt: skip


def a_record(kind="cuda", **changes):
    names = {"cuda": ("Imaginary GPU", "imaginary-gpu"), "none": ("no GPU", "inspect-alexnet")}
    device = Device(names[kind][0], kind, names[kind][1])
    known = {"cuda": "13.0", "cudnn": "91002", "driver": "580.65.06"} if kind == "cuda" else {}
    record = Record(
        device=device, versions=Versions("3.11.7", "2.13.0", "3.7.1", "2.4.0", "0.1.0", **known),
        commit=Commit("a" * 40, False), started="2026-01-02T03:04:05Z", seconds=120.0,
        machine=Machine("Some CPU", 2, 23.5), command="tileconv bench --batch 2 --jobs 2",
        checks=tuple(a_check(layer, dtype, 0.1 + 0.02 * i) for i, layer in enumerate(LAYERS)
                     for dtype in ("fp32", "fp16")),
        inspections=inspections(), timings=timings() if kind == "cuda" else (),
        published=(Published("8192 x 8192 x 512", "fp16", "H100", 539.88, 537.1, "an example"),),
    )  # fmt: skip
    return dataclasses.replace(record, **changes)
