"""Plots of a sweep with matplotlib: accuracy against cost with the Pareto front, and bars by category. No pyplot, no state."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.base import BUDGET_FIELDS
from mllm_efficient.errors import BadSettingError, MllmEfficientError
from mllm_efficient.spec import without
from mllm_efficient.writing import writing

from .labels import Mark, label_points
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


@dataclass(frozen=True)
class Size:
    """Of a figure in inches, and of its letters in points."""

    width: float
    height: float
    letters: float
    marker: float


PAGE, COLUMN = Size(6.4, 4.4, 9, 6), Size(3.35, 2.6, 6.5, 3.6)  # a column of a paper on two columns
SIZES = {"page": PAGE, "column": COLUMN}
FORMATS = (".png", ".pdf", ".svg")
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


def tokens(row: dict[str, Any]) -> float | None:
    """Percent of the visual tokens that are kept."""
    return None if not row["visual_tokens_full"] else 100 * row["visual_tokens_kept"] / row["visual_tokens_full"]


COSTS: dict[str, tuple[Cost, str]] = {"flops": (flops, "FLOPs"), "ttft": (ttft, "Time to first token"), "tokens": (tokens, "Visual tokens")}


def budget_of(row: dict[str, Any]) -> str:
    """What stands at a point: the budget asked for, ``10%`` or ``64``; where there is none the tokens kept."""
    name, _, value = row["asked"].partition(",")[0].partition("=")
    if name in ("keep", "prune") and value:
        return f"{100 * (float(value) if name == 'keep' else 1 - float(value)):g}%"
    return value or f"{row['visual_tokens_kept']:g}"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both cost and score, from cheap to dear."""
    out: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not out or points[i][1] > points[out[-1]][1]:
            out.append(i)
    return out


def pareto(
    rows: Sequence[dict[str, Any]], cost: Cost, label: str, *, max_drop: float | None, theme: Theme = LIGHT, size: Size = PAGE
) -> Figure | None:  # fmt: skip
    """Score against cost in percent of the baseline's, the budget at every point. None where fewer than two cells have both.

    Whiskers are the paired 95% interval of the difference to the baseline, downwards to the bound that holds for all cells at once,
    so that a cell is admitted exactly where its whisker ends above the line of ``max_drop`` (None, without a line, where something else
    decides); beside a measured ratio lies its own interval.
    """
    shown = [r for r in rows if not r["failed"] and r["score"] is not None and cost(r) is not None]
    if len(shown) < 2 or shown[0]["role"] != "baseline":
        return None
    figure, axes = _page(size, theme)
    base, styles = shown[0]["score"], colours_of(rows)
    places: list[tuple[float, float]] = [(cost(r) or 0.0, r["score"]) for r in shown]
    x, y = zip(*(places[i] for i in front(places)))
    axes.step(
        [*x, max(p[0] for p in places)],
        [*y, y[-1]],
        where="post",
        color=theme.grey,
        lw=0.8 * size.marker,
        alpha=0.28,
        zorder=1,
        solid_capstyle="round",
    )
    marks, lines = list[Mark](), list[list[tuple[float, float]]]()
    for name, (colour, marker) in styles.items():
        own = [i for i, r in enumerate(shown) if r["role"] != "baseline" and series_of(r["method"]) == name]
        own.sort(key=lambda i: shown[i]["visual_tokens_kept"])
        if not own:
            continue
        xs, ys = [places[i][0] for i in own], [places[i][1] for i in own]
        low = [max(0.0, places[i][1] - base - _lowest(shown[i], max_drop is not None)) for i in own]
        high = [max(0.0, _ends(shown[i])[1] - places[i][1] + base) for i in own]
        sides = _sides([shown[i]["ttft_ratio"] for i in own], xs) if cost is ttft else None
        axes.errorbar(
            xs, ys, yerr=[low, high], xerr=sides, color=colour, marker=marker, ms=size.marker, lw=0.23 * size.marker,
            elinewidth=0.15 * size.marker, alpha=0.95, mec=theme.paper, mew=0.7, zorder=3, ls="-", label=name,
        )  # fmt: skip
        lines.append([places[i] for i in own])
        across = sides or [[0.0] * len(own)] * 2
        marks += [Mark(budget_of(shown[i]), *places[i], colour, low[k], high[k], across[0][k], across[1][k]) for k, i in enumerate(own)]
    axes.plot(
        [places[0][0]], [base], marker="*", ms=2.5 * size.marker, color=theme.ink, mec=theme.paper, mew=0.8, zorder=5, ls="", label="none"
    )
    marks.append(Mark("", *places[0], theme.ink, 0, 0, 0, 0))
    _limits(axes, places, base, max_drop, theme, size)
    axes.set_xlabel(f"{label}, percent of the uncompressed model's", color=theme.grey, size=size.letters)
    axes.set_title(TITLES[metric_of(rows)], loc="left", size=size.letters, color=theme.grey, pad=8)
    _frame(axes, theme, size)
    _key(figure, axes, theme, size)
    label_points(figure, axes, marks, lines, 0.78 * size.letters, size.marker)
    return figure


def _sides(ratios: Sequence[dict[str, float]], xs: Sequence[float]) -> list[list[float]]:
    """How far the intervals of ratios reach to the left and to the right, in percent."""
    return [[max(0.0, v - 100 * r["low"]) for v, r in zip(xs, ratios)], [max(0.0, 100 * r["high"] - v) for v, r in zip(xs, ratios)]]


