"""`tileconv compare`: what counts as a regression, what is only listed, and what is refused."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from tileconv.bench import records
from tileconv.bench.cli import app
from tileconv.bench.compare import compare, percentage
from tileconv.bench.records import Commit, Device, Inspection, Machine, Record, Timing, Versions


def a_timing(us=100.0, noise=0.02, provider="tileconv", layer="conv2", **changes):
    row = Timing(
        network="alexnet", layer=layer, pass_="fprop", batch=128, dtype="fp16", provider=provider,
        memory_format="channels_last", l2="cold", p20_us=us * (1 - noise), p50_us=us, p80_us=us * (1 + noise), n=100,
        tflops=None, error=1e-3, allowed=4e-3, passed=True,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def lost(row, status="out of memory"):
    return dataclasses.replace(row, p20_us=None, p50_us=None, p80_us=None, n=0, passed=False, status=status)


def an_inspection(**changes):
    row = Inspection(
        case="alexnet/conv2/fprop/fp16/n128", network="alexnet", layer="conv2", pass_="fprop", dtype="fp16",
        arch="sm_90", gpu="H100", batch=128, step=0, steps=1, role="main", kernel="fprop_box",
        tile="pixel 128*128*64 w4 s4", num_warps=4, num_stages=4, registers=154, stack_bytes=0, spills=0,
        shared_bytes=131104, fits=True, ctas=2187, ctas_per_sm=1, scope="loop", instructions=900,
        mma="HGMMA.64x128x16.F32", loop_instructions=103, loop_mma=8, other_per_mma=95 / 8, loop_loads={"UTMALDG": 2},
        serialised=False, register_operand=False, useful_rows=1.0, useful_columns=1.0, wave_efficiency=0.97,
        bytes_read=8, bytes_written=1, bytes_least=4, flops_done=6, flops_needed=5, modelled_us=90.0, floor_us=58.0,
        bound_by="L2", peak_tflops=989.0, dram_gbs=3350.0, triton="3.7.1",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def a_record(*rows, name="Imaginary GPU", torch="2.13.0"):
    timings = tuple(row for row in rows if isinstance(row, Timing))
    kind = "none" if name == "no GPU" else "cuda"
    return Record(
        device=Device(name, kind, records.slug(name)), versions=Versions("3.11.7", torch, "3.7.1", "2.4.0", "0.1.0"),
        commit=Commit(None, False), started="2026-01-02T03:04:05Z", seconds=1.0, machine=Machine("Some CPU", 2, 23.5),
        command="tileconv bench", timings=timings, inspections=tuple(r for r in rows if isinstance(r, Inspection)),
    )  # fmt: skip


def verdicts(before, after, fail_above=0.05, **options):
    found = compare(a_record(*before), a_record(*after), fail_above, **options)
    return [row.verdict for row in found.rows]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (a_timing(110), "REGRESSION"),
        (a_timing(104), "same"),  # apart, but by less than was asked for
        (a_timing(110, noise=0.12), "within noise"),  # 10 % slower, and its quantiles reach into A's
        (a_timing(80), "faster"),
        (a_timing(90, noise=0.12), "within noise"),
        (lost(a_timing()), "REGRESSION"),
        (a_timing(150, throttled=("power",)), "throttled"),
        (a_timing(150, precision="tf32"), "REGRESSION"),  # A does not say which it had
    ],
)
def test_a_time_is_a_regression_when_it_grew_by_more_than_noise(after, verdict):
    assert verdicts([a_timing()], [after]) == [verdict]


def test_touching_quantiles_overlap():
    before, after = a_timing(100, p80_us=107.8), a_timing(110)
    assert after.p20_us == pytest.approx(before.p80_us)
    after = dataclasses.replace(after, p20_us=before.p80_us)
    assert verdicts([before], [after]) == ["within noise"]


def test_rivals_do_not_fail_a_build():
    before, after = a_timing(provider="cudnn"), a_timing(150, provider="cudnn")
    assert verdicts([before], [after]) == ["rival moved"]
    assert verdicts([before], [lost(after)]) == ["rival moved"]
    assert verdicts([a_timing(provider="tileconv:box")], [a_timing(150, provider="tileconv:box")]) == ["REGRESSION"]


def test_another_precision_is_not_compared():
    assert verdicts([a_timing(precision="ieee")], [a_timing(150, precision="tf32")]) == ["changed"]


def test_a_time_that_came_back_is_no_regression_and_two_lost_ones_are_no_row():
    assert verdicts([lost(a_timing())], [a_timing()]) == ["faster"]
    assert verdicts([lost(a_timing())], [lost(a_timing())]) == []


def test_rows_are_matched_by_all_that_names_them_and_the_worst_come_first():
    rows = [a_timing(), a_timing(l2="warm"), a_timing(memory_format="contiguous"), a_timing(method="graph"),
            a_timing(batch=1)]  # fmt: skip
    slower = [dataclasses.replace(row, p50_us=100 + 10 * i, p80_us=150) for i, row in enumerate(rows)]
    slower = [dataclasses.replace(row, p20_us=row.p50_us) for row in slower]
    found = compare(a_record(*rows, a_timing(layer="conv3")), a_record(*slower, a_timing(layer="conv4")), 0.05)
    assert [round(row.ratio, 2) for row in found.rows] == [1.4, 1.3, 1.2, 1.1, 1.0]
    assert ["conv3" in name for name in found.only_a] == [True]
    assert ["conv4" in name for name in found.only_b] == [True]


@pytest.mark.parametrize(
    ("after", "verdict", "what"),
    [
        ({"modelled_us": 100.0}, "REGRESSION", "modelled time"),
        ({"modelled_us": 93.0}, "same", "modelled time"),
        ({"instructions": 1000}, "REGRESSION", "instructions"),
        ({"instructions": 700}, "faster", "instructions"),
        ({"registers": 168}, "changed", "registers"),
        ({"stack_bytes": 8}, "REGRESSION", "spills"),
        ({"serialised": True}, "REGRESSION", "serialised"),
        ({"failure": "died"}, "REGRESSION", "did not compile"),
        ({"tile": "pixel 64*64*64 w4 s4", "instructions": 2000}, "changed", "launches"),
    ],
)
def test_without_timings_the_machine_code_is_compared(after, verdict, what):
    found = compare(
        a_record(an_inspection(), name="no GPU"), a_record(an_inspection(**after), name="no GPU"), fail_above=0.05
    )
    assert found.kind == "modelled and inspected, not measured"
    assert [row.verdict for row in found.rows if what in row.what] == [verdict]
    assert bool(found.regressions) == (verdict == "REGRESSION")


def test_more_spills_and_faults_of_an_added_launch_count():
    spilling = an_inspection(stack_bytes=8)
    worse = compare(a_record(spilling), a_record(an_inspection(stack_bytes=64)), 0.05)
    assert [row.after for row in worse.regressions] == ["64 bytes, 0 accesses"]
    added = an_inspection(step=1, role="helper", kernel="fprop_finish", spills=3, modelled_us=0.0)
    more = compare(a_record(an_inspection()), a_record(an_inspection(), added), 0.05)
    assert [row.what for row in more.regressions] == ["sm_90, fprop_finish, spills"]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (a_record(a_timing()), a_record(a_timing(), name="Another GPU"), "device: A ran on Imaginary GPU and B on An"),
        (a_record(a_timing()), a_record(an_inspection()), "timings: A holds measurements and B none"),
        (a_record(a_timing()), a_record(a_timing(batch=64)), "share no row: A .* at batch 128; B .* at batch 64"),
        (a_record(), a_record(), "neither timings nor inspections"),
        (a_record(a_timing(), a_timing()), a_record(a_timing()), "timings: A holds .*conv2.* twice"),
    ],
    ids=["device", "kind", "batch", "empty", "duplicate"],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b, 0.05)


def test_force_compares_other_devices_and_says_so():
    found = compare(a_record(a_timing()), a_record(a_timing(200), name="Another GPU"), 0.05, force=True)
    assert [row.verdict for row in found.rows] == ["REGRESSION"]
    assert "Another GPU in B" in found.notes[0]
    both = a_record(a_timing(), an_inspection()), a_record(an_inspection())
    assert compare(*both, 0.05, force=True).kind.startswith("modelled")


@pytest.mark.parametrize("text", ["5", "0.05", "-5%", "five%", "5%%", ""])
def test_a_percentage_needs_its_sign(text):
    with pytest.raises(ValueError, match=r"fail-above=.*such as 5%"):
        percentage(text)


def run(tmp_path, a, b, *options):
    for name, record in (("a", a), ("b", b)):
        records.save(record, tmp_path / f"{name}.json")
    return CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])


def test_the_command_fails_on_a_regression_alone(tmp_path):
    before = a_record(a_timing(), a_timing(layer="conv3"))
    after = a_record(a_timing(120), a_timing(layer="conv4"), a_timing(layer="conv3"), torch="2.14.0")
    failed = run(tmp_path, before, after)
    assert failed.exit_code == 1, failed.output
    assert "REGRESSION" in failed.output and "1.200x" in failed.output
    assert "alexnet/conv3" not in failed.output, "rows that did not change are left out"
    assert "Only in B: alexnet/conv4" in failed.output
    assert "torch: 2.13.0 in A, 2.14.0 in B" in failed.output
    passed = run(tmp_path, before, after, "--fail-above", "25%", "--all")
    assert passed.exit_code == 0, passed.output
    assert "alexnet/conv3" in passed.output
    assert "0 regressions above 25%" in passed.output


def test_bad_input_names_what_is_wrong(tmp_path):
    record = a_record(a_timing())
    refused = run(tmp_path, record, a_record(a_timing(), name="Another GPU"))
    assert refused.exit_code == 2 and "--force" in refused.output
    assert run(tmp_path, record, record, "--fail-above", "5").exit_code == 2
    data = records.to_data(record)
    data["timings"][0]["p50_us"] = "fast"
    (tmp_path / "c.json").write_text(json.dumps(data))
    (tmp_path / "d.json").write_bytes(b"\xff\xfe")
    wrong = {"c": "record.timings[0].p50_us: expected float", "d": "not JSON", "e": "e.json: cannot be read"}
    for name, message in wrong.items():
        result = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / f"{name}.json")])
        assert result.exit_code == 2, result.output
        assert message in result.output
