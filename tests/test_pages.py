"""The rendered page: first screen, pictures and tables, and what a browser makes of it. The GPU here is imaginary."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tileconv.bench import document, figures, frames, pictures, records, report, report_inspected, report_lead, targets
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


# The tables behind the page


def test_the_best_rival_has_our_precision_and_either_layout():
    rows = [
        a_timing(us=100), a_timing(provider="tileconv:box", us=1),
        a_timing(provider="cudnn", us=90, memory_format="contiguous"), a_timing(provider="cudnn", us=95),
        a_timing(provider="cudnn", us=10, precision="tf32"), a_timing(provider="torch.compile", us=80),
        a_timing(provider="cudnn default precision", us=20, precision="tf32"),
        a_timing(provider="im2col", us=70, l2="warm"),
    ]  # fmt: skip
    (found,) = frames.comparisons(rows).to_dict("records")
    assert (found["us"], found["best_us"], found["best_provider"]) == (100, 80, "torch.compile")
    assert (found["cudnn_us"], found["cudnn_layout"]) == (90, "contiguous")
    assert (found["default_us"], found["default_ratio"]) == (20, pytest.approx(0.2))
    assert found["ratio"] == pytest.approx(0.8)


def test_rows_without_a_speed_are_compared_with_nothing():
    rival = a_timing(provider="cudnn")
    assert frames.comparisons([without_speed(a_timing(), "wrong", "outside its budget"), rival]).empty
    (alone,) = frames.comparisons([a_timing(), without_speed(rival, "failed", "")]).to_dict("records")
    assert alone["best_provider"] is None and alone["ratio"] != alone["ratio"]
    assert frames.comparisons([]).empty


def test_geometric_means_leave_throttled_cases_out():
    rows = [a_timing("conv2"), a_timing("conv2", provider="cudnn", us=200), a_timing("conv3"),
            a_timing("conv3", provider="cudnn", us=50), a_timing("conv4", throttled=("power",)),
            a_timing("conv4", provider="cudnn", us=900), a_timing("conv5"),
            a_timing("conv5", provider="cudnn", us=900, throttled=("heat",))]  # fmt: skip
    (mean,) = frames.geometric_means(frames.comparisons(rows), ["network"]).to_dict("records")
    assert (mean["cases"], mean["losses"]) == (2, 1)
    assert mean["mean"] == pytest.approx(1.0), "sqrt(2 x 0.5)"
    assert frames.geometric_mean(frames.comparisons([])["ratio"]) is None


def test_only_the_reference_batch_reaches_targets_and_pictures():
    rows = [an_inspection(other_per_mma=50.0, batch=1), an_inspection(batch=128)]
    assert not [line for line in targets.shortfalls(rows) if "other instructions" in line.target]
    alone = targets.shortfalls(rows[:1])
    assert [line.subject for line in alone if "other instructions" in line.target] == ["conv2"]


def test_default_is_the_row_of_that_name_or_what_the_settings_leave_on():
    heuristic, searched = a_timing(provider="cudnn-heuristic", us=70), a_timing(provider="cudnn-benchmark", us=60)
    named = a_timing(provider="torch-default", us=50, precision="tf32")
    rows = frames.comparisons([a_timing(), heuristic, searched])
    assert rows["default_us"].tolist() == [70]
    assert frames.comparisons([a_timing(), heuristic, searched, named])["default_us"].tolist() == [50]


def test_limits_of_alexnet_do_not_judge_a_namesake():
    slow = an_inspection("conv2", modelled_us=1000.0)
    assert "modelled time / floor" in [line.target for line in targets.shortfalls([slow])]
    namesake = dataclasses.replace(slow, network="lenet", case="lenet/conv2")
    assert "modelled time / floor" not in [line.target for line in targets.lines([namesake])]
    assert all(line.subject == "lenet conv2" for line in targets.lines([namesake]))


def test_one_operand_of_wgrad_may_pass_registers():
    assert report_inspected.inspection_faults(an_inspection(register_operand=True)) == ["operand A in registers"]
    assert report_inspected.inspection_faults(an_inspection(pass_="wgrad", register_operand=True)) == []
    many = [an_inspection(f"conv{i}", stack_bytes=8) for i in range(5)]
    assert report_inspected.named_faults(many).endswith("conv2 fprop sm_90 (spills) and 2 more")


# Pictures


def drawn(record):
    """(name, word, title) of every picture, nothing rendered."""
    found = []

    def picture(name, title, about, draw, size, word):
        found.append((name, word, title))
        return document.Figure(title, about, f"figures/{name}.png", b"<svg/>", b"<svg/>", word)

    pictures.speed_pictures(record, picture)
    return found


NAMES = ["heat", "roofline", "waterfall", "dilation", "batch"]


def test_without_a_gpu_every_picture_is_modelled_and_says_so():
    found = drawn(a_record("none"))
    assert [name for name, _, _ in found] == NAMES
    assert {word for _, word, _ in found} == {"modelled"}
    assert all("H100 (sm_90)" in title for _, _, title in found)


def test_on_a_gpu_every_picture_is_measured():
    found = drawn(a_record())
    assert [name for name, _, _ in found] == NAMES
    assert {word for _, word, _ in found} == {"measured"}


def test_a_picture_that_was_not_measured_is_modelled():
    only_forward = tuple(t for t in timings() if t.network == "alexnet" and t.batch == 128)
    words = {name: word for name, word, _ in drawn(a_record(timings=only_forward))}
    assert words == {"heat": "measured", "roofline": "measured", "waterfall": "measured", "dilation": "modelled",
                     "batch": "modelled"}  # fmt: skip


def test_a_layer_without_a_time_is_named_beside_the_sum():
    rows = [a_timing("conv2"), a_timing("conv2", provider="cudnn"), without_speed(a_timing("conv3"), "wrong", "")]
    titles = {name: title for name, _, title in drawn(a_record(timings=tuple(rows), inspections=()))}
    assert "Not in these sums, because there is no time: conv3 fprop." in titles["waterfall"]


def test_memory_that_is_not_known_is_left_out_and_said():
    rows = tuple(dataclasses.replace(i, extra_bytes=None) for i in inspections())
    titles = {name: title for name, _, title in drawn(a_record("none", inspections=rows))}
    assert "not in this record, and not drawn" in titles["batch"]


def test_an_empty_record_draws_nothing():
    assert drawn(a_record("none", inspections=(), checks=())) == []


# The page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.faults, self.rows = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.rows += tag == "tr"
        self.sources += [found[key] for key in ("src", "srcset") if found.get(key)]
        if tag == "img" and not found.get("alt"):
            self.faults.append("img without alt")
        if tag == "th" and found.get("scope") not in ("col", "row"):
            self.faults.append("th without scope")
        if tag == "link" or "http" in (found.get("href") or ""):
            self.faults.append(f"{tag} {found}")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The pages of both records: with invented timings, and without any."""
    out = tmp_path_factory.mktemp("pages")
    draw = figures._render
    with pytest.MonkeyPatch.context() as patch:
        # The page holds SVG; a third of the time would go into pictures that nothing here looks at.
        patch.setattr(figures, "_render", lambda *a: b"" if a[-1] == "png" else draw(*a))
        return {kind: report.render_report(a_record(kind), out)[0] for kind in ("cuda", "none")}


