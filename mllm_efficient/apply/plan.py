"""What a method does to an image and which models run it, asked of the method itself. Names that ``apply`` and others read from here."""

from __future__ import annotations

from typing import Any

from ..compressors.base import Compressor
from ..errors import UnsupportedModelError
from ..family import Family
from ..plans import Group as Group
from ..plans import Plan as Plan
from ..tokens import VisualShape


def plan(adapter: Family, method: Compressor, item: Any) -> Plan:
    """The plan of a method for an item of the adapter. Raises ``BadBudgetError`` where the budget cannot be met."""
    return method.plan(adapter, item)


def position_rule(adapter: Family, method: Compressor) -> str:
    """ "renumber" or "keep": the method's own rule, else the family's. A merged token has no old position to keep."""
    return method.position_rule(adapter)


def check(adapter: Family, method: Compressor) -> None:
    """Raises where a model cannot run a method at all, before any call is made."""
    method.check(adapter)


def describe(method: Compressor, shape: VisualShape | None, adapter: Family) -> str:
    """``divprune keeps 56 of 576 tokens per image (removes 90.3%)``; without a shape what it keeps of any image."""
    return method.describe(shape, adapter)


def refuse_processor(method: Compressor) -> None:
    """Raises for a method that sets the processor: a model that is given pixels cannot run it."""
    if any(stage.sets_processor for stage in method.parts):
        raise UnsupportedModelError(
            f"{method.spec()} sets the model's own image processor, and what a model is given are pixels already: give the processor the "
            "setting that 'mllm-efficient flops --method' and the other commands name, and run the model without a method"
        )
