"""What is compared: the uncompressed baseline, the methods asked for, and for each budget a free choice and a smaller picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..apply.plan import check, plan
from ..compressors.base import Compressor
from ..compressors.kinds import PRE_LLM
from ..compressors.none import NoCompression
from ..compressors.random import Random
from ..compressors.resize import Resize
from ..errors import MllmEfficientError
from .timing import Series

BASELINE, METHOD, REFERENCE, TEXT_ONLY = "baseline", "method", "reference", "text-only"


@dataclass(kw_only=True)
class Arm(Series):
    """One method on one model.

    role: "baseline" is the stock model, never wrapped; "method" was asked for; "reference" was added beside it;
    "text-only" is the stock model on the prompt without its images. kept: visual tokens of one image that are left.
    model: the transformers model; quantization: of its weights. beside_mb: weights of another model that is loaded too,
    which are left out of ``peak_memory_mb``.
    """

    method: Compressor
    role: str
    model: Any
    kept: int
    quantization: str | None = None
    beside_mb: float = 0.0
    peak_memory_mb: float | None = None
    kv_cache_mb: float | None = None
    max_batch: int | None = None

    @property
    def wrapped(self) -> bool:
        return self.role in (METHOD, REFERENCE) and self.method.spec() != NoCompression.name and not self.method.sets_processor


def arms_for(
    adapter: Any, item: Any, methods: Sequence[Compressor], quantization: str | None = None, native: Mapping[str, int] | None = None
) -> tuple[list[Arm], dict[str, str]]:
    """The arms in the order they are run, and why any of the references had to be left out.

    item: one of the images, which are all alike. native: its tokens under each method that sets the processor, by specification. For every
    count that a method keeps there is ``random`` at the same count, which costs what a free selection costs, and for every budget there is
    ``resize``.
    """
    model = adapter.model

    def arm(method: Compressor, role: str) -> Arm:
        kept = native[method.spec()] if native is not None and method.sets_processor else plan(adapter, method, item).kept
        return Arm(name=method.spec(), method=method, role=role, model=model, kept=kept, quantization=quantization)

    arms = [arm(NoCompression(), BASELINE)]
    for method in methods:
        check(adapter, method)
        if method.spec() not in [a.name for a in arms]:
            arms.append(arm(method, METHOD))
    left_out: dict[str, str] = {}
    for chosen in arms[1:]:
        if chosen.kept == item.shape.n:
            continue
        whole = chosen.method.per == "image" and chosen.method.kind == PRE_LLM
        asked = chosen.method.budget.count(item.shape.n, fixed=adapter.fixed_count) if whole else chosen.kept
        marked = (adapter.separators or adapter.marks) and not chosen.method.merges_tokens
        same: dict[str, Any] = {"newline": chosen.method.newline if marked else None}
        for reference in (Random(tokens=chosen.kept, **same), Resize(tokens=asked, **same)):
            if chosen.method.as_resizer is not None or reference.spec() in left_out:
                continue
            try:
                check(adapter, reference)
                added = arm(reference, REFERENCE)
            except MllmEfficientError as error:
                left_out[reference.spec()] = str(error)
                continue
            if not any(a.method.name == added.method.name and a.kept == added.kept for a in arms):
                arms.append(added)
    return arms, left_out


def free_choice(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The ``random`` arm that keeps as many tokens on the same weights."""
    same = (a for a in arms if a.method.name == "random" and a.kept == arm.kept and a.quantization == arm.quantization)
    return next(same, None)
