"""README and docs/: every Python block runs or its names are checked, every command parses, every generated part is up to date.

Blocks of one page run one after the other in one namespace, on the embedded model. What a block prints is the ``text`` block after it,
if one follows at once. ``<!-- not run: REASON -->`` before a block says that it needs what is not here (the weights of a 7B model, a GPU).
"""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib.util
import inspect
import io
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import mllm_efficient as me
from mllm_efficient import registry
from mllm_efficient.cli import app, main
from mllm_efficient.patches.facts import FACTS
from mllm_efficient.patches.rules import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md", "eval/builtin/model/README.md")]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINES_OF_README = 150
SPECIFICATION = re.compile(rf"({'|'.join(registry.BUILTIN)})(:[\w=./,-]+)?( \| ({'|'.join(registry.BUILTIN)})(:[\w=./,-]+)?)*")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    why_not: str | None
    output: str | None  # what it prints, where the page says so

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    out = []
    for i, match in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) and not text[match.end() : found[i + 1].start()].strip() else None
        printed = after["text"] if after is not None and after["language"] == "text" else None
        line = text.count("\n", 0, match.start()) + 1
        out.append(Block(page, line, match["language"], match["text"], match["why"], printed))
    return [block for block in out if block.language in languages]


def here(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the files that the pages speak of, and methods registered there forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    image, question = me.sample()
    image.save(tmp_path / "photo.jpg")
    records = [{"images": ["photo.jpg"], "prompt": question}, {"images": ["photo.jpg"], "prompt": "Is there a red circle?", "answer": "no"}]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    known = {*registry._registered, *registry.BUILTIN}
    yield tmp_path
    for name in {*registry._registered} - known:
        del registry._registered[name]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=here)
def test_python_runs_and_prints_what_it_shows(page, workplace):
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if block.why_not is not None:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        if block.output is not None:
            assert printed.getvalue().rstrip() == block.output.rstrip(), str(block)


@pytest.mark.parametrize("page", PAGES, ids=here)
def test_names_and_specifications_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "me":
                assert node.attr in me.__all__, f"{block}: me.{node.attr}"
            if isinstance(node, ast.Call) and block.why_not is not None:
                takes(node, block)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and SPECIFICATION.fullmatch(node.value):
                builds(node.value, block)


def takes(call: ast.Call, block: Block) -> None:
    """A call of ``me.NAME`` has the keywords that it gives."""
    if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "me"):
        return
    parameters = inspect.signature(getattr(me, call.func.attr)).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        wrong = {k.arg for k in call.keywords} - {None, *parameters}
        assert not wrong, f"{block}: me.{call.func.attr} takes no {wrong}"


def builds(specification: str, block: Block) -> None:
    try:
        me.build(specification)
    except me.MissingBudgetError:  # a sweep gives it one
        pass
    except me.MllmEfficientError as error:
        raise AssertionError(f"{block}: {specification}: {error}") from error


# -------------------------------------------------------------------------------------------------------------------- shell

PROGRAMS = {"apt", "apt-get", "cd", "curl", "docker", "export", "git", "hf", "pipx", "uv"}  # of others, taken as they are
EXTRAS = re.compile(r"\[([\w,]+)\]")


def commands(block: Block) -> list[list[str]]:
    """The words of every command, variables and what a loop wraps around them left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    out = []
    for line in lines:
        lexer = shlex.shlex(re.sub(r"\$\w+", "1", line), posix=True, punctuation_chars="&;|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&;|"):
                while words and (words[0] in ("do", "then") or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
                    words = words[1:]
                if words and words[0] not in ("for", "done"):
                    out.append(words)
                words = []
            else:
                words.append(word)
    return out


def parse(words: list[str], block: Block) -> None:
    """Raises for a command that does not exist or does not take what it is given."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program in ("torchrun", "accelerate"):
        assert "-m" in rest, block
        return parse(["python", *rest[rest.index("-m") :]], block)
    if program == "mllm-efficient":
        return parse_own(rest, block)
    if program in ("python", "python3", "bash"):
        if rest[0] == "-m" and rest[1] in ("mllm_efficient", "lmms_eval", "pip", "venv", "build"):
            return parse_own(rest[2:], block) if rest[1] == "mllm_efficient" else None
        there = importlib.util.find_spec(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).is_file() or rest[0] == "-c"
        assert there, f"{block}: {rest}"
        return None
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all("=" in word or word in targets for word in rest), f"{block}: {rest}"
        return None
    if program.endswith("pip"):
        project = (ROOT / "pyproject.toml").read_text()
        for extra in (e for word in rest for found in EXTRAS.findall(word) for e in found.split(",")):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{block}: no extra {extra}"
        return None
    if program == "vllm":
        for i, word in enumerate(rest):
            if word == "--hf-overrides":
                builds(json.loads(rest[i + 1])["visual_token_compression"], block)
        return None
    assert program in PROGRAMS or program.endswith((".venv/bin/pytest", "/ruff")) or program in ("pytest", "ruff"), f"{block}: {words}"
    return None


