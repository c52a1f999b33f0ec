"""Objects that captions name and pictures do not show: CHAIR (Rohrbach et al., arXiv 1809.02156) on COCO's captions.

What is in a picture is what COCO's annotators outlined or any of its reference captions names. ``chair_i`` is the share of the objects
named that are not there, each mention counted, as the authors' code does; ``chair_s`` the share of captions with such a one; ``recall``
the share of what is there that is named, without which the model that says least would be the best.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError

Doc = dict[str, Any]
VARIABLE = "COCO_INSTANCES"
WORDS = 4  # of the longest phrase
IRREGULAR = {
    "person": "people", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen", "sheep": "sheep", "knife": "knives",
    "calf": "calves", "cattle": "cattle", "luggage": "luggage", "scissors": "scissors", "skis": "skis", "broccoli": "broccoli",
    "aircraft": "aircraft",
}  # fmt: skip
BEFORE = {"a", "an", "the", "one", "each", "this", "that", "his", "her", "whole", "peeled", "sliced", "single", "half"}
BEHIND = {
    "and", "or", "on", "in", "at", "with", "of", "is", "are", "was", "that", "which", "to", "for", "from", "by", "beside", "near", "next",
    "sits", "sitting", "lies", "lying", "behind", "under", "above", "a", "the", "while", "as", "it", "there", "has", "cut",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- objects of a text


def objects_in(text: str) -> list[str]:
    """COCO's categories that a text names, one for each mention, in order. The longest phrase counts: a hot dog is no dog."""
    words, table = re.findall(r"[a-z]+", text.lower()), _table()
    found, at = [], 0
    while at < len(words):
        n = next((n for n in range(min(WORDS, len(words) - at), 0, -1) if tuple(words[at : at + n]) in table), 0)
        category = table[tuple(words[at : at + n])] if n else None
        if category is not None and not (n == 1 and _describes(words, at)):
            found.append(category)
        at += n or 1
    return found


def _describes(words: Sequence[str], at: int) -> bool:
    """Whether the word is a colour or the like here: an orange shirt, the cat is orange."""
    before, behind = words[at - 1] if at else "", words[at + 1] if at + 1 < len(words) else ""
    return words[at] in _words()["adjectives"] and not (before in BEFORE and (not behind or behind in BEHIND))


@functools.cache
def _words() -> Doc:
    import yaml

    content: Doc = yaml.safe_load((files("mllm_efficient.configs") / "coco_objects.yaml").read_text())
    return content


@functools.cache
def _table() -> dict[tuple[str, ...], str | None]:
    """The category of each phrase, a tuple of words, in the singular and in the plural; None of those that name no object."""
    content, out = _words(), dict[tuple[str, ...], str | None]()
    forms = {c: [f for name in (c, *more) for f in (name, plural(name))] for c, more in content["objects"].items()}
    for prefixes, kinds in ((("baby", "adult", "mother", "father"), "animals"), (("passenger",), "vehicles")):
        out |= {(p, *form.split()): c for p in prefixes for c in content[kinds] for form in forms[c]}
    out |= {tuple(f.split()): c for c, those in forms.items() for f in those}
    out |= {tuple(f.split()): None for name in content["others"] for f in (name, plural(name))}
    return out


def plural(name: str) -> str:
    """Of an English noun, or of the last word of several."""
    *rest, word = name.split()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("man") and word != "human":
        word = f"{word[:-3]}men"
    elif re.search(r"(s|x|z|ch|sh)$", word):
        word += "es"
    else:
        word = f"{word[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{word}s"
    return " ".join([*rest, word])


# ------------------------------------------------------------------------------------------- objects of the pictures


@functools.cache
def outlined(path: str) -> dict[int, list[str]]:
    """The categories that COCO's ``instances_*.json`` has of each picture, by the picture's number.

    Raises ``MllmEfficientError`` for a file that is none.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        found: dict[int, set[str]] = {i["id"]: set() for i in content["images"]}
        for a in content["annotations"]:
            found[a["image_id"]].add(names[a["category_id"]])
    except OSError as error:
        raise MllmEfficientError(f"COCO's annotations {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MllmEfficientError(f"{path} is no instances_*.json of COCO: {type(error).__name__}: {error}") from None
    if unknown := set(names.values()) - _words()["objects"].keys():
        raise MllmEfficientError(f"{path} has categories that are none of COCO's 80: {', '.join(sorted(unknown)[:3])}")
    return {i: sorted(those) for i, those in found.items()}


def with_objects(docs: Any) -> Any:
    """The samples with ``objects``, what is in their pictures."""
    path = os.environ.get(VARIABLE)
    if not path:
        raise MllmEfficientError(
            "what the pictures show is in COCO's instances_val2017.json (of annotations_trainval2017.zip): give its path with "
            f"--coco-instances, or to python -m lmms_eval as {VARIABLE}=FILE"
        )
    known = outlined(path)
    columns = docs.select_columns(["question_id", "answer"])
    numbers = [int(str(name).split("_")[-1].split(".")[0]) for name in columns["question_id"]]
    if lacking := [n for n in numbers if n not in known]:
        raise MllmEfficientError(
            f"{path} does not have {len(lacking)} of the {len(numbers)} pictures, such as {lacking[0]}: it is of another split"
        )
    there = [sorted({*known[n], *(o for text in said for o in objects_in(text))}) for n, said in zip(numbers, columns["answer"])]
    return docs.add_column("objects", there)


# ------------------------------------------------------------------------------------------------------------ scores


def visual(doc: Doc) -> list[Any]:
    from mllm_efficient.media.images import to_rgb

    return [to_rgb(doc["image"])]


def results(doc: Doc, results: Sequence[str]) -> Doc:
    """The caption's three scores; of a share over all captions with how much it counts there."""
    named, there = objects_in(results[0] if results else ""), set(doc["objects"])
    wrong = sum(o not in there for o in named)
    return {
        "chair_s": float(wrong > 0),
        "chair_i": {"score": wrong / len(named) if named else 0.0, "weight": len(named)},
        "recall": {"score": len(there & set(named)) / len(there) if there else 0.0, "weight": len(there)},
    }


def share(items: Sequence[Doc]) -> float:
    """Over all captions; NaN where there is nothing to count."""
    total = sum(i["weight"] for i in items)
    return math.fsum(i["score"] * i["weight"] for i in items) / total if total else math.nan