def _limits(
    axes: Axes, places: Sequence[tuple[float, float]], base: float, max_drop: float | None, theme: Theme, size: Size
) -> None:  # fmt: skip
    """A little room around the points, and the line of ``max_drop``."""
    across, up = [p[0] for p in places], [p[1] for p in places]
    room = 0.08 * (max(across) - min(across) or 1)
    axes.set_xlim(min(across) - room, max(across) + room)
    low, high = min(up), max(up)
    if max_drop is not None and max_drop > 1.5 * max(high - low, 10):
        max_drop = None  # a line far below would press the points together
    if max_drop is not None:
        low = min(low, base - max_drop)
    axes.set_ylim(low - 0.1 * (high - low + 1), high + 0.1 * (high - low + 1))
    if max_drop is not None:
        axes.axhline(base - max_drop, color=theme.grey, lw=0.9, ls=(0, (1, 2)), zorder=1, label=f"none − {max_drop:g}")


def _key(figure: Figure, axes: Axes, theme: Theme, size: Size) -> None:
    """The names of the series, below the axes, where nothing else stands."""
    handles, labels = axes.get_legend_handles_labels()
    widest = 0.62 * 0.88 * size.letters * max(len(name) for name in labels) / 72 + 0.4 * size.letters / 6.5  # inches of an entry
    columns = max(1, min(len(labels), int(size.width / widest)))
    key = figure.legend(
        [handle[0] if isinstance(handle, tuple) else handle for handle in handles], labels, loc="outside lower center", ncols=columns,
        fontsize=0.88 * size.letters, frameon=False, handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip
    for text in key.get_texts():
        text.set_color(theme.ink)
        text.set_parse_math(False)


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


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as .png, .pdf (with real text) or .svg. Raises ``MllmEfficientError`` for other endings or where it cannot."""
    if path.suffix.lower() not in FORMATS:
        raise MllmEfficientError(f"{path} does not end in {', '.join(FORMATS)}: figures are written as these")
    from matplotlib import rc_context

    with writing(path), rc_context({"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "mllm-efficient"}):
        path.parent.mkdir(parents=True, exist_ok=True)
        none = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
        figure.savefig(path, facecolor=figure.get_facecolor(), metadata=none[path.suffix.lower()])


def tradeoff(rows: Sequence[dict[str, Any]], cost: str | None, *, size: str = "page") -> Figure:
    """``pareto`` of the first cost that was measured, or of one by name. Raises where there is nothing to draw."""
    if size not in SIZES:
        raise BadSettingError(f"size={size!r} is not one of {', '.join(SIZES)}")
    if cost not in (None, *COSTS):
        raise BadSettingError(f"cost={cost!r} is not one of {', '.join(COSTS)}")
    for name in COSTS if cost is None else [cost]:
        figure = pareto(rows, *COSTS[name], max_drop=None, size=SIZES[size])
        if figure is not None:
            return figure
    raise MllmEfficientError(f"nothing to draw: fewer than two rows have a score and {cost or 'a cost'}")


def phases(rows: Sequence[dict[str, Any]], cost: str | None, *, size: str = "page") -> Figure:
    """Of every method one bar, its cost phase by phase: milliseconds of a benchmark, or TFLOPs. Raises where nothing was measured."""
    if size not in SIZES:
        raise BadSettingError(f"size={size!r} is not one of {', '.join(SIZES)}")
    if cost is not None:
        raise BadSettingError(f"cost={cost!r} has no effect here: bars are of all phases")
    timed = "prefill_ms" in rows[0]
    names = ("vision", "compress", "prefill") if timed else ("vision", "compress", "prefill", "decode")
    shown = [r for r in rows if not r.get("failed") and (not timed or r["prefill_ms"])]
    if not shown:
        raise MllmEfficientError("nothing to draw: every method failed")
    how = SIZES[size]
    figure, axes = _page(replace(how, height=0.5 * how.height + 0.028 * how.letters * len(shown)), LIGHT)
    done = [0.0] * len(shown)
    for name, colour in zip(names, COLOURS):
        values = [((r[f"{name}_ms"] or {}).get("median", 0.0) if timed else r[f"{name}_tflops"]) or 0.0 for r in shown]
        axes.barh(range(len(shown)), values, 0.68, left=done, color=colour, label=name)
        done = [a + b for a, b in zip(done, values)]
    several = timed and len({r["batch_size"] for r in shown}) > 1
    batch = [f", batch {r['batch_size']}" if several else "" for r in shown]
    axes.set_yticks(range(len(shown)), [r["method"] + more for r, more in zip(shown, batch)])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.invert_yaxis()
    axes.set_xlabel("Milliseconds to the first token, medians" if timed else "TFLOPs", color=LIGHT.grey, size=how.letters)
    _frame(axes, LIGHT, how)
    axes.grid(axis="y", visible=False)
    _key(figure, axes, LIGHT, how)
    return figure


def _page(size: Size, theme: Theme) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size.width, size.height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    return figure, figure.subplots()


def _frame(axes: Axes, theme: Theme, size: Size = PAGE) -> None:
    axes.set_facecolor(theme.paper)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.tick_params(colors=theme.grey, labelsize=0.94 * size.letters, length=0)
    axes.grid(color=theme.line, lw=0.7, zorder=0)
    axes.set_axisbelow(True)


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    """The interval of the difference to the baseline; where there is none, as of captions, the difference itself."""
    low, high = row["difference_interval"] or (row["difference"],) * 2
    return float(low), float(high)


def _lowest(row: dict[str, Any], decides: bool) -> float:
    """Where a whisker ends. decides: whether the score is what the row's bound is of."""
    low = _ends(row)[0]
    return min(low, row["bound"]) if decides and row.get("bound") is not None else low
