"""The inspector: machine code with a known answer, kernels compiled for GPUs that are not here, and the workers."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from tileconv.bench import cache, cases, inspect, networks, peers, targets
from tileconv.bench.cli import app
from tileconv.bench.machine_code import (
    Instruction,
    main_loop,
    memory_kind,
    parse_sass,
    product_size,
    read_amdgcn,
    read_function,
)
from tileconv.bench.predictions import predictions
from tileconv.bench.records import Inspection, from_data, load
from tileconv.bench.workers import describe_error, run_tasks
from tileconv.kernels import hardware
from tileconv.kernels.launch.common import Launch

# A persistent kernel: an outer loop over tiles, in it the main loop and an epilogue loop. The main loop waits for its
# operands at .L_x_5, behind the end of the kernel. Six instructions of .L_x_2 multiply, load, or count.
PERSISTENT = """
	.section	.text.persistent,"ax",@progbits
persistent:
.text.persistent:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0020*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_2:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R6 ;
        /*0040*/              @!P0 BRA `(.L_x_5) ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32 R88, gdesc[UR36], R88 ;
        /*0060*/                   HGMMA.64x128x16.F32 R24, gdesc[UR28], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/              @UP0 UTMALDG.4D [UR8], [UR20] ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_4:
        /*00b0*/                   STG.E.128 desc[UR4][R4.64], R8 ;
        /*00c0*/               @P3 BRA `(.L_x_4) ;
        /*00d0*/                   BRA.U UP1, `(.L_x_1) ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   IMAD.U32 R6, RZ, RZ, UR9 ;
.L_x_6:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R6 ;
        /*0110*/              @!P0 BRA `(.L_x_6) ;
        /*0120*/                   BRA `(.L_x_3) ;
.L_x_7:
        /*0130*/                   BRA `(.L_x_7);
"""

# Two loops one behind the other; the second multiplies more, waits for every product, and takes A from registers.
# Between its products an inner loop without any, whose instructions are part of it.
TWO_LOOPS = """
	.section	.text.two,"ax",@progbits
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR36], R24, gsb0 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R152, [R20+UR8+0xc000] ;
        /*0040*/                   HGMMA.64x128x16.F32 R88, R152, gdesc[UR28], R88, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_3:
        /*0060*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R4.64] ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/                   HGMMA.64x128x16.F32 R88, R156, gdesc[UR28], R88, gsb0 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   STL [R1], R4 ;
        /*00b0*/                   LDL R4, [R1] ;
        /*00c0*/                   EXIT ;
"""

POOL = """
	.section	.text.pool,"ax",@progbits
        /*0000*/                   LDG.E.128 R4, desc[UR4][R4.64] ;
        /*0010*/               @P0 LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0020*/                   FMNMX R4, R4, R8, !PT ;
        /*0030*/                   STG.E.128 desc[UR4][R4.64], R4 ;
        /*0040*/                   STG.E.U8 desc[UR4][R4.64], R9 ;
        /*0050*/                   EXIT ;
.L_x_0:
        /*0060*/                   BRA `(.L_x_0);
"""


def facts(text):
    return read_function(parse_sass(text)[0], registers=10, stack_bytes=0)


def test_persistent_kernel_reports_its_inner_loop():
    code = facts(PERSISTENT)
    assert code.scope == "loop"
    assert code.loop_instructions == 7, "the poll behind the kernel's end is not counted, the test before it is"
    assert code.mma == {"HGMMA.64x128x16.F32": 2}
    assert code.memory == {"UTMALDG": 1}, "the tile's first load and the epilogue's stores are outside"
    assert not code.serialised, "the wait for everything is behind the loop"
    assert not code.register_operand


def test_nested_loops_are_all_found():
    loops = parse_sass(PERSISTENT)[0].graph.loops
    outer = max(loops, key=lambda loop: len(loop.blocks))
    inside = [loop for loop in loops if loop.blocks < outer.blocks]
    assert len(loops) == 4, "tiles, main loop, epilogue, poll; nothing reaches the trap behind the end"
    assert len(inside) == 3


def test_of_two_loops_the_one_that_multiplies_more():
    code = facts(TWO_LOOPS)
    assert code.loop_instructions == 7
    assert code.mma == {"HGMMA.64x128x16.F32": 2}
    assert code.memory == {"LDG.16": 1, "LDSM.128": 1}
    assert code.serialised
    assert code.register_operand
    assert code.spills == 2


def test_small_products_do_not_outweigh_those_of_a_warp_group():
    many = "".join(f"        /*00{i:02x}*/  HMMA.16816.F32 R4, R8, R12, R4 ;\n" for i in range(8))
    behind = f".L_x_9:\n{many}        /*0100*/  @P0 BRA `(.L_x_9) ;\n"
    fixed = TWO_LOOPS.replace("        /*00a0*/", behind + "        /*00a0*/")
    assert facts(fixed).mma == {"HGMMA.64x128x16.F32": 2}
    straight = fixed.replace("@P0 BRA `(.L_x_1)", "NOP").replace("@P2 BRA `(.L_x_2)", "NOP")
    assert facts(straight).scope == "kernel", "the loop that is left is not the main one"
    peeled = TWO_LOOPS.replace(
        "        /*00a0*/", "        /*0090*/  HGMMA.64x128x16.F32 R88, R156, gdesc[UR28], R88 ;\n        /*00a0*/"
    )
    assert facts(peeled).loop_instructions == 7, "a step that was peeled off does not unroll a loop"


