"""The report as one HTML file that opens offline: tables that sort, plots, kept tokens, how it was measured."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..columns import meaning, without_interval
from . import plots
from .formats import conditions, is_tiny, lengths, tables
from .merge import Finished
from .pictures import worst_requests
from .recommend import decided_by
from .rows import RIGHT, WORDS, metric_of, tasks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {None: "Score", RIGHT: "Right", WORDS: "Same words"}


def figures(run: Finished, max_drop: float, theme: plots.Theme, size: plots.Size = plots.PAGE) -> dict[str, Figure]:
    """Figures by name: ``accuracy_flops``, ``accuracy_ttft``, ``accuracy_tokens`` where no cost is known, ``categories``."""
    out: dict[str, Figure] = {}
    drop = max_drop if _plot_decides(run) else None
    for name, (cost, label) in plots.COSTS.items():
        figure = None if name == "tokens" and out else plots.pareto(run.rows, cost, label, max_drop=drop, theme=theme, size=size)
        if figure is not None:
            out[f"accuracy_{name}"] = figure
    figure = plots.bars(run.rows, budget_shown(run), theme)
    return out if figure is None else out | {"categories": figure}


def _plot_decides(run: Finished) -> bool:
    """Whether the score is what cells are admitted by: it is not where only some of a user's requests have an answer."""
    return decided_by(run.rows[0]) == metric_of(run.rows)


def budget_shown(run: Finished) -> str:
    """The budget of the pictures and bars."""
    named = next((m["budget_shown"] for m in run.metas if m.get("budget_shown")), None)
    asked = [r["asked"] for r in run.rows if r["asked"]]
    return named or max(asked, key=asked.count, default="")


def write_plots(run: Finished, folder: Path) -> None:
    """The light plots beside the report, PNG of a page's width and PDF of a column's: ``agreement_*`` where the score is no accuracy."""
    drop = run.recommendation()["max_drop"]
    for size, ending in ((plots.PAGE, "png"), (plots.COLUMN, "pdf")):
        for name, figure in figures(run, drop, plots.LIGHT, size).items():
            if metric_of(run.rows) == WORDS:
                name = name.replace("accuracy", "agreement")
            plots.save(figure, folder / f"{name}.{ending}")


def page(run: Finished, max_drop: float | None = None) -> str:
    """The whole page. All text is escaped by the template."""
    from jinja2 import Environment

    source = (files(__package__) / "page.html.jinja").read_text(encoding="utf-8")
    chosen = run.recommendation(max_drop)
    best = next(r for r in run.rows if r["method"] == chosen["method"])
    images = {theme.name: figures(run, chosen["max_drop"], theme) for theme in (plots.LIGHT, plots.DARK)}
    encoded = {t: {n: base64.b64encode(plots.png(figure)).decode() for n, figure in found.items()} for t, found in images.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        title=f"Visual-token compression on {run.meta['model']}", run=run, chosen=chosen, best=best, tiny=is_tiny(run),
        conditions=conditions(run), tables=_tables(run, chosen["method"]), images=encoded, budget=_words(budget_shown(run)),
        pictures=run.pictures.get("samples", []), pictures_budget=_words(run.pictures.get("budget", "")),
        failed=[r for r in run.rows if r["failed"]], left_out={k: v for m in run.metas for k, v in (m.get("left_out") or {}).items()},
        details=_details(run), meaning=next((m["meaning"] for m in run.metas if m.get("meaning")), {}),
        notes=_notes(run), ceiling=_ceiling(run), series=plots.series_of, measure=SCORES[decided_by(best)],
        agreement=metric_of(run.rows) == WORDS, decides=_plot_decides(run), worst=worst_requests(run.metas, run.names),
    )  # fmt: skip


def _words(budget: str) -> str:
    return budget.replace("=", " ").replace(",", ", ")


def _notes(run: Finished) -> list[str]:
    """Warnings: runs that were timed on a machine at other work, or whose FLOPs could not be counted."""
    from mllm_efficient.measure.machine import busy

    machines = [m["bench"]["machine"] for m in run.metas if (m.get("bench") or {}).get("machine")]
    notes = [*map(busy, machines), *(m.get("flops_error") and f"without FLOPs: {m['flops_error']}" for m in run.metas)]
    return list(dict.fromkeys(note for note in notes if note))


def _ceiling(run: Finished) -> str | None:
    lines = [c["line"] for m in run.metas for c in ((m.get("bench") or {}).get("ceiling") or ()) if c]
    return lines[0] if lines else None


