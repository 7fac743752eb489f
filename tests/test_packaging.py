"""What a person installs: the wheel's contents, its import from there, the command, and the README's example."""

import os
import re
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tileconv.model.version import own_version

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "model", "bench")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # It must not know that one of parallel workers of pytest starts it: benchmarks would not measure there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command_line = [str(part) for part in command]
    return subprocess.run(command_line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    assert not [e.filename for e in entries if stat.S_ISLNK(e.external_attr >> 16)]
    info = f"tileconv-{PROJECT['version']}.dist-info"
    names = {e.filename for e in entries}
    on_disk = {f"tileconv/{p.relative_to(ROOT)}" for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
    typed = {f"tileconv/{folder}/py.typed" for folder in FOLDERS}
    licence = {f"{info}/licenses/LICENSE"}
    assert names >= on_disk | typed | licence
    assert not {name for name in names - on_disk - typed if not name.startswith(f"{info}/")}


def test_wheel_imports_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """-S keeps this checkout's own editable installation out; the dependencies are appended by hand."""
    target = tmp_path / "site"
    installed = run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    )
    assert installed.returncode == 0, installed.stderr
    script = f"""
import sys
sys.path[:] = [{str(target)!r}, *sys.path, {sysconfig.get_path("purelib")!r}]
import tileconv.kernels, tileconv.model.alexnet, tileconv.bench
print(tileconv.kernels.__file__, tileconv.model.__file__, tileconv.bench.__file__, sep="\\n")
"""
    imported = run(sys.executable, "-I", "-S", "-c", script, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    expected = [target / "tileconv" / folder / "__init__.py" for folder in FOLDERS]
    assert imported.stdout.split() == [str(path) for path in expected]


def test_folder_name_is_refused_as_an_import() -> None:
    """Loaded under a second name, the package would define its operators twice."""
    refused = run(sys.executable, "-c", "import kernels")
    assert refused.returncode != 0
    last_line = refused.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError")
    assert "tileconv.kernels" in last_line


# A checkout that is only on the path, as on a lent machine, has no script: there the module is the command.
INSTALLED = any(found.name == "tileconv" for found in metadata.distributions())
COMMAND = (Path(sysconfig.get_path("scripts")) / "tileconv",) if INSTALLED else (sys.executable, "-m", "tileconv.bench")


@pytest.mark.parametrize("arguments", [(), ("bench",)], ids=["tileconv", "bench"])
def test_command_helps(arguments: tuple[str, ...]) -> None:
    helped = run(*COMMAND, *arguments, "--help")
    assert helped.returncode == 0, helped.stderr
    plain = re.sub(r"\x1b\[[\d;]*m", "", helped.stdout)  # colours are forced on in some CI
    assert " ".join(["Usage: tileconv", *arguments]) in plain


def test_versions_agree() -> None:
    version = PROJECT["version"]
    assert own_version() == version
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_direct_dependencies_are_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }
    direct = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, direct):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes the pin {pins[name]}"


# What the README's second example takes for granted.
MODELS = """
import torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
other_model, images = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
"""


def test_readme_examples_run() -> None:
    first, second = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for example in (
        first,
        second.replace("import tileconv.kernels as tk\n", "import tileconv.kernels as tk\n" + MODELS),
    ):
        ran = run(sys.executable, "-c", example)
        assert ran.returncode == 0, ran.stderr


def test_readme_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|opt|mnt|data)/\w")


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{text.count(chr(10), 0, hit.start()) + 1}: {hit[0]}" for hit in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.slow
def test_pytest_bench_measures_and_pytest_alone_does_not() -> None:
    for folder, measures in (("bench/", True), ("tests/benchmarks", False)):
        chosen = ("-q", "-k", "choosing_a_tile_again", "-p", "no:cacheprovider")
        done = run(sys.executable, "-m", "pytest", folder, *chosen)
        assert done.returncode == 0, done.stdout
        assert "3 passed" in done.stdout
        assert ("benchmark: 3 tests" in done.stdout) == measures
