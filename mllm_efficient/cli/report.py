"""``mllm-efficient report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MllmEfficientError
from . import options

FORMATS = ("md", "csv", "latex", "html")


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs of sweep or eval; several are merged.", metavar="RUN_DIR...")
    ],
    format: Annotated[str, typer.Option("--format", help="md (or markdown), csv, latex or html.")] = "md",
    output: Annotated[Path | None, typer.Option("--output", help="The file to write; default stdout.")] = None,
    max_drop: Annotated[float | None, typer.Option("--max-drop", min=0, help="Points the recommended method may lose.")] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="With latex: columns of the table, such as tokens,score,FLOPs.")] = None,
    caption: Annotated[str | None, typer.Option("--caption", help="With latex: of the table.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="With latex: what \\ref{...} names.")] = None,
    json: options.Json = False,
) -> None:
    """Renders finished runs and merges several; refuses to merge what cannot be compared, naming the field."""
    format = "md" if format == "markdown" else format
    if format not in FORMATS:
        raise MllmEfficientError(f"--format {format} is not one of {', '.join(FORMATS)}")
    if json and output is None and format != "md":
        raise MllmEfficientError(f"--json and --format {format} both write to stdout: add --output")
    if output is not None and (output.is_dir() or (output.parent.exists() and not output.parent.is_dir())):
        raise MllmEfficientError(f"--output {output} is not a file that can be written")

    for name, value in (("--columns", columns), ("--caption", caption), ("--label", label)):
        if value is not None and format != "latex":
            raise MllmEfficientError(f"{name} has no effect without --format latex: leave it out")
    names = options.check_columns(columns, "report")

    from ..eval.report import formats
    from ..eval.report.merge import Finished, merge

    folders = list(dict.fromkeys(path.resolve() for path in runs))
    found = merge([Finished.read(next(p for p in runs if p.resolve() == folder)) for folder in folders])
    if format == "html":
        from ..eval.report.page import page

        text = page(found, max_drop)
    elif format == "csv":
        text = formats.csv_text(found.rows)
    elif format == "latex":
        text = formats.latex(found, max_drop, names, caption, label)
    else:
        text = formats.markdown(found, max_drop)
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise MllmEfficientError(f"--output {output} cannot be written: {error.strerror}") from None
        options.say(f"wrote {output}")
    if json:
        options.print_json(found.rows, {"runs": found.names, "recommendation": found.recommendation(max_drop), "metas": found.metas})
    elif output is None:
        print(text, end="")
