"""``mllm-efficient methods``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..compressors.base import Compressor

ALL = """\
Every method takes keep= (fraction kept), tokens= (count) or prune= (fraction removed), min_tokens=, max_tokens=, positions=, per= \
(image, tile, frame) and newline= (keep); none keeps everything, and dpn's router takes the place of a budget. Kinds: pre_llm before \
the language model, projector in place of the model's own, in_llm inside the decoder, whose budget is the average over its layers.
Examples: --method divprune:keep=0.1, --method fastv:layer=2,keep=0.5. One method alone: mllm-efficient methods divprune"""
FIRST = ("kind", "query-aware", "trained", "paper", "needs", "own parameters")


def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its parameters, what they mean, their defaults.")] = None,
    columns: options.Columns = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> None:
    """Lists the methods: kind, trained or not, query-aware or not, what they need, paper, parameters. With a name, one of them."""
    import warnings

    from ..registry import get_method, list_methods

    options.import_files(imports)
    options.check_columns(columns, "methods")
    if name is not None:
        _one(get_method(name), json)
        return
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        names = list_methods()
    for warning in broken:
        options.warn(f"left out: {warning.message}")
    rows = [_row(get_method(one)) for one in names]
    if json:
        options.print_json(rows, {"count": len(rows)})
        return
    from ..compressors.words import SHARED
    from ..tables import Table

    lines = []
    for r in rows:
        own = ", ".join(f"{k}={v}" for k, v in r["parameters"].items() if k not in (*list(SHARED)[:8],))
        answers = ["yes" if r[k] else "no" for k in ("trained", "query_aware")]
        lines.append([r["name"], r["kind"], *answers, ", ".join(r["needs"]) or "-", r["paper"] or "-", own or "-"])
    header = ["method", "kind", "trained", "query-aware", "needs", "paper", "own parameters"]
    options.print_tables(Table(header, lines, left=7, first=FIRST, note=ALL), columns)


def _row(cls: type[Compressor]) -> dict[str, Any]:
    from ..compressors.base import one_line, parameters, query_aware
    from ..compressors.kinds import letters_of

    kinds = {"kind": cls.kind, "family": letters_of(cls.kind)}  # the letter goes with version 0.3
    flags = {"trained": cls.trained, "query_aware": query_aware(cls), "needs": sorted(cls.needs)}
    return {"name": cls.name, **kinds, **flags, "paper": cls.paper, "parameters": parameters(cls), "summary": one_line(cls)}


def _one(cls: type[Compressor], json: bool) -> None:
    """Everything about a method."""
    from ..compressors.words import parameters_of, title_of
    from ..tables import Table

    row, settings = _row(cls), parameters_of(cls)
    if json:
        described = [{"name": p.name, "default": p.default, "meaning": p.meaning} for p in settings]
        options.print_json([row | {"described": described, "doc": inspect.getdoc(cls)}], {"count": 1})
        return
    facts = [row["kind"], "trained" if row["trained"] else "no training", "looks at the question" if row["query_aware"] else "no query"]
    needs = [f"needs {', '.join(row['needs'])}"] if row["needs"] else []
    print(f"{row['name']} ({title_of(row['name'])}): {', '.join([*facts, *needs, *filter(None, [row['paper']])])}")
    options.print_prose(inspect.getdoc(cls) or "")
    table = Table(["parameter", "default", "meaning"], [[p.name, p.shown, p.meaning or "-"] for p in settings], left=3, folded="meaning")
    options.print_tables(table)
