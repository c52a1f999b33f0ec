"""Kinds of method: what each is and says of itself, and that the rest of the package asks a method instead of its class."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import mllm_efficient as me
from mllm_efficient.compressors.composed import stages_of

ROOT = Path(me.__file__).resolve().parent.parent
KINDS = {
    "Compressor", "Selector", "Merger", "Resizer", "Projector", "MethodProjector", "Reducer", "OneStage", "Composed", "Pooling",
    "NoCompression",
}  # fmt: skip


def classes_asked_for(tree: ast.AST) -> list[str]:
    """The kinds of method among the second arguments of ``isinstance`` and ``issubclass``."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("isinstance", "issubclass"))
    names = (n for call in calls for n in ast.walk(call.args[1]) if isinstance(n, (ast.Name, ast.Attribute)))
    return [name for name in (n.id if isinstance(n, ast.Name) else n.attr for n in names) if name in KINDS]


def test_a_ladder_of_kinds_is_seen():
    source = "isinstance(a, Reducer) or isinstance(b, (Merger, me.Projector)) or isinstance(c, Resizer | Composed) or isinstance(d, int)"
    assert sorted(classes_asked_for(ast.parse(source))) == ["Composed", "Merger", "Projector", "Reducer", "Resizer"]


def test_what_a_kind_means_is_asked_of_the_method():
    """At most ten places look at a method's class, the registry apart."""
    files = [f for folder in ("mllm_efficient", "patches", "eval") for f in (ROOT / folder).rglob("*.py")]
    if not (ROOT / "patches").is_dir():  # installed: everything is below the package
        files = list(Path(me.__file__).parent.rglob("*.py"))
    found = {str(f): n for f in files if f.name != "registry.py" and (n := len(classes_asked_for(ast.parse(f.read_text()))))}
    assert len(files) > 100 and sum(found.values()) <= 10, found


SPECS = {
    "divprune:keep=0.5": ("pre_llm", "P"),
    "pool:keep=0.5": ("pre_llm", "P"),
    "resize:keep=0.5": ("pre_llm", "P"),
    "none": ("pre_llm", "P"),
    "tokenflex:tokens=36": ("projector", "J"),
    "fastv:ratio=0.5": ("in_llm", "L"),
    "dpn": ("in_llm", "L"),
    "tokenflex:tokens=36 | divprune:keep=0.5 | fastv:ratio=0.5": ("projector | pre_llm | in_llm", "JPL"),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_method_says_its_kind_and_the_old_letter_with_a_warning(spec):
    method, (kind, letter) = me.build(spec), SPECS[spec]
    assert method.kind == kind
    with pytest.warns(DeprecationWarning, match="family is now kind"):
        assert method.family == letter
    if len(method.parts) == 1:
        with pytest.warns(DeprecationWarning, match="family is now kind"):
            assert type(method).family == letter


@pytest.mark.parametrize("spec", SPECS)
def test_the_parts_of_a_method_are_those_of_its_kind(spec):
    method = me.build(spec)
    assert stages_of(method) == method.parts == getattr(method, "stages", (method,)) if " | " in spec else method.parts == (method,)
    assert (method.as_projector is not None) == ("projector" in method.kind)
    assert (method.as_reducer is not None) == ("in_llm" in method.kind)
    assert (method.as_resizer is not None) == (method.name == "resize")
    assert method.map_parts(lambda part: part) == method


@pytest.mark.parametrize(("letter", "kind"), [("P", "pre_llm"), ("J", "projector"), ("L", "in_llm"), ("T", "T")])
@pytest.mark.parametrize("base", [me.Compressor, me.Selector])
def test_a_class_that_sets_the_old_letter_works_with_a_warning_at_its_own_line(letter, kind, base):
    with pytest.warns(DeprecationWarning, match=rf"Old: family='{letter}' is now kind='{kind}'") as seen:

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Old(base):
            family = letter

    assert seen[0].filename == __file__
    assert (Old.kind, Old.family, Old(tokens=4).kind) == (kind, letter, kind)

    class Younger(Old):
        pass

    assert Younger.kind == kind


def test_an_in_decoder_method_of_the_old_letter_runs(registered, tiny_llava, make_batch):
    with pytest.warns(DeprecationWarning, match="kind='in_llm'"):

        @registered("old_first")
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class OldFirst(me.Reducer):
            family = "L"

            def layers(self, depth):
                return (1,)

            def score(self, v):
                return -v.index.float()

    batch = make_batch("one image")
    with me.compressed(tiny_llava, "old_first:ratio=0.5") as model:
        model(**batch)
    report = me.last_report(tiny_llava)
    assert report.tokens_per_layer[0] > report.tokens_per_layer[-1]


def test_settings_that_a_method_does_not_declare_have_the_usual_value():
    method = me.build("uniform:tokens=4")
    assert (method.order, method.seed, method.clip, method.weights) == ("raster", 0, None, None)
    assert me.build("random:tokens=4,seed=3").seed == 3 and me.build("divprune:tokens=4,order=picked").order == "picked"
    assert "seed" not in method.to_dict() and "order" not in method.spec()


def test_the_kinds_know_nothing_of_models():
    """Importing every kind of method imports nothing of ``apply``, ``patches``, ``trained`` or torch."""
    kinds = "base selector merger resizer projector reducer composed kinds grouping fit"
    code = (
        "import sys, importlib\nbefore = set(sys.modules)\n"
        f"for name in {kinds.split()}: importlib.import_module('mllm_efficient.compressors.' + name)\n"
        "found = [m for m in set(sys.modules) - before if m == 'torch' or m.split('.')[:2] in "
        "[['mllm_efficient', room] for room in ('apply', 'patches', 'trained', 'eval', 'measure')]]\nprint(found)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
