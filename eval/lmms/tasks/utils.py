"""What the tasks beside this file ask and how they are scored. lmms-eval runs this file by its path."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from mllm_efficient.eval.builtin.questions import CATEGORIES

Doc = dict[str, Any]


# ------------------------------------------------------------------------------------------- the embedded benchmark


def builtin_docs(splits: Any) -> Any:
    """The questions of a split, round-robin over the categories, so that a limit takes those that the light runner takes."""
    from datasets import Dataset

    from mllm_efficient.eval.builtin.suite import round_robin

    (split,) = splits["split"]
    samples = round_robin(split)
    return Dataset.from_list(
        [
            {
                "split": split, "image": s.image, "category": s.task, "question": s.question.text, "natural": s.question.natural,
                "answer": s.question.answer,
            }
            for s in samples
        ]
    )  # fmt: skip


def _sample(doc: Doc) -> Any:
    from mllm_efficient.eval.builtin.questions import benchmark_questions
    from mllm_efficient.eval.builtin.scenes import make_scene
    from mllm_efficient.eval.builtin.suite import Sample

    (question,) = (q for q in benchmark_questions(make_scene(doc["split"], doc["image"])) if q.category == doc["category"])
    return Sample(doc["split"], doc["image"], question)


def builtin_messages(doc: Doc, lmms_eval_specific_kwargs: Doc) -> list[Doc]:
    """The question as the embedded model is asked it, or with ``wording: natural`` as others are."""
    sample, how = _sample(doc), lmms_eval_specific_kwargs
    image = {"type": "image", "url": sample.picture(how["size"]), "key": sample.key}
    text = doc["natural"] if how["wording"] == "natural" else doc["question"]
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def builtin_text(doc: Doc, lmms_eval_specific_kwargs: Doc) -> str:
    return doc["natural"] if lmms_eval_specific_kwargs["wording"] == "natural" else doc["question"]


def _scores(doc: Doc, right: bool) -> Doc:
    return {"macro": {"category": doc["category"], "score": float(right)}, "micro": float(right), doc["category"]: float(right)}


def builtin_results(doc: Doc, results: Sequence[str]) -> Doc:
    from mllm_efficient.eval.runner import first_word

    return _scores(doc, first_word(results[0]) == doc["answer"])


def builtin_natural_results(doc: Doc, results: Sequence[str]) -> Doc:
    from mllm_efficient.eval.answers import judge

    return _scores(doc, judge(_sample(doc).question, results[0])[1])


def macro(items: Sequence[Doc]) -> float:
    """The unweighted mean of the categories."""
    by_category = [[i["score"] for i in items if i["category"] == c] for c in CATEGORIES]
    means = [sum(scores) / len(scores) for scores in by_category if scores]
    return sum(means) / len(means)


def in_turn(docs: Any) -> Any:
    """Questions of each category in turn, with all samples of a question together, so that a limit takes some of each."""
    columns = docs.select_columns(["category", "question_id"])
    by_category: dict[str, dict[str, list[int]]] = {}
    for row, (category, question) in enumerate(zip(columns["category"], columns["question_id"])):
        by_category.setdefault(category, {}).setdefault(str(question), []).append(row)
    turns = itertools.zip_longest(*(list(questions.values()) for questions in by_category.values()), fillvalue=())
    return docs.select([row for turn in turns for rows in turn for row in rows])


# ------------------------------------------------------------------------------------------------------------- POPE


def pope_results(doc: Doc, results: Sequence[str]) -> Doc:
    """An answer is what its first word says; one that is neither yes nor no is wrong and counts as neither."""
    from mllm_efficient.eval.runner import first_word

    said, right = first_word(results[0]), doc["answer"].strip().lower()
    item = {
        "said": said if said in ("yes", "no") else "neither",
        "answer": right,
        "category": doc["category"],
        "question_id": doc["question_id"],
        "score": float(said == right),
    }
    return {"f1": item, f"f1_{doc['category']}": item, "accuracy": item["score"], "yes_ratio": item, "neither_ratio": item}  # fmt: skip


def f1(items: Sequence[Doc]) -> float:
    """Of "yes", the positive answer."""
    hits = sum(i["said"] == "yes" == i["answer"] for i in items)
    said, are = (sum(i[name] == "yes" for i in items) for name in ("said", "answer"))
    return 2 * hits / (said + are) if said + are else 0.0


def f1_of_categories(items: Sequence[Doc]) -> float:
    """The mean of the F1 of each category, as LLaVA reports it."""
    categories = sorted({i["category"] for i in items})
    return sum(f1([i for i in items if i["category"] == c]) for c in categories) / len(categories)


def yes_ratio(items: Sequence[Doc]) -> float:
    """How often the model says yes."""
    return sum(i["said"] == "yes" for i in items) / len(items)


def neither_ratio(items: Sequence[Doc]) -> float:
    return sum(i["said"] == "neither" for i in items) / len(items)


# -------------------------------------------------------------------------------------------------------------- MME


def mme_results(doc: Doc, results: Sequence[str]) -> Doc:
    from lmms_eval.tasks.mme.utils import eval_type_dict, mme_process_results

    (item,) = mme_process_results(doc, results).values()
    kind = "perception" if doc["category"] in eval_type_dict["Perception"] else "cognition"
    return {kind: item, doc["category"]: item}


def mme_points(items: Sequence[Doc]) -> float:
    """Sum over categories of accuracy and accuracy of pairs, both in percent. A question whose partner was not asked does not count;
    without a pair there is no sum (NaN)."""
    points = []
    for category in {i["category"] for i in items}:
        pairs: dict[str, list[float]] = {}
        for i in items:
            if i["category"] == category:
                pairs.setdefault(i["question_id"], []).append(i["score"])
        whole = [p for p in pairs.values() if len(p) == 2]
        if whole:
            points.append(100 * sum(sum(p) / 2 + (sum(p) == 2) for p in whole) / len(whole))
    return sum(points) if points else math.nan


# -------------------------------------------------------------------------------------------------------------- GQA


@functools.cache
def _gqa_images() -> tuple[Any, dict[str, int]]:
    from datasets import load_dataset

    images = load_dataset("lmms-lab-encoder/GQA", "testdev_balanced_images", split="testdev")
    return images, {name: row for row, name in enumerate(images["id"])}


def gqa_visual(doc: Doc) -> list[Any]:
    """The question's image out of the table of images, where lmms-eval's own task copies each image to each of its questions."""
    images, rows = _gqa_images()
    return [images[rows[doc["imageId"]]]["image"].convert("RGB")]
