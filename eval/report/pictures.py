"""What methods kept of a few samples, as pictures for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.models import Loaded

EDGE, SAMPLES = 288, 3  # pixels of the longer side; pictures shown


def kept_pictures(
    loaded: Loaded, methods: Sequence[Compressor], samples: Sequence[Any], records: Sequence[dict[str, Any]], size: int
) -> list[dict[str, Any]]:
    """A few samples with what each method kept of them and answered.

    Samples are taken from different categories, first those on which most of the methods differ from each other.
    Each: question, expected, original (JPEG as base64) and methods: spec, kept, full, answer, correct, views.
    A method whose tokens have no place on the picture has ``views`` empty.
    """
    answers = {(r["method"], r["id"]): r for r in records}
    out = []
    for sample in interesting(samples, [m.spec() for m in methods], answers)[:SAMPLES]:
        picture = sample.picture(size)
        question = answers[methods[0].spec(), sample.id]
        shown: list[dict[str, Any]] = []
        for method in methods:
            record = answers[method.spec(), sample.id]
            try:
                views = _views(loaded, method, question["question"], picture, sample.key)
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


def _views(loaded: Loaded, method: Compressor, question: str, picture: Any, key: str) -> list[str]:
    """One JPEG for each view of the picture: the kept tokens lit, or the mean colour of each merged one."""
    import torch
    from PIL import Image

    from mllm_efficient.patches import adapter_for
    from mllm_efficient.shrink import prepare
    from mllm_efficient.viz import Result, fit, render, views

    with torch.no_grad():
        inputs = loaded.inputs([loaded.prompt(question, 1)], [picture])
        report = prepare(loaded.model, method, image_keys=[key], **inputs).report.images[0]
    adapter = adapter_for(loaded.model)
    processor = loaded.processor.image_processor
    planes = adapter.place(report.planes, picture.size, processor)
    kept = None if report.kept_planes is None else adapter.place(report.kept_planes, picture.size, processor)
    if kept is not None and len(kept) != len(planes):
        return []
    indices = report.indices.tolist() if report.indices is not None and kept is None else None
    result = Result(method.spec(), report.full, report.kept, planes, indices, kept)
    small = fit(picture, EDGE)
    return [_jpeg(Image.fromarray(render(small, *view.of(result)))) for view in views(planes)]


def _jpeg(picture: Any) -> str:
    from mllm_efficient.viz import fit

    out = io.BytesIO()
    fit(picture.convert("RGB"), EDGE).save(out, format="JPEG", quality=88, subsampling=0, optimize=True)
    return base64.b64encode(out.getvalue()).decode()
