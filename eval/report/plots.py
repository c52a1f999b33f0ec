"""Plots of a sweep with matplotlib: accuracy against cost with the Pareto front, and bars by category. No pyplot, no state."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.base import BUDGET_FIELDS
from mllm_efficient.spec import without

from .recommend import points
from .rows import RIGHT, WORDS, metric_of, tasks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 180
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7F5FC8", "#8C564B")  # Okabe and Ito's, yellow darkened
MARKERS = "osD^vPX*"
TITLES = {
    None: "Score, percent right (mean of the categories)", RIGHT: "Right, percent of the requests",
    WORDS: "Answered in the uncompressed model's words, percent of the requests",
}  # fmt: skip
Cost = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Theme:
    """Colours of a page. name: "light" or "dark"."""

    name: str
    paper: str
    ink: str
    grey: str
    line: str


LIGHT = Theme("light", "#ffffff", "#16181d", "#5f6570", "#e3e6ea")
DARK = Theme("dark", "#1a1d23", "#eceef2", "#a3abb8", "#343a44")


def series_of(spec: str) -> str:
    """A specification without its budgets: cells of one series are one line of a plot."""
    return without(spec, BUDGET_FIELDS)


def colours_of(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series, in the order of the rows."""
    names = list(dict.fromkeys(series_of(r["method"]) for r in rows if r["role"] != "baseline"))
    return {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}


def flops(row: dict[str, Any]) -> float | None:
    """Percent of the baseline's FLOPs."""
    return None if row["flops_ratio"] is None else 100 * row["flops_ratio"]


def ttft(row: dict[str, Any]) -> float | None:
    """Percent of the baseline's time to first token."""
    return None if row["ttft_ratio"] is None else 100 * row["ttft_ratio"]["median"]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both cost and score, from cheap to dear."""
    out: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not out or points[i][1] > points[out[-1]][1]:
            out.append(i)
    return out


def pareto(
    rows: Sequence[dict[str, Any]], cost: Cost, label: str, *, max_drop: float | None, theme: Theme = LIGHT
) -> Figure | None:  # fmt: skip
    """Score against cost in percent of the baseline's. None where fewer than two cells have both.

    Whiskers are the paired 95% interval of the difference to the baseline, downwards to the bound that holds for all cells at once,
    so that a cell is admitted exactly where its whisker ends above the line of ``max_drop`` (None, without a line, where something else
    decides); beside a measured ratio lies its own interval.
    """
    shown = [r for r in rows if not r["failed"] and r["score"] is not None and cost(r) is not None]
    if len(shown) < 2 or shown[0]["role"] != "baseline":
        return None
    figure, axes = _page(6.4, 4.4, theme)
    base = shown[0]["score"]
    places: list[tuple[float, float]] = [(cost(r) or 0.0, r["score"]) for r in shown]
    styles = colours_of(rows)
    best = front(places)
    x, y = zip(*(places[i] for i in best))
    axes.step(
        [*x, max(p[0] for p in places)], [*y, y[-1]], where="post", color=theme.grey, lw=5, alpha=0.28, zorder=1, solid_capstyle="round"
    )
    ends = []
    for name, (colour, marker) in styles.items():
        own = [i for i, r in enumerate(shown) if r["role"] != "baseline" and series_of(r["method"]) == name]
        own.sort(key=lambda i: shown[i]["visual_tokens_kept"])
        if not own:
            continue
        xs, ys = [places[i][0] for i in own], [places[i][1] for i in own]
        low = [places[i][1] - base - _lowest(shown[i], max_drop is not None) for i in own]
        high = [shown[i]["difference_interval"][1] - places[i][1] + base for i in own]
        sides = None
        if cost is ttft:
            ratio = [shown[i]["ttft_ratio"] for i in own]
            sides = [[max(0.0, v - 100 * r["low"]) for v, r in zip(xs, ratio)], [max(0.0, 100 * r["high"] - v) for v, r in zip(xs, ratio)]]
        axes.errorbar(
            xs, ys, yerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]], xerr=sides, color=colour, marker=marker, ms=6,
            lw=1.4, elinewidth=0.9, alpha=0.95, mec=theme.paper, mew=0.7, zorder=3, ls="-",
        )  # fmt: skip
        ends.append((ys[0], xs[0], name, colour))
    axes.plot([places[0][0]], [base], marker="*", ms=15, color=theme.ink, mec=theme.paper, mew=0.8, zorder=5, ls="")
    axes.annotate("none", (places[0][0], base), (0, 9), textcoords="offset points", ha="center", size=9, color=theme.ink, weight="bold")
    left, right = _limits(axes, places, [r["score"] for r in shown], base, max_drop, theme)
    _end_labels(axes, ends, left - 0.07 * (right - left or 1), theme)
    axes.set_xlabel(f"{label}, percent of the uncompressed model's", color=theme.grey, size=9)
    axes.set_title(TITLES[metric_of(rows)], loc="left", size=9, color=theme.grey, pad=8)
    _frame(axes, theme)
    return figure


def _limits(
    axes: Axes, places: Sequence[tuple[float, float]], scores: Sequence[float], base: float, max_drop: float | None, theme: Theme
) -> tuple[float, float]:
    """Room for labels on the left, and the line of ``max_drop``; the least and the greatest cost."""
    every = [p[0] for p in places]
    left, right = min(every), max(every)
    room = 0.25 * (right - left or 1)
    axes.set_xlim(left - room, right + 0.06 * (right - left or 1))
    axes.set_xticks([t for t in axes.get_xticks() if left - 0.05 * (right - left or 1) <= t <= axes.get_xlim()[1]])
    low_y, high_y = min(scores), max(scores)
    if max_drop is not None and max_drop > 1.5 * max(high_y - low_y, 10):
        max_drop = None  # a line far below would press the points together
    if max_drop is not None:
        low_y = min(low_y, base - max_drop)
    axes.set_ylim(low_y - 0.08 * (high_y - low_y + 1), high_y + 0.1 * (high_y - low_y + 1))
    if max_drop is not None:
        axes.axhline(base - max_drop, color=theme.grey, lw=0.9, ls=(0, (1, 2)), zorder=1)
        where, said = axes.get_xlim()[0], f" {points(max_drop)} below none"
        axes.text(where, base - max_drop, said, size=7.5, color=theme.grey, va="bottom")
    return left, right


def _end_labels(axes: Axes, ends: list[tuple[float, float, str, str]], right: float, theme: Theme) -> None:
    """The name of each series left of its cheapest point, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    ends = sorted(ends)
    places = [y for y, *_ in ends]
    for _ in range(200):
        for i in range(len(places) - 1):
            short = gap - (places[i + 1] - places[i])
            if short > 1e-9:
                places[i] -= short / 2
                places[i + 1] += short / 2
        if places and places[0] < low + gap / 2:
            places[0] = low + gap / 2
    for (y, x, name, colour), at in zip(ends, places):
        axes.annotate(
            name, (x, y), (right, at), textcoords="data", ha="right", va="center", size=9, color=colour, weight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3}, parse_math=False,
        )  # fmt: skip


