"""``mllm-efficient COMMAND``: exit code 0 done, 1 the run or a sample failed, 2 bad usage or bad input (one line)."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from ..errors import MllmEfficientError, shortened
from . import bench, demo, doctor, evaluate, export, flops, generate, help, methods, options, report, show, sweep, train

QUOTED = re.compile(r"""(['"])([^'"]{81,})\1""")  # a value of the user's in a message, however long it is
LONG = re.compile(r"[^\s/\\]{91,}")  # a word, or a part of a path

app = typer.Typer(
    name="mllm-efficient",
    help="Fewer visual tokens for LLaVA-family models, measured honestly.",
    epilog="Examples:\n\nmllm-efficient methods\n\nmllm-efficient eval --method divprune:keep=0.25 --limit 500\n\n"
    "mllm-efficient --install-completion (the shell then completes commands, options, methods and models)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable] = {
    "methods": methods.methods, "generate": generate.generate, "show": show.show, "eval": evaluate.evaluate, "bench": bench.bench,
    "flops": flops.flops, "sweep": sweep.sweep, "report": report.report, "train": train.train, "export": export.export,
    "doctor": doctor.doctor, "demo": demo.demo,
}  # fmt: skip
for _name, _command in COMMANDS.items():
    help.add(app, _name, _command)

TRACEBACK, QUIET = "--traceback", "--quiet"  # wherever they stand


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        print(f"mllm-efficient {__version__}")
        raise typer.Exit


@app.callback()
def of_all(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option(QUIET, help="Say nothing of what is being done; failures and results alone.")] = False,
    traceback: Annotated[bool, typer.Option(TRACEBACK, help="Show where in the code an error comes from.")] = False,
) -> None:
    """Fewer visual tokens for LLaVA-family models, measured honestly."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Every error is one line on stderr, whoever raised it; ``--traceback`` shows where."""
    from ..patches.torchvision_cpu import at_import

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    at_import()
    for noisy in ("torchao", "torch.utils._pytree"):  # what they log while being imported is not about the user's run
        logging.getLogger(noisy).setLevel(logging.ERROR)
    given = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in given if word not in (TRACEBACK, QUIET)]
    options.be_quiet(QUIET in given)
    try:
        code = app(args=words, prog_name="mllm-efficient", standalone_mode=False)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code and "_MLLM_EFFICIENT_COMPLETE" in os.environ:
            return 0  # the shell asked what there is, and was told
        if isinstance(error, SystemExit) and isinstance(error.__context__, OSError):
            return 1  # click's way to say that nobody reads stdout any more
        if TRACEBACK in given:
            traceback.print_exc()
        # typer's usage errors, whichever click it brings along
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message()) if error.format_message().strip() else 2
        return _fail(str(error) if isinstance(error, MllmEfficientError) else said_of(error))
    return code if isinstance(code, int) else 0


def said_of(error: BaseException) -> str:
    """What an error that nobody foresaw says, in one line."""
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that is read-only
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, SystemExit):
        return f"a library ended the command (exit code {shortened(error.code)}): {TRACEBACK} shows where"
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = shortened(lines[0] if lines else "no message", 300)
    return f"{type(error).__name__}: {told} ({TRACEBACK} shows where)"


def _fail(message: str) -> int:
    line = QUOTED.sub(lambda found: f"{found[1]}{found[2][:79]}…{found[1]}", " ".join(message.split()))
    print(f"mllm-efficient: {LONG.sub(lambda word: word[0][:79] + '…', line)}", file=sys.stderr)
    return 2
