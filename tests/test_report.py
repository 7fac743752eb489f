"""Records, checks, timing with a stubbed timer, rendering, and the command line."""

import dataclasses
import json
import math
import platform
import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from tileconv.bench import check, environment, job, records, report, targets
from tileconv.bench.cli import app
from tileconv.bench.records import Check, Commit, Device, Inspection, Machine, Record, RecordError, Timing, Versions


def a_check(layer="conv2", dtype="fp16", error=1e-3, allowed=4e-3, **changes):
    row = Check(
        case=f"alexnet/{layer}/{dtype}", layer=layer, op="conv2d", shape=(2, 64, 27, 27), dtype=dtype,
        memory_format="channels_last", formulation="chosen", error=error, torch_error=1e-3, allowed=allowed,
        passed=error is not None and error <= allowed, seconds=0.2,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def an_inspection(layer="conv2", arch="sm_90", **changes):
    row = Inspection(
        case=f"alexnet/{layer}/{changes.get('pass_', 'fprop')}/fp16/n128", network="alexnet", layer=layer,
        pass_="fprop", dtype="fp16", arch=arch, gpu="H100", batch=128, step=0, steps=1, role="main", kernel="fprop_box",
        tile="pixel 128*128*64 w4 s4", num_warps=4, num_stages=4, registers=154, stack_bytes=0, spills=0,
        shared_bytes=131104, fits=True, ctas=2187, ctas_per_sm=1, scope="loop", instructions=900,
        mma="HGMMA.64x128x16.F32", loop_instructions=103, loop_mma=8, other_per_mma=95 / 8,
        loop_loads={"UTMALDG": 2}, serialised=False, register_operand=False, useful_rows=1.0, useful_columns=1.0,
        wave_efficiency=0.97, bytes_read=800_000_000, bytes_written=10_000_000, bytes_least=48_000_000,
        flops_done=60_000_000_000, flops_needed=57_300_000_000, modelled_us=90.0, floor_us=58.0, bound_by="L2",
        peak_tflops=989.0, dram_gbs=3350.0, triton="3.7.1",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def a_timing(provider="tileconv", p50=50.0, layer="conv2", **changes):
    row = Timing(
        network="alexnet", layer=layer, pass_="fprop", batch=128, dtype="fp16", provider=provider,
        memory_format="channels_last", l2="cold", p20_us=p50 - 1, p50_us=p50, p80_us=p50 + 1, n=100, tflops=500.0,
        error=1e-3, allowed=4e-3, passed=True,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def a_record(kind="interpreter", **changes):
    device = Device("Some GPU 80GB", "cuda", "some-gpu-80gb") if kind == "cuda" else environment_device()
    record = Record(
        device=device, versions=Versions("3.11.7", "2.13.0", "3.7.1", "2.4.0", "0.1.0"), commit=Commit("a" * 40, False),
        started="2026-01-02T03:04:05Z", seconds=120.0, machine=Machine("Some CPU", 2, 23.5),
        command="tileconv bench --batch 2 --jobs 2",
        checks=(a_check("network", op="forward"), a_check("conv2"), a_check("pool2", error=0.0),
                a_check("conv2", "fp32")),
        inspections=(
            an_inspection(), an_inspection("conv1", serialised=True), an_inspection(arch="sm_80", mma="HMMA.16816.F32"),
            an_inspection("pool1", pass_="forward", mma=None, loop_instructions=None, loop_mma=0, scope="kernel",
                          loop_loads={"LDG.128": 9}, other_per_mma=None, flops_needed=None, flops_done=None,
                          useful_rows=None, useful_columns=None, peak_tflops=None),
        ),
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take a second each; most tests look at the text."""
    monkeypatch.setattr(report, "render", lambda draw, size: (b"<svg/>", b"<svg/>", b"\x89PNG"))


def environment_device():
    return Device("Triton's interpreter on a CPU", "interpreter", "interpreter")


# Records


def test_record_survives_the_file(tmp_path):
    record = a_record("cuda", timings=(a_timing(),))
    records.save(record, tmp_path / "data" / "x.json")
    assert records.load(tmp_path / "data" / "x.json") == record
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data" / "x.json"], "no temporary file is left"


def test_pass_is_written_as_pass():
    assert records.to_data(an_inspection())["pass"] == "fprop"


def broken(change):
    data = json.loads(json.dumps(records.to_data(a_record())))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=4), "schema: 4 is not the schema read here"),
        (lambda d: d.update(schema=1), "schema: 1 .* written by an older version: run the same command again"),
        (lambda d: d.pop("schema"), "schema: null is not the schema"),
        (lambda d: d.pop("machine"), r"record\.machine: missing"),
        (lambda d: d.update(host="x"), r"record\.host: unknown field"),
        (lambda d: d["device"].update(kind="tpu"), r"record\.device\.kind: \"tpu\" is not one of"),
        (lambda d: d["device"].update(slug="../x"), r"record\.device\.slug"),
        (lambda d: d["checks"][1].update(error="small"), r"record\.checks\[1\]\.error: expected float, got \"small\""),
        (lambda d: d["checks"][0].update(passed=1), r"record\.checks\[0\]\.passed: expected bool, got 1"),
        (lambda d: d["checks"][0].update(shape=[2, "x"]), r"record\.checks\[0\]\.shape\[1\]: expected int"),
        (lambda d: d["checks"].append(3), r"record\.checks\[4\]: expected an object"),
        (lambda d: d["inspections"][0].update(registers=True), r"record\.inspections\[0\]\.registers: expected int"),
        (
            lambda d: d["inspections"][0]["loop_loads"].update(LDG=1.5),
            r"inspections\[0\]\.loop_loads\.LDG: expected int",
        ),
        (lambda d: d.update(timings=[records.to_data(a_timing())]), r"record\.timings: .*without a GPU"),
    ],
)
def test_malformed_records_name_the_field(tmp_path, change, message):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(broken(change)))
    with pytest.raises(RecordError, match=message):
        records.load(file)


def test_files_that_are_not_json(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RecordError, match=r"x\.json: not JSON"):
        records.load(tmp_path / "x.json")


def test_a_wrong_row_cannot_have_a_speed():
    with pytest.raises(RecordError, match="a wrong row has no speed"):
        a_timing(passed=False)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    records.save(a_record(), file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="Out of range float"):
        records.save(a_record(seconds=math.nan), file)
    assert file.read_bytes() == before


def test_environment_names_no_host_or_path():
    found = (environment.device(), environment.versions(), environment.commit())
    text = json.dumps([records.to_data(x) for x in found])
    assert "/" not in text
    assert platform.node() not in text
    machine = environment.machine()
    assert machine.cores >= 1 and machine.memory_gib > 0


# Checks


def test_budget_is_twice_torch_plus_eps():
    assert check.budget(1e-3, "fp16", 4.0) == pytest.approx(2 * (1e-3 + 2**-10 * 4.0))


def test_difference_of_nan_never_passes():
    nan = torch.tensor([math.nan])
    assert not check.largest_difference(nan, torch.zeros(1)) <= 1.0
    assert check.largest_difference(torch.zeros(2), torch.zeros(1)) == math.inf


def test_tasks_cover_every_layer_dtype_and_formulation():
    found = check.tasks(2, ["fp16", "fp32"])
    assert {t["layer"] for t in found} >= {"network", "conv1", "pool1", "conv5", "avgpool", "fc8"}
    conv3 = {t["formulation"] for t in found if t["layer"] == "conv3" and t["dtype"] == "fp16"}
    assert conv3 == {"chosen", "box", "gather", "pixel"}
    conv1 = {t["formulation"] for t in found if t["layer"] == "conv1"}
    assert conv1 == {"chosen", "box", "gather"}, "three channels become 48 by space-to-depth; pixel takes minutes"
    with pytest.raises(ValueError, match="batch=0"):
        check.tasks(0, ["fp16"])


@pytest.mark.slow
def test_a_layer_on_photographs_is_within_budget():
    task = next(t for t in check.tasks(2, ["fp16"]) if t["layer"] == "conv5")
    row = check.run_check(task)
    assert records.from_data(Check, json.loads(json.dumps(row))).passed
    assert row["shape"] == [2, 256, 13, 13]
    assert row["op"] == "conv2d"
    assert 0 < row["error"] <= row["allowed"]


# Rendering


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "srcset", "href") and value]


def test_report_is_self_contained_and_says_what_it_is(tmp_path):
    paths = report.render_report(a_record(), tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in paths} == {
        "interpreter.html", "interpreter.md", "figures/interpreter-errors.png", "figures/interpreter-loops.png",
        "figures/interpreter-roofline.png", "figures/interpreter-heat.png", "figures/interpreter-waterfall.png",
    }  # fmt: skip
    html = (tmp_path / "interpreter.html").read_text()
    links = Links()
    links.feed(html)
    assert "link" not in links.tags
    assert len([source for source in links.sources if not source.startswith("#")]) == 10, "five, light and dark"
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in links.sources)
    assert "prefers-color-scheme: dark" in html
    first = (tmp_path / "interpreter.md").read_text().splitlines()
    assert first[0].startswith("# ")
    names = [line.split("**")[1] for line in first if line.startswith("- **")]
    assert names[10:14] == ["Measured", "Modelled", "Inspected", "Checked"]
    assert next("no GPU speed was measured" in line for line in first if line.startswith("- **Measured"))
    for picture in re.findall(r"\]\((.*?\.png)\)", (tmp_path / "interpreter.md").read_text()):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_rendering_is_deterministic(tmp_path):
    for name in ("a", "b"):
        report.render_report(a_record(), tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_headline_has_three_lines_and_no_invented_speed():
    lines = report.headline(a_record())
    assert [line.split(":")[0] for line in lines] == ["Checked", "Inspected", "Measured"]
    assert "4 of 4" in lines[0]
    assert "3 of 4" in lines[1] and "conv1 fprop sm_90 (serialised)" in lines[1]
    assert "TFLOP" not in "".join(lines)


def test_losses_come_first(no_pictures, tmp_path):
    rows = (a_timing(), a_timing("torch", 100.0), a_timing(layer="conv3"), a_timing("torch", 40.0, layer="conv3"))
    record = a_record("cuda", timings=rows)
    assert "Speed-up over cuDNN, geometric mean: 1.26x" in report.headline(record)[3], "sqrt(2 * 0.8)"
    assert "slower in 1" in report.headline(record)[3]
    report.render_report(record, tmp_path)
    text = (tmp_path / "some-gpu-80gb.md").read_text()
    assert text.index("0.80x") < text.index("2.00x")


def test_failures_are_shown_first_and_escaped(no_pictures, tmp_path):
    bad = a_check("conv4", error=None, note="<b>|died", op="", shape=(), allowed=None, passed=False)
    record = a_record(checks=(a_check("network"), bad, a_check("conv4")))
    report.render_report(record, tmp_path)
    html, text = (tmp_path / "interpreter.html").read_text(), (tmp_path / "interpreter.md").read_text()
    assert "&lt;b&gt;|died" in html and "<b>|died" not in html
    assert "<b>\\|died" in text
    assert "2 of 3" in text
    assert job.failures(record) == ["alexnet/conv4/fp16: <b>|died"]


def test_empty_record_renders(no_pictures, tmp_path):
    report.render_report(a_record(checks=(), inspections=()), tmp_path)
    assert "**Checked**: Nothing." in (tmp_path / "interpreter.md").read_text()


# Targets


def test_clean_rows_meet_every_target():
    rows = [an_inspection(layer, modelled_us=80.0) for layer in targets.WIDE_LAYERS]
    assert targets.shortfalls(rows) == []
    names = {line.target for line in targets.lines(rows)}
    assert {"operands by TMA", "modelled time / floor", "modelled time / floor, together"} <= names


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({"stack_bytes": 8}, "stack bytes (spills)"),
        ({"serialised": True}, "asynchronous HGMMA"),
        ({"mma": "HMMA.16816.F32"}, "multiplies with HGMMA"),
        ({"loop_loads": {"LDGSTS.128": 4}}, "operands by TMA"),
        ({"register_operand": True}, "operands by TMA"),
        ({"other_per_mma": 14.1}, "other instructions per HGMMA.64x128"),
        ({"useful_columns": 0.94}, "useful rows x useful columns"),
        ({"fits": False}, "fits shared memory"),
        ({"failure": "died"}, "compiles"),
        (
            {"arch": "sm_80", "mma": "HMMA.16816.F32", "loop_loads": {"LDG.16": 4}, "other_per_mma": 2.0},
            "16-byte LDGSTS",
        ),
        ({"arch": "sm_100", "mma": "FFMA"}, "tensor cores in the loop"),
    ],
)
def test_each_target_finds_its_fault(changes, target):
    short = targets.shortfalls([an_inspection(**changes)])
    assert target in [line.target for line in short]


def test_a_case_is_judged_with_its_helpers():
    main = an_inspection(modelled_us=90.0, steps=2)
    helper = an_inspection(role="helper", step=1, steps=2, kernel="fprop_finish", mma=None, modelled_us=15.0,
                           other_per_mma=None, loop_loads={})  # fmt: skip
    short = targets.shortfalls([main, helper])
    assert [(line.target, line.found) for line in short] == [("modelled time / floor", "1.81")]
    assert [c.modelled_us for c in targets.case_sums([main, helper])] == [105.0]
    assert targets.case_sums([main, dataclasses.replace(helper, modelled_us=None)])[0].ratio is None


def test_wgrad_has_limits_of_its_own():
    row = an_inspection(
        pass_="wgrad", other_per_mma=20.0, register_operand=True, loop_loads={"UTMALDG": 1, "LDSM.128": 2}
    )
    assert targets.shortfalls([dataclasses.replace(row, modelled_us=110.0)]) == []


def test_shortfalls_are_worst_first_and_in_the_report(no_pictures, tmp_path):
    rows = (an_inspection(other_per_mma=21.0), an_inspection("conv3", serialised=True), an_inspection("conv4"))
    found = targets.shortfalls(rows)
    assert [line.target for line in found[:2]] == ["asynchronous HGMMA", "other instructions per HGMMA.64x128"]
    report.render_report(a_record(inspections=rows), tmp_path)
    text = (tmp_path / "interpreter.md").read_text()
    assert text.index("waits for every product") < text.index("at most 14")
    assert "nobody's measurement" in text


def test_peers_stand_beside_ours_and_the_lost_ones_first(no_pictures, tmp_path):
    rows = (an_inspection(), an_inspection("conv3"))
    others = (an_inspection(kernel="Inductor conv2d", modelled_us=95.0),
              an_inspection("conv3", kernel="Inductor conv2d", modelled_us=80.0, serialised=True))  # fmt: skip
    record = a_record(inspections=rows, peers=others)
    records.save(record, tmp_path / "x.json")
    assert records.load(tmp_path / "x.json") == record
    report.render_report(record, tmp_path)
    text = (tmp_path / "interpreter.md").read_text()
    assert text.index("NOT AHEAD") < text.index("ours ahead")


def test_modelled_is_never_called_measured(no_pictures, tmp_path):
    report.render_report(a_record(), tmp_path)
    text = (tmp_path / "interpreter.md").read_text()
    modelled = next(line for line in text.splitlines() if line.startswith("- **Modelled**"))
    assert "fprop" in modelled and "H100 (sm_90)" in modelled
    assert "no GPU speed was measured" in text


# The command line and the main job


def test_unwritable_directory_is_said_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(job, "checks", lambda *a, **k: pytest.fail("ran before the directory was tried"))
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "is not a directory that can be written" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--suite", "alexnett"], "nearest: alexnet"),
        (["inspect", "--arch", "sm_9"], "nearest: sm_90"),
        (["inspect", "--dtype", "float16"], "dtype='float16' is unknown"),
        (["inspect", "--pass", "fprp"], "nearest: fprop"),
        (["inspect", "--layer", "conv22"], "nearest: conv2"),
        (["inspect", "--layer", "conv1", "--pass", "dgrad"], "nothing to inspect"),
        (["inspect", "--batch", "0"], "batch=0 must be at least 1"),
        (["bench", "--batch", "1"], "batch=1 must be at least 2"),
        (["report", "no-such.json"], "no-such.json"),
    ],
)
def test_bad_arguments(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_job_writes_a_record_and_its_report(no_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "checks", lambda *a, **k: [json.loads(json.dumps(records.to_data(a_check("network"))))])
    monkeypatch.setattr(job, "inspect_all", lambda *a, **k: [records.to_data(an_inspection())])
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    tail = result.output.strip().splitlines()[-4:]
    assert tail[0].startswith("Report: ")
    assert [line.split(":")[0] for line in tail[1:]] == ["Checked", "Inspected", "Measured"]
    stored = next((tmp_path / "data").glob("*.json"))
    assert str(tmp_path) not in stored.read_text()
    again = CliRunner().invoke(app, ["report", str(stored), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    name = f"{stored.stem}.html"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_inspect_writes_a_record_that_report_renders(no_pictures, tmp_path, monkeypatch):
    from tileconv.bench import inspect

    monkeypatch.setattr(inspect, "inspect_all", lambda *a, **k: [records.to_data(an_inspection())])
    file = tmp_path / "x.json"
    result = CliRunner().invoke(app, ["inspect", "--layer", "conv2", "--pass", "fprop", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "Modelled: on H100 (sm_90)" in result.output
    record = records.load(file)
    assert record.device.kind == "none" and str(tmp_path) not in file.read_text()
    assert record.command == "tileconv inspect --suite alexnet --arch sm_90 --pass fprop --layer conv2"
    again = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "inspect-alexnet.md").read_text().startswith("# tileconv, inspected\n")


def test_a_wrong_result_ends_with_an_error(no_pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "checks", lambda *a, **k: [records.to_data(a_check("conv2", error=1.0))])
    monkeypatch.setattr(job, "inspect_all", lambda *a, **k: [])
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "failed: alexnet/conv2/fp16: outside its budget" in result.output


def test_env_lists_versions():
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert f"torch: {torch.__version__}" in result.output