def bars(rows: Sequence[dict[str, Any]], budget: str, theme: Theme = LIGHT) -> Figure | None:
    """Scores by category at one budget (``asked`` of the rows), with 95% intervals, baseline and floor."""
    shown = [r for r in rows if r["asked"] == budget and r["score"] is not None and not r["failed"] and r["role"] != "baseline"]
    base = next((r for r in rows if r["role"] == "baseline" and r["score"] is not None), None)
    tasks = tasks_of(rows)
    if not shown or base is None or not tasks:
        return None
    from matplotlib.figure import Figure

    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(9.4, (0.62 + 0.24 * len(shown)) * lines + 0.35), dpi=DPI, facecolor=theme.paper, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    styles, names = colours_of(rows), [series_of(r["method"]) for r in shown]
    for i, axes in enumerate(grid.flat):
        if i >= len(tasks):
            axes.set_visible(False)
            continue
        here = [r["tasks"].get(tasks[i]) for r in shown]
        for j, (name, task) in enumerate(zip(names, here)):
            if task is None:
                continue
            score = task["score"]
            low, high = task["score_interval"] or (score, score)  # captions have none
            axes.barh(j, score, height=0.68, color=styles[name][0], zorder=2)
            axes.plot([low, high], [j, j], color=theme.ink, lw=1, zorder=3)
            inside = score >= 16
            axes.text(
                3 if inside else max(high, score) + 3, j, f"{score:.0f}", va="center", size=7, color="white" if inside else theme.ink,
                weight="bold", zorder=4,
            )  # fmt: skip
        full = base["tasks"].get(tasks[i])
        if full:
            axes.axvline(full["score"], color=theme.ink, lw=1.1, ls=(0, (4, 2)), zorder=4)
            if full["floor"] is not None:
                axes.axvline(full["floor"], color=theme.grey, lw=1, ls=(0, (1, 1.5)), zorder=4)
        axes.set_title(tasks[i], loc="left", size=9, color=theme.ink, weight="bold")
        axes.set_yticks(range(len(names)), names, size=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 104)
        axes.set_xticks([0, 50, 100])
        _frame(axes, theme)
        axes.grid(False)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return out.getvalue()


def _page(width: float, height: float, theme: Theme) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    return figure, figure.subplots()


def _frame(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.tick_params(colors=theme.grey, labelsize=8.5, length=0)
    axes.grid(color=theme.line, lw=0.7, zorder=0)
    axes.set_axisbelow(True)


def _lowest(row: dict[str, Any], decides: bool) -> float:
    """Where a whisker ends. decides: whether the score is what the row's bound is of."""
    low = float(row["difference_interval"][0])
    return min(low, row["bound"]) if decides and row.get("bound") is not None else low