def _tables(run: Finished, chosen: str) -> list[dict[str, Any]]:
    """The tables as cells: text, the value to sort by, a shade 0 to 5 for points lost, whether the row is chosen."""
    (header, lines), *categories = tables(run)
    caption = "Accuracy and cost" if metric_of(run.rows) is None else "Agreement with the uncompressed model, and cost"
    main: dict[str, Any] = {"id": "cells", "caption": caption, "header": [(h, meaning(h)) for h in header]}
    main["glossary"] = [(without_interval(h), meaning(h)) for h in header if meaning(h)]
    main["rows"] = [_cells(line, row, chosen) for line, row in zip(lines, run.rows)]
    for cells, row in zip(main["rows"], run.rows):
        lost = {m: r["difference"] for m, r in row.get("agreement", {}).items()}
        lost = {"vs none [95%]": row["difference"], "same words [95%]": lost.get(WORDS), "right vs none [95%]": lost.get(RIGHT)}
        _shade(cells["cells"], header, lost)
    if not categories:
        return [main, *_lengths(run, chosen)]
    tasks = tasks_of(run.rows)
    header, lines = categories[0]
    by_method = {r["method"]: r for r in run.rows}
    second: dict[str, Any] = {
        "id": "categories",
        "caption": "Score by category",
        "header": [(h, "percent right" if h in tasks else meaning(h)) for h in header],
    }
    second["rows"] = [_cells(line, by_method.get(line[0]), chosen) for line in lines]
    for cells in second["rows"]:
        own = by_method.get(cells["cells"][0]["text"])
        if own is not None:
            lost = {t: v["difference"] for t, v in own["tasks"].items()} | {"macro": own["difference"]}
            _shade(cells["cells"], header, lost)
            for cell, name in zip(cells["cells"], header):
                if own["role"] != "baseline" and own["tasks"].get(name, {}).get("difference_interval"):
                    low, high = own["tasks"][name]["difference_interval"]
                    cell["title"] = f"{own['tasks'][name]['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] against none"
    return [main, second]


def _lengths(run: Finished, chosen: str) -> list[dict[str, Any]]:
    """The table of agreement by the length of answers; its first line says how many requests those are."""
    by_method = {r["method"]: r for r in run.rows}
    caption = "Same words by the length of the uncompressed answer"
    note = "requests whose uncompressed answer has so many tokens, its end among them"
    return [
        {
            "id": "lengths", "caption": caption, "header": [(h, note if i else "") for i, h in enumerate(header)],
            "rows": [_cells(line, by_method.get(line[0]), chosen) for line in lines],
        }
        for header, lines in lengths(run)
    ]  # fmt: skip


def _cells(line: Sequence[str], row: dict[str, Any] | None, chosen: str) -> dict[str, Any]:
    kind = "floor" if row is None else "failed" if row["failed"] else row["role"]
    out: dict[str, Any] = {"kind": kind, "chosen": row is not None and row["method"] == chosen, "cells": []}
    for i, text in enumerate(line):
        found = re.match(r"[+-]?[\d,]*\.?\d+", text) if i else None
        value, rest = (found[0], text[len(found[0]) :]) if found else (text, "")
        interval = rest.strip() if rest.strip().startswith("[") else ""
        sort = float(value.replace(",", "")) if found else ""
        shown = text[: len(text) - len(rest)] + (rest if not interval else "")
        title = (row["failed"] or "") if row is not None and i < 3 else ""
        out["cells"].append({"text": shown, "interval": interval, "sort": sort, "shade": 0, "title": title})
    return out


def _shade(cells: list[dict[str, Any]], header: Sequence[str], lost: dict[str, float | None]) -> None:
    for cell, name in zip(cells, header):
        points = -(lost.get(name) or 0.0)
        cell["shade"] = sum(points >= step for step in (1, 5, 10, 20, 40)) if cell["text"] else 0


def _details(run: Finished) -> list[list[tuple[str, str]]]:
    """Name and value of everything that a run depends on."""
    skip = {"meaning", "recommendation", "bench", "methods", "left_out", "command", "budget_shown", "worst"}
    out = []
    for meta in run.metas:
        bench = meta.get("bench") or {}
        flat = {k: v for k, v in meta.items() if k not in skip and v is not None}
        flat |= {f"bench {k}": v for k, v in bench.items() if k not in ("meaning", "ceiling") and v is not None}
        out.append([(k.replace("_", " "), _said(v)) for k, v in flat.items()])
    return out


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items() if v is not None)
    return value if isinstance(value, str) else json.dumps(value)
