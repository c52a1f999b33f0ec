"""``mllm-efficient COMMAND``: exit code 0 done, 1 the run or a sample failed, 2 bad usage or bad input (one line)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import typer

from ..errors import MllmEfficientError
from . import bench, doctor, evaluate, export, flops, generate, methods, report, show, sweep, train

app = typer.Typer(
    name="mllm-efficient",
    help="Fewer visual tokens for LLaVA-family models, measured honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("methods")(methods.methods)
app.command("generate")(generate.generate)
app.command("show")(show.show)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("flops")(flops.flops)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("train")(train.train)
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Every foreseen error is one line on stderr."""
    from ..patches.torchvision_cpu import at_import

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    at_import()
    for noisy in ("torchao", "torch.utils._pytree"):  # what they log while being imported is not about the user's run
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = app(args=list(sys.argv[1:] if argv is None else argv), prog_name="mllm-efficient", standalone_mode=False)
    except MllmEfficientError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        # typer's usage errors, whichever click it brings along
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _fail(error.format_message()) if error.format_message().strip() else 2
        raise
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"mllm-efficient: {' '.join(message.split())}", file=sys.stderr)
    return 2
