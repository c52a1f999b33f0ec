"""Tables that can be pasted into a paper: few columns, methods as papers name them, the best of each budget in bold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mllm_efficient.compressors.base import BUDGET_FIELDS
from mllm_efficient.compressors.words import title_of
from mllm_efficient.spec import parse
from mllm_efficient.tables import INTERVAL, Table, plain

SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "×": r"$\times$", "−": r"$-$",
}  # fmt: skip
USUAL = ("tokens", "kept", "score", "macro", "vs none", "vs baseline", "same words", "right", "retention", "FLOPs", "ratio", "TTFT/none")
HIGH = ("score", "macro", "same answer", "same words", "right", "retention", "hard", "tok/s")
LOW = ("kl nats", "broken", "ece", "aurc", "flops", "prefill flops", "ratio", "ttft ms", "ttft/none", "prefill ms", "e2e ms", "peak mb")
NUMBER = re.compile(r"[+-]?[\d,]*\.?\d+")


def latex_table(
    table: Table, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None, *, caption: str | None = None,
    label: str | None = None, intervals: bool = True, categories: Sequence[str] = (),
) -> str:  # fmt: skip
    """The table as a float of the booktabs package; every method in the line of its own budget.

    rows: of the results, whose ``asked`` or tokens say which lines are of one budget. columns: by name; None takes the usual ones that
    are there, and the categories. intervals: whether what stands in brackets is shown. Raises ``BadSettingError`` for unknown columns.
    """
    usual = [name for name in table.header if plain(name) in {plain(u) for u in USUAL} or name in categories]
    shown = table.select(usual if columns is None else columns)
    lines = [[cell if intervals or i < shown.left else INTERVAL.sub("", cell) for i, cell in enumerate(line)] for line in shown.lines]
    high = {*HIGH, *map(plain, categories)}
    bold = _best(shown.header, lines, [_budget(line, table) for line in table.lines], shown.named, high)
    named = shown.named
    body = []
    for i, line in enumerate(lines):
        cells = [_method(cell) if j == named else _cell(cell, (i, j) in bold) for j, cell in enumerate(line)]
        body.append(" & ".join(cells) + r" \\")
        if line[named] == "none" and i + 1 < len(lines):
            body.append(r"\midrule")
    header = " & ".join("Method" if h == "method" else _text(h if intervals else INTERVAL.sub("", h)) for h in shown.header) + r" \\"
    about = _text(caption or "Visual-token compression.")
    return "\n".join([
        r"\begin{table}[t]", r"\centering", rf"\caption{{{about}}}", rf"\label{{{label or 'tab:tokens'}}}",
        r"\begin{tabular}{" + "l" * shown.left + "r" * (len(shown.header) - shown.left) + "}", r"\toprule", header, r"\midrule", *body,
        r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _budget(line: Sequence[str], table: Table) -> str:
    """What lines have in common that stand in competition: the budget in the specification; empty for the baseline."""
    if line[table.named] == "none":
        return ""
    try:
        given = {k: v for stage in parse(line[table.named].removesuffix(" (failed)")) for k, v in stage.settings.items()}
    except ValueError:
        return ""
    return ",".join(f"{k}={given[k]}" for k in BUDGET_FIELDS if k in given) or "own"


def _best(
    header: Sequence[str], lines: Sequence[Sequence[str]], budgets: Sequence[str], named: int, high: set[str]
) -> set[tuple[int, int]]:
    """(line, column) of the best of each budget, of all that are as good, where there are at least two that differ."""
    out = set()
    for j, name in enumerate(header):
        sign = 1 if plain(name) in high else -1 if plain(name) in LOW else 0
        for budget in set(budgets) - {""} if sign and j != named else ():
            values = {i: sign * value for i, line in enumerate(lines) if budgets[i] == budget and (value := _value(line[j])) is not None}
            if len(set(values.values())) > 1:
                out |= {(i, j) for i, value in values.items() if value == max(values.values())}
    return out


def _value(cell: str) -> float | None:
    found = NUMBER.match(cell)
    return float(found[0].replace(",", "")) if found else None


def _method(spec: str) -> str:
    """``DivPrune`` of ``divprune:keep=0.25``; settings beside the budget stand behind, a failed one says so."""
    failed = spec.endswith(" (failed)")
    try:
        stages = parse(spec.removesuffix(" (failed)"))
    except ValueError:
        return _text(spec)
    names = []
    for stage in stages:
        more = ", ".join(f"{k}={v}" for k, v in stage.settings.items() if k not in BUDGET_FIELDS)
        name, _, on = stage.name.partition("@")
        title = title_of(name) + (f" on {title_of(on)}" if on else "")
        names.append(f"{title} ({more})" if more else title)
    return _text(" + ".join(names) + (" (failed)" if failed else ""))


def _cell(cell: str, bold: bool) -> str:
    """A number with a true minus sign; the best in bold, its interval in small print."""
    value, interval = INTERVAL.sub("", cell), INTERVAL.search(cell)
    if not NUMBER.match(value):
        return _text(cell)
    shown = _signed(value)
    between = f" {{\\scriptsize {_signed(interval[0].strip())}}}" if interval else ""
    return (rf"\textbf{{{shown}}}" if bold else shown) + between


def _signed(text: str) -> str:
    return re.sub(r"(?<![\w.])-(?=[\d.])", "$-$", _escaped(text)).replace("+", "$+$")


def _text(text: str) -> str:
    """Escaped; braces keep a cell that begins with a bracket from being read as an argument of the line break before it."""
    return f"{{{_escaped(text)}}}" if text.startswith("[") else _escaped(text)


def _escaped(text: str) -> str:
    return "".join(SIGNS.get(c, c) for c in text)
