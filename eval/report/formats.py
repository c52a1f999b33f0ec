"""A report as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from mllm_efficient.embedded import is_embedded
from mllm_efficient.tables import Table, flat

from ..agreement_rows import length_table
from .latex import latex_table
from .merge import Finished
from .rows import failures, main_table, metric_of, task_table, tasks_of

TINY = "Offline self-test on a tiny model, not evidence about 7B models."


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


def latex(
    run: Finished, max_drop: float | None = None, columns: Sequence[str] | None = None, caption: str | None = None, label: str | None = None
) -> str:  # fmt: skip
    """The tables as floats of the booktabs package. columns: of the first one. Raises ``BadSettingError`` for unknown ones."""
    said = (_recommended(run, max_drop), conditions(run), *([TINY] if is_tiny(run) else []), *failures(run.rows))
    out = [r"% Needs \usepackage{booktabs}.", *(f"% {line}" for line in said)]
    label = label or "tab:tokens"
    about = caption or f"Visual-token compression on {run.meta['model']}: {'agreement' if metric_of(run.rows) else 'accuracy'} and cost."
    main, *others = tables(run)
    out.append(latex_table(Table(*main), run.rows, columns, caption=about, label=label))
    for table in others:
        found = Table(*table)
        out.append(
            latex_table(found, run.rows, caption="Percent right by category.", label=f"{label}:tasks", categories=tasks_of(run.rows))
        )
    for header, lines in lengths(run):
        by_length = "Answers in the same words, by the length of the uncompressed model's answer."
        out.append(latex_table(Table(header, lines), run.rows, header, caption=by_length, label=f"{label}:lengths"))
    return "\n".join(out).rstrip() + "\n"


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each cell and every number in a column of its own; categories and intervals are flattened.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    tasks = tasks_of(rows)
    flattened = [flat({k: v for k, v in r.items() if k != "tasks"} | {f"task_{t}": r["tasks"].get(t) for t in tasks}) for r in rows]
    columns = list(dict.fromkeys(k for f in flattened for k in f))
    columns = [c for c in columns if not any(f"{c}_{part}" in columns for part in ("median", "low", "score"))]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({k: _no_formula(v) for k, v in row.items()} for row in flattened)
    return out.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
