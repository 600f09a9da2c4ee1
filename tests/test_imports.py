"""Who may import whom, and that nobody pays for torch who only asks for help."""

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("vit", "data") for path in (ROOT / folder).rglob("*.py"))


def imported(text: str) -> Iterator[str]:
    """Full names of everything a source imports, at the top or inside functions: ``a.b`` for ``from a import b``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import; write the full name")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(folder: str, name: str) -> bool:
    """Whether a source in ``folder`` must not import ``name``."""
    parts = name.split(".")
    if folder == "vit":
        return parts[0] in ("data", "train", "predict", "benchmarks", "tests")
    return parts[0] in ("train", "predict", "benchmarks", "tests") or (
        parts[0] == "vit" and parts[1] not in ("preprocess", "quiet", "records")  # which know of no model
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_direction_of_imports(path):
    folder = path.relative_to(ROOT).parts[0]
    assert [name for name in imported(path.read_text()) if forbidden(folder, name)] == []


def test_the_check_sees_what_it_must():
    hidden = (
        "def f():\n    from data.sources import load\n    import vit.model, vit.preprocess\n    from vit import model"
    )
    names = list(imported(hidden))
    assert [name for name in names if forbidden("vit", name)] == ["data.sources.load"]
    assert [name for name in names if forbidden("data", name)] == ["vit.model", "vit.model"]


def test_every_folder_is_a_package_that_is_installed():
    """Of a folder that is none setuptools warns that it will be left out: the weights."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for folder in ("vit", "data") for path in (ROOT / folder).rglob("*.*")}
    assert {str(path).replace("/", ".") for path in folders if path.name != "__pycache__"} == set(packages)


def test_nothing_is_missing_of_what_is_packed(tmp_path):
    """Of the packages in the wheel; in the source distribution also of what their tests need."""
    pytest.importorskip("setuptools", minversion="77")
    (source := tmp_path / "source").mkdir()
    folders = ("vit", "data", "benchmarks", "configs", "docs", "tests")
    for folder in folders:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, source)
    code = "from setuptools import build_meta as build\nbuild.build_sdist('..')\nbuild.build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=100)
    ((wheel,), (archive,)) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    with tarfile.open(archive) as packed:
        sources = {name.partition("/")[2] for name in packed.getnames()}
    files = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files = [str(path) for path in files if "__pycache__" not in path.parts]
    assert not set(files) - sources
    assert not {path for path in files if path.startswith(("vit/", "data/"))} - names
    assert {"vit/py.typed", "data/py.typed"} <= names  # without which type checkers pass the packages over


def test_no_drawer_for_everything():
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def loaded(code: str) -> set[str]:
    """Modules that a program has imported when it is done."""
    code += "\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-1000:]
    return set(done.stdout.splitlines())


HELP = "import predict\nassert predict.main(['--help']) == 0"


@pytest.mark.parametrize("code", ["import vit", HELP], ids=["import vit", "--help"])
def test_starts_without_torch(code):
    names = loaded(code)
    assert "vit" in names
    assert names.isdisjoint({"torch", "torchvision", "timm", "lightning", "numpy", "matplotlib"})


def test_maps_and_their_scores_without_what_takes_seconds_to_import(tmp_path):
    image = str(ROOT / "docs" / "photographs.png")
    options = [image, "--score-maps", "--maps", str(tmp_path / "maps"), "--report", str(tmp_path / "page.html")]
    names = loaded(f"import predict\nassert predict.main({options}) == 0")
    assert {"torch", "vit.faithfulness", "vit.gallery"} <= names
    assert names.isdisjoint({"torchvision", "torch._dynamo", "timm", "lightning"})
