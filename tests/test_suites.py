"""Suites: their shapes against published figures, every plan, users' files, recorded models, and bad input."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from tileconv.bench import cases, inspect, networks, plans, recorded, suites
from tileconv.bench.cases import Case
from tileconv.bench.cli import app
from tileconv.bench.layers import OPERATIONS
from tileconv.bench.predictions import predictions
from tileconv.kernels import functional, hardware

GPUS = [hardware.GPUS["H100"], hardware.GPUS["A100"]]


def shapes(suite, batch=None):
    return {shape.name: shape for shape in networks.network_layers(suite, batch)}


def convolution(shape):
    """input, filters, window, stride and padding, for a layer with the same of both axes."""
    m = shape.module
    assert len({*m.kernel_size}) == len({*m.stride}) == len({*m.padding}) == 1
    return shape.input, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]


def gigaflops(suite, prefix=""):
    """Multiplications and additions of a forward pass, an image."""
    found = [s for s in networks.network_layers(suite) if s.name.startswith(prefix) and s.op in ("conv2d", "linear")]
    return sum(cases.conv_problem(s).flops / s.input[0] for s in found) / 1e9


# -- published figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("L1", ((128, 3, 128, 128), 96, 11, 1, 0)),
        ("L2", ((128, 64, 64, 64), 128, 9, 1, 0)),
        ("L3", ((128, 128, 32, 32), 128, 9, 1, 0)),
        ("L4", ((128, 128, 16, 16), 128, 7, 1, 0)),
        ("L5", ((128, 384, 13, 13), 384, 3, 1, 0)),
        ("alexnet.conv1", ((128, 3, 224, 224), 64, 11, 4, 2)),
        ("alexnet.conv4", ((128, 384, 13, 13), 256, 3, 1, 1)),
        ("overfeat.conv1", ((128, 3, 231, 231), 96, 11, 4, 0)),
        ("overfeat.conv2", ((128, 96, 28, 28), 256, 5, 1, 0)),
        ("overfeat.conv5", ((128, 1024, 12, 12), 1024, 3, 1, 1)),
        ("vgg-a.conv1_1", ((64, 3, 224, 224), 64, 3, 1, 1)),
        ("vgg-a.conv5_2", ((64, 512, 14, 14), 512, 3, 1, 1)),
        ("googlenet.conv1", ((128, 3, 224, 224), 64, 7, 2, 3)),
        ("googlenet.inception3a.branch3.1", ((128, 16, 28, 28), 32, 5, 1, 2)),
        ("googlenet.inception5b.branch2.1", ((128, 192, 7, 7), 384, 3, 1, 1)),
    ],
)
def test_convnet_benchmarks_layers(name, figures):
    """torch7/layerwise_benchmarks/benchmark.lua, torch7/imagenet_winners and caffe/imagenet_winners of that project."""
    assert convolution(shapes("convnet-benchmarks")[name]) == figures


def test_convnet_benchmarks_times_the_gradient_of_single_layers_inputs():
    found = {c.layer for c in cases.cases("convnet-benchmarks", passes=["dgrad"])}
    assert {"L1", "L2", "L3", "L4", "L5"} <= found, "updateGradInput is timed there, of the first layer too"
    assert not found & {"alexnet.conv1", "overfeat.conv1", "vgg-a.conv1_1", "googlenet.conv1"}
    assert {c.batch for c in cases.cases("convnet-benchmarks") if c.layer.startswith("vgg-a")} == {64}
    widths = {s.name: s.module.out_features for s in networks.network_layers("convnet-benchmarks") if s.op == "linear"}
    assert [widths[f"overfeat.{name}"] for name in ("fc6", "fc7", "fc8")] == [3072, 4096, 1000]
    assert shapes("convnet-benchmarks")["overfeat.fc6"].input == (128, 1024 * 6 * 6)


@pytest.mark.parametrize(
    ("suite", "prefix", "published", "source"),
    [
        ("alexnet", "", 1.43, "torchvision's table: 0.71 GMAC"),
        ("vgg16", "", 30.94, "torchvision's table: 15.47 GMAC"),
        ("googlenet", "", 3.0, "torchvision's table: 1.5 GMAC"),
        ("convnet-benchmarks", "googlenet.inception3a", 0.256, "arXiv:1409.4842, table 1: 128M multiplications"),
        ("convnet-benchmarks", "googlenet.inception4a", 0.146, "arXiv:1409.4842, table 1: 73M multiplications"),
        ("convnet-benchmarks", "googlenet.inception5b", 0.142, "arXiv:1409.4842, table 1: 71M multiplications"),
        ("convnet-benchmarks", "vgg-a", 15.22, "torchvision's table, vgg11: 7.61 GMAC"),
    ],
)
def test_work_is_that_which_is_published(suite, prefix, published, source):
    assert gigaflops(suite, prefix) == pytest.approx(published, rel=0.02), source


def test_the_paper_of_2012_comes_from_the_model():
    found = shapes("alexnet-2012")
    assert list(found) == ["conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5",
                           "fc6", "fc7", "fc8"]  # fmt: skip
    parameters = sum(p.numel() for shape in found.values() for p in shape.module.parameters())
    assert parameters == 60_965_224
    assert found["conv1"].input == (128, 3, 227, 227) and found["fc8"].activation is None


def test_mobilenet_and_resnext_shapes():
    depthwise, grouped = shapes("depthwise"), shapes("grouped")
    assert all(shape.module.groups == shape.input[1] for shape in depthwise.values())
    m = grouped["resnext-56x56"].module
    assert (m.in_channels, m.groups, m.in_channels // m.groups) == (128, 32, 4), "arXiv:1611.05431, table 1: 32x4d"
    assert {shape.module.dilation[0] for shape in shapes("dilated").values()} >= {1, 2, 4, 6, 8, 12, 16, 18}


# -- every suite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [name for name in suites.SUITES if name not in ("convnet-benchmarks", "networks")])
def test_every_case_plans_its_launches_and_is_modelled(suite):
    for gpu in GPUS:
        for case in cases.cases(suite):
            if suite in ("vgg16", "googlenet", "odd-sizes", "latency") and case.pass_ not in cases.FORWARD:
                continue  # their gradients run the kernels that the other suites' gradients run
            planned = cases.launches(case, gpu)
            rows = predictions(case, planned, gpu)
            assert planned and len(rows) == len(planned), case
            assert all(row["modelled_us"] > 0 and row["bytes_least"] > 0 for row in rows), case
            assert all(row["floor_us"] == rows[0]["floor_us"] > 0 for row in rows), case
            assert sum(row["flops_needed"] or 0 for row in rows) == (cases.flops_of(case) or 0), case


def test_the_single_layers_of_convnet_benchmarks_plan_too():
    for gpu in GPUS:
        for case in cases.cases("convnet-benchmarks", layers=["L1", "L2", "L3", "L4", "L5"]):
            rows = predictions(case, cases.launches(case, gpu), gpu)
            assert sum(row["flops_needed"] or 0 for row in rows) == (cases.flops_of(case) or 0), case


def test_a_networks_launches_are_those_of_its_layers():
    gpu = GPUS[1]
    forward, step = (Case("networks", "alexnet", pass_, 128, "fp16") for pass_ in ("forward", "step"))
    assert [case.pass_ for case in cases.cases("networks", layers=["alexnet"])] == ["forward", "step"]
    layers = [launch for part in cases.parts(forward) for launch in cases.launches(part, gpu)]
    assert [launch.tile for launch in cases.launches(forward, gpu)] == [launch.tile for launch in layers]
    assert cases.flops_of(step) == pytest.approx(3 * cases.flops_of(forward), rel=0.05), "less conv1's dgrad"
    rows = predictions(step, cases.launches(step, gpu), gpu)
    assert rows[0]["floor_us"] == pytest.approx(sum(cases.weight_of(part) for part in cases.parts(step)), rel=2)
    assert sum(row["modelled_us"] for row in rows) > rows[0]["floor_us"]


def test_the_layers_suite_has_every_operation():
    assert {shape.op for shape in networks.network_layers("layers")} == set(OPERATIONS)
    no_layers = {"fc_to_conv", "conv_to_fc", "batch_invariant", "how_conv2d_max_pool2d_runs"}
    public = set(functional.__all__) - no_layers
    assert public <= set(OPERATIONS), "a function of the library without an entry"


@pytest.mark.parametrize(
    "name",
    ["beyond-2^31-conv", "beyond-2^31-conv-63", "beyond-2^31-depthwise", "pool-beyond-2^31", "norm-beyond-2^31"],
)
def test_beyond_two_to_the_31_takes_64_bit_offsets(name):
    shape = shapes("odd-sizes")[name]
    assert math.prod(shape.input) > 2**31
    pointers = 0
    for gpu in GPUS:
        for case in cases.cases("odd-sizes", layers=[name]):
            for launch in cases.launches(case, gpu):
                tensors = [t for t in launch.arguments.values() if isinstance(t, torch.Tensor) and t.numel() > 2**31]
                if tensors and "INDEX" in launch.arguments:
                    pointers += 1
                    assert str(launch.arguments["INDEX"]) == "int64", (case, launch.kernel.__name__)
    assert pointers


def test_suites_with_batches_of_their_own_refuse_another():
    assert {c.batch for c in cases.cases("odd-sizes", layers=["batch-127", "batch-129"])} == {127, 129}
    with pytest.raises(ValueError, match="batch=8: the layers of 'odd-sizes' have batch sizes of their own"):
        cases.cases("odd-sizes", 8)
    assert {c.batch for c in cases.cases("latency")} == {1} and suites.SUITES["latency"].graph
    assert suites.SUITES["networks"].whole
    with pytest.raises(ValueError, match="batch=8: batch-127 of odd-sizes has 127"):
        cases.shape_of(Case("odd-sizes", "batch-127", "fprop", 8, "fp16"))


def test_telling_layers_come_first_and_then_the_heaviest():
    order = cases.by_weight(cases.cases("alexnet", passes=["fprop", "forward", "wgrad"]))
    assert [c.layer for c in order[:5]] == ["conv2", "conv2", "conv3", "conv3", "conv1"]
    rest = [cases.weight_of(c) for c in order if c.layer not in suites.SUITES["alexnet"].telling]
    assert rest == sorted(rest, reverse=True)
    assert sorted(map(str, order)) == sorted(map(str, cases.cases("alexnet", passes=["fprop", "forward", "wgrad"])))
    for suite in suites.SUITES.values():
        assert {s.name for s in suite.shapes()} >= set(suite.telling), suite.name


def test_cases_are_found_by_their_names():
    case = Case("odd-sizes", "batch-127", "fprop", 127, "fp16")
    for one in (case, replace(case, memory_format="contiguous")):
        assert cases.find_case(str(one)) == one == Case.from_json(json.loads(json.dumps(one.to_json())))
    for text, message in (
        ("alexnet/conv2", "must be suite/layer/pass/dtype/nBATCH"),
        ("alexnt/conv2/fprop/fp16/n1", "suite='alexnt' is unknown; nearest: alexnet"),
        ("alexnet/conv9/fprop/fp16/n1", "layer='conv9' is unknown; nearest: conv"),
        ("alexnet/conv2/frop/fp16/n1", "pass='frop' is unknown; nearest: fprop"),
        ("alexnet/conv2/fprop/fp61/n1", "dtype='fp61' is unknown; nearest: fp64, fp16"),
        ("alexnet/conv1/dgrad/fp16/n1", "pass of conv1='dgrad' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            cases.find_case(text)


# -- a user's own ------------------------------------------------------------------------------------------------------

YAML = """
batch: 32
layers:
  - {name: stem, op: conv2d, input: 3x64x48, filters: 16, kernel: [7, 5], stride: 2, padding: 3x2, activation: relu}
  - {name: pool, op: max_pool2d, input: [16, 32, 24], kernel: 3, stride: 2, ceil_mode: true, batch: 8}
  - {name: head, op: linear, input: 512, features: 10, bias: false}