def test_a_lesser_loop_that_waits_makes_a_kernel_serialised():
    wait = "        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
    assert not facts(TWO_LOOPS.replace(wait, "")).serialised
    waiting = TWO_LOOPS.replace(wait, "").replace(".L_x_1:\n", f".L_x_1:\n{wait}")
    assert facts(waiting).serialised and facts(waiting).loop_instructions == 6


def test_without_multiplying_loop_the_whole_kernel_counts():
    code = facts(POOL)
    assert (code.scope, code.loop_instructions, code.mma) == ("kernel", None, {})
    assert code.memory == {"LDG.128": 2, "STG.128": 1, "STG.8": 1}
    assert not code.serialised


def test_a_poll_that_every_iteration_passes_stays():
    inline = PERSISTENT.replace("@!P0 BRA `(.L_x_5)", "@!P0 BRA `(.L_x_2)")
    assert facts(inline).mma == {"HGMMA.64x128x16.F32": 2}


def test_unrolled_products_without_a_loop_have_no_main_loop():
    straight = PERSISTENT.replace("@P2 BRA `(.L_x_2)", "NOP").replace("BRA.U UP1, `(.L_x_1)", "NOP")
    assert main_loop(parse_sass(straight)[0]) is None
    assert facts(straight).mma == {"HGMMA.64x128x16.F32": 2}


def test_fma_loop_is_a_main_loop():
    body = "".join(f"        /*{i:04x}*/  FFMA R{i}, R1, R2, R{i} ;\n" for i in range(16))
    text = f'\t.section\t.text.f,"ax"\n.L_x_0:\n{body}        /*0100*/  @P0 BRA `(.L_x_0) ;\n        /*0110*/  EXIT ;\n'
    code = facts(text)
    assert (code.scope, code.loop_instructions, code.mma) == ("loop", 17, {"FFMA": 16})


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("LDGSTS.E.BYPASS.128", "LDGSTS.128"),
        ("LDG.E.U16.CONSTANT", "LDG.16"),
        ("LDG.E", "LDG.32"),
        ("LDG.E.64", "LDG.64"),
        ("LDG.E.U8", "LDG.8"),
        ("LDS.U.128", "LDS.128"),
        ("LDSM.16.M88.4", "LDSM.128"),
        ("LDSM.16.MT88.2", "LDSM.64"),
        ("STS.128", "STS.128"),
        ("STL.64", "STL.64"),
        ("UTMALDG.4D", "UTMALDG"),
        ("UTMASTG.2D", "UTMASTG"),
        ("LDTM.x128", "LDTM"),
        ("LDGDEPBAR", None),
        ("LDC", None),
        ("LDCU.64", None),
        ("HMMA.16816.F32", None),
    ],
)
def test_memory_kinds(opcode, kind):
    assert memory_kind(opcode) == kind


def test_instruction_parts():
    parsed = Instruction.parse("@!UP0 UTMALDG.4D [UR16], [UR22] ")
    assert (parsed.guard, parsed.opcode, parsed.arguments) == ("@!UP0", "UTMALDG.4D", ["[UR16]", "[UR22]"])