def parse_own(words: list[str], block: Block) -> None:
    group: Any = typer.main.get_command(app)
    if words in (["--help"], ["--version"]):
        return
    assert words and words[0] in group.commands, f"{block}: {words}"
    if "--help" in words:
        return
    try:
        group.commands[words[0]].make_context(words[0], list(words[1:]))
    except Exception as error:
        raise AssertionError(f"{block}: {shlex.join(words)}: {error}") from error
    for option, value in itertools.pairwise(words):
        if option == "--method" and SPECIFICATION.fullmatch(value) and "--import" not in words:
            builds(value, block)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=here)
def test_commands_parse(page):
    for block in blocks(page, "bash", "console"):
        for words in commands(block):
            parse(words, block)


def test_a_wrong_command_is_found():
    block = Block(ROOT / "README.md", 1, "bash", "", None, None)
    for wrong in ("mllm-efficient evl", "mllm-efficient eval --limt 3", "mllm-efficient eval --method divprune:kep=1", "make tea", "rm x"):
        with pytest.raises(AssertionError):
            parse(shlex.split(wrong), block)
    with pytest.raises(AssertionError):
        parse(["pip", "install", ".[tea]"], block)


def test_commands_of_readme_run(workplace, capsys):
    """Those that need no weights but the embedded model's, on few questions."""
    ran = 0
    for block in blocks(ROOT / "README.md", "bash", "console"):
        for words in commands(block) if block.why_not is None else []:
            if words[0] == "mllm-efficient" and "--model" not in words:
                few = {"eval": ["--limit", "7"], "sweep": ["--limit", "7", "--no-bench"]}.get(words[1], [])
                assert main([*words[1:], *few]) == 0, words
                ran += 1
    assert ran >= 2


# -------------------------------------------------------------------------------------------------------------------- pages


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LINES_OF_README


@pytest.mark.parametrize("page", [*PAGES, *OTHERS, ROOT / "CHANGELOG.md", ROOT / "findings" / "README.md"], ids=here)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), f"{here(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{here(page)}: {target}"


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.once
def test_tests_that_the_documentation_names_exist():
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)", "".join(f.read_text() for f in files), re.MULTILINE)) | {f.stem for f in files}
    named = {name for page in PAGES for name in re.findall(r"`(?:tests/[\w/]*)?(test_\w+)(?:\.py)?`", page.read_text())}
    assert named and named <= known


@pytest.mark.once
def test_numbers_of_readme_are_those_of_the_results():
    with (ROOT / "benchmarks" / "results" / "methods.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}

    def lost(method: str) -> str:
        value, low, high = (-float(rows[method][f"difference{end}"]) for end in ("", "_interval_high", "_interval_low"))
        return f"{value:.1f} points [{low:.1f}, {high:.1f}]"

    def share(method: str) -> str:
        return f"{100 * float(rows[method]['flops_ratio']):.0f}%"

    half, quarter, small, tower = "divprune:keep=0.5", "divprune:keep=0.25", "resize:keep=0.25", "tome:keep=0.25,at=tower"
    reading = [f"{float(rows[name]['task_reading_score']):.1f}%" for name in (half, quarter, "divprune:keep=0.0625")]
    text = (ROOT / "README.md").read_text()
    for said in (
        f"loses {lost(half)} at a half, {lost(quarter).replace(' points', '')} at a quarter",
        f"{share(small)} and {share(tower)} of all FLOPs, against {share(quarter)} of the default",
        f"lose {lost(small)} and {lost(tower).replace(' points', '')}",
        f"{reading[0]} at a half, {reading[1]} at a quarter, {reading[2]} at a sixteenth",
        f"{len(FACTS.keys() - FAMILIES.keys())} more model types",
    ):
        assert said in " ".join(text.split()), said


def test_every_page_is_in_the_navigation():
    nav = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(page.name for page in DOCS)


@pytest.mark.once
def test_generated_parts_are_those_of_the_code():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = generate
    spec.loader.exec_module(generate)
    for page in generate.PARTS:
        assert generate.written(page) == (ROOT / "docs" / page).read_text(), f"docs/{page} is out of date: python docs/generate.py"
