"""torchvision built for CUDA beside a torch without: when its operators are declared, and when nothing is touched."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mllm_efficient.patches import torchvision_cpu


@pytest.fixture(autouse=True)
def nothing_stays():
    """A made-up torchvision that stayed would be taken for installed by the tests after this one."""
    before = sys.modules.get("torchvision")
    yield
    assert sys.modules.get("torchvision") is before


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """``installed(version)``: a torchvision that says so, found on the path; what would be declared."""
    declared = []

    class Library:
        def __init__(self, name, kind):
            declared.append((name, kind))

        def define(self, schema):
            declared.append(schema.split("(")[0])

    monkeypatch.setattr(torchvision_cpu, "_kept", [])
    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # so that what a test imports is taken out again, where there is none too
    del sys.modules["torchvision"]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if getattr(f, "__name__", "") == "PathFinder"])

    def put(version):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text("")
        (tmp_path / "torchvision" / "version.py").write_text(f"__version__ = '{version}'\nraise SystemExit('run')\n")
        return declared

    return put


@pytest.mark.parametrize(
    "version, cuda, done", [("0.28.0+cu130", None, True), ("0.28.0+cpu", None, False), ("0.28.0+cu130", "13.0", False)]
)
def test_declared_for_a_cuda_build_beside_a_cpu_torch_alone(installed, monkeypatch, version, cuda, done):
    declared = installed(version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    torchvision_cpu.declare()
    torchvision_cpu.declare()
    assert declared == ([("torchvision", "FRAGMENT"), "nms", "qnms"] if done else [])


def test_at_import_declares_when_it_is_imported_and_keeps_no_finder_from_its_turn(installed, monkeypatch):
    declared = installed("0.28.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", None)
    torchvision_cpu.at_import()
    torchvision_cpu.at_import()
    assert declared == [] and len(sys.meta_path) == 2
    import torchvision

    assert declared and torchvision.__file__.startswith(sys.path[0])


def test_without_torchvision_nothing_happens(installed):
    torchvision_cpu.declare()
    assert torchvision_cpu._kept == []


def test_the_installed_line_outlives_the_package(tmp_path, monkeypatch):
    """It may be uninstalled later; every Python of the environment would complain at its start."""
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": str(tmp_path)})
    line = torchvision_cpu.install().read_text()
    run = subprocess.run([sys.executable, "-S", "-I", "-c", line], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
