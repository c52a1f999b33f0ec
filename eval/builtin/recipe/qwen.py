"""Trains ``builtin-qwen`` from nothing on two CPU cores, by the language model's loss alone.

python -m mllm_efficient.eval.builtin.recipe.qwen --output-dir OUT [--minutes 60]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import qwen_architecture
from .instrument import Recipe, main
from .phases import Drawn, Phase
from .prompts import HARD, OLD, Kind
from .qwen_packed import PackedQwen, arranged

TINY = Drawn(("tiny",), 1, 0, 12, 40, 1.0, 6)
LARGE = Drawn(("large",), 1, 0, 9, 96, 1.0, 2)
ONE = ("old", "old", "old", "document", "document", "chart", "scene", "scene")
SEVERAL = (Drawn(("images",), 2, 0, 36, 10, 0.1), Drawn(("images",), 3, 0, 36, 8, 0.1), Drawn(("screens",), 2, 0, 64, 8, 0.1))
PHASES = (
    Phase(400, 2, 1.0, (TINY,)),
    Phase(350, 2, 0.4, (replace(TINY, share=0.25), Drawn(ONE, 1, 0, 36, 16, 0.75))),
    Phase(356, 2, 0.3, (replace(TINY, share=0.06), Drawn(ONE, 1, 0, 36, 16, 0.44), Drawn(ONE, 1, 36, 64, 12, 0.2), *SEVERAL)),
    Phase(263, 2, 0.3, (replace(LARGE, share=0.4), replace(TINY, share=0.1), Drawn(ONE, 1, 0, 36, 16, 0.4), *SEVERAL)),
    Phase(150, 2, 0.3, (replace(LARGE, share=0.6), replace(TINY, share=0.15), Drawn(ONE, 1, 0, 36, 16, 0.25))),
    Phase(200, 2, 0.3, (replace(LARGE, share=0.15), replace(TINY, share=0.2), Drawn(ONE, 1, 0, 36, 16, 0.4), *SEVERAL)),
    Phase(2500, 2, 0.2, (
        replace(LARGE, share=0.05), replace(TINY, share=0.05),
        Drawn(ONE, 1, 0, 36, 16, 0.22), Drawn(ONE, 1, 36, 64, 12, 0.2), Drawn(ONE, 1, 64, 144, 6, 0.16),
        Drawn(("images",), 2, 0, 64, 8, 0.1), Drawn(("images",), 3, 0, 64, 6, 0.1),
        Drawn(("screens",), 2, 0, 144, 5, 0.11), Drawn(("screens",), 3, 0, 144, 3, 0.11),
    )),
    Phase(1800, 2, 0.1, (
        replace(LARGE, share=0.04), Drawn(ONE, 1, 0, 36, 16, 0.15), Drawn(ONE, 1, 36, 64, 12, 0.2), Drawn(ONE, 1, 64, 144, 6, 0.11),
        Drawn(("images",), 2, 0, 64, 8, 0.14), Drawn(("images",), 3, 0, 64, 6, 0.14),
        Drawn(("screens",), 2, 0, 144, 5, 0.11), Drawn(("screens",), 3, 0, 144, 3, 0.11),
    )),
)  # fmt: skip


def shown(prompts: Sequence[Sequence[np.ndarray]], kind: Kind) -> Any:
    return arranged(prompts, kind.high)


RECIPE = Recipe(
    "builtin-qwen",
    qwen_architecture.build_model,
    PackedQwen,
    shown,
    qwen_architecture.save,
    PHASES,
    (*OLD, *HARD),
    buckets=(36, 64, 100, 144),
)

if __name__ == "__main__":
    raise SystemExit(main(RECIPE, __doc__))
