"""``mllm-efficient methods``."""

from __future__ import annotations

from typing import Any

from . import options


def methods(json: options.Json = False, imports: options.Import = None) -> None:
    """Lists the methods: kind, trained or not, query-aware or not, what they need, paper, parameters."""
    import warnings

    from ..compressors.base import one_line, parameters, query_aware
    from ..compressors.kinds import letters_of
    from ..registry import get_method, list_methods

    options.import_files(imports)
    with warnings.catch_warnings(record=True) as broken:
        warnings.simplefilter("always")
        names = list_methods()
    for warning in broken:
        options.say(f"left out: {warning.message}")
    rows: list[dict[str, Any]] = []
    for name in names:
        cls = get_method(name)
        kinds = {"kind": cls.kind, "family": letters_of(cls.kind)}  # the letter goes with version 0.3
        flags = {"trained": cls.trained, "query_aware": query_aware(cls), "needs": sorted(cls.needs)}
        rows.append({"name": name, **kinds, **flags, "paper": cls.paper, "parameters": parameters(cls), "summary": one_line(cls)})
    if json:
        options.print_json(rows, {"count": len(rows)})
        return
    shared = ("keep", "tokens", "prune", "min_tokens", "max_tokens", "positions", "per", "newline")
    lines = []
    for r in rows:
        own = ", ".join(f"{k}={v}" for k, v in r["parameters"].items() if k not in shared)
        answers = ["yes" if r[k] else "no" for k in ("trained", "query_aware")]
        lines.append([r["name"], r["kind"], *answers, ", ".join(r["needs"]) or "-", r["paper"] or "-", own or "-"])
    options.print_table(["method", "kind", "trained", "query-aware", "needs", "paper", "own parameters"], lines, left=7)
    print("Every method takes keep= (fraction kept), tokens= (count) or prune= (fraction removed), min_tokens=, max_tokens=, positions=,")
    print("per= (image, tile, frame) and newline= (keep); none keeps everything, and dpn's router takes the place of a budget.")
    print("Kinds: pre_llm before the language model, projector in place of the model's own, in_llm inside the decoder, whose budget is")
    print("the average over its layers.")
    print("Examples: --method divprune:keep=0.1, --method fastv:layer=2,keep=0.5")