"""
CSV = """name,op,input,batch,filters,features,kernel,stride,padding,activation,ceil_mode,bias
stem,conv2d,3x64x48,32,16,,7x5,2,3x2,relu,,
pool,max_pool2d,16x32x24,8,,,3,2,,,true,
head,linear,512,32,,10,,,,,,false
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="mine.yaml"):
        file = tmp_path / name
        file.write_text(text)
        return str(file)

    return write


def test_yaml_and_csv_say_the_same(written):
    of_yaml, of_csv = written(YAML), written(CSV, "mine.csv")
    both = [networks.network_layers(file) for file in (of_yaml, of_csv)]
    for a, b in zip(*both, strict=True):
        assert (a.name, a.op, a.input, a.activation, repr(a.module)) == (
            b.name,
            b.op,
            b.input,
            b.activation,
            repr(b.module),
        )
    stem, pool, head = both[0]
    assert convolution_pairs(stem) == ((32, 3, 64, 48), (7, 5), (2, 2), (3, 2)) and stem.activation == "relu"
    assert pool.input == (8, 16, 32, 24) and pool.module.ceil_mode is True
    assert head.module.bias is None
    found = cases.cases(of_yaml)
    assert {(c.layer, c.batch) for c in found} == {("stem", 32), ("pool", 8), ("head", 32)}
    assert ("head", "backward") not in {(c.layer, c.pass_) for c in found}, "no bias and no ReLU"
    assert {c.batch for c in cases.cases(of_csv, 4)} == {4}
    again = Case.from_json(json.loads(json.dumps(found[0].to_json())))
    assert cases.shape_of(again).input == (32, 3, 64, 48)
    assert cases.launches(again, GPUS[0])


