"""The wheel: it holds all that the package needs, and works where the checkout is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
LIMIT_MB = 32
COMMANDS = ("methods", "generate", "show", "eval", "flops", "bench", "sweep", "report")


def call(*command: str | Path, cwd: Path | None = None, path: Path | None = None) -> str:
    """What a command prints; ``path`` comes first on Python's import path. Fails if the command fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "TERM"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    run = subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a wheel is made from, so that building leaves nothing behind here and finds nothing old."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, copy)
    for folder in {Path(folder).parts[0] for folder in FOLDERS.values()}:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs' folder of an environment that has the wheel, and its dependencies from this one.

    Paths named in a .pth file bring no .pth files of their own: an editable install here is unknown there.
    """
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    own = Path(call(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(here)))
    call(sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index", wheel)
    return programs


def source_packages() -> set[str]:
    """Import names of all folders with an ``__init__.py``."""
    return {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }


def test_every_package_is_named_in_pyproject():
    assert sorted(source_packages()) == PROJECT["tool"]["setuptools"]["packages"]


def test_the_constraints_pin_every_dependency():
    names = {
        re.split(r"[<>=;]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[:1] != "#"
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["docs"]]
    assert {re.split(r"[<>=;]", d)[0].lower() for d in wanted} <= names


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_exactly_the_package(wheel):
    assert wheel.stat().st_size <= LIMIT_MB * 1e6
    with ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licences = {Path(n).name for n in archive.namelist() if "/licenses/" in n}
    assert licences == {"LICENSE", "NOTICE"}
    for name, folder in FOLDERS.items():
        inside = name.replace(".", "/")
        for file in (ROOT / folder).rglob("*"):
            if (
                file.suffix in (".py", ".yaml", ".safetensors", ".jinja", ".json", ".jsonl", ".md", ".typed")
                and "__pycache__" not in file.parts
            ):
                assert f"{inside}/{file.relative_to(ROOT / folder).as_posix()}" in names
    assert all(n.startswith("mllm_efficient/") and "__pycache__" not in n for n in names)


@pytest.mark.slow
def test_the_sdist_holds_every_file_and_builds_the_same_wheel(wheel, tmp_path):
    """Of a repository with the files that are here, as a release is made."""
    pytest.importorskip("build.__main__")
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository here, and copied files have no list of what belongs to them")
    listed = call("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    copy, files = tmp_path / "copy", [file for file in listed if (ROOT / file).is_file()]
    for file in files:
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, copy / file)
    for words in ("init -q", "add -A", "-c user.name=me -c user.email=me@here commit -qm all"):
        call("git", *words.split(), cwd=copy)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, copy, cwd=tmp_path)
    (source,), (again,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert source.stat().st_size <= LIMIT_MB * 1e6 and not set(files) - inside
    with ZipFile(wheel) as one, ZipFile(again) as two:
        names = [sorted(n for n in z.namelist() if ".dist-info/" not in n) for z in (one, two)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_the_wheel_imports_from_where_it_is_installed(installed, tmp_path):
    names = ("mllm_efficient", *(f"mllm_efficient.{n}" for n in ("eval", "patches", "patches.llava", "configs", "eval.builtin", "cli")))
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    files = call(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(files) == len(names)
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


@pytest.mark.slow
def test_the_wheel_has_its_version_and_one_program(installed, tmp_path):
    code = """
from importlib.metadata import distribution
import mllm_efficient as me
entries = [(e.name, e.value) for e in distribution("mllm-efficient").entry_points if e.group == "console_scripts"]
print(distribution("mllm-efficient").version == me.__version__, entries)
"""
    assert call(installed / "python", "-c", code, cwd=tmp_path) == "True [('mllm-efficient', 'mllm_efficient.cli:main')]\n"


@pytest.mark.slow
def test_the_installed_program_helps(installed, tmp_path):
    """The program by itself, and all of its commands in one process."""
    out = call(installed / "mllm-efficient", "--help", cwd=tmp_path)
    assert "Usage: mllm-efficient" in out and all(name in out for name in COMMANDS)
    code = f"from mllm_efficient.cli import main\nfor name in {list(COMMANDS)}:\n    print(f'= {{name}}', main([name, '--help']))"
    helps = call(installed / "python", "-c", code, cwd=tmp_path).replace("Usage: python -c ", "Usage: mllm-efficient ")
    assert all(f"Usage: mllm-efficient {name}" in helps and f"= {name} 0" in helps for name in COMMANDS)
    assert helps.count("--json") >= len(COMMANDS)


@pytest.mark.slow
def test_the_shipped_configs_are_methods(installed, tmp_path):
    code = """
from importlib.resources import files
import mllm_efficient as me
for path in sorted((files("mllm_efficient.configs") / "methods").iterdir()):
    print(path.stem, me.build(path).name, me.build(str(path)).count(576, (24, 24)))
"""
    lines = call(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert "divprune divprune 56" in lines and "random random 56" in lines
    assert len(lines) == len(list((ROOT / "configs" / "methods").glob("*.yaml")))


@pytest.mark.slow
def test_the_embedded_model_of_the_wheel_answers(installed, tmp_path):
    code = "from mllm_efficient.loading.models import builtin_folder; print(builtin_folder())"
    folder = Path(call(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert folder.is_relative_to(installed.parent) and (folder / "model.safetensors").is_file()
    out = call(installed / "mllm-efficient", "eval", "--method", "divprune:keep=0.25", "--limit", "7", cwd=tmp_path)
    assert "divprune" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_method_of_the_documentation_runs(installed, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-method.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 40
    (tmp_path / "norm.py").write_text(example)
    options = ("--import", "norm.py", "--method", "norm:keep=0.25,longest=false", "--limit", "7", "--json")
    rows = json.loads(call(installed / "mllm-efficient", "eval", *options, cwd=tmp_path))["rows"]
    assert "norm:keep=0.25,longest=False" in {row["method"] for row in rows}


def test_a_listing_imports_no_torch():
    code = f"""
import sys
from mllm_efficient.cli import main
for arguments in {[["methods"], ["--help"], *([name, "--help"] for name in COMMANDS)]}:
    assert main(arguments) == 0, arguments
    assert "torch" not in sys.modules and "transformers" not in sys.modules, arguments
"""
    call(sys.executable, "-c", code, path=ROOT)
