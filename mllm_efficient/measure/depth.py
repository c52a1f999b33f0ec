"""A configuration with fewer layers: the widths of a large model at a cost that a small machine can pay."""

from __future__ import annotations

from typing import Any

from ..errors import MllmEfficientError

DEPTHS = ("num_hidden_layers", "depth")
INDEXES = ("deepstack_visual_indexes", "fullatt_block_indexes")  # layers of a tower, by number
KINDS, MADE_ANEW = "layer_types", ("per_layer_config",)  # what transformers makes from the rest
SHARED, INSERT, SLIDING_FROM = "num_kv_shared_layers", "insert_layer_id", "max_window_layers"


def shallower(config: Any, layers: int) -> Any:
    """The configuration with the first ``layers`` layers of the language model, and of the tower where that has more.

    Raises ``MllmEfficientError`` where the language model has fewer.
    """
    whole = config.to_dict()
    text, vision = dict(whole["text_config"]), dict(whole["vision_config"])
    have = text["num_hidden_layers"]
    if not 1 <= layers <= have:
        raise MllmEfficientError(f"--layers {layers}: the language model has {have}, so give 1 to {have}")
    whole["text_config"], whole["vision_config"] = _cut(text, layers), _cut(vision, layers)
    if INSERT in whole:  # MiniCPM-V says it twice
        whole[INSERT] = whole["vision_config"][INSERT]
    return type(config).from_dict(whole)


def _cut(part: dict[str, Any], layers: int) -> dict[str, Any]:
    """One part with at most so many layers, and what it says of each by its place or by number."""
    name = next(name for name in DEPTHS if name in part)
    part = {k: v for k, v in part.items() if k not in MADE_ANEW}
    have, last = part[name], min(layers, part[name]) - 1
    out = {k: v[: last + 1] if isinstance(v, (list, tuple)) and len(v) == have and k not in INDEXES else v for k, v in part.items()}
    out[name] = last + 1
    if out.get(KINDS):  # some models want their last layer to be of one kind
        out[KINDS] = [*out[KINDS][:-1], part[KINDS][-1]]
    for key in INDEXES:
        if out.get(key):
            out[key] = [i for i in out[key] if i <= last] or [last]
    for key in (INSERT, SLIDING_FROM):
        if isinstance(out.get(key), int):
            out[key] = min(out[key], last)
    if out.get(SHARED):
        out[SHARED] = _sharing(list(out[KINDS]), min(out[SHARED], last))
    return out


def _sharing(kinds: list[str], most: int) -> int:
    """How many of the last layers can read the keys of earlier ones of their kind."""
    return next(n for n in range(most, -1, -1) if set(kinds[len(kinds) - n :]) <= set(kinds[: len(kinds) - n]))
