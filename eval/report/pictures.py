"""Pictures for the page: what methods kept of a few samples, and the requests whose answers are the farthest off."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.media.images import load_image

EDGE, SAMPLES = 288, 3  # pixels of the longer side; pictures shown
REQUESTS, EACH = 20, 4  # requests shown at most, and pictures of each


def kept_pictures(
    loaded: Loaded, methods: Sequence[Compressor], samples: Sequence[Any], records: Sequence[dict[str, Any]], size: int
) -> list[dict[str, Any]]:
    """A few samples with what each method kept of them and answered.

    Samples of one picture are taken from different categories, first those on which most of the methods differ from each other.
    Each: question, expected, original (JPEG as base64) and methods: spec, kept, full, answer, correct, views.
    A method whose tokens have no place on the picture has ``views`` empty.
    """
    answers = {(r["method"], r["id"]): r for r in records}
    out = []
    alone = [s for s in samples if len(s.sizes(size)) == 1]
    for sample in interesting(alone, [m.spec() for m in methods], answers)[:SAMPLES]:
        (picture,), (key,) = sample.pictures(size), sample.keys
        question = answers[methods[0].spec(), sample.id]
        shown: list[dict[str, Any]] = []
        for method in methods:
            record = answers[method.spec(), sample.id]
            try:
                views = _views(loaded, method, question["question"], picture, key)
            except (MllmEfficientError, RuntimeError):
                views = []
            head = {"method": method.spec(), "kept": record.get("visual_tokens_kept"), "full": record.get("visual_tokens_full")}
            shown.append({**head, "answer": record["answer"], "correct": record["correct"], "views": views})
        out.append({
            "id": sample.id, "task": sample.task, "question": question["question"], "expected": question["expected"],
            "original": _jpeg(picture), "methods": shown,
        })  # fmt: skip
    return out


def interesting(samples: Sequence[Any], specs: Sequence[str], answers: dict[tuple[str, str], dict[str, Any]]) -> list[Any]:
    """Samples of different categories and images, those first on which right and wrong answers are most evenly mixed."""

    def evenness(sample: Any) -> tuple[int, int]:
        right = sum(answers[s, sample.id]["correct"] for s in specs)
        return abs(2 * right - len(specs)), sample.image

    ordered = sorted(samples, key=evenness)
    chosen: list[Any] = []
    for sample in ordered:
        if all(sample.task != c.task and sample.image != c.image for c in chosen):
            chosen.append(sample)
    return chosen


def worst_requests(metas: Sequence[dict[str, Any]], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The requests on which any method is farthest from the uncompressed model, farthest first, of what runs keep in ``worst``.

    Each: id, question, expected, baseline_answer, answers (``worst``'s entries, of each method one), pictures (a JPEG as
    base64, or None, and the path) and more, the number of pictures that are not shown. names: the folder of each run, from where its
    data are named; the paths of pictures are relative to the data.
    """
    by_id: dict[str, dict[str, dict[str, Any]]] = {}
    folders: dict[str, Path] = {}
    for meta, name in zip(metas, names or [""] * len(metas)):
        for entry in meta.get("worst") or ():
            by_id.setdefault(entry["id"], {}).setdefault(entry["method"], entry)
            folders.setdefault(entry["id"], (Path(name) / (meta.get("data") or "")).parent)
    out = []
    for name, by_method in by_id.items():
        answers = sorted(by_method.values(), key=lambda e: -(e["kl"] or 0.0))
        first = answers[0]
        out.append({**{k: first[k] for k in ("question", "expected", "baseline_answer", "images", "kl")}, "id": name, "answers": answers})
    out = sorted(out, key=lambda r: -(r["kl"] or 0.0))[:REQUESTS]
    for request in out:
        paths, folder = request["images"], folders[request["id"]]
        request |= {"pictures": [(_thumbnail(folder / path), path) for path in paths[:EACH]], "more": max(0, len(paths) - EACH)}
    return out


def _thumbnail(path: Path) -> str | None:
    """A picture's JPEG as base64; None where its file is gone or no picture any more."""
    try:
        return _jpeg(load_image(path))
    except (MllmEfficientError, OSError):
        return None


def _views(loaded: Loaded, method: Compressor, question: str, picture: Any, key: str) -> list[str]:
    """One JPEG for each view of the picture: the kept tokens lit, or merged ones in the mean colour of what they are made of."""
    from PIL import Image

    from mllm_efficient.media.overlay import fit, render, views

    from ..drawn import run_method

    (result,) = run_method(loaded, method, question, [picture], keys=[key])
    small = fit(picture, EDGE)
    found = views(result.planes)
    return [_jpeg(Image.fromarray(render(small, *view.of(result), areas=view.areas_of(result)))) for view in found]


def _jpeg(picture: Any) -> str:
    from mllm_efficient.media.overlay import fit

    out = io.BytesIO()
    fit(picture.convert("RGB"), EDGE).save(out, format="JPEG", quality=88, subsampling=0, optimize=True)
    return base64.b64encode(out.getvalue()).decode()
