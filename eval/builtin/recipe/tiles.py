"""Trains ``builtin-tiles``, a LLaVA-NeXT, from nothing on two CPU cores, by the language model's loss alone.

python -m mllm_efficient.eval.builtin.recipe.tiles --output-dir OUT [--minutes 60]
"""

from __future__ import annotations

from .. import llava_architectures as architecture
from .instrument import Recipe, main
from .llava_packed import PackedLlava, tiled
from .prompts import HARD, OLD
from .qwen import PHASES

RECIPE = Recipe(
    "builtin-tiles", architecture.tiles_model, PackedLlava, lambda prompts, kind: tiled(prompts), architecture.save_tiles, PHASES,
    (*OLD, *HARD), buckets=(36, 64, 100, 144),
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main(RECIPE, __doc__))
