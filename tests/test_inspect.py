"""The inspector: machine code with a known answer, kernels compiled for GPUs that are not here, and the workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tileconv.bench import cases, inspect
from tileconv.bench.machine_code import Instruction, main_loop, memory_kind, parse_sass, read_function
from tileconv.bench.workers import describe_error, run_tasks

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
    environment = os.environ | inspect.COMPILING
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
        cases.cases("alexnet", 128), ["sm_90", "sm_80"], progress=lambda done, total, label: seen.append((done, total))
    )
    assert seen[-1] == (24, 24)
    assert [row["failure"] for row in rows if row["failure"]] == []
    assert [(r["layer"], r["arch"]) for r in rows if r["stack_bytes"] or r["spills"] or not r["fits"]] == []
    hopper = {row["layer"]: row for row in rows if row["arch"] == "sm_90"}
    for layer in ("conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"):
        assert hopper[layer]["mma"].startswith("HGMMA"), layer
        assert hopper[layer]["loop_loads"] == {"UTMALDG": 2}, layer
        assert not hopper[layer]["serialised"] and not hopper[layer]["register_operand"], layer
    for layer in ("conv3", "conv4", "conv5"):
        assert hopper[layer]["loop_instructions"] / hopper[layer]["loop_mma"] <= 15, layer
    pools = [row for row in rows if row["layer"].startswith("pool")]
    assert all(set(row["loop_loads"]) == {"LDG.128", "STG.128"} for row in pools), "16-byte loads and stores only"


@pytest.mark.slow
def test_gfx_resources():
    [row] = inspect.inspect_all(cases.cases("alexnet", 128, passes=["forward"])[:1], ["gfx942"])
    assert row["failure"] is None
    assert (row["gpu"], row["registers"] > 0, row["stack_bytes"]) == ("MI300X", True, 0)


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
    from tileconv.kernels import hardware

    if not hardware.interpreting():
        pytest.skip("this process compiles")
    [launch] = cases.launches(cases.cases("alexnet", 2)[0], hardware.GPUS["H100"])
    with pytest.raises(RuntimeError, match="inspect_all"):
        inspect.compile_launch(launch, "sm_90")


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
        "probe_worker", todo, jobs=2, environment={"PYTHONPATH": str(tmp_path)}, label=lambda task: task["do"]
    )
    assert [a.get("value") for a in answers] == [0, 2, 4, 6, 8, None, None, 18]
    assert answers[5]["error"] == "ValueError: in file.py: bad", "no path of this machine"
    assert "status 7" in answers[6]["error"]


def test_errors_are_described_in_one_line_without_paths():
    assert describe_error(OSError("first\n/home/someone/x.py failed\n")) == "OSError: first x.py failed"
