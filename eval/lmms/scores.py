"""What a metric's value means: its scale, which metric of a task counts, and whether a single answer is right."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

RIGHT = 0.5  # a sample's score above which it counts as right
SAID = ("pred", "prediction", "parsed_pred")
LETTERS = "ABCDE"
WHOLE = ("average", "overall", "total", "_all")
CLOSE = 1e-5  # some tasks round their metric to so much


@dataclass(frozen=True)
class Known:
    """A task whose scale is known. metric: the one that counts. top: of each metric the value that is 100 percent. per: what the
    number of right answers is divided by, however many were asked. pairs: samples come in pairs that belong together."""

    metric: str
    title: str
    top: dict[str, float]
    pairs: bool = False
    per: int | None = None


@functools.cache
def known() -> dict[str, Known]:
    """``configs/benchmarks.yaml``."""
    import yaml

    content = yaml.safe_load((files("mllm_efficient.configs") / "benchmarks.yaml").read_text())
    return {name: Known(e["metric"], e["title"], e.get("top", {}), e.get("pairs", False), e.get("per")) for name, e in content.items()}


def primary(task: str, higher: dict[str, bool]) -> str:
    """The metric of a task that tables show and means take: the known one, or of those that are better when higher the one that
    is called a whole, otherwise the first. higher: of each metric in order."""
    if task in known():
        return known()[task].metric
    better = [m for m, is_better in higher.items() if is_better] or list(higher)
    return next((m for m in better if any(word in m.lower() for word in WHOLE)), better[0])


def top_of(task: str, metric: str, value: float, scores: Sequence[float]) -> float | None:
    """The value of a metric that is 100 percent: known, or seen from a mean of the samples' scores, which lie in [0, 1]. Else None.

    A value of 0 says nothing of the scale: ask with that of another arm.
    """
    entry = known().get(task)
    if entry is not None:
        return len(scores) / entry.per if entry.per else entry.top.get(metric, 1.0)
    if not scores or not all(0 <= s <= 1 for s in scores):
        return None
    mean = sum(scores) / len(scores)
    return next((top for top in (1.0, 100.0) if abs(top * mean - value) < CLOSE * top), None)


def sample_score(value: Any) -> float | None:
    """A sample's score as its task computed it, in [0, 1] for all but odd tasks: a number, a ``score`` in what is kept for the
    aggregation, or whether the choice kept there is the right one. None where there is nothing of that kind, as with captions."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("score"), (int, float)):
        return float(value["score"])
    said, answer = next((value[k] for k in SAID if k in value), None), value.get("answer")
    said = said[0] if isinstance(said, list) and said else said  # MMMU keeps one prediction of each repetition
    if said is None or not isinstance(answer, str):
        return None
    if isinstance(said, list):
        return float(_open(said, answer))
    if "prediction" in value:
        from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

        choices = [c for c in LETTERS if str(value.get(c, "nan")) not in ("nan", "None", "")]
        said = extract_mcq_answer(said, choices=choices) or said
    return float(str(said).strip().lower() == answer.strip().lower())


def _open(candidates: Sequence[Any], answer: str) -> bool:
    """MMMU's rule for open questions: a number among the candidates, or a text inside one of them."""
    try:
        return round(float(answer.replace(",", "")), 2) in candidates
    except ValueError:
        wanted = answer.strip().lower()
        texts = [wanted] if len(wanted) > 1 else [f" {wanted}", f"{wanted} "]
        return any(t in c for c in candidates if isinstance(c, str) for t in texts)
