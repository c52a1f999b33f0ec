"""``mllm-efficient doctor``."""

from __future__ import annotations

from . import options


def doctor(device: options.Device = "auto", attention: options.Attention = None, json: options.Json = False) -> int:
    """Checks on tiny models whether every kind of method is right with the versions, device and attention kernel here."""
    import warnings

    from ..patches.checkup import CHECKS
    from ..patches.checkup import doctor as examine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a host warns of is not about the user's own code
        found = examine(device, attention)
    if json:
        plain = found.to_dict()
        options.print_json(plain["rows"], plain["meta"])
        return 0 if found.holds else 1
    said = {True: "holds", False: "DOES NOT HOLD", None: "-"}
    table: dict[tuple[str, str], list[str]] = {}
    for row in found.rows:
        table.setdefault((row.model_type, row.kind), []).append(said[row.holds])
    options.print_table(["model type", "kind", *CHECKS], [[*key, *cells] for key, cells in table.items()], left=5)
    versions = ", ".join(f"{name} {number}" for name, number in found.meta["versions"].items())
    kernels = ", ".join(sorted({row.attention for row in found.rows if row.attention}))
    print(f"{versions}; {found.meta['device']}, {found.meta['dtype']}, attention {kernels}")
    print("- : the family does not offer that kind of method")
    print(found)
    return 0 if found.holds else 1
