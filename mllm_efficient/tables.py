"""Tables in text: which columns a reader gets, by name or by the room there is. No other module of the package is needed for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import BadSettingError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table as RichTable

INTERVAL = re.compile(r"\s*\[.*\]$")
GAP = 2  # spaces between two columns
LEAST = 24  # characters that a column of methods keeps when it is folded


@dataclass(frozen=True)
class Table:
    """Cells as text. left: how many columns are text, the others are numbers. first: names of the columns that are kept longest where
    there is little room, the others go from the end. hidden: names of those that found no room. title, note: what stands above and below.
    folded: the column whose cells are broken into lines where they are too long.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    left: int = 1
    first: tuple[str, ...] = ()
    title: str = ""
    note: str = ""
    folded: str = "method"
    hidden: tuple[str, ...] = ()

    def select(self, names: Iterable[str]) -> Table:
        """These columns in this order after those that say what a line is of. Raises ``BadSettingError`` for unknown ones."""
        wanted = columns_named(names, self.header)
        always = range(self.named + 1)
        picked = [*always, *(i for i in wanted if i not in always)]
        return self._of(picked, sum(i < self.left for i in picked), ())

    @property
    def named(self) -> int:
        """The last of the columns that say what a line is of: the folded one, where there is one."""
        return list(self.header).index(self.folded) if self.folded in self.header else 0

    def fitted(self, width: int) -> Table:
        """As many columns as ``width`` characters hold. Those that say what a line is of stay."""
        rank = {plain(name): i for i, name in enumerate(self.first)}
        dear = sorted(range(self.named + 1, len(self.header)), key=lambda i: (rank.get(plain(self.header[i]), len(rank)), i))
        picked = list(range(len(self.header)))
        while dear and self._width(picked) > width:
            picked.remove(dear.pop())
        return self._of(picked, min(self.left, len(picked)), tuple(self.header[i] for i in range(len(self.header)) if i not in picked))

    def drawn(self, width: int | None = None) -> RichTable:
        """As rich draws it, in at most ``width`` characters: where names of methods are too long, they are folded within their cells."""
        from rich import box
        from rich.table import Table as RichTable

        widths, named = self._widths(range(len(self.header))), self.named
        others = sum(widths) - widths[named] + GAP * (len(widths) - 1) + 1
        room = None if width is None else max(LEAST, width - others)
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for i, name in enumerate(self.header):
            folded = i == named and room is not None and widths[i] > room
            table.add_column(
                name, justify="left" if i < self.left else "right", no_wrap=not folded, overflow="fold", max_width=room if folded else None
            )
        for line in self.lines:
            table.add_row(*line)
        return table

    def text(self, width: int | None = None) -> str:
        """The table as plain text, lines without spaces at their end."""
        from io import StringIO

        from rich.console import Console

        shown = self if width is None else self.fitted(width)
        out = Console(file=StringIO(), width=width or 10_000, highlight=False, markup=False, color_system=None)
        out.print(shown.drawn(width))
        lines = [line.rstrip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]
        return "\n".join(line for line in lines if line)

    def html(self) -> str:
        """The table for a notebook."""
        from html import escape

        def row(cells: Sequence[str], tag: str) -> str:
            style = ["left" if i < self.left else "right" for i in range(len(cells))]
            return "".join(f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for side, cell in zip(style, cells))

        body = "".join(f"<tr>{row(line, 'td')}</tr>" for line in self.lines)
        return f"<table><thead><tr>{row(self.header, 'th')}</tr></thead><tbody>{body}</tbody></table>"

    def _of(self, picked: Sequence[int], left: int, hidden: tuple[str, ...]) -> Table:
        lines = [[line[i] for i in picked] for line in self.lines]
        return replace(self, header=[self.header[i] for i in picked], lines=lines, left=left, hidden=hidden)

    def _widths(self, picked: Iterable[int]) -> list[int]:
        from rich.cells import cell_len

        return [max(cell_len(cell) for cell in [self.header[i], *(line[i] for line in self.lines)]) for i in picked]

    def _width(self, picked: Sequence[int]) -> int:
        """Characters across; of long names what they are folded to."""
        widths = self._widths(picked)
        name = widths[picked.index(self.named)]
        return sum(widths) - name + min(name, max(LEAST, len(self.header[self.named]))) + GAP * (len(widths) - 1) + 1


def columns_named(names: Iterable[str], header: Sequence[str]) -> list[int]:
    """Places of columns by name: upper and lower case are alike, and ``[95%]`` may be left out.

    Raises ``BadSettingError`` naming the columns there are.
    """
    known = {plain(name): i for i, name in reversed(list(enumerate(header)))} | {name.lower(): i for i, name in enumerate(header)}
    out = []
    for name in names:
        at = known.get(name.strip().lower(), known.get(plain(name)))
        if at is None:
            hint = did_you_mean(name.strip().lower(), known)
            raise BadSettingError(f"no column {name.strip()!r}{hint} (columns: {', '.join(INTERVAL.sub('', h) for h in header)})")
        out.append(at)
    return list(dict.fromkeys(out))


def plain(name: str) -> str:
    """A column's name as it may be asked for: ``vs none`` of ``vs none [95%]``."""
    return INTERVAL.sub("", name.strip()).lower()


def listed(text: str | None) -> list[str] | None:
    """``"score, FLOPs"`` as names of columns; None and ``all`` are every column."""
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    return names if names and names != ["all"] else None


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a column for every number: ``{"ttft_ms": {"median": 1}}`` is ``{"ttft_ms_median": 1}``, a pair ``_low`` and ``_high``."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= {f"{key}_{k}": v for k, v in flat(value).items()}
        elif isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value):
            out |= dict(zip((f"{key}_low", f"{key}_high"), value))
        else:
            out[key] = value
    return out
