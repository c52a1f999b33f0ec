"""Llama 4: tiles with marks between them, features that are projected inside forward; every call raises by itself in one release."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

import mllm_efficient as me
from mllm_efficient.measure import counter
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.patches import transformers_version
from mllm_efficient.patches.facts import FACTS

from ..families import VOCABULARY

NEW = dict(max_new_tokens=6)
IMAGE = VOCABULARY["<image>"]


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]


RUNS = FACTS["llama4"].broken != transformers_version()
needs_calls = pytest.mark.skipif(not RUNS, reason="every call of Llama 4 raises in this version of transformers itself")
X, Y, WHOLE = 20, 21, 22  # ids that stand for the text between tiles


def flat(parts: list[list[int]]) -> list[int]:
    return [column for part in parts for column in part]


def llama4(row: str) -> tuple[Any, dict[str, Any], list[tuple[list[list[int]], list[tuple[int, tuple[list[int], ...]]]]]]:
    """A tiny model, a call, and of each picture the columns of its tiles and its marks, each with what it needs."""
    import transformers

    from mllm_efficient.patches.checkup import _models

    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(**_models()["llama4"]["config"])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids, pictures = [1, 30, 31], []
    for rows, columns in {"tiled": [(2, 2)], "touching": [(1, 2), (0, 0), (2, 1)], "one tile": [(0, 0)]}[row]:
        ids, tiles, marks = [*ids, 6], [], []
        for _ in range(rows):
            for c in range(columns):
                tiles.append(list(range(len(ids), len(ids) + 9)))
                ids += [4] * 9 + [X if c < columns - 1 else Y]
        for i, tile in enumerate(tiles):
            row_start, in_row = i // columns * columns, i % columns
            later, whole_row = flat(tiles[i + 1 : row_start + columns]), flat(tiles[row_start : row_start + columns])
            needs = (tile, later) if in_row < columns - 1 else (whole_row,)
            marks.append((tile[-1] + 1, needs))
        ids.append(WHOLE)
        tiles.append(list(range(len(ids), len(ids) + 9)))
        if rows:
            marks.append((tiles[-1][0] - 1, (tiles[-1],)))
        ids += [4] * 9 + [7]
        pictures.append((tiles, marks))
    ids += [33, 34, 35]
    pixels = torch.randn(sum(len(tiles) for tiles, _ in pictures), 3, 24, 24)
    return (
        model,
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), "pixel_values": pixels},
        pictures,
    )


@pytest.mark.skipif(RUNS, reason="this version of transformers runs Llama 4")
def test_llama4_that_raises_by_itself_is_one_clear_line():
    model, inputs, _ = llama4("tiled")
    with pytest.raises(AttributeError):
        model(input_ids=inputs["input_ids"][:, :3])
    for call in (lambda: me.wrap(model, "uniform:keep=0.5"), lambda: me.prepare(model, "uniform:keep=0.5", **inputs)):
        with pytest.raises(me.UnsupportedModelError, match="every call of it raises in transformers .* itself") as caught:
            call()
        assert "\n" not in str(caught.value)


@needs_calls
@pytest.mark.parametrize("row", ["tiled", "touching", "one tile"])
@pytest.mark.parametrize(
    "spec", ["uniform:keep=0.3", "divprune:keep=0.1", "random:keep=0.5,per=tile", "divprune:keep=0.1,newline=keep", "pool:keep=0.5"]
)
def test_llama4_equals_the_slow_reference(spec, row):
    model, inputs, pictures = llama4(row)
    prepared = me.prepare(model, spec, **inputs)
    keep, visual = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool), inputs["input_ids"][0] == 4
    method, made = me.build(spec), model.get_image_features(inputs["pixel_values"], return_dict=True).last_hidden_state
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    embeds[visual] = model.multi_modal_projector(made.flatten(0, 1))
    for image, (tiles, marks) in zip(prepared.report.images, pictures, strict=True):
        columns = torch.tensor(flat(tiles))
        assert image.separators_full == len(marks) and len(image.planes) == len(tiles) and image.full == len(columns)
        if method.merges:
            continue
        keep[columns] = False
        keep[columns[image.indices]] = True
        there = set(columns[image.indices].tolist())
        for column, needs in marks:
            keep[column] = method.newline == "keep" or all(there & set(need) for need in needs)
        assert image.separators_kept == sum(int(keep[column]) for column, _ in marks)
    with torch.no_grad():
        given = model(**prepared.model_kwargs).logits[0]
        if not method.merges:
            assert torch.equal(prepared.visual_keep_mask[0], keep)
            wanted = model.language_model(inputs_embeds=embeds[keep][None], use_cache=False).logits[0]
            torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)
        before = model(**inputs).logits
        assert torch.equal(model(**me.prepare(model, "uniform:keep=1", **inputs).model_kwargs).logits, before)
    me.wrap(model, spec)
    assert torch.equal(
        answer(model, inputs), model.generate(**prepared.model_kwargs, **NEW)[:, prepared.model_kwargs["input_ids"].shape[1] :]
    )


@needs_calls
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("spec", ["divprune:keep=0.1", "pool:keep=0.5"])
def test_llama4_in_a_batch_answers_as_one_by_one(spec, beams):
    model, *rows = llama4("tiled")[0], *(llama4(row)[1] for row in ("tiled", "touching", "one tile"))
    width = max(row["input_ids"].shape[1] for row in rows)
    padded = {
        name: torch.cat([pad(row[name], (width - row[name].shape[1], 0)) for row in rows]) for name in ("input_ids", "attention_mask")
    }
    me.wrap(model, spec)
    wanted = torch.cat([model.generate(**row, **NEW, num_beams=beams)[:, row["input_ids"].shape[1] :] for row in rows])
    given = model.generate(**padded, pixel_values=torch.cat([row["pixel_values"] for row in rows]), **NEW, num_beams=beams)
    assert torch.equal(given[:, width:], wanted)


@needs_calls
def test_a_loss_of_llama4_is_that_of_what_is_left_and_reaches_tower_and_projector():
    model, inputs, _ = llama4("tiled")
    labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) < inputs["input_ids"].shape[1] - 3, -100, inputs["input_ids"])
    prepared = me.prepare(model, "divprune:keep=0.2", **inputs)
    with torch.no_grad():
        logits = model(**prepared.model_kwargs).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], labels[prepared.visual_keep_mask][1:])
    me.wrap(model.train(), "divprune:keep=0.2")
    loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    for part in (
        "vision_model.patch_embedding.linear",
        "multi_modal_projector.linear_1",
        "language_model.model.layers.1.feed_forward.router",
    ):
        assert any(w.grad is not None and w.grad.abs().max() > 0 for n, w in model.named_parameters() if part in n), part


@pytest.mark.parametrize("most", [1, 4, 16])
def test_canvases_of_llama4_are_those_of_its_processor(most):
    pytest.importorskip("torchvision", reason="the processor of Llama 4 needs torchvision")
    from transformers.image_utils import SizeDict
    from transformers.models.llama4.image_processing_llama4 import find_supported_resolutions, get_best_fit

    found = torch.tensor(find_supported_resolutions(most, SizeDict(height=336, width=336)))
    rules = llama4_rules()
    assert [(r * 336, c * 336) for r, c in llama4_canvases(most)] == [tuple(one) for one in found.tolist()]
    for size in ((336, 336), (1, 1), (1000, 700), (337, 336), (5000, 400), (400, 5000), (672, 672), (900, 900)):
        for largest in (False, True):
            wanted = (get_best_fit(size[::-1], found, resize_to_max_canvas=largest) // 336).tolist()
            settings = {"max_patches": most, "resize_to_max_canvas": largest, "size": {"height": 336, "width": 336}}
            assert list(rules.tiling(size, settings)) == wanted, (size, largest)


def llama4_rules() -> Any:
    from mllm_efficient.measure.shapes import Plain
    from mllm_efficient.patches.rules import rules_class

    vision = {"image_size": 336, "patch_size": 14, "pixel_shuffle_ratio": 0.5}
    return rules_class("llama4")("llama4", Plain({"vision_config": vision, "text_config": {"model_type": "llama4_text"}}))


def llama4_canvases(most: int) -> list:
    from mllm_efficient.patches.families.llama4 import canvases

    return canvases(most)


def test_a_picture_of_llama4_has_the_tokens_of_its_processors_prompt():
    rules = llama4_rules()
    for size, (rows, columns) in (((336, 336), (1, 1)), ((672, 672), (2, 2)), ((1000, 336), (1, 3)), ((336, 700), (3, 1))):
        shape = rules.of_size(size).shape
        tiles = rows * columns + (rows * columns > 1)
        assert shape.n == 144 * tiles and shape.marked == (0 if tiles == 1 else rows * columns + 1)


@functools.cache
def scout() -> Any:
    return counter.build_on_meta(load_shape("llama-4-scout-109b"))


@needs_calls
@pytest.mark.parametrize(
    ("spec", "size"),
    [("random:keep=0.5,per=tile", (672, 672)), ("divmerge:keep=0.1", (1000, 336))],
    ids=str,
)
def test_llama4_costs_what_torch_counts(spec, size):
    """All experts, as transformers computes them, and the projection inside the model's forward."""
    shape = load_shape("llama-4-scout-109b")
    found = counter.count(scout(), shape, me.build(spec), image_size=size, new_tokens=3)
    closed = cost(shape, method=spec, image_size=size, new_tokens=3, marks=found.marks)
    assert (found.vision, found.compress, found.prefill, found.decode) == (closed.vision, closed.compress, closed.prefill, closed.decode)


@needs_calls
def test_a_tiny_llama4_costs_what_torch_counts():
    """Layers with experts in turn with dense ones, and a cache whose chunk is shorter than the prompt."""
    model = llama4("tiled")[0]
    shape = shape_of(model.config, "tiny")
    assert len({layer.weights for layer in shape.decoder.each}) == 2 and shape.decoder.windows.count(64) == 3
    found = counter.count(model, shape, me.build("none"), image_size=(48, 48), new_tokens=3, text_tokens=40)
    closed = cost(shape, image_size=(48, 48), new_tokens=3, text_tokens=40)
    assert (found.vision, found.prefill, found.decode) == (closed.vision, closed.prefill, closed.decode)