def convolution_pairs(shape):
    m = shape.module
    return shape.input, m.kernel_size, m.stride, m.padding


def test_a_changed_file_is_read_again(written):
    file = written(YAML)
    assert len(networks.network_layers(file)) == 3
    written("layers: [{name: head, op: linear, input: 512, features: 10}]")
    os.utime(file, (1, 1))
    assert len(networks.network_layers(file)) == 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("{name: a, op: conv2d, input: 3x8x8, filters: 4}", "layer 1 .'a'.: kernel is missing: conv2d needs filters"),
        ("{name: a, op: conv2, input: 3x8x8}", "op='conv2' is unknown; nearest: conv2d"),
        ("{name: a, op: relu}", "input is missing"),
        ("{op: relu, input: 8}", "layer 1: name is missing"),
        ("{name: a, op: relu, input: 8, fitlers: 3}", "field='fitlers' is unknown; nearest: filters"),
        ("{name: a, op: relu, input: 8, filters: 3}", "field of relu='filters' is unknown"),
        ("{name: a/b, op: relu, input: 8}", "name='a/b' is not allowed"),
        ("{name: a, op: relu, input: 8, batch: 0}", "batch=0 is not allowed: it must be an integer of at least 1"),
        ("{name: a, op: relu, input: 8x-1}", "input='8x-1' is not allowed: it must be the extents of one image"),
        ("{name: a, op: relu, input: [8, 2.5]}", "input=.8, 2.5. is not allowed"),
        ("{name: a, op: max_pool2d, input: 3x8x8, kernel: big}", "kernel='big' is not allowed: it must be an integer"),
        ("{name: a, op: max_pool2d, input: 3x8x8, kernel: 1x2x3}", "kernel='1x2x3' is not allowed"),
        ("{name: a, op: max_pool2d, input: 3x8x8, kernel: true}", "kernel=True is not allowed"),
        ("{name: a, op: max_pool2d, input: 3x8x8, kernel: 2, ceil_mode: maybe}", "'maybe' is not allowed: .* true or"),
        ("{name: a, op: dropout, input: 8, p: 1.5}", "p=1.5 is not allowed: it must be a number from 0 to 1"),
        ("{name: a, op: conv2d, input: 3x8x8, filters: 4, kernel: 3, activation: gelu}", "activation='gelu'"),
        ("{name: a, op: conv2d, input: 3x8, filters: 4, kernel: 3}", "input=3x8 has 2 extents: conv2d takes 3"),
        ("{name: a, op: conv2d, input: 3x8x8, filters: 4, kernel: 9}", "kernel=9: input of 8x8 is too small"),
        ("{name: a, op: conv2d, input: 3x8x8, filters: 4, kernel: 3, groups: 2}", "in_channels must be divisible"),
        ("{name: a, op: fold, input: 10x9, output: 4, kernel: 3}", "input has 10 rows, which must be a multiple"),
        ("{name: a, op: fold, input: 9x9, output: 4, kernel: 3}", "input has 9 columns, and output=4x4 needs 4"),
        ("{name: a, op: relu, input: 8}, {name: a, op: relu, input: 9}", "layer 2 .'a'.: name='a' is taken by layer 1"),
        ("3", "layer 1: 3 is no layer"),
        ("", "no layers: at least one is needed"),
    ],
)  # fmt: skip
def test_wrong_layers_are_named(written, layer, message):
    with pytest.raises(ValueError, match=message) as caught:
        cases.cases(written(f"layers: [{layer}]"))
    assert "mine.yaml: " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "layers: {", "is no YAML"),
        ("a.yaml", "- 1", "layers is missing"),
        ("a.yaml", "layer: []\nlayers: []", "field='layer' is unknown; nearest: layers"),
        ("a.yml", "batch: -1\nlayers: []", "batch=-1 is not allowed"),
        ("a.csv", "name,op\na,relu\n", "line 1: input is missing"),
        ("a.csv", "name,op,input\na,relu,8,9\n", "line 2: .'9'. is beyond the header's 3 fields"),
        ("a.csv", "name,op,input,kernel\na,relu,8,\nb,max_pool2d,8,3\n", "line 3 .'b'.: input=8 has 1 extents"),
        ("a.csv", "name,op,input\n", "no layers"),
        ("a.csv", "", "line 1: name is missing"),
    ],
)
def test_wrong_files_are_named(written, name, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        cases.cases(written(text, name))
    assert f"{name}: " in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        cases.cases(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        (tmp_path / "folder.csv").mkdir()
        cases.cases(str(tmp_path / "folder.csv"))


# -- recorded models ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Modules, functions, repeated calls, and what there is no kernel for."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2)])
        self.relu = nn.ReLU(inplace=True)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 10)
        self.own = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        for block in self.blocks:
            x = self.relu(block(x))
        x = F.max_pool2d(self.up(F.avg_pool2d(x, 2)), 3, stride=2, ceil_mode=True)
        x = F.gelu(F.conv2d(x, self.own))
        x = F.adaptive_avg_pool2d(F.local_response_norm(x, 5), 1).flatten(1)
        return F.log_softmax(self.head(self.drop(x)), dim=1)


def test_a_models_calls_are_written_down():
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = recorded.record_model(model, (torch.randn(4, 3, 16, 16),))
    layers = [(row.name, row.at(4)) for row in found.rows]
    assert [(name, shape.op, shape.input) for name, shape in layers] == [
        ("first", "conv2d", (4, 3, 16, 16)), ("relu", "relu", (4, 8, 16, 16)), ("blocks.0", "conv2d", (4, 8, 16, 16)),
        ("blocks.1", "conv2d", (4, 8, 16, 16)), ("avg_pool2d", "avg_pool2d", (4, 8, 16, 16)),
        ("up", "conv_transpose2d", (4, 8, 8, 8)), ("max_pool2d", "max_pool2d", (4, 4, 16, 16)),
        ("conv2d", "conv2d", (4, 4, 8, 8)), ("local_response_norm", "local_response_norm", (4, 4, 8, 8)),
        ("adaptive_avg_pool2d", "adaptive_avg_pool2d", (4, 4, 8, 8)), ("drop", "dropout", (4, 4)),
        ("head", "linear", (4, 4)), ("log_softmax", "log_softmax", (4, 10)),
    ]  # fmt: skip
    shapes = dict(layers)
    assert [shapes[name].activation for name in ("first", "blocks.0", "conv2d", "head")] == [None, "relu", None, None]
    assert (shapes["blocks.1"].module.groups, shapes["first"].module.padding) == (8, "same")
    assert shapes["up"].module.bias is None and shapes["max_pool2d"].module.ceil_mode
    assert shapes["drop"].module.p == 0.3
    assert found.left_out == ["norm (BatchNorm2d): batch_norm", "gelu"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "batch norm ran on none"
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(24))

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias, activation="relu", dropout=0.3)


