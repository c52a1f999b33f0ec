"""``mllm-efficient doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..patches.checkup import Row

Every = Annotated[bool, typer.Option("--all", help="Also every model type with a row in the table of facts: a minute or two.")]


def doctor(device: options.Device = "auto", attention: options.Attention = None, every: Every = False, json: options.Json = False) -> int:
    """Checks on tiny models whether every kind of method is right with the versions, device and attention kernel here."""
    import warnings

    import transformers

    from ..patches.checkup import CHECKS, ROW, ROW_CHECKS
    from ..patches.checkup import doctor as examine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a host warns of is not about the user's own code
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            found = examine(device, attention, every)
        finally:
            transformers.logging.set_verbosity(verbosity)
    if json:
        plain = found.to_dict()
        options.print_json(plain["rows"], plain["meta"])
        return 0 if found.holds else 1
    families = [row for row in found.rows if row.kind != ROW]
    options.print_table(["model type", "kind", *CHECKS], _cells(families), left=5)
    if every:
        types = [[model_type, *cells] for model_type, _, *cells in _cells([row for row in found.rows if row.kind == ROW])]
        options.print_table(["model type", *ROW_CHECKS], types, left=6)
        for model_type, why in {row.model_type: row.why for row in found.rows if row.kind == ROW and row.holds is None}.items():
            print(f"{model_type}: {why}")
    versions = ", ".join(f"{name} {number}" for name, number in found.meta["versions"].items())
    kernels = ", ".join(sorted({row.attention for row in found.rows if row.attention}))
    print(f"{versions}; {found.meta['device']}, {found.meta['dtype']}, attention {kernels}")
    print("- : the family does not offer that kind of method" + (", or the type is not supported" if every else ""))
    print(found)
    return 0 if found.holds else 1


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each model type and kind, with what each check says."""
    said = {True: "holds", False: "DOES NOT HOLD", None: "-"}
    table: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        table.setdefault((row.model_type, row.kind), []).append(said[row.holds])
    return [[*key, *cells] for key, cells in table.items()]
