"""The pooling that reads the question: its rule place by place, what models make of it, and where no text is known."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mllm_efficient as me
from mllm_efficient.apply.encode import encode
from mllm_efficient.compressors.mixing import pooling_flops, question_rank
from mllm_efficient.measure.counter import count
from mllm_efficient.measure.flops import cost
from mllm_efficient.measure.shapes import shape_of
from mllm_efficient.patches.vllm.settings import require_served
from mllm_efficient.train.build import build_model
from mllm_efficient.trained.install import installed
from mllm_efficient.trained.projector import TokenFlexProjector

from ..compressors.test_tokenflex import ByHand, random_folder
from ..families import make, tiny
from ..train.test_train import builtin_batch, recipe
from .test_mixers import D, cells_of, layer_norm, projector

QUESTION = {"pooling": "question"}


def slow_question(m, x, side, text):
    """(side * side, D) of one picture (D, h, w), each cell, token and channel by itself."""
    asked = m.text.weight @ layer_norm(torch.stack(list(text)).mean(0), m.norm) + m.text.bias
    out = []
    for cell in cells_of(x, side):
        scores = [m.score.weight @ ((m.token.weight @ x[:, a, b] + m.token.bias).tanh() * asked.tanh()) for a, b in cell]
        out.append(
            torch.stack([
                sum(weight * x[c, a, b] for weight, (a, b) in zip(torch.stack([s[c] for s in scores]).softmax(0), cell))
                for c in range(len(x))
            ])
        )  # fmt: skip
    return torch.stack(out)


@pytest.mark.parametrize("grid, side", [((5, 7), 3), ((6, 6), 2), ((1, 3), 2), ((2, 2), 3), ((5, 7), 1)])
@torch.no_grad()
def test_it_equals_its_rule_on_any_grid(grid, side):
    module = projector(**QUESTION)
    x, text = torch.randn(2, D, *grid, dtype=torch.float64), [torch.randn(n, 12, dtype=torch.float64) for n in (5, 2)]
    out = module.pool(x.flatten(2).transpose(1, 2), side, grid, text)
    for one, given, words in zip(out, x, text):
        torch.testing.assert_close(one, slow_question(module.pooler, given, side, words), atol=1e-9, rtol=1e-9)


def test_it_begins_as_the_average_and_every_weight_learns():
    x, text = torch.randn(2, 35, D), [torch.randn(n, 12) for n in (5, 2)]
    module = TokenFlexProjector(D, 12, **QUESTION)
    wanted = TokenFlexProjector(D, 12, pooling="adaptive").pool(x, 3, (5, 7))
    torch.testing.assert_close(module.pool(x, 3, (5, 7), text), wanted, atol=1e-5, rtol=1e-5)
    drawn = projector(**QUESTION).float()
    drawn(x, side=3, grid=(5, 7), text=text).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drawn.parameters())
    assert (drawn.pool(x, 3, (5, 7), text) - drawn.pool(x, 3, (5, 7), text[::-1])).abs().max() > 1e-3
    assert (question_rank(D), question_rank(1024)) == (D, 256)


def test_flops_equal_the_counter():
    module, text = TokenFlexProjector(512, 64, **QUESTION), [torch.randn(4, 64)] * 3
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(3, 45, 512), side=3, grid=(5, 9), text=text)
    made = pooling_flops("question", 512, (5, 9), 9, 64) + 2 * 9 * 3 * 512 * (2 * 512 + 64)
    assert counter.get_total_flops() == 3 * made


@torch.no_grad()
def test_in_half_precision_it_is_near():
    module, x, text = projector(**QUESTION), torch.randn(1, 35, D, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    full = module(x, side=3, grid=(5, 7), text=[text])
    half = module.bfloat16()(x.bfloat16(), side=3, grid=(5, 7), text=[text.bfloat16()])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), full, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("settings, call, message", [
    (QUESTION, {"side": 2}, "1 of 1 views have none: ask something in every row"),
    (QUESTION, {"side": 2, "text": [torch.zeros(0, 12)]}, "1 of 1 views have none"),
    (QUESTION, {"side": 2, "text": [None]}, "1 of 1 views have none"),
    (QUESTION, {"text": [torch.zeros(2, 12)]}, "text= is of pooling='question', and beside a side"),
    ({}, {"side": 2, "text": [torch.zeros(2, 12)]}, "text= is of pooling='question'"),
])  # fmt: skip
def test_where_no_text_is_known_or_read_it_is_one_line(settings, call, message):
    with pytest.raises(me.CountMismatchError, match=message) as caught:
        TokenFlexProjector(D, 12, **settings)(torch.randn(1, 36, D), **call)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ in models


class Told(ByHand):
    """The projector, told by hand what is asked about every view."""

    def forward(self, features):
        return self.module(features, side=self.side, text=self.text * len(features))


def words_of(model, ids):
    return model.get_input_embeddings()(ids[ids != model.config.image_token_id])


@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
@torch.no_grad()
def test_models_generate_as_with_the_projector_put_in_by_hand(name, tmp_path, tiny_llava, make_batch):
    """A batch is its rows one by one, each of whose pictures is pooled by its own row's text."""
    model, side = tiny_llava if name == "llava" else copy.deepcopy(tiny(name)), 3
    batch_of = make_batch if name == "llava" else functools.partial(make, name)
    module, rows = random_folder(tmp_path, model, **QUESTION), ("one image", "two images", "text only")
    batch = batch_of(*rows)
    me.wrap(model, me.TokenFlex(tokens=side * side, weights=str(tmp_path)))
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    kept = [[i.kept for i in me.last_report(model).images if i.row == row] for row in range(len(rows))]
    me.unwrap(model)
    told = Told(module, side)
    for row, kind in enumerate(rows):
        inputs = batch_of(kind)
        told.text = [words_of(model, inputs["input_ids"][0])]
        pixels = inputs.get("pixel_values")
        pixels = pixels.flatten(0, 1) if pixels is not None and pixels.ndim == 5 else pixels
        features, embeds = [], model.get_input_embeddings()(inputs["input_ids"])[0]
        if pixels is not None:
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
            hidden = hidden[:, 1:] if model.config.vision_feature_select_strategy == "default" else hidden
            features = torch.cat([told(view[None])[0] for view in hidden])
        ids, stay, at = inputs["input_ids"][0], torch.ones(len(embeds), dtype=torch.bool), 0
        image = ids == model.config.image_token_id
        starts = (image & ~torch.cat([torch.zeros(1, dtype=torch.bool), image[:-1]])).nonzero()[:, 0].tolist()
        assert len(starts) == len(kept[row])
        for start, n in zip(starts, kept[row]):
            embeds[start : start + n] = features[at : at + n]
            end = start + int(image[start:].long().cumprod(0).sum())
            stay[start + n : end], at = False, at + n
        assert at == len(features)
        answer, given = [], embeds[stay][None]
        for _ in range(5):
            hidden = model.model.language_model(inputs_embeds=given).last_hidden_state
            answer.append(int(model.lm_head(hidden[:, -1]).argmax()))
            given = torch.cat([given, model.get_input_embeddings()(torch.tensor([answer[-1:]]))], 1)
        assert out[row].tolist() == answer, kind