def test_a_linear_layer_with_dropout_is_one_layer_and_one_kernel():
    [row] = recorded.record_model(Head(), (torch.randn(4, 16),)).rows
    shape = row.at(4)
    assert (shape.op, shape.input, shape.activation, shape.dropout) == ("linear", (4, 16), "relu", 0.3)
    setting = plans.Setting(torch.float16, "ieee", hardware.INTERPRETER)
    names = [launch.kernel.__name__ for pass_ in ("fprop", "backward") for launch in plans.plan(shape, pass_, setting)]
    assert names == ["fprop_box", "bias_backward", "add_slices"]
    plain = plans.plan(replace(shape, activation=None), "backward", setting)
    assert [launch.kernel.__name__ for launch in plain] == ["dropout", "bias_backward", "add_slices"]


def test_our_own_networks_are_recorded_too():
    suite = suites.suite_of("tileconv.model.alexnet:AlexNet")
    ours = [(shape.op, shape.input, shape.activation) for shape in suite.shapes(128) if shape.op != "dropout"]
    named = networks.network_layers("alexnet")
    assert ours == [(shape.op, shape.input, shape.activation) for shape in named]
    assert suite.left_out == () and suite.shapes(3)[0].input == (3, 3, 224, 224)


MODELS = """
import torch
from torch import nn

class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.GELU()), torch.randn(2, 3, 8, 8)
def number():
    return 3
def pair():
    return nn.ReLU(), 3
def raises():
    raise KeyError("weights")
def none():
    return nn.Linear(3, 3)
def nothing():
    return nn.GELU(), torch.randn(2, 3)
def misfit():
    return nn.Conv2d(3, 4, 3), torch.randn(2, 5, 8, 8)
chooses = Chooses
constant = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module that lies in the current directory, as a user's does."""
    (tmp_path / "made_for_tests.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    recorded.record.cache_clear()
    yield "made_for_tests"
    sys.modules.pop("made_for_tests", None)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("made_for_tests:number", "returned an object of type int: allowed are a torch.nn.Module and .module, input."),
        ("made_for_tests:pair", "returned .ReLU, int.: allowed are"),
        ("made_for_tests:raises", "fails when called .KeyError"),
        ("made_for_tests:none", "a model without Conv2d needs an example"),
        ("made_for_tests:nothing", "calls no layer that there are kernels for; it calls gelu"),
        ("made_for_tests:misfit", "fails on an input of shape .2, 5, 8, 8. .RuntimeError"),
        ("made_for_tests:chooses", "looks at values to choose its way"),
        ("made_for_tests:constant", "constant is an object of type int, and must be a callable"),
        ("made_for_tests:smal", "callable='smal' is unknown; nearest: small"),
        ("made_for_test:small", "made_for_test cannot be imported .ModuleNotFoundError"),
        ("made_for_tests:", "must be module:callable"),
    ],
)
def test_wrong_models_are_named(models, place, message):
    with pytest.raises(ValueError, match=message) as caught:
        cases.cases(place)
    assert place in str(caught.value)
    assert str(Path.cwd()) not in sys.path