def test_the_page_holds_everything_itself(rendered):
    for path in rendered.values():
        page = Page(path.read_text())
        assert page.faults == []
        assert page.sources and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
        assert path.stat().st_size < 3_000_000
    assert page.tags.count("picture") == 7, "five of times, errors, loops"


def test_every_row_is_there_without_javascript(rendered):
    static = re.sub(r"<script>.*</script>", "", rendered["cuda"].read_text(), flags=re.S)
    assert Page(static).rows > len(timings()) + len(inspections())
    assert "not timed: out of GPU memory" in static and "throttled: power" in static
    assert "<button" not in static and "<input" not in static


def test_first_lines_of_the_text_version(rendered):
    lines = rendered["cuda"].with_suffix(".md").read_text().splitlines()
    names = [line.split("**")[1] for line in lines if line.startswith("- **")]
    assert names[:6] == ["device", "torch", "triton", "CUDA", "cuDNN", "driver"]
    assert names[9:14] == ["Speed-up over cuDNN, geometric mean", "Measured", "Modelled", "Inspected", "Checked"]
    table = [line for line in lines if line.startswith("| ")]
    assert table[0].startswith("| layer | pass | dtype | speed-up |") and "0.8" in table[2], "losses first"


def test_the_headline_is_a_geometric_mean_over_cudnn():
    rows = (a_timing("conv2"), a_timing("conv2", provider="cudnn", us=200), a_timing("conv3"),
            a_timing("conv3", provider="cudnn", us=80), a_timing("conv3", provider="torch.compile", us=50))  # fmt: skip
    first = report_lead.lead(a_record(timings=rows))
    assert (first.what, first.value) == ("Speed-up over cuDNN, geometric mean", "1.26x"), "sqrt(2 x 0.8)"
    assert "slower in 1" in first.note and "Over the best of all rivals: 1.00x" in first.note
    assert [row[0] for row in first.table.rows] == ["conv3", "conv2"]