@torch.no_grad()
def test_one_pass_of_the_tower_serves_every_question_and_answers_are_not_shown(tiny_llava, make_batch, tmp_path):
    model, module = tiny_llava, random_folder(tmp_path, tiny_llava, **QUESTION)
    method, batch = me.TokenFlex(tokens=9, weights=str(tmp_path)), make_batch("one image")
    encoded = encode(model, method, **batch)
    assert encoded.encodings[0].features.shape == (1, 36, module.inputs)
    ids = batch["input_ids"]
    other = torch.where(ids == ids[0, -1], ids[0, -1] + 1, ids)
    made = [me.prepare(model, method, **{**batch, "input_ids": i}, encoded=e) for i, e in itertools.product((ids, other), (encoded, None))]
    features = [p.model_kwargs["mm_encoder_outputs"]["image"].pooler_output[0] for p in made]
    assert torch.equal(features[0], features[1]) and torch.equal(features[2], features[3])
    assert (features[0] - features[2]).abs().max() > 1e-3
    longer = torch.cat([ids, ids[:, -3:]], 1)
    labels = torch.where(torch.arange(longer.shape[1]) < ids.shape[1], -100, longer)
    answered = me.prepare(model, method, **{**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}, labels=labels)
    torch.testing.assert_close(answered.model_kwargs["mm_encoder_outputs"]["image"].pooler_output[0], features[0])


