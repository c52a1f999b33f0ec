"""Registered methods, what is imported, and packages of third parties."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mllm_efficient as me
from mllm_efficient import registry

from .test_registry import (
    BUILTIN,
    ROOT,
)

pytestmark = pytest.mark.once


def test_a_class_that_is_no_dataclass_is_refused_with_what_to_type(registered):
    with pytest.raises(me.MllmEfficientError, match="Plain: put @dataclass\\(frozen=True\\) between @register and the class"):

        @registered("plain")
        class Plain:
            pass


def test_a_method_whose_settings_would_be_lost_without_dataclass_is_refused(registered):
    """Its parent is a dataclass, it is not: ``strength`` would be no parameter."""
    with pytest.raises(me.MllmEfficientError, match="Mine: put @dataclass\\(frozen=True\\) between @register and the class"):

        @registered("mine")
        class Mine(me.Selector):
            strength: float = 0.5


def test_a_name_is_registered_once(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class First(me.Selector):
        pass

    with pytest.raises(me.MllmEfficientError, match=r"method 'mine' is already registered by .*First"):

        @registered("mine")
        @dataclasses.dataclass(frozen=True)
        class Second(me.Selector):
            pass

    assert me.get_method("mine") is First


def test_a_file_may_be_loaded_again(registered):
    def load():
        @registered("mine")
        @dataclasses.dataclass(frozen=True)
        class Mine(me.Selector):
            def score(self, v):
                return torch.zeros(len(v))

        return Mine

    assert load() is not load()
    assert "mine" in me.list_methods()


def test_a_registered_method_is_listed_once_and_after_the_builtin(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        pass

    assert me.list_methods().count("mine") == 1
    assert me.list_methods().index("mine") >= len(BUILTIN)


def python(code: str, *folders: Path):
    """What ``code`` prints, as JSON, in a fresh interpreter that finds ``folders`` and this package."""
    path = os.pathsep.join(str(folder) for folder in (*folders, ROOT))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def installed(folder: Path, package: str, entries: dict[str, str], source: str) -> Path:
    """A site-packages folder where ``package`` is installed: a module, its metadata and entry points {method: object}."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{method} = {target}" for method, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]))
    (folder / f"{package}.py").write_text(textwrap.dedent(source))
    return folder


GOOD = """\
from dataclasses import dataclass
import mllm_efficient as me

@dataclass(frozen=True, kw_only=True)
class Last(me.Selector):
    '''The last tokens.'''
    shift: int = 0

    def select(self, v, k):
        import torch
        return torch.arange(len(v) - k, len(v))
"""
REGISTERS_ITSELF = GOOD.replace("@dataclass", "@me.register('last')\n@dataclass", 1)

LIST = """\
import json, warnings
import mllm_efficient as me
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    names = me.list_methods()
print(json.dumps({"names": names, "warnings": [str(w.message) for w in seen]}))
"""

BUILD = """\
import json
import mllm_efficient as me
try:
    answer = repr(me.build("broken:keep=0.5"))
except me.MllmEfficientError as error:
    answer = str(error)
print(json.dumps({"answer": answer}))
"""


def test_listing_imports_neither_torch_nor_transformers():
    heavy = python(
        """
        import json, sys
        import mllm_efficient as me
        me.list_methods()
        print(json.dumps(sorted({"torch", "transformers", "numpy"} & set(sys.modules))))
        """
    )
    assert heavy == []


def test_a_budget_is_counted_without_torch():
    counted = python(
        """
        import json, sys
        import mllm_efficient as me
        counts = [me.build(spec).count(576, (24, 24)) for spec in ("none", "divprune:keep=0.098", "pool:tokens=64", "resize:tokens=64")]
        print(json.dumps([counts, sorted({"torch", "transformers"} & set(sys.modules))]))
        """
    )
    assert counted == [[576, 56, 64, 64], []]


@pytest.mark.parametrize("source", [GOOD, REGISTERS_ITSELF], ids=["plain class", "class that registers itself"])
def test_an_installed_method_is_listed_and_built_like_any_other(tmp_path, source):
    installed(tmp_path, "nice_package", {"last": "nice_package:Last"}, source)
    listing = python(LIST, tmp_path)
    assert listing == {"names": [*BUILTIN, "last"], "warnings": []}
    built = python(
        """
        import json
        import mllm_efficient as me
        method = me.build("last:tokens=2,shift=3")
        same = me.build(method.to_dict()) == me.build(method.spec()) == method
        print(json.dumps([method.to_dict(), method.count(5, None), same]))
        """,
        tmp_path,
    )
    assert built == [{"method": "last", "tokens": 2, "shift": 3}, 2, True]


def test_an_installed_method_is_suggested_for_a_typo(tmp_path):
    installed(tmp_path, "nice_package", {"last_tokens": "nice_package:Last"}, GOOD)
    message = python(BUILD.replace("broken", "last_token"), tmp_path)["answer"]
    assert message == "unknown method 'last_token' - did you mean 'last_tokens'? (mllm-efficient methods lists all)"


