"""What of a method's settings a model cannot run, said before any call is made. Each raises ``UnsupportedModelError``.

adapter: whatever says of a model ``name``, ``gives``, ``parts``, ``separators``, ``deepstack`` and the like; see ``patches.base.Adapter``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..family import Family
    from .base import Compressor
    from .reducer import Reducer

OF_TOWER = frozenset({"attention", "early_attention", "keys", "clip_text"})  # needs for which the vision tower is watched


def require_slot(method: Compressor, adapter: Family) -> None:
    """There is a projector for a trained one to replace."""
    trained = method.installs
    if trained is not None and trained.as_projector is not None and not adapter.projects:
        raise UnsupportedModelError(f"{trained.name} takes the place of LLaVA's projector, which {adapter.name} has not")


def require_needs(method: Compressor, adapter: Family) -> None:
    """The model gives what a method that works before the decoder asks for."""
    lacking = sorted(set(method.needs) - adapter.gives - ({"frame"} & adapter.parts))
    if lacking:
        raise UnsupportedModelError(f"{method.name} needs {', '.join(lacking)}, which {adapter.name} does not give")
    if "clip_text" in method.needs and not isinstance(method.clip, str):
        raise UnsupportedModelError(f"{method.name} needs clip_text and names no CLIP: give it a setting clip with a folder or hub id")


def require_parts(method: Compressor, adapter: Family) -> None:
    """The model has the parts that ``per`` names."""
    if method.per != "image" and method.per not in adapter.parts:
        known = " and ".join(f"per={part!r}" for part in sorted(adapter.parts)) or "no per="
        raise UnsupportedModelError(f"{method.name}: per={method.per!r} has no effect on {adapter.name}, which knows {known}")


def require_newlines(method: Compressor, adapter: Family) -> None:
    """``newline="keep"`` has an effect, and the newline columns that stay belong to rows that stay."""
    if method.newline != "keep":
        return
    if not (adapter.separators or adapter.marks):
        raise UnsupportedModelError(f"{method.name}: newline='keep' has no effect on {adapter.name}, which has no newline columns")
    if method.merges_tokens:
        raise UnsupportedModelError(f"{method.name} merges rows, and a newline column belongs to a row: leave newline= out")


def require_positions(method: Compressor, adapter: Family, positions: str) -> None:
    """The model can follow the rule, and tokens in the order of their choice, which have no places to keep, need not.

    positions: the rule, "renumber" or "keep".
    """
    adapter.check_positions(positions)
    if method.order != "picked":
        return
    if positions == "keep" or method.newline == "keep":
        raise UnsupportedModelError(
            f"{method.name}: order='picked' shuffles tokens, which {adapter.name} places by position: use positions='renumber'"
        )
    if method.per != "image":
        raise UnsupportedModelError(
            f"{method.name}: order='picked' is the order of one choice, and per={method.per!r} makes several: give one of them"
        )


def require_later_layers(method: Compressor, adapter: Family) -> None:
    """Features that a model adds in later layers (deepstack) can follow their tokens."""
    if adapter.deepstack and method.merges_tokens and not method.channelwise:
        raise UnsupportedModelError(
            f"{method.name} merges by content, and the features that {adapter.name} adds in later layers cannot follow"
        )


def require_counts(method: Reducer, before: Compressor | None) -> None:
    """Where a method weighs tokens by how many each holds, the one before it says how many."""
    if method.weighs and (before is None or not before.says_counts):
        raise UnsupportedModelError(
            f"{method.name} weighs tokens by how many were merged into each, and nothing before it says how many: "
            f"put a method that selects and merges before it, as in 'divmerge:keep=0.1 | {method.name}'"
        )


def require_chooser(method: Compressor, before: Compressor) -> None:
    """A method can choose among the tokens that one before the tower leaves, which fill no grid and saw each other alone."""
    lacking = sorted(set(method.needs) - {"text"})
    if lacking:
        raise UnsupportedModelError(f"{method.name} needs {', '.join(lacking)} of the whole picture, of which {before.name} leaves a part")
    if method.merges or method.says_counts or method.in_tower or method.as_resizer is not None:
        raise UnsupportedModelError(f"after {before.name} a method can choose tokens, and {method.name} makes new ones: use one of them")
    if method.per != "image" or before.positions is not None:
        given = f"{method.name}: per={method.per!r}" if method.per != "image" else f"{before.name}: positions={before.positions!r}"
        raise UnsupportedModelError(f"{given} has no effect where {method.name} follows {before.name}: leave it out")