def test_the_page_without_a_gpu_says_measured_nothing(rendered):
    text = rendered["none"].with_suffix(".md").read_text()
    assert "- **Measured**: Nothing. No GPU ran these kernels, so no GPU speed was measured." in text
    assert "- **Speed-up over cuDNN**: not measured" in text
    assert 'class="badge measured"' not in rendered["none"].read_text()


@pytest.mark.parametrize(("name", "values"), [("dtype", ("fp16", "bf16")), ("architecture", ("sm_90", "sm_80"))])
def test_what_is_furthest_from_target_is_told_apart(name, values):
    field = {"architecture": "arch"}.get(name, name)
    rows = tuple(dataclasses.replace(an_inspection("conv2"), failure="no", **{field: value}) for value in values)
    table = report_lead.lead(a_record("none", inspections=rows)).table
    assert {row[table.header.index(name)] for row in table.rows} == set(values)
    assert len(set(table.rows)) == len(table.rows) > 1


def test_the_model_stands_beside_published_products(rendered):
    text = rendered["none"].with_suffix(".md").read_text()
    assert "| 8192 x 8192 x 512 | fp16 | H100 | 540 | 537 | 0.99 | an example |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p50_us": -1.0}, "quantiles must be positive and ascending"),
        ({"p80_us": 1.0}, "quantiles must be positive and ascending"),
    ],
)
def test_times_that_cannot_be_are_refused(change, message):
    with pytest.raises(records.RecordError, match=message):
        a_timing(**change)


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look at the page with")
# Before anything else on the page, so that no error goes unseen.
WATCH = """<script>
window.faults = [];
addEventListener("error", e => faults.push(e.message));
addEventListener("securitypolicyviolation", e => faults.push(e.violatedDirective));
for (const kind of ["error", "warn"]) console[kind] = (...words) => faults.push(words.join(" "));
</script>"""
# What the page looks like, and what sorting and filtering its longest open table does.
LOOK = """<script>
addEventListener("load", () => {
  const bottom = name => Math.max(...[...document.querySelectorAll(name)].map(e => e.getBoundingClientRect().bottom));
  const found = {width: innerWidth, wide: document.documentElement.scrollWidth, faults,
    bottoms: Object.fromEntries([".facts", ".lead .value", ".lead table", ".cards"].map(n => [n, bottom(n)])),
    ground: getComputedStyle(document.body).backgroundColor,
    dark: [...document.querySelectorAll("picture")].every(p =>
      p.querySelector("img").currentSrc === p.querySelector("source").srcset)};
  const table = [...document.querySelectorAll("table")].find(t => t.caption?.textContent.startsWith("Every case"));
  if (table) {
    const rows = () => [...table.tBodies[0].rows].filter(r => !r.hidden);
    const heads = [...table.tHead.rows[0].cells];
    const column = heads.findIndex(h => h.textContent === "tileconv us");
    const button = heads[column].querySelector("button");
    const values = () => rows().map(r => parseFloat(r.cells[column].textContent));
    found.before = values();
    button.focus();
    found.focused = document.activeElement === button;
    button.click();
    found.up = [heads[column].getAttribute("aria-sort"), values()];
    button.click();
    found.down = [heads[column].getAttribute("aria-sort"), values()];
    const label = table.closest(".scroll").previousElementSibling, input = label.querySelector("input");
    input.value = "conv2 wgrad tf32";
    input.dispatchEvent(new Event("input"));
    found.filtered = rows().map(r => r.textContent);
    found.count = label.querySelector("output").textContent;
  }
  if (parent !== window) parent.postMessage(found, "*");
  else document.documentElement.innerHTML = `<body><pre>${JSON.stringify(found).replaceAll("<", "&lt;")}</pre></body>`;
});
</script>"""


