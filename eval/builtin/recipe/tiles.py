"""Trains ``builtin-tiles``, a LLaVA-NeXT, on two CPU cores, by the language model's loss alone: a new tower, and the decoder of
``builtin-qwen`` to begin with.

python -m mllm_efficient.eval.builtin.recipe.tiles --output-dir OUT [--minutes 60]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import llava_architectures as architecture
from .instrument import Recipe, main
from .llava_packed import PackedLlava, begun, tiled
from .phases import Drawn, Phase
from .prompts import HARD, OLD
from .qwen import LARGE, ONE, SEVERAL, TINY

SMALL, MIDDLE, WHOLE = Drawn(ONE, 1, 0, 36, 16), Drawn(ONE, 1, 36, 64, 16), Drawn(ONE, 1, 64, 144, 8)
FIT = architecture.TILE  # words are learnt in the size in which they are drawn first: other sizes look like another script
PHASES = (
    Phase(750, 2, 1.0, (replace(TINY, whole=FIT, share=0.9), replace(LARGE, batch=64, share=0.1))),
    Phase(300, 2, 0.5, (
        replace(TINY, whole=FIT, share=0.3), replace(LARGE, batch=64, share=0.1),
        replace(SMALL, whole=FIT, share=0.3), replace(MIDDLE, whole=FIT, share=0.3),
    )),
    Phase(300, 2, 0.3, (
        replace(LARGE, share=0.1), replace(TINY, share=0.1), replace(SMALL, share=0.35), replace(MIDDLE, share=0.25), *SEVERAL,
    )),
    Phase(1300, 2, 0.2, (
        replace(LARGE, share=0.05), replace(SMALL, share=0.15), replace(MIDDLE, share=0.25), replace(WHOLE, share=0.15),
        Drawn(("images",), 2, 0, 64, 8, 0.1), Drawn(("images",), 3, 0, 64, 6, 0.1),
        Drawn(("screens",), 2, 0, 144, 5, 0.1), Drawn(("screens",), 3, 0, 144, 3, 0.1),
    )),
    Phase(800, 2, 0.1, (
        replace(LARGE, share=0.04), replace(SMALL, share=0.15), replace(MIDDLE, share=0.25), replace(WHOLE, share=0.1),
        Drawn(("images",), 2, 0, 64, 8, 0.14), Drawn(("images",), 3, 0, 64, 6, 0.14),
        Drawn(("screens",), 2, 0, 144, 5, 0.1), Drawn(("screens",), 3, 0, 144, 3, 0.08),
    )),
)  # fmt: skip


def new_model() -> Any:
    """Torch's seed decides of the tower and the projector."""
    return begun(architecture.tiles_model())


RECIPE = Recipe(
    "builtin-tiles", new_model, PackedLlava, lambda prompts, kind: tiled(prompts), architecture.save_tiles, PHASES,
    (*OLD, *HARD), buckets=(36, 64, 100, 144),
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main(RECIPE, __doc__))
