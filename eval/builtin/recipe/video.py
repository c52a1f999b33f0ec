"""Trains ``builtin-video``, a LLaVA-OneVision, on two CPU cores, by the language model's loss alone: a new tower, and the decoder of
``builtin-qwen`` to begin with.

    python -m mllm_efficient.eval.builtin.recipe.video --output-dir OUT [--minutes 60]

Single pictures, which come first, are shown as videos of one frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import llava_architectures as architecture
from .instrument import Recipe, main
from .llava_packed import PackedLlava, begun, filmed
from .phases import Drawn, Phase
from .prompts import VIDEO

STILL = Drawn(("tiny", "scene"), 1, 0, 36, 32, 1.0, 6)
FILM = Drawn((VIDEO,), 8, 0, 36, 12, 1.0, 6)

PHASES = (
    Phase(400, 2, 1.0, (STILL,)),
    Phase(1860, 2, 0.7, (replace(STILL, share=0.2), replace(FILM, share=0.8))),
    Phase(840, 2, 0.7, (replace(STILL, share=0.05), replace(FILM, share=0.95))),
)


def new_model() -> Any:
    """Torch's seed decides of the tower and the projector."""
    return begun(architecture.video_model())


RECIPE = Recipe(
    "builtin-video", new_model, PackedLlava, lambda prompts, kind: filmed(prompts), architecture.save_video, PHASES,
    (VIDEO,), buckets=(36,),
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main(RECIPE, __doc__))
