"""The model's own control of how many tokens a picture has: what every user of it has without this package."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import BadBudgetError, UnsupportedModelError
from ..plans import Plan
from ..registry import register
from ..tokens import VisualShape
from .base import Compressor

if TYPE_CHECKING:
    from ..family import Family

Size = tuple[int, int]  # (width, height) in pixels
Settings = Mapping[str, Any]  # of an image processor


@register("native")
@dataclass(frozen=True, kw_only=True)
class Native(Compressor):
    """A setting of the model's own image processor that gives a picture at most K tokens; nothing is compressed.

    Gemma 4's ``max_soft_tokens``, limits of pixels (Qwen-VL, GLM-V), ``downsample_mode`` (MiniCPM-V), ``longest_edge`` (Mistral 3,
    SmolVLM), tiles (InternVL), ``max_image_tokens`` (LFM2-VL). Of the counts that the control reaches, that of each picture is the
    largest of at most K; pictures of one prompt share one setting. It acts on pictures: a wrapped model, which is given pixels, cannot
    run it. Complexity: one closed form for each setting that there is.
    """

    merges: ClassVar[bool] = True
    sets_processor: ClassVar[bool] = True

    @property
    def merges_tokens(self) -> bool:
        return False

    @property
    def fills_rectangles(self) -> bool:
        return True

    def chosen(
        self, sizes: Sequence[Size], controls: Callable[[Size, int], Iterable[Settings]], count: Callable[[Size, Settings], int]
    ) -> Settings:
        """The processor's setting for the pictures of one prompt: ``{}`` where its own gives few enough.

        controls: settings to choose from for a picture and its K. count: tokens of a picture under a setting.
        Raises ``BadBudgetError`` naming the fewest tokens that the control reaches.
        """
        fewest = {size: count(size, {}) for size in sizes}
        ks = {size: self.budget.count(n, fixed=False) for size, n in fewest.items()}
        if fewest == ks:
            return {}
        best: Settings | None = None
        most = 0
        for setting in (setting for size, k in ks.items() for setting in controls(size, k)):
            counts = {size: count(size, setting) for size in ks}
            fewest = {size: min(n, fewest[size]) for size, n in counts.items()}
            if all(counts[size] <= k for size, k in ks.items()) and sum(counts.values()) > most:
                best, most = setting, sum(counts.values())
        if best is None:
            size, n = next((size, n) for size, n in fewest.items() if n > ks[size])
            raise BadBudgetError(
                f"native: {ks[size]} token(s) are asked, and the model's own control gives a picture of {size[0]}x{size[1]} at least {n}: "
                "ask for as many"
            )
        return best

    def setting(self, rules: Any, size: Size) -> Settings:
        """That of one picture, by the rules of its model's family."""
        return self.chosen([size], rules.controls, rules.tokens_under)

    def seen(self, rules: Any, item: Any) -> Any:
        """The picture, known by its size, as the model sees it under its own control."""
        if getattr(item, "size", None) is None:
            raise UnsupportedModelError(
                "native sets the model's own image processor, and here are pixels or a number of tokens alone: give the size of the "
                "picture (--image-size WxH), or run it by a command of mllm-efficient"
            )
        return rules.under(self.setting(rules, item.size)).of_size(item.size)

    def plan(self, adapter: Family, item: Any) -> Plan:
        after: VisualShape = self.seen(adapter, item).shape
        clamped = self.tokens is not None and self.tokens > item.shape.n
        if after == item.shape:
            return self.untouched_plan(item.shape)
        return Plan(item.shape, after.n, after=after, separators=after.separators, all_marks=True, clamped=clamped)

    def check_parts(self, adapter: Family) -> None:
        if not adapter.control:
            raise UnsupportedModelError(f"native: {adapter.name} has no control of its own over the tokens of a picture: use resize")
        if self.per != "image" or self.newline is not None:
            given = "per" if self.per != "image" else "newline"
            raise UnsupportedModelError(f"native is a setting for whole pictures: leave {given}= out")

    def describe(self, shape: VisualShape | None, adapter: Any) -> str:
        """``native: at most 100 tokens per image by the model's own control, for 672x672 max_soft_tokens=70 (64 tokens)``."""
        asked = f"at most {self.tokens} tokens" if self.tokens is not None else f"at most {100 * (self.fraction or 0):.1f}% of the tokens"
        said = f"native: {asked} per image by the model's own control, {adapter.control}"
        if not adapter.counts_by_rule:
            return said
        size = adapter.example_size
        setting = self.setting(adapter, size)
        words = ", ".join(f"{name}={json.dumps(value)}" for name, value in setting.items()) or "as it is"
        return f"{said}; for a picture of {size[0]}x{size[1]} {words}: {adapter.tokens_under(size, setting)} tokens"
