"""What a reader sees: tables in the room there is, help, progress, quick errors, completion."""

from __future__ import annotations

import inspect
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from typing import Annotated, get_args, get_origin

import pytest

import mllm_efficient as me
from mllm_efficient.cli import COMMANDS, help, main, options
from mllm_efficient.compressors.words import OWN, SHARED, parameters_of
from mllm_efficient.eval import columns
from mllm_efficient.progress import EVERY, Progress
from mllm_efficient.tables import Table, columns_named, flat, listed

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
WIDE = Table(
    ["method", "tokens", "object", "macro", "vs none [95%]", "retention"],
    [["divprune:keep=0.25,merge=mean | fastv:layer=2,keep=0.5", "36", "99.1", "98.0", "-1.2 [-3.4, -1.0]", "99.0%"]],
    first=("tokens", "vs none"), note="What the columns mean.",
)  # fmt: skip


def in_terminal(width: int, code: str) -> list[str]:
    """The lines that Python code prints to a terminal of so many columns."""
    own, other = pty.openpty()
    ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=other, stderr=subprocess.PIPE, stdin=other, env=env)
    os.close(other)
    out = b""
    while True:
        try:
            part = os.read(own, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
        if not part:
            break
        out += part
    os.close(own)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return [line.rstrip() for line in ANSI.sub("", out.decode()).split("\n")]


SHOWN = """\
from mllm_efficient.cli import main
import json, sys
from mllm_efficient.eval.evaluate import benchmark_table, AGREEMENT
from mllm_efficient.eval.sweeping import main_table_of
from mllm_efficient.eval.agreement_rows import agreement_table
from mllm_efficient.cli import options
from mllm_efficient.tables import Table
sys.path.insert(0, {tests!r})
main(["methods"]); main(["methods", "dpn"])
main(["flops", "--quiet", "--model", "llava-1.5-7b", "--method", "divprune:keep=0.1", "--method", "divprune:keep=0.5 | fastv:keep=0.75"])
"""
SWEPT = """\
from mllm_efficient.cli import options
from mllm_efficient.eval.report.rows import HEADER
from mllm_efficient.eval.sweeping import FIRST, NOTES
from mllm_efficient.tables import Table
line = ["divprune:keep=0.25,metric=l2 | fastv:layer=2,keep=0.5", *("-12.34 [-23.4, +12.3]" if "95%" in h else "1234.5" for h in HEADER[1:])]
options.print_tables(Table(HEADER, [line, ["none", *[""] * (len(HEADER) - 1)]], first=FIRST, note=NOTES["data"], title="t " * 90))
"""


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal(width, tmp_path):
    lines = in_terminal(width, SHOWN.format(tests="")) + in_terminal(width, SWEPT)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "No room for" in text and "--columns all" in text  # every one of these has a table that is too wide
    rules = [line for line in lines if set(line.strip()) == {"─"}]
    assert len(rules) == 4 and all(len(r) <= width for r in rules)
    assert sum(line.lstrip().startswith("divprune:keep=0.1 ") for line in lines) == 1  # a line each


def test_the_columns_that_matter_stay_longest():
    assert list(WIDE.fitted(54).header) == ["method", "tokens", "vs none [95%]"]
    assert WIDE.fitted(54).hidden == ("object", "macro", "retention")
    assert list(WIDE.fitted(34).header) == ["method", "tokens"] and list(WIDE.fitted(5).header) == ["method"]
    assert WIDE.fitted(500).header == list(WIDE.header) and WIDE.fitted(500).hidden == ()
    for width in range(30, 130, 7):
        lines = WIDE.text(width).splitlines()
        assert max(map(len, lines)) <= width and "".join(lines).replace(" ", "").count("keep=0.25") == 1
    assert WIDE.text().count("\n") == 2  # a header, a rule, a line: nothing is folded where there is room


def test_columns_are_asked_for_by_name():
    assert list(WIDE.select(["VS NONE", "macro"]).header) == ["method", "vs none [95%]", "macro"]
    assert columns_named(["method", "Macro", "macro"], WIDE.header) == [0, 3]
    with pytest.raises(me.BadSettingError, match="no column 'macr' - did you mean 'macro'.*columns: method, tokens"):
        WIDE.select(["macr"])
    assert listed("score, FLOPs") == ["score", "FLOPs"] and listed("all") is listed(None) is None
    tasks = Table(["task", "metric", "method", "score"], [["gqa", "em", "none", "1"]], left=3)
    assert list(tasks.select(["score"]).header) == ["task", "metric", "method", "score"] and tasks.fitted(3).header == tasks.header[:3]


def test_columns_of_commands(capsys):
    assert main(["flops", "--quiet", "--model", "llava-1.5-7b", "--columns", "total,ratio"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["method", "total", "ratio"]
    for command, wrong in [("flops", "totl"), ("eval", "macr"), ("bench", "TTFTms"), ("methods", "papers")]:
        assert main([command, "--columns", wrong]) == 2
        assert f"no column {wrong!r}" in capsys.readouterr().err


def test_a_row_is_flattened():
    assert flat({"a": {"median": 1, "q": {"b": 2}}, "i": [1, 2.5], "s": ["x", "y"], "n": None}) == {
        "a_median": 1, "a_q_b": 2, "i_low": 1, "i_high": 2.5, "s": ["x", "y"], "n": None,
    }  # fmt: skip


def test_every_column_of_a_table_is_explained_in_its_own_words():
    from mllm_efficient.eval.agreement_rows import agreement_table
    from mllm_efficient.eval.builtin.questions import CATEGORIES
    from mllm_efficient.eval.lmms import tables
    from mllm_efficient.eval.report.rows import HEADER
    from mllm_efficient.measure.rows import HEADER as BENCH

    of_tasks = re.findall(r'"([^"]+)"', inspect.getsource(tables.task_table).split("lines = []")[0].split("header = [")[1])
    for header in [*HEADER, *BENCH, *of_tasks, *agreement_table([])[0]]:
        assert columns.meaning(header) or header in CATEGORIES, header


# ------------------------------------------------------------------------------------------------ help


def test_every_option_of_every_command_is_in_one_group():
    grouped = [name for names in help.GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    there = set()
    for command in COMMANDS.values():
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            if get_origin(parameter.annotation) is Annotated and "Option" in type(get_args(parameter.annotation)[1]).__name__:
                there.add(name)
                assert name in grouped, f"{command.__name__} {name}"
    assert set(help.EXAMPLES) == set(COMMANDS) and there <= set(grouped)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_help_has_examples_that_are_commands(capsys, name):
    import shlex

    assert main([name, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Examples: " in out and f"mllm-efficient {name}" in out and "--quiet" in out
    known = {o for c in COMMANDS.values() for o in options_of(c)}
    for example in help.EXAMPLES[name]:
        words = shlex.split(example)
        assert words[0] in ("mllm-efficient", "vllm") and all(w in known for w in words if w.startswith("--")), example
        options.check_methods([word for before, word in itertools.pairwise(words) if before == "--method"])


def options_of(command) -> set[str]:
    found = set()
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if get_origin(parameter.annotation) is Annotated:
            info = get_args(parameter.annotation)[1]
            found |= {info.default, *(info.param_decls or ())} - {...}
    return found


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"mllm-efficient {me.__version__}"


def test_one_method_says_what_its_parameters_mean(capsys):
    assert main(["methods", "visionzip"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ("visionzip (VisionZip): pre_llm" in out and "contextual 0.15" in out.replace(str(10 / 64), "0.15")) or "contextual" in out
    assert OWN["visionzip.contextual"] in out and SHARED["keep"] in out
    assert main(["methods", "visionzp"]) == 2 and "did you mean 'visionzip'" in capsys.readouterr().err


def test_every_parameter_of_every_method_has_a_meaning():
    used = set()
    for name in me.list_methods():
        for p in parameters_of(me.get_method(name)):
            assert p.meaning, f"{name}: {p.name} (compressors/words.py)"
            used |= {f"{name}.{p.name}", p.name}
    assert {*OWN, *SHARED} <= used


def test_the_shell_completes_methods_parameters_and_models():
    def completed(words: str) -> list[str]:
        env = os.environ | {"_MLLM_EFFICIENT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run([sys.executable, "-m", "mllm_efficient"], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout.split()

    assert completed("mllm-efficient eval --method div") == ["divprune", "divmerge"]
    assert "llava-1.5-7b" in completed("mllm-efficient flops --model llava")
    assert help._methods("divprune:keep=0.1,me") == ["divprune:keep=0.1,merge=", "divprune:keep=0.1,metric="]


# ------------------------------------------------------------------------------------------------ errors and progress


@pytest.mark.parametrize("argv", [
    ["eval", "--method", "divprun"], ["eval", "--method", "divprune:kep=1"], ["eval", "--model", "./nowhere"],
    ["eval", "--dtype", "float8"], ["sweep", "--method", "divprun", "--output-dir", "x"], ["bench", "--method", "divprun"],
    ["bench", "--quantization", "int3"],
    ["show", "--image", "x", "--method", "divprun", "--output", "y.png"],
    ["generate", "--image", "x", "--prompt", "x", "--method", "divprun"],
    ["flops", "--method", "divprun"], ["eval", "--limit", "0"], ["eval", "--columns", "tokns"],
])  # fmt: skip
def test_wrong_arguments_are_told_before_torch_is_imported(argv):
    code = (
        f"import sys\nfrom mllm_efficient.cli import main\nassert main({argv!r}) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr


def test_eval_without_methods_says_what_it_is_about_to_do_and_quiet_says_nothing(capsys):
    assert main(["eval", "--limit", "7", "--split", "val", "--device", "cpu"]) == 0
    assert "no --method: builtin is asked the embedded benchmark as it is" in capsys.readouterr().err
    assert main(["eval", "--limit", "7", "--split", "val", "--device", "cpu", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "macro" in out
    assert main(["eval", "--quiet", "--method", "divprun"]) == 2 and "divprun" in capsys.readouterr().err


def test_a_log_gets_a_line_now_and_then(capsys):
    now = [0.0]
    with Progress(clock=lambda: now[0]).bar(200, "answer") as bar:
        for _ in range(200):
            now[0] += EVERY / 64  # which binary numbers are
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "64 of 200 answers (32%), 0:30 so far, about 1:04 to go", "128 of 200 answers (64%), 1:00 so far, about 0:34 to go",
        "192 of 200 answers (96%), 1:30 so far, about 0:04 to go",
    ]  # fmt: skip
    with Progress(quiet=True, clock=lambda: now[0]).bar(2, "answer") as bar:
        now[0] += 1e6
        bar.longer(3)()
    assert (bar.total, bar.done) == (5, 1) and capsys.readouterr().err == ""
