"""What may import what, without circles, and how long a file and a function may be. Read from the code; nothing is imported.

A list of exceptions names what truly is one: an entry that has become needless fails, so that it is taken out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mllm_efficient"
FOLDERS = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.eval": ROOT / "eval", f"{PACKAGE}.patches": ROOT / "patches"}

# The rooms, and what each may import besides itself. ``report`` and so on lie flat in the package.
VOCABULARY = (
    "", "budget", "embedded", "errors", "family", "lazy", "locking", "moved", "parsing", "plans", "progress", "report", "spec", "stats",
    "tables", "tokens", "writing",
)  # fmt: skip
MODELS = {"vocabulary", "compressors", "apply", "trained", "loading", "media", "patches"}
MAY_IMPORT = {
    "vocabulary": set(),
    "compressors": {"vocabulary"},
    "media": {"vocabulary"},
    "loading": {"vocabulary"},
    "records": {"vocabulary", "media", "loading"},
    "apply": {"vocabulary", "compressors"},
    "trained": {"vocabulary", "compressors", "apply", "loading"},
    "patches": {"vocabulary", "compressors", "apply", "trained"},
    "measure": MODELS,
    "train": MODELS | {"measure", "records"},
    "eval": MODELS | {"measure", "records", "train"},
    "cli": MODELS | {"measure", "records", "train", "eval"},
}

# Imports between rooms that go the other way. ``patches`` itself is the one door to the families: it finds the adapter of a model
# by name and imports no family for it, so everything may ask it, within a function.
DOOR = "patches"
OTHER_WAY = {
    "apply.generate -> trained.install": "puts trained parts in for one call of generate",
    "apply.in_llm -> patches.decoder.staging": "the records that hooks on the decoder read",
    "apply.context -> patches.tower.clip": "relevance=clip reads the question with CLIP's text tower",
    "apply.encode -> trained.folder": "reads what was trained",
    "apply.projecting -> trained.folder": "reads what was trained",
    "apply.prepare -> trained.install": "reads what was trained",
    "apply.wrap -> patches.trainer": "Trainer counts labels by what wrap leaves of a prompt",
    "apply.wrap -> trained.install": "wrap puts trained parts in",
    "apply.wrap -> trained.saving": "save_pretrained of a wrapped model",
    "compressors.dpn -> trained.files": "what a router was trained under is in its folder",
    "compressors.dpn -> trained.router": "the module of a trained method",
    "compressors.tokenflex -> trained.files": "the sizes of a projector are in its folder",
    "compressors.tokenflex -> trained.projector": "the module of a trained method",
    "loading.lora -> patches.pictures": "reads settings of a model's folder",
    "loading.models -> patches.anchor": "registers an attention function that a model is loaded with",
    "loading.models -> patches.pictures": "reads settings of a model's folder",
    "loading.models -> patches.vllm": "refuses a model that was exported for vLLM",
    "loading.processor -> patches.pictures": "reads settings of a model's folder",
    "patches.checkup -> loading.models": "the doctor runs tiny models",
    "patches.checkup -> measure.workload": "the doctor runs tiny models",
    "train.data -> eval.builtin.recipe.data": "the embedded benchmark's training questions",
    "train.data -> eval.builtin.scenes": "the embedded benchmark's training questions",
    "trained.export -> patches.vllm": "export writes what the plugin reads",
    "trained.export -> patches.vllm.settings": "export writes what the plugin reads",
}

# Imports within functions that save start-up time, without which there would be a circle.
SAVE_TIME: dict[str, str] = {}

LONGEST_FILE, LONGEST_FUNCTION, LONGEST_TEST_FILE = 350, 60, 600
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


class Import(NamedTuple):
    importer: str  # modules without the package's name in front
    imported: str
    at_start: bool  # not within a function

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def source_files() -> dict[str, Path]:
    """Every module outside tests, by its name, and its file."""
    out = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            out[".".join(parts).removesuffix(".__init__")] = path
    return out


def imports_in(name: str, path: Path, known: Iterable[str]) -> Iterator[Import]:
    """What a module imports of this package, at its start and within functions. What is for type checkers alone is left out."""

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            around = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = around[: len(around) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            named = [".".join([*base, alias.name]) for alias in node.names]
            named = [one if one in known else ".".join(base) for one in named]
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
            return
        for one in named:
            if one in known and one != name:
                yield Import(short(name), short(one), at_start)

    yield from visit(ast.parse(path.read_text()), True)


def short(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".")


def room(name: str) -> str:
    first = name.split(".")[0]
    return "vocabulary" if first in VOCABULARY else "compressors" if first == "registry" else first


def circles(imports: Iterable[Import]) -> list[tuple[str, ...]]:
    """Groups of modules each of which reaches every other one of its group, and itself."""
    reached: dict[str, set[str]] = {}
    for one in imports:
        reached.setdefault(one.importer, set()).add(one.imported)
        reached.setdefault(one.imported, set())
    before = None
    while before != sum(map(len, reached.values())):
        before = sum(map(len, reached.values()))
        for modules in reached.values():
            modules.update(*(reached[m] for m in tuple(modules)))
    return sorted({tuple(sorted(m for m in there if name in reached[m])) for name, there in reached.items()} - {()})


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    known = source_files()
    return [one for name, path in known.items() for one in imports_in(name, path, known) if name not in (PACKAGE, f"{PACKAGE}.__main__")]


# ------------------------------------------------------------------------------------------------------------ imports


def test_nothing_is_imported_in_a_circle(imports):
    assert circles(one for one in imports if str(one) not in SAVE_TIME) == []


def test_imports_that_save_time_are_within_functions_and_needed(imports):
    there = {str(one): one.at_start for one in imports if str(one) in SAVE_TIME}
    assert there == dict.fromkeys(SAVE_TIME, False)
    for kept in SAVE_TIME:
        assert circles(one for one in imports if str(one) not in SAVE_TIME or str(one) == kept), f"{kept} makes no circle: take it out"


def test_arrows_between_rooms_point_one_way(imports):
    wrong = {str(one) for one in imports if room(one.imported) not in {room(one.importer), *MAY_IMPORT[room(one.importer)]}}
    through_the_door = {str(one) for one in imports if one.imported == DOOR and not one.at_start}
    assert sorted(wrong - through_the_door - set(OTHER_WAY)) == []
    assert sorted(set(OTHER_WAY) - wrong) == [], "these go no longer the other way: take them out"


@pytest.mark.parametrize(
    "importer, imported",
    [
        ("compressors", "patches"), ("compressors", "apply"), ("compressors", "eval"), ("compressors", "cli"), ("measure", "cli"),
        ("measure", "eval"), ("measure", "train"), ("apply", "eval"), ("apply", "cli"), ("apply", "measure"), ("trained", "eval"),
        ("patches", "eval"), ("patches", "cli"), ("loading", "eval"), ("media", "eval"), ("eval", "cli"), ("train", "cli"),
    ],
)  # fmt: skip
def test_never(imports, importer, imported):
    assert [str(one) for one in imports if (room(one.importer), room(one.imported)) == (importer, imported)] == []


def test_one_module_knows_where_the_embedded_model_lies():
    naming = [short(name) for name, path in source_files().items() if 'files("mllm_efficient.eval' in path.read_text()]
    assert naming == ["embedded"]


@pytest.mark.parametrize("name, home", [("Grid", "tokens"), ("Projector", "compressors.projector"), ("hooking", "patches.running")])
def test_one_thing_of_a_name(name, home):
    defining = []
    for module, path in source_files().items():
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if name in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]:
                defining.append(short(module))
    assert defining == [home]


def test_circles_are_found(tmp_path):
    """The reading of imports: a chain is no circle, and one through a function is."""
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nfrom . import b\nif TYPE_CHECKING:\n    from . import d\n")
    (tmp_path / "b.py").write_text("def f():\n    def g():\n        from .c import x\n")
    (tmp_path / "c.py").write_text("import mllm_efficient.a\n")
    (tmp_path / "d.py").write_text("from .a import f\n")
    known = {f"{PACKAGE}.{name}": tmp_path / f"{name}.py" for name in "abcd"}
    found = [one for name, path in known.items() for one in imports_in(name, path, known)]
    assert [(str(one), one.at_start) for one in found] == [("a -> b", True), ("b -> c", False), ("c -> a", True), ("d -> a", True)]
    assert circles(found) == [("a", "b", "c")] and circles(one for one in found if one.at_start) == []


# ------------------------------------------------------------------------------------------------------------ lengths


def named_from_root(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_is_longer_than_it_may_be():
    long = {named_from_root(path) for path in source_files().values() if len(path.read_text().splitlines()) > LONGEST_FILE}
    assert long == LONG_FILES


def test_no_function_is_longer_than_it_may_be():
    """A command's own function is as long as its list of options, and so left out."""
    functions = [
        (path, node)
        for path in source_files().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (path.parent.name != "cli" or node.name != path.stem)
    ]
    long = {f"{named_from_root(p)} {n.name}" for p, n in functions if (n.end_lineno or 0) - n.lineno + 1 > LONGEST_FUNCTION}
    assert long == LONG_FUNCTIONS


def test_no_test_file_is_longer_than_it_may_be_and_folders_mirror_the_package():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    assert {named_from_root(path) for path in tests if len(path.read_text().splitlines()) > LONGEST_TEST_FILE} == set()
    rooms = {path.name for folder in FOLDERS.values() for path in folder.iterdir() if (path / "__init__.py").is_file()}
    assert {path.parent.name for path in tests if path.parent.parent == ROOT / "tests"} <= rooms | {"eval", "patches"}