PROBE = '''
import dataclasses, json
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from tileconv.bench.inspect import compile_launch, gpu_and_limit, inspect_launch
from tileconv.kernels.launch.common import Launch


@triton.jit
def product(x, w, y, N, one, maybe, C, WEIGHTS_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Boxes of pixels [BLOCK, 1, 64] and weights [128, 64], multiplied either way round."""
    acc = tl.zeros((128, BLOCK) if WEIGHTS_FIRST else (BLOCK, 128), tl.float32)
    for c in tl.range(0, C, 64):
        a = x.load([0, 0, c]).reshape(BLOCK, 64)
        b = w.load([0, c])
        acc = tl.dot(b, a.T, acc) if WEIGHTS_FIRST else tl.dot(a, b.T, acc)
    rows = tl.arange(0, acc.shape[0])
    tl.store(y + rows[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :], acc.to(tl.float16))


def meta(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")


def launch(first, block, stages=3):
    x = TensorDescriptor(meta(256, 1, 512), [256, 1, 512], [512, 512, 1], [block, 1, 64])
    w = TensorDescriptor(meta(128, 512), [128, 512], [512, 1], [128, 64])
    arguments = dict(x=x, w=w, y=meta(256, 128), N=7, one=1, maybe=None, C=512, WEIGHTS_FIRST=first, BLOCK=block)
    return Launch(product, (3, 2), arguments, 4, stages)


rows = {
    "weights": inspect_launch(launch(True, 128), "sm_90"),
    "pixels": inspect_launch(launch(False, 128), "sm_90"),
    "ampere": inspect_launch(launch(True, 64), "sm_80"),
    "blackwell": inspect_launch(launch(True, 128), "sm_100"),
    "geforce": inspect_launch(launch(True, 128, 5), "sm_120"),
}
compiled = compile_launch(launch(True, 128), "sm_90")
source = compiled.asm["ttir"]
rows["ttir"] = source[source.index("tt.func"):source.index("{", source.index("%y"))]
rows["signature"] = [line for line in source.splitlines() if "tt.func" in line][0]
print(json.dumps(rows))
'''


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Rows of a small kernel, compiled in a process that does not interpret."""
    file = tmp_path_factory.mktemp("probe") / "probe.py"
    file.write_text(PROBE)
    environment = os.environ | inspect.COMPILING | {cache.VARIABLE: ""}
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_weights_as_operand_a_stay_in_shared_memory(probe):
    row = probe["weights"]
    assert row["mma"] == "HGMMA.64x128x16.F32"
    assert row["loop_mma"] == 8
    assert row["loop_loads"] == {"UTMALDG": 2}
    assert (row["register_operand"], row["serialised"]) == (False, False)
    assert (row["stack_bytes"], row["spills"], row["fits"], row["ctas"]) == (0, 0, True, 6)


@pytest.mark.slow
def test_pixels_as_operand_a_go_through_registers(probe):
    row = probe["pixels"]
    assert (row["register_operand"], row["serialised"]) == (True, True)
    assert row["loop_loads"]["LDSM.128"] > 0


@pytest.mark.slow
def test_other_architectures(probe):
    assert probe["ampere"]["mma"].startswith("HMMA.16816")
    assert "LDG.16" in probe["ampere"]["loop_loads"], "host descriptors become two-byte loads there"
    assert probe["blackwell"]["mma"] == "UTCHMMA"
    assert probe["geforce"]["mma"].startswith("HMMA.16816")


@pytest.mark.slow
def test_shared_memory_over_the_block_limit_does_not_fit(probe):
    row = probe["geforce"]
    assert row["shared_bytes"] > inspect.gpu_and_limit("sm_120")[1]
    assert row["fits"] is False, "triton compiles it all the same"


@pytest.mark.slow
def test_signature_is_specialised_as_in_a_launch(probe):
    signature = probe["signature"]
    assert "%N: i32 " in signature and "%one" not in signature and "%maybe" not in signature
    assert signature.count("tt.divisibility = 16") == 2, "y and C; N is 7, descriptors have none"
    assert "tensordesc" in signature


@pytest.mark.slow
def test_every_alexnet_kernel_compiles_without_spills():
    seen = []
    rows = inspect.inspect_all(
        cases.cases("alexnet", 128, passes=cases.FORWARD)
        + cases.cases("alexnet", 128, ["fp32"], ("forward", "backward"), ("pool5",)),
        ["sm_90"],
        progress=lambda done, total, label: seen.append((done, total)),
    )
    assert seen[-1] == (14, 14)
    items = [from_data(Inspection, row) for row in rows]
    broken = {"compiles", "fits shared memory", "multiplies with HGMMA", "asynchronous HGMMA", "operands by TMA"}
    short = targets.shortfalls([i for i in items if i.role == "main"])
    # An image of three channels is beyond the copy engine: its runs come by asynchronous loads.
    in_runs = [("operands by TMA", "conv1", "sm_90")]
    assert [(line.target, line.subject, line.arch) for line in short if line.target in broken] == in_runs
    assert [(i.layer, i.arch) for i in items if i.role == "main" and (i.stack_bytes or i.spills)] == []
    for item in items:
        if item.arch == "sm_90" and item.layer in targets.WIDE_LAYERS and item.role == "main":
            assert item.other_per_mma <= 14, item.layer
    pools = [i for i in items if i.layer.startswith("pool")]
    for item in pools:  # the strips of overlapping windows copy ahead
        memory = {kind for kind in item.loop_loads if kind[:3] in ("LDG", "STG")}
        assert memory | {"LDG.128"} == {"LDG.128", "LDGSTS.128", "STG.128"}, (item.layer, item.arch)
    assert all(i.modelled_us > 0 and i.floor_us > 0 and i.bytes_read > 0 for i in items)
    for case in targets.case_sums(items):
        assert case.modelled_us >= case.floor_us, case.first.case


@pytest.mark.slow
def test_every_pass_compiles_without_spills_for_the_generations_before_and_after():
    rows = inspect.inspect_all(cases.cases("alexnet", 128), ["sm_80", "sm_100"])  # test_targets.py holds sm_90
    assert len({(row["arch"], row["pass"]) for row in rows}) == 2 * len(set(cases.PASSES) - {cases.STEP})
    assert [(row["layer"], row["pass"], row["arch"], row["failure"]) for row in rows if row["failure"]] == []
    spilling = [(row["layer"], row["pass"], row["arch"], row["kernel"]) for row in rows if row["stack_bytes"]]
    assert spilling == []
    for row in rows:  # the second kernel of a filter gradient adds what the first one leaves in scratch
        if row["kernel"] == "add_slices" and row["pass"] == "wgrad" and row["layer"] == "conv4":
            written = row["bytes_written"]
            assert row["extra_bytes"] == row["bytes_read"] > written > 0
        elif row["layer"] == "pool1":
            assert row["extra_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "layers"),
    [
        ("odd-sizes", ("batch-1", "batch-31", "batch-33", "batch-129")),
        ("dilated", ("large-fov", "one-axis", "dilation-4")),
    ],
)
def test_filter_gradients_of_small_batches_do_not_wait_for_each_product(suite, layers):
    chosen = [case for case in cases.cases(suite, None, ["fp16"], ["wgrad"]) if case.layer in layers]
    rows = [row for row in inspect.inspect_all(chosen, ["sm_90"]) if row["role"] == "main"]
    assert len(rows) == len(layers)
    for row in rows:
        found = row["kernel"], row["failure"], row["serialised"], row["spills"]
        assert found == ("wgrad_box", None, False, 0), row["layer"]


@pytest.mark.slow
def test_odd_channels_multiply_as_even_ones_do():
    layers = [f"channels-{c}" for c in (63, 129, 255)]
    chosen = [case for case in cases.cases("odd-sizes", None, ["fp16"], cases.PASSES[:3]) if case.layer in layers]
    rows = inspect.inspect_all(chosen, ["sm_90"])
    assert [(row["layer"], row["pass"]) for row in rows if row["failure"] or row["spills"]] == []
    products = [row for row in rows if row["role"] == "main"]
    assert {(row["layer"], row["pass"]) for row in products} == {(c.layer, c.pass_) for c in chosen}
    for row in products:
        assert row["kernel"] in ("fprop_box", "wgrad_box") and not row["serialised"], row["layer"]
        assert row["loop_loads"].keys() <= {"UTMALDG", "LDSM.128"}, row["layer"]
    assert {row["kernel"] for row in rows if row["role"] == "helper"} == {"widen", "add_slices"}


@pytest.mark.slow
def test_plain_fp32_is_mostly_products():
    layers = ("conv1", "conv3", "fc8")
    chosen = cases.cases("alexnet", None, ["fp32"], cases.PASSES[:3], layers)
    chosen += cases.cases("alexnet", 1, ["fp32"], ["fprop"], ("fc8",))
    rows = inspect.inspect_all(chosen, ["sm_90"])
    assert [(row["layer"], row["pass"], row["arch"]) for row in rows if row["failure"] or row["stack_bytes"]] == []
    products = [row for row in rows if row["role"] == "main"]
    assert len(products) == 2 * len(layers) + 3, "an image has no gradient"
    for row in products:
        # Elements of three channels come one by one, each with its address; the tiles of one image hold few sums.
        limit = 1.6 if row["batch"] == 1 else 1.5 if row["layer"] == "conv1" else 1.2
        assert row["loop_instructions"] <= limit * row["loop_mma"], (row["layer"], row["pass"], row["arch"])


@pytest.mark.slow
def test_gfx_resources():
    [row] = inspect.inspect_all(cases.cases("alexnet", 128, passes=["forward"])[:1], ["gfx942"])
    assert row["failure"] is None
    assert (row["gpu"], row["registers"] > 0, row["stack_bytes"]) == ("MI300X", True, 0)
    assert (row["modelled_us"], row["ctas_per_sm"]) == (None, None), "no model for that GPU"


def test_gfx_registers_count_the_accumulators_once():
    metadata = ".vgpr_count: 96\n.agpr_count: 32\n.private_segment_fixed_size: 8\n.vgpr_spill_count: 3\n"
    code = read_amdgcn(
        metadata + "\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]\n\tds_read_b128 v[0:3], v4\n"
    )
    assert (code.registers, code.stack_bytes, code.spills) == (96, 8, 3)
    assert code.mma == {"v_mfma_f32_32x32x8_f16": 1}


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("HGMMA.64x128x16.F32", 1), ("HGMMA.64x256x16.F32.BF16", 2), ("HGMMA.64x64x8.F32.TF32", 0.5),
        ("HMMA.16816.F32", 1), ("HMMA.1688.F32.TF32", 1), ("HMMA.1688.F32", 0.5), ("UTCHMMA", 1), ("FFMA", 1),
    ],
)  # fmt: skip
def test_products_are_counted_by_their_size(opcode, size):
    assert product_size(opcode) == size


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "warps", "ctas"),
    [
        ("H100", 168, 0, 4, 3),  # 65,536 registers, 21 granules of 256 a warp
        ("H100", 169, 0, 4, 2),  # one register more is a granule more
        ("H100", 32, 0, 4, 16),  # 64 warps
        ("RTX 4090", 32, 0, 4, 12),  # 48 warps
        ("H100", 32, 115_712, 4, 2),  # 233,472 bytes, each block takes 1,024 more
        ("H100", 32, 115_713, 4, 1),
        ("A100", 128, 82_944, 8, 2),
        ("A100", 255, 0, 8, 1),
    ],
)
def test_occupancy(gpu, registers, shared, warps, ctas):
    launch = Launch(None, (1,), {}, num_warps=warps)
    assert inspect.occupancy(registers, shared, launch, hardware.GPUS[gpu]) == ctas


def test_every_pass_has_its_cases():
    found = cases.cases("alexnet", 128)
    assert {case.pass_ for case in found} == set(cases.PASSES) - {cases.STEP}
    assert "conv1" not in {case.layer for case in found if case.pass_ == "dgrad"}, "an image needs no gradient"
    assert [c.layer for c in cases.cases("alexnet", 128, passes=["wgrad"], layers=["conv2", "fc7"])] == ["conv2", "fc7"]
    with pytest.raises(ValueError, match="layer='conv9' is unknown; nearest: conv"):
        cases.cases("alexnet", 128, layers=["conv9"])


def test_alexnet_2012_has_the_published_shapes():
    shapes = {shape.name: shape for shape in networks.network_layers("alexnet-2012", 128)}
    assert shapes["norm1"].input == (128, 96, 55, 55)
    assert shapes["conv2"].input == (128, 96, 27, 27) and shapes["conv2"].module.groups == 2
    assert shapes["pool5"].input == (128, 256, 13, 13) and shapes["fc6"].input == (128, 9216)
    flops = sum(cases.flops_of(c) or 0 for c in cases.cases("alexnet-2012", 128, passes=["fprop"]))
    ours = sum(cases.flops_of(c) or 0 for c in cases.cases("alexnet", 128, passes=["fprop"]))
    assert flops == pytest.approx(ours, rel=0.03)


@pytest.mark.parametrize("pass_", ["fprop", "dgrad", "wgrad", "backward"])
def test_predictions_of_a_case_add_up(pass_):
    gpu = hardware.GPUS["H100"]
    for layer in ("conv1", "conv2", "conv4", "fc7"):
        if pass_ == "dgrad" and layer == "conv1":
            continue
        case = cases.Case("alexnet", layer, pass_, 128, "fp16")
        planned = cases.launches(case, gpu)
        rows = predictions(case, planned, gpu)
        assert all(row["modelled_us"] is not None and row["bytes_read"] is not None for row in rows), case
        assert len({row["floor_us"] for row in rows}) == 1
        assert sum(row["modelled_us"] for row in rows) >= rows[0]["floor_us"]
        needed = sum(row["flops_needed"] or 0 for row in rows)
        assert needed == (cases.flops_of(case) or 0)


def test_a_kernel_that_nobody_knows_has_no_prediction():
    case = cases.Case("alexnet", "pool1", "forward", 128, "fp16")
    gpu = hardware.GPUS["H100"]
    [row] = predictions(case, [Launch(test_occupancy, (8,), {})], gpu)
    assert (row["modelled_us"], row["floor_us"], row["bytes_read"], row["bytes_least"]) == (None, None, None, None)


def test_cache_keeps_what_its_key_names(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    name = cache.key(kernel="a", arch="sm_90")
    assert name == cache.key(arch="sm_90", kernel="a")
    assert name != cache.key(kernel="a", arch="sm_80")
    assert cache.load(name) is None
    cache.save(name, {"registers": 3})
    assert cache.load(name) == {"registers": 3}
    next(tmp_path.rglob("*.json")).write_text("{half")
    assert cache.load(name) is None, "a broken file is as good as none"
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache.folder() is None
    cache.save(name, {"registers": 3})
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "tileconv" / "inspect"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    cache.save(name, {"registers": 3})  # a folder that cannot be made is no error


@pytest.mark.slow
def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    todo = cases.cases("alexnet", 128, passes=["forward"], layers=["pool5"])
    first = inspect.inspect_all(todo, ["sm_90"])
    kept = list(tmp_path.rglob("*.json"))
    assert len(kept) == 1
    kept[0].write_text(kept[0].read_text().replace(f'"registers": {first[0]["registers"]}', '"registers": 7'))
    assert inspect.inspect_all(todo, ["sm_90"])[0]["registers"] == 7
    assert inspect.inspect_all(todo, ["sm_90"], cached=False) == first


@pytest.mark.slow
@pytest.mark.parametrize(("pass_", "grid"), [("fprop", (169, 3, 1)), ("dgrad", (169, 2, 1)), ("wgrad", (14, 3, 1))])
def test_peers_are_rendered_from_the_installed_torch(pass_, grid):
    config = SimpleNamespace(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)
    if not peers.has_template(pass_):  # torch 2.11 has one forward, 2.13 has all
        assert pass_ != "fprop" and torch.__version__ < "2.13"
        with pytest.raises(ValueError, match=f"no Triton template for {pass_}: Inductor calls cuDNN"):
            peers.render(cases.Case("alexnet", "conv3", pass_, 128, "fp16"), config)
        return
    source, found = peers.render(cases.Case("alexnet", "conv3", pass_, 128, "fp16"), config)
    assert found == grid
    [kernel] = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [a.arg for a in kernel.args.args][-1] == "OUT"
    assert "tl.dot(" in source and "tl.store(OUT + " in source and "{{" not in source


def test_a_peers_time_is_a_lower_bound():
    case = cases.Case("alexnet", "conv3", "fprop", 128, "fp16")
    config = SimpleNamespace(block_m=128, block_n=128, block_k=64)
    facts = {"ctas": 507, "ctas_per_sm": 1, "num_warps": 4, "mma": "HGMMA.64x128x16.F32", "loop_mma": 8,
             "loop_instructions": 108, "other_per_mma": 12.5, "serialised": False}  # fmt: skip
    gpu = hardware.GPUS["H100"]
    free = peers.at_best(case, config, facts, gpu)
    assert free["flops_done"] == 507 * 27 * 2 * 128 * 128 * 64
    assert free["modelled_us"] > free["floor_us"]
    long = {"loop_instructions": 408, "other_per_mma": 50.0}
    overlapped, waiting = (peers.at_best(case, config, facts | long | {"serialised": s}, gpu) for s in (False, True))
    assert waiting["bound_by"] == "tensor, then issue" and waiting["modelled_us"] > overlapped["modelled_us"]
    # 108 instructions for eight products of 64x128x16, one scheduler each
    issue = 1e6 * free["flops_done"] / (2 * 64 * 128 * 16) * 108 / 8 / gpu.sms / gpu.clock
    slow = peers.at_best(case, config, facts | {"loop_instructions": 1608, "other_per_mma": 200.0}, gpu)
    assert slow["bound_by"] == "issue" and slow["modelled_us"] == pytest.approx(issue * 1608 / 108)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"arch='sm_91' is unknown; nearest: sm_90"):
        inspect.inspect_all([], ["sm_91"])
    with pytest.raises(ValueError, match="suite='alexnte' is unknown; nearest: alexnet"):
        cases.cases("alexnte", 2)
    with pytest.raises(ValueError, match="dtype='fp15'"):
        cases.cases("alexnet", 2, ["fp15"])
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        cases.cases("alexnet", 0)


def test_a_process_that_interprets_says_where_to_compile():
    if not hardware.interpreting():
        pytest.skip("this process compiles")
    launch = cases.launches(cases.cases("alexnet", 2)[0], hardware.GPUS["H100"])[0]
    with pytest.raises(RuntimeError, match="inspect_all"):
        inspect.compile_launch(launch, "sm_90")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages=2", "override='stages' is unknown"),
        ("num_stages=two", "num_stages takes int"),
        ("box=128x1", "as num_stages=2, box=128x1x1 or half=true"),
        ("half=yes", "half takes bool"),
    ],
)
def test_overrides_that_no_tile_has(setting, message):
    result = CliRunner().invoke(app, ["inspect", "--layer", "fc8", "--override", setting])
    assert result.exit_code == 2 and message in result.stderr


def test_a_forced_field_is_what_is_compiled(tmp_path):
    out = tmp_path / "fc8.json"
    chosen = ["--layer", "fc8", "--pass", "fprop", "--batch", "64", "--jobs", "1", "--json", str(out)]
    forced = ["--override", "half=False", "--override", "num_stages=2", "--override", "splits=1"]
    result = CliRunner().invoke(app, ["inspect", *chosen, *forced])
    assert result.exit_code == 0 and "interpreter" not in result.output
    [item] = load(out).inspections
    assert (item.kernel, item.num_stages) == ("fprop_box", 2) and "/" not in item.tile


def test_cases_travel_as_json():
    case = cases.cases("alexnet", 128)[3]
    assert cases.Case.from_json(json.loads(json.dumps(case.to_json() | {"arch": "sm_90"}))) == case


WORKER = """
import json, os, sys
from tileconv.bench.workers import serve
def handle(task):
    if task["do"] == "raise":
        raise ValueError("in /some/where/file.py: bad")
    if task["do"] == "die":
        os._exit(7)
    print("noise")
    return {"value": task["value"] * 2}
serve(handle)
"""


def test_workers_answer_in_order_and_survive_a_crash(tmp_path: Path):
    (tmp_path / "probe_worker.py").write_text(WORKER)
    todo = [{"do": "ok", "value": i} for i in range(5)] + [{"do": "raise"}, {"do": "die"}, {"do": "ok", "value": 9}]
    answers = run_tasks(
        "probe_worker", todo, jobs=2, label=lambda task: task["do"],
        environment={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert [a.get("value") for a in answers] == [0, 2, 4, 6, 8, None, None, 18]
    assert answers[5]["error"] == "ValueError: in file.py: bad", "no path of this machine"
    assert "status 7" in answers[6]["error"]


def test_errors_are_described_in_one_line_without_paths():
    assert describe_error(OSError("first\n/home/someone/x.py failed\n")) == "OSError: first x.py failed"
