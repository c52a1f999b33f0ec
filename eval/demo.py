"""What the demo computes: a question about a picture under two methods at one budget, beside the uncompressed model. No interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_efficient.apply.plan import check
from mllm_efficient.apply.wrap import compressed
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.compressors.words import title
from mllm_efficient.errors import BadBudgetError, MllmEfficientError
from mllm_efficient.loading.models import Loaded, require_supported
from mllm_efficient.measure.native import asked
from mllm_efficient.measure.workload import Workload
from mllm_efficient.registry import list_methods, runnable, with_budget

from .agreement import MAX_NEW_TOKENS
from .answers import normalise
from .sweep import Flops

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 500  # characters of a question


@dataclass(frozen=True)
class Answer:
    """text: what the model said. kept, full: visual tokens. seconds: of the whole call. flops_ratio: over the uncompressed model's."""

    title: str
    text: str
    kept: int
    full: int
    seconds: float
    flops_ratio: float | None

    def agrees_with(self, other: Answer) -> bool:
        """Whether both say the same, apart from case, punctuation, articles and numbers spelled out."""
        return normalise(self.text) == normalise(other.text)


class Demo:
    """A loaded model that answers one question at a time."""

    def __init__(self, loaded: Loaded, max_new_tokens: int = MAX_NEW_TOKENS):
        self.loaded, self.max_new_tokens, self.adapter = loaded, max_new_tokens, require_supported(loaded)
        self._alone = threading.Lock()  # times of two calls at once would say nothing

    def methods(self) -> list[str]:
        """The methods that this model can run at some budget."""
        return [name for name in list_methods() if self._runs(name)]

    def _runs(self, name: str) -> bool:
        try:
            check(self.adapter, with_budget(name, keep=0.25))
        except BadBudgetError:
            return True  # at another budget it may
        except MllmEfficientError:
            return False
        return True

    def ask(self, picture: Image, question: str, method: Compressor) -> Answer:
        """Raises ``MllmEfficientError`` for a question that is empty or too long, and for what the model cannot run."""
        question = question.strip()
        if not question or len(question) > LONGEST:
            raise MllmEfficientError(f"the question has {len(question)} characters: from 1 to {LONGEST} can be asked")
        check(self.adapter, method)
        way = asked(self.loaded, method, [[picture]])
        inputs = way.loaded.inputs([self.loaded.prompt(question, 1)], [picture])
        with self._alone, compressed(self.loaded.model, way.method):
            start = time.perf_counter()
            out = self.loaded.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, return_dict_in_generate=True
            )  # fmt: skip
            seconds = time.perf_counter() - start
        new, made, report = out.sequences[0, inputs["input_ids"].shape[1] :], out.compression, way.told(out.compression)
        text = self.loaded.processor.decode(new, skip_special_tokens=True).strip()
        words = max(1, inputs["input_ids"].shape[1] - made.visual_tokens_full - made.separators_full)
        ratio = self._flops_ratio(picture.size, words, max(1, len(new)), method)
        return Answer(title(method), text, report.visual_tokens_kept, report.visual_tokens_full, seconds, ratio)

    def _flops_ratio(self, size: tuple[int, int], text_tokens: int, new_tokens: int, method: Compressor) -> float | None:
        """None where this version does not count them."""
        try:
            flops = Flops(self.loaded, Workload(size, 1, text_tokens, new_tokens))
            return None if flops.error is not None else flops.of(method).total / flops.baseline.total
        except MllmEfficientError:
            return None

    def compare(self, picture: Image, question: str, names: Sequence[str], keep: float) -> tuple[Answer, list[Answer | str]]:
        """The uncompressed model's answer, and that of each method at the budget, or why it has none."""
        base = self.ask(picture, question, runnable("none"))  # raises for what is wrong with the question, whatever the method
        found: list[Any] = []
        for name in names:
            try:
                found.append(self.ask(picture, question, with_budget(name, keep=keep)))
            except MllmEfficientError as error:
                found.append(str(error))
        return base, found