def test_a_recorded_models_cases(models):
    found = cases.cases("made_for_tests:small")
    assert [(c.layer, c.pass_, c.batch) for c in found] == [("0", "fprop", 2), ("0", "wgrad", 2), ("0", "backward", 2)]
    assert cases.cases("made_for_tests:small", 5)[0].batch == 5
    again = Case.from_json(json.loads(json.dumps(found[0].to_json())))
    assert cases.shape_of(again).activation == "relu" and cases.launches(again, GPUS[1])
    assert suites.suite_of("made_for_tests:small").left_out == ("2 (GELU): gelu",)


# -- the command line --------------------------------------------------------------------------------------------------


def test_inspect_lists_what_a_model_calls_beside(models, monkeypatch):
    monkeypatch.setattr(inspect, "inspect_all", lambda *a, **k: [])
    result = CliRunner().invoke(app, ["inspect", "--from-model", "made_for_tests:small"])
    assert result.exit_code == 0, result.output
    assert "Left out, because there is no kernel for it: 2 (GELU): gelu" in result.output


def test_unknown_suites_end_with_the_nearest_names():
    result = CliRunner().invoke(app, ["inspect", "--suite", "dilatd"])
    assert result.exit_code == 2
    assert "suite='dilatd' is unknown; nearest: dilated" in result.output
    result = CliRunner().invoke(app, ["inspect", "--from-model", "alexnet"])
    assert result.exit_code == 2 and "from_model='alexnet' must be module:callable" in result.output


