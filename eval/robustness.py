"""Rows and a table of questions about corrupted pictures, the uncompressed model's answers about the same pictures beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.stats import Scores, points
from mllm_efficient.tables import Table

from .builtin.corruptions import CORRUPTIONS, Corrupted
from .runner import NO_IMAGE
from .table import OVERALL, rows_of

TITLE = "Under each corruption: macro, difference to none under the same one [95%]:"


def with_corrupted(questions: Sequence[Any], corruptions: Sequence[str]) -> list[Any]:
    """The questions, then all of them under the first corruption, and so on."""
    return [*questions, *(Corrupted(q, name) for name in corruptions for q in questions)]


def under(records: Sequence[dict[str, Any]], corruption: str | None) -> list[dict[str, Any]]:
    """The records of one corruption; None: of the pictures as they are."""
    return [r for r in records if r.get("corruption") == corruption]


def corrupted_rows(
    records: Sequence[dict[str, Any]], methods: Sequence[Compressor], tasks: Sequence[str], corruptions: Sequence[str], *,
    against: str | None = None, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows like those of the pictures as they are, corruption after corruption: their baseline is ``none`` under the same corruption.

    ``clean`` is the method's own score on the pictures as they are, ``clean_difference`` what the corruption takes from it, paired by
    picture.
    """
    out, clean = list[dict[str, Any]](), _by_arm(under(records, None))
    for corruption in corruptions:
        own = under(records, corruption)
        images = sorted({r["image"] for r in own})
        both = Scores({**{f"{arm} clean": rows for arm, rows in clean.items()}, **_by_arm(own)}, images, tasks, seed)
        for row in rows_of(own, methods, tasks, against=against, seed=seed):
            column = len(tasks) if row["task"] == OVERALL else list(tasks).index(row["task"])
            change = both.of(row["method"], column, f"{row['method']} clean")
            row |= {"corruption": corruption, "clean": round(float(both.values[f"{row['method']} clean"][column]), 2)}
            out.append(row | {"clean_difference": round(change.value, 2), "clean_interval": points(change.interval())})
    return out


def corrupted_table(rows: Sequence[dict[str, Any]], corruptions: Sequence[str]) -> Table:
    """A line for each method: its score on the pictures as they are, and under each corruption with the difference to ``none``."""
    found = {(r["method"], r.get("corruption")): r for r in rows if r["task"] == OVERALL and r["turns"] == 1}
    floor = {c: found["none", c]["floor"] for c in (None, *corruptions)}
    lines = []
    if floor[None] is not None:
        lines.append([NO_IMAGE, f"{floor[None]:.1f}", *(f"{floor[c]:.1f}" for c in corruptions)])
    for method in dict.fromkeys(method for method, _ in found):
        lines.append([method, f"{found[method, None]['score']:.1f}", *(_cell(found[method, c]) for c in corruptions)])
    said = "; ".join(f"{c}: {CORRUPTIONS[c]}" for c in corruptions)
    return Table(["method", "as it is", *corruptions], lines, title=TITLE, note=f"{said}.")


def _cell(row: dict[str, Any]) -> str:
    low, high = row["difference_interval"]
    return f"{row['score']:.1f}" + ("" if row["method"] == "none" else f", {row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]")


def _by_arm(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        out.setdefault(record["method"], []).append(record)
    return out