def test_a_package_is_loaded_only_when_its_method_is_asked_for(tmp_path):
    installed(tmp_path, "nice_package", {"last": "nice_package:Last"}, GOOD)
    loaded = python(
        """
        import json, sys
        import mllm_efficient as me
        me.build("divprune:keep=0.1")
        before = "nice_package" in sys.modules
        me.build("last:keep=0.1")
        print(json.dumps([before, "nice_package" in sys.modules]))
        """,
        tmp_path,
    )
    assert loaded == [False, True]


BROKEN = {
    "a missing import": ("rough_package:Last", "import a_module_that_is_nowhere\n" + GOOD),
    "an exception at import": ("rough_package:Last", "raise RuntimeError('two\\nlines')"),
    "a syntax error": ("rough_package:Last", "def broken(:\n"),
    "no such name": ("rough_package:Lost", GOOD),
    "no such module": ("another_package:Last", GOOD),
    "a function": ("rough_package:last", "def last(v, k):\n    return v"),
    "a number": ("rough_package:last", "last = 5"),
    "the module": ("rough_package", GOOD),
    "a plain class": ("rough_package:Last", "class Last:\n    pass"),
    "a dataclass that is no method": (
        "rough_package:Last",
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Last:\n    keep: float",
    ),
    "a method object": ("rough_package:last", GOOD + "\nlast = Last(keep=0.5)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_reported_and_skipped(tmp_path, kind):
    target, source = BROKEN[kind]
    installed(tmp_path / "broken", "rough_package", {"broken": target}, source)
    installed(tmp_path / "good", "nice_package", {"last": "nice_package:Last"}, GOOD)
    listing = python(LIST, tmp_path / "broken", tmp_path / "good")
    assert listing["names"] == [*BUILTIN, "last"]
    (warning,) = listing["warnings"]
    assert "'broken'" in warning and "rough_package" in warning and "\n" not in warning


@pytest.mark.parametrize("kind", BROKEN)
def test_building_a_method_of_a_broken_package_is_one_clear_line(tmp_path, kind):
    """Clear: it names the method and the package to repair or remove."""
    target, source = BROKEN[kind]
    message = python(BUILD, installed(tmp_path, "rough_package", {"broken": target}, source))["answer"]
    assert "'broken'" in message and "rough_package" in message and "\n" not in message
    assert not message.startswith("Last("), "it was built"


def test_a_broken_package_does_not_stand_in_the_way_of_others(tmp_path):
    installed(tmp_path, "rough_package", {"broken": "rough_package:Last"}, "raise RuntimeError")
    built = python("import json, mllm_efficient as me; print(json.dumps(me.build('divprune:keep=0.1').to_dict()))", tmp_path)
    assert built == {"method": "divprune", "keep": 0.1}


def test_an_installed_package_cannot_take_a_builtin_name(tmp_path):
    installed(tmp_path, "nice_package", {"divprune": "nice_package:Last"}, GOOD)
    module = python(
        """
        import json
        import mllm_efficient as me
        print(json.dumps([me.list_methods(), me.build("divprune:keep=0.1").__module__]))
        """,
        tmp_path,
    )
    assert module == [BUILTIN, "mllm_efficient.compressors.divprune"]


@pytest.mark.parametrize("first", ["pass", "me.get_method('divprune')"], ids=["before the builtin is imported", "after"])
def test_a_registered_method_cannot_take_a_builtin_name(first):
    message = python(
        f"""
        import dataclasses, json
        import mllm_efficient as me
        {first}
        try:
            @me.register("divprune")
            @dataclasses.dataclass(frozen=True)
            class Mine(me.Selector):
                pass
        except me.MllmEfficientError as error:
            print(json.dumps(str(error)))
        else:
            print(json.dumps("registered"))
        """
    )
    assert "method 'divprune' is already registered" in message


def test_a_usual_setting_without_a_default_is_still_asked_for():
    """A dataclass takes an inherited class attribute for a field's default."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Seeded(me.Selector):
        seed: int
        weights: str

    with pytest.raises(TypeError, match="seed"):
        Seeded(keep=0.5)
    assert (me.Uniform(keep=0.5).seed, me.Uniform(keep=0.5).order, me.Uniform(keep=0.5).clip) == (0, "raster", None)


@pytest.mark.parametrize("taken", ["kind", "parts", "plan", "merges"])
def test_a_setting_by_the_name_of_what_every_method_has_is_refused(taken):
    cls = dataclasses.make_dataclass("Taken", [(taken, str, "x")], bases=(me.Selector,), frozen=True, kw_only=True)
    with pytest.raises(me.MllmEfficientError, match=f"cannot be named '{taken}'"):
        me.register("taken")(cls)
