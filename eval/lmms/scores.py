"""What a metric's value means: its scale, which metric of a task counts, and whether a single answer is right."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

RIGHT = 0.5  # a sample's score above which it counts as right
SAID = ("pred", "prediction", "parsed_pred")


@dataclass(frozen=True)
class Known:
    """A task whose scale is known. metric: the one that counts. top: of each metric the value that is 100 percent."""

    metric: str
    title: str
    top: dict[str, float]
    pairs: bool = False


@functools.cache
def known() -> dict[str, Known]:
    """``configs/benchmarks.yaml``."""
    import yaml

    content = yaml.safe_load((files("mllm_efficient.configs") / "benchmarks.yaml").read_text())
    return {name: Known(e["metric"], e["title"], e.get("top", {}), e.get("pairs", False)) for name, e in content.items()}


def primary(task: str, metrics: Sequence[str]) -> str:
    """The metric of a task that tables show and means take: the known one, or the task's first."""
    return known()[task].metric if task in known() else metrics[0]


def top_of(task: str, metric: str, value: float, scores: Sequence[float]) -> float | None:
    """The value of a metric that is 100 percent: known, or seen from a mean of the samples' scores, which lie in [0, 1]. Else None."""
    entry = known().get(task)
    if entry is not None:
        return entry.top.get(metric, 1.0)
    if not scores or not all(0 <= s <= 1 for s in scores):
        return None
    mean = sum(scores) / len(scores)
    return next((top for top in (1.0, 100.0) if abs(top * mean - value) < 1e-6 * top), None)


def sample_score(value: Any) -> float | None:
    """A sample's score as its task computed it, in [0, 1] for all but odd tasks: a number, a ``score`` in what is kept for the
    aggregation, or whether the answer kept there is the right one. None where there is nothing of that kind, as with captions."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("score"), (int, float)):
        return float(value["score"])
    said = next((value[k] for k in SAID if k in value), None)
    if said is None or "answer" not in value:
        return None
    said, answer = (said[0] if isinstance(said, list) and said else said), value["answer"]
    if isinstance(said, list):  # candidates for an open answer
        return float(str(answer).lower() in [str(s).lower() for s in said])
    if not isinstance(answer, str):
        return float(said == answer)
    said, answer = str(said).strip().lower(), answer.strip().lower()
    letter = len(answer) == 1 and re.match(r"\(?([a-z])\b", said)  # "b", "B. a cat"
    return float(letter.group(1) == answer if letter else said == answer)
