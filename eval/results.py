"""What an evaluation, a sweep, a benchmark or a count of FLOPs gives back: rows, and the tables and plots of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.tables import Table, flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

    from .report.merge import Finished

EVALUATE, SWEEP, BENCH, FLOPS = KINDS = ("evaluate", "sweep", "bench", "flops")
WIDTH = 120  # characters of a table where no terminal says


@dataclass(frozen=True, repr=False)
class Results:
    """Rows of numbers, the uncompressed baseline first, and ``meta``: on what they were made (fields: ``eval/record/schema.py``).

    kind: "evaluate", "sweep", "bench" or "flops". tables: for readers, the first of all rows. failed: a line for everything that failed.
    """

    kind: str
    rows: list[dict[str, Any]]
    meta: dict[str, Any]
    tables: tuple[Table, ...]
    failed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``: a line for each row; pairs and medians are flattened (``score_interval_low``, ``ttft_ms_median``).

        Raises ``MllmEfficientError`` where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MllmEfficientError("to_pandas needs pandas: pip install pandas (or read .rows, a list of dicts)") from None
        return pandas.DataFrame([flat(row) for row in self.rows])

    def to_latex(
        self, columns: Sequence[str] | None = None, *, caption: str | None = None, label: str | None = None, intervals: bool = True
    ) -> str:  # fmt: skip
        """A table of the booktabs package that can be pasted: methods as papers name them, the best of each budget in bold.

        columns: by the names that the printed table has; None chooses few. Raises ``BadSettingError`` for one that is not there.
        """
        from .report.latex import latex_table

        return latex_table(self.tables[0], self.rows, columns, caption=caption, label=label or f"tab:{self.kind}", intervals=intervals)

    def plot(self, cost: str | None = None, *, size: str = "page", path: str | Path | None = None) -> Figure:
        """A matplotlib figure: score against cost for "evaluate" and "sweep", cost by phase for "bench" and "flops".

        Args:
            cost: "flops", "ttft" or "tokens"; None takes the first of these that was measured.
            size: "page", or "column" for one column of a paper (3.3 inches).
            path: a .png, .pdf or .svg file that it is written to as well.

        Raises ``MllmEfficientError`` where there is nothing to draw, ``BadSettingError`` for an unknown cost or size.
        """
        from .report import plots

        draw = plots.tradeoff if self.kind in (EVALUATE, SWEEP) else plots.phases
        figure = draw(self.finished.rows if self.kind in (EVALUATE, SWEEP) else self.rows, cost, size=size)
        if path is not None:
            plots.save(figure, Path(path))
        return figure

    @property
    def finished(self) -> Finished:
        """The run as reports read it. Raises ``MllmEfficientError`` for a benchmark of time or FLOPs."""
        from .report.merge import Finished, of_eval

        if self.kind not in (EVALUATE, SWEEP):
            raise MllmEfficientError(f"reports are made of evaluations and sweeps, not of {self.kind}")
        return Finished(of_eval(self.rows, self.meta) if self.kind == EVALUATE else self.rows, [self.meta], [self.kind])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in self.tables:
            if table.title:
                yield table.title
            yield table.fitted(options.max_width).drawn(options.max_width)
            if table.note:
                yield f"[dim]{table.note}[/dim]" if "[" not in table.note else table.note

    def __repr__(self) -> str:
        width = shutil.get_terminal_size((WIDTH, 24)).columns
        shown = "\n\n".join("\n".join(filter(None, (t.title, t.text(width)))) for t in self.tables if t.lines)
        return f"{shown}\n{len(self.rows)} rows of {self.kind}" + "".join(f"\n{line}" for line in self.failed)

    def _repr_html_(self) -> str:
        from html import escape

        parts = [f"<p>{escape(t.title)}</p>" * bool(t.title) + t.html() + f"<p><small>{escape(t.note)}</small></p>" for t in self.tables]
        return "".join([*parts, *(f"<p><b>{escape(line)}</b></p>" for line in self.failed)])