def chromium(*arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def looked_at(page, folder, *options, frame=None):
    """What LOOK finds on a page, in the window or in a frame of (width, height) as narrow as a phone."""
    text = page.read_text()
    assert text.count("<head>") == text.count("</body>") == 1
    copy = folder / "page.html"
    copy.write_text(text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{LOOK}</body>"))
    shown = copy
    if frame is not None:
        shown = folder / "frame.html"
        inner = f"<iframe src=page.html width={frame[0]} height={frame[1]} style=border:0></iframe>"
        script = 'onmessage = e => { document.querySelector("pre").textContent = JSON.stringify(e.data); };'
        shown.write_text(f"<body>{inner}<pre></pre><script>{script}</script></body>")
    dom = chromium(*options, "--virtual-time-budget=4000", "--dump-dom", shown.as_uri())
    return json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", dom, re.S)[1]))


@browser
def test_the_first_screen_sorting_and_filtering_in_a_browser(rendered, tmp_path):
    found = looked_at(rendered["cuda"], tmp_path, "--window-size=1280,800")
    assert found["faults"] == []
    assert found["wide"] <= found["width"] == 1280
    # A window of 800 pixels less what a browser keeps for its bars.
    assert max(found["bottoms"].values()) <= 660, found["bottoms"]
    assert found["focused"]
    assert found["up"] == ["ascending", sorted(found["before"])]
    assert found["down"] == ["descending", sorted(found["before"], reverse=True)]
    assert found["before"] not in (found["up"][1], found["down"][1])
    assert len(found["filtered"]) == 2, "a cold and a warm L2 cache"
    assert all("conv2" in row and "wgrad" in row and "tf32" in row for row in found["filtered"])
    assert found["count"] == f"2 of {len(found['before'])} rows"


@browser
@pytest.mark.parametrize("kind", ["cuda", "none"])
def test_a_phone_in_the_dark_scrolls_no_page_sideways(rendered, tmp_path, kind):
    dark = "--blink-settings=preferredColorScheme=0"
    found = looked_at(rendered[kind], tmp_path, dark, "--window-size=800,900", frame=(390, 844))
    assert found["faults"] == []
    assert found["width"] == 390
    assert found["wide"] <= 390
    assert found["ground"] == "rgb(20, 23, 28)"
    assert found["dark"], "every picture is its dark version"


@browser
def test_a_screenshot_shows_the_page(rendered, tmp_path):
    from matplotlib.image import imread

    file = tmp_path / "shot.png"
    chromium("--window-size=1280,800", f"--screenshot={file}", rendered["none"].as_uri())
    pixels = imread(file)[..., :3]
    assert pixels.shape == (800, 1280, 3)
    assert (pixels[0, 0] == 1).all(), "white in the corner"
    inked = (pixels.min(axis=2) < 0.5).mean()
    assert 0.01 < inked < 0.2, "text, and not a blank or a black page"
    colours = {tuple(c) for c in (pixels[::2, ::2] * 255).astype(int).reshape(-1, 3)}
    assert {(180, 80, 26), (15, 122, 87)} <= colours, "the rules of the cards modelled and measured"