@torch.no_grad()
def test_it_is_saved_loaded_cached_composed_counted_and_not_served(tiny_llava, make_batch, tmp_path):
    module, batch = random_folder(tmp_path, tiny_llava, **QUESTION), make_batch("one image", "two images")
    shape, method = shape_of(tiny_llava.config), me.load(tmp_path)
    assert method.asks and not me.TokenFlex(tokens=9, weights="random").asks
    for counted in (method, me.build(f"none@tokenflex:weights={tmp_path}")):
        with installed(tiny_llava, counted):
            asked = {"method": counted, "text_tokens": 12, "images": 2, "batch_size": 2}
            found, torchs = cost(shape, **asked), count(tiny_llava, shape, counted, **{k: v for k, v in asked.items() if k != "method"})
            assert (found.vision, found.compress, found.prefill) == (torchs.vision, torchs.compress, torchs.prefill)
    me.wrap(tiny_llava, method, cache="1MB")
    logits = [tiny_llava(**batch, logits_to_keep=1).logits for _ in range(2)]
    assert torch.equal(*logits) and me.last_report(tiny_llava).vision_cache.hits == 3
    with torch.no_grad():
        tiny_llava.model.multi_modal_projector.pooler.score.weight.zero_()  # other weights, other tokens
        assert not torch.equal(tiny_llava(**batch, logits_to_keep=1).logits, logits[0])
    me.unwrap(tiny_llava)
    me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path} | divprune:tokens=4")
    tiny_llava(**batch)
    assert [i.kept for i in me.last_report(tiny_llava).images] == [4] * 3
    me.unwrap(tiny_llava)
    text = [torch.randn(3, module.outputs)]
    with installed(tiny_llava, method):
        held, features = tiny_llava.model.multi_modal_projector, torch.randn(1, 36, module.inputs)
        assert torch.equal(held(features, side=3, text=text), module(features, side=3, text=text))
    with pytest.raises(me.UnsupportedModelError, match="makes tokens by the question"):
        require_served(method)


def test_a_row_of_images_alone_is_one_line(tiny_llava, make_batch, tmp_path):
    random_folder(tmp_path, tiny_llava, **QUESTION)
    batch = make_batch("one image")
    image = batch["input_ids"][0] == tiny_llava.config.image_token_id
    alone = {"input_ids": batch["input_ids"][:, image], "attention_mask": batch["attention_mask"][:, image]}
    with pytest.raises(me.CountMismatchError, match="by the text of their row"):
        me.prepare(tiny_llava, me.load(tmp_path), **{**batch, **alone})


# ------------------------------------------------------------------------------------------------ in training


def test_every_turn_of_a_batch_is_pooled_by_its_own_question(tmp_path):
    """Packed turns have the loss of conversations of one turn, one by one."""
    loaded, records, batch = builtin_batch(2)
    model = build_model(recipe(tmp_path, "settings.pooling=question"), loaded)
    torch.nn.init.normal_(model.trained_module.pooler.score.weight)
    out = model("answers", 9, batch)
    losses, method = [], me.TokenFlex(tokens=9, weights="random")
    from mllm_efficient.train.encoding import Collator

    for record in records:
        for question, answer in record.turns:
            text = question if question.startswith("<image>") else f"<image>\n{question}"
            one = Collator(loaded.processor)([replace(record, turns=((text, answer),))])
            logits, wanted = model._answered(method, one)
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
    torch.testing.assert_close(out["loss"], torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.trained_module.named_parameters())


def test_distilling_shows_every_picture_its_question(tmp_path):
    loaded, _, batch = builtin_batch(3, questions=1)
    model = build_model(recipe(tmp_path, "settings={layers: mlp, pooling: question}"), loaded)
    model.trained_module.load_state_dict(model.outside[1][0].state_dict(), strict=False)
    assert float(model("distil", 144, batch)["loss"]) < 1e-10
    torch.nn.init.normal_(model.trained_module.pooler.score.weight)
    assert float(model("distil", 36, batch)["loss"]) > 1e-3