def test_suites_are_listed():
    result = CliRunner().invoke(app, ["suites"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(suites.SUITES)


# -- compiled ----------------------------------------------------------------------------------------------------------


def compiled(suite, arch, **options):
    return inspect.inspect_all(cases.cases(suite, **options), [arch])


@pytest.mark.slow
def test_every_layer_compiles_without_spills():
    rows = compiled("layers", "sm_90")
    assert [(r["layer"], r["pass"], r["failure"]) for r in rows if r["failure"]] == []
    assert [
        (r["layer"], r["pass"], r["kernel"]) for r in rows if r["stack_bytes"] or r["spills"] or not r["fits"]
    ] == []
    assert all(r["modelled_us"] > 0 and r["bytes_read"] > 0 for r in rows)
    wide = ("relu", "max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "local_response_norm", "softmax",
            "log_softmax", "depthwise_conv2d")  # fmt: skip
    for row in rows:
        if row["layer"] in wide and row["role"] == "main" and row["pass"] in cases.FORWARD:
            accesses = {kind for kind in row["loop_loads"] if kind[:3] in ("LDG", "STG")}
            assert accesses <= {"LDG.128", "LDGSTS.128", "STG.128"}, row["layer"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_contiguous_images_are_read_and_written_as_channels_last_ones(arch):
    rows = [
        compiled("alexnet", arch, layers=["conv5"], passes=["fprop", "wgrad"], memory_format=memory_format)
        for memory_format in cases.MEMORY_FORMATS
    ]
    last, contiguous = ([row for row in found if row["kernel"] != "turn"] for found in rows)
    facts = "kernel", "tile", "registers", "stack_bytes", "loop_loads", "serialised"
    assert [[row[fact] for fact in facts] for row in contiguous] == [[row[fact] for fact in facts] for row in last]
    turns = [(row["pass"], row["stack_bytes"]) for row in rows[1] if row["kernel"] == "turn"]
    assert turns == [("fprop", 0)] * 3 + [("wgrad", 0)] * 2
    assert all(row["case"].endswith("/contiguous") and row["modelled_us"] > 0 for row in rows[1])


@pytest.mark.slow
def test_odd_channels_and_large_depthwise_windows_do_not_spill():
    rows = compiled("odd-sizes", "sm_90", dtypes=["fp16", "tf32"], passes=["fprop", "dgrad"], layers=["channels-127"])
    rows += compiled(
        "depthwise", "sm_90", passes=["fprop", "dgrad"], layers=["efficientnet-5x5-240", "two-filters-each"]
    )
    assert [(r["layer"], r["pass"], r["dtype"], r["failure"]) for r in rows if r["failure"] or r["stack_bytes"]] == []


EIGHTS = """
layers:
  - {name: "72", op: conv2d, batch: 128, input: 72x56x56, filters: 72, kernel: 3, padding: 1}
  - {name: "136", op: conv2d, batch: 64, input: 136x14x14, filters: 232, kernel: 3, padding: 1}
"""


@pytest.mark.slow
def test_filter_gradients_of_channels_in_eights_do_not_spill(written):
    rows = compiled(written(EIGHTS), "sm_90", dtypes=["fp16", "tf32"], passes=["wgrad"])
    main = [row for row in rows if row["role"] == "main"]
    assert [(row["layer"], row["dtype"], row["kernel"]) for row in main] == [
        (layer, dtype, "wgrad_box") for dtype in ("fp16", "tf32") for layer in ("72", "136")
    ]
    assert [(row["layer"], row["dtype"], row["stack_bytes"]) for row in rows if row["stack_bytes"]] == []


@pytest.mark.slow
def test_workers_rebuild_users_suites(written, models):
    for suite, layers in ((written(YAML), ["stem"]), (f"{models}:small", [])):
        rows = compiled(suite, "sm_80", passes=["fprop"], layers=layers)
        assert [row["failure"] for row in rows] == [None] * len(rows)


@pytest.mark.slow
def test_our_own_networks_are_recorded_where_triton_compiles():
    code = "from tileconv.bench import networks; print(len(networks.network_layers('tileconv.model.alexnet:AlexNet')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | inspect.COMPILING
    )
    assert (done.returncode, done.stdout.strip()) == (0, "14"), done.stderr


@pytest.mark.slow
def test_a_tensor_beyond_two_to_the_31_compiles():
    rows = compiled("odd-sizes", "sm_90", passes=cases.FORWARD, layers=["beyond-2^31-conv", "pool-beyond-2^31"])
    assert [(row["layer"], row["failure"], row["stack_bytes"]) for row in rows] == [
        ("beyond-2^31-conv", None, 0), ("pool-beyond-2^31", None, 0),
    ]  # fmt: skip
