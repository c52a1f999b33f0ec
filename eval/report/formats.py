"""A report as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from mllm_efficient.embedded import is_embedded

from ..agreement_rows import length_table
from .merge import Finished
from .rows import failures, main_table, task_table, tasks_of

TINY = "Offline self-test on a tiny model, not evidence about 7B models."
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def conditions(run: Finished) -> str:
    """On what the numbers were made, in one line."""
    m = run.meta
    versions = m["versions"]
    asked = f"suite {m['suite']}, {m.get('split')} split, {m['questions']} questions"
    if m["suite"] == "data":
        asked = f"data {m['data']}, {m['questions']} requests, {m['with_answer']} with an answer, {m['text_only']} without an image"
    if m["suite"] == "tasks":
        asked = f"tasks {', '.join(m['tasks'])}, {m['questions']} questions"
    parts = [
        f"model {m['model']} ({m['weights']})", asked,
        m["device"], m["dtype"], f"attention {m['attention']}",
        *(f"{n} {versions[n]}" for n in ("torch", "transformers", "mllm_efficient") if n in versions),
    ]  # fmt: skip
    return "; ".join(parts)


def is_tiny(run: Finished) -> bool:
    return any(is_embedded(m["model"]) for m in run.metas)


def tables(run: Finished) -> list[tuple[list[str], list[list[str]]]]:
    """Header and lines of all cells, and of the categories where there are some."""
    found = [main_table(run.rows, asked=run.matched)]
    return [*found, task_table(run.rows)] if tasks_of(run.rows) else found


def lengths(run: Finished) -> list[tuple[list[str], list[list[str]]]]:
    """Agreement by the length of answers: one table, or none of a run that has no such thing."""
    return [table for table in [length_table(run.rows)] if table[1]]


def markdown(run: Finished, max_drop: float | None = None) -> str:
    """The tables, the recommendation and the conditions."""
    out = [_recommended(run, max_drop), ""]
    for header, lines in [*tables(run), *lengths(run)]:
        out += [_md_line(header), "|" + "---|" + "---:|" * (len(header) - 1), *map(_md_line, lines), ""]
    out += [f"{line}\n" for line in failures(run.rows)]
    out += [f"{conditions(run)}." + (f" {TINY}" if is_tiny(run) else ""), ""]
    out += [f"    {m['command']}" for m in run.metas if m.get("command")]
    return "\n".join(out).rstrip() + "\n"


def _md_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for c in cells) + " |"


def _recommended(run: Finished, max_drop: float | None) -> str:
    chosen = run.recommendation(max_drop)
    return f"Recommended ({chosen['rule']}): {chosen['line']}"


def latex(run: Finished, max_drop: float | None = None) -> str:
    """The tables as tabulars of the booktabs package."""
    out = [f"% {line}" for line in (_recommended(run, max_drop), conditions(run), *([TINY] if is_tiny(run) else []), *failures(run.rows))]
    for header, lines in [*tables(run), *lengths(run)]:
        out += [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule", _tex_line(header), r"\midrule"]
        out += [*map(_tex_line, lines), r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(out).rstrip() + "\n"


def _tex_line(cells: Sequence[str]) -> str:
    # braces keep a cell that begins with a bracket from being read as an argument of the line break before it
    return " & ".join("{" + "".join(LATEX.get(c, c) for c in cell) + "}" if cell else "" for cell in cells) + r" \\"


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each cell and every number in a column of its own; categories and intervals are flattened.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    tasks = tasks_of(rows)
    flat = [_flat({k: v for k, v in r.items() if k != "tasks"} | {f"task_{t}": r["tasks"].get(t) for t in tasks}) for r in rows]
    columns = list(dict.fromkeys(k for f in flat for k in f))
    columns = [c for c in columns if not any(f"{c}_{part}" in columns for part in ("median", "low", "score"))]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({k: _no_formula(v) for k, v in row.items()} for row in flat)
    return out.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {f"{key}_{k}": v for k, v in _flat(value).items()}
        elif isinstance(value, list | tuple):
            out |= dict(zip((f"{key}_low", f"{key}_high"), value))
        else:
            out[key] = value
    return out
