"""``me.prepare``, the explicit path: bit-equal where nothing is removed, else equal to a slow reference by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode
from mllm_efficient.compressors.base import generator_for

from ..conftest import MIXED, eager_attention

N, GRID, IMAGE = 36, (6, 6), 4
ROWS = ("one image", "two images", "touching images", "text only", "long text")
SPECS = (
    "divprune:tokens=9", "divprune:tokens=9,metric=l2", "random:tokens=9", "random:tokens=9,seed=3", "uniform:tokens=9", "uniform:keep=0.4",
    "pool:tokens=9", "pool:tokens=9,op=max", "resize:tokens=9", "divprune:tokens=9,order=picked",
    "divprune:tokens=9,positions=keep", "random:tokens=9,positions=keep", "uniform:tokens=1,positions=keep",
)  # fmt: skip


def rows_of(batch):
    """(ids without padding, pixels) of every row."""
    at = 0
    for ids, mask in zip(batch.input_ids, batch.attention_mask):
        ids = ids[mask.bool()]
        images = int((ids == IMAGE).sum()) // N
        yield ids, batch.get("pixel_values", torch.empty(0, 3, 48, 48))[at : at + images]
        at += images


# ------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize(
    "spec", ["none", "divprune:keep=1", "random:tokens=36", "pool:keep=1", "resize:keep=1", "uniform:keep=1,positions=keep"]
)
@pytest.mark.parametrize("rows", [("one image",), MIXED], ids=["one row", "batch"])
def test_keeping_everything_leaves_the_call_alone(tiny_llava, make_batch, spec, rows):
    batch = make_batch(*rows)
    prepared = me.prepare(tiny_llava, spec, **batch)
    assert prepared.layout is None
    assert prepared.model_kwargs.keys() == batch.keys()
    assert all(prepared.model_kwargs[k] is batch[k] for k in batch)
    assert torch.equal(tiny_llava(**prepared.model_kwargs).logits, tiny_llava(**batch).logits)


@pytest.mark.parametrize("rows", [("one image",), ("touching images",), MIXED], ids=["one row", "touching images", "batch"])
def test_keeping_everything_through_mm_encoder_outputs_is_bit_equal(tiny_llava, make_batch, rows):
    batch = make_batch(*rows)
    prepared = me.prepare(tiny_llava, "divprune:keep=1", encoded=encode(tiny_llava, "divprune:keep=1", **batch), **batch)
    assert "pixel_values" not in prepared.model_kwargs
    assert len(prepared.model_kwargs["mm_encoder_outputs"]["image"].pooler_output) == len(batch.pixel_values)
    assert torch.equal(tiny_llava(**prepared.model_kwargs).logits, tiny_llava(**batch).logits)


@pytest.mark.parametrize("positions", [None, "keep"])
@pytest.mark.parametrize("rows", [("one image",), ("touching images",), MIXED], ids=["one row", "touching images", "batch"])
def test_keeping_everything_through_the_whole_repacking_is_bit_equal(tiny_llava, make_batch, rows, positions):
    @dataclass(frozen=True, kw_only=True)
    class Everything(me.Selector):
        name: ClassVar[str] = "everything"
        full_is_identity: ClassVar[bool] = False  # so that nothing is passed through

        def select(self, v, k):
            return torch.arange(k).flip(0)

    batch = make_batch(*rows)
    prepared = me.prepare(tiny_llava, Everything(keep=1.0, positions=positions), **batch)
    assert prepared.layout.removed == 0
    assert torch.equal(prepared.model_kwargs["input_ids"], batch.input_ids)
    own, stock = tiny_llava(**prepared.model_kwargs).logits, tiny_llava(**batch).logits
    if positions is None:
        assert torch.equal(own, stock)
    else:  # rows are shifted to begin at position 0, where stock counts their padding: RoPE rounds differently
        real = batch.attention_mask.bool()
        torch.testing.assert_close(own[real], stock[real], atol=1e-5, rtol=1e-5)


def test_a_text_only_batch_is_untouched_and_reports_no_images(tiny_llava, make_batch):
    batch = make_batch("text only", "text only")
    prepared = me.prepare(tiny_llava, "divprune:tokens=9", **batch)
    assert all(prepared.model_kwargs[k] is batch[k] for k in batch) and prepared.layout is None
    assert prepared.report.images == () and prepared.report.visual_tokens_full == 0
    assert str(prepared.report) == "no images: nothing was compressed"
    assert prepared.visual_keep_mask.all() and prepared.visual_keep_mask.shape == batch.input_ids.shape


# ------------------------------------------------------------------------------------------------ K < N


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("spec", SPECS)
def test_greedy_tokens_equal_the_slow_reference(tiny_llava, make_batch, reference, spec, row):
    batch = make_batch(row)
    ((ids, pixels),) = rows_of(batch)
    visual, places = reference.compressed(tiny_llava, spec, pixels)
    expected = reference.greedy(tiny_llava, ids, visual, N, 6, places)
    kwargs = me.prepare(tiny_llava, spec, **batch).model_kwargs
    out = tiny_llava.generate(**kwargs, max_new_tokens=6)
    assert out[0, kwargs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("spec", SPECS)
def test_greedy_tokens_of_a_padded_batch_equal_the_slow_reference(tiny_llava, make_batch, reference, spec):
    batch = make_batch(*ROWS)
    expected = []
    for ids, pixels in rows_of(batch):
        visual, places = reference.compressed(tiny_llava, spec, pixels)
        expected.append(reference.greedy(tiny_llava, ids, visual, N, 6, places))
    kwargs = me.prepare(tiny_llava, spec, **batch).model_kwargs
    out = tiny_llava.generate(**kwargs, max_new_tokens=6)
    assert out[:, kwargs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("spec", SPECS)
def test_the_reference_tells_compressed_from_uncompressed(tiny_llava, make_batch, reference, spec):
    """The equalities above would prove nothing on a model whose answer does not depend on the tokens kept."""
    ((ids, pixels),) = rows_of(make_batch("one image"))
    visual, places = reference.compressed(tiny_llava, spec, pixels)
    full = reference.features(tiny_llava, pixels)
    assert reference.greedy(tiny_llava, ids, visual, N, 6, places) != reference.greedy(tiny_llava, ids, full, N, 6)


@pytest.mark.parametrize("image_size, patch_size, side", [(32, 8, 4), (48, 12, 4), (56, 8, 7)])
def test_greedy_tokens_equal_the_slow_reference_at_other_sizes(make_llava, make_batch, reference, image_size, patch_size, side):
    model = make_llava(image_size=image_size, patch_size=patch_size)
    batch = make_batch("one image", "two images", image_size=image_size, patch_size=patch_size)
    method = me.DivPrune(keep=0.3)
    kwargs = me.prepare(model, method, **batch).model_kwargs
    out = model.generate(**kwargs, max_new_tokens=5)[:, kwargs["input_ids"].shape[1] :].tolist()
    features = [f[method.select(f)] for f in reference.features(model, batch.pixel_values)]
    for row, visual in enumerate((features[:1], features[1:])):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert out[row] == reference.greedy(model, ids, visual, side * side, 5)


@pytest.mark.parametrize("tower, settings", [
    ("siglip", {}), ("clip", {"vision_feature_layer": -2}), ("clip", {"vision_feature_layer": 1}),
    ("clip", {"vision_feature_layer": (-2, -1)}), ("clip", {"vision_feature_select_strategy": "full"}),
])  # fmt: skip
def test_greedy_tokens_equal_the_slow_reference_for_other_towers(make_llava, make_batch, reference, tower, settings):
    model = make_llava(tower, **settings)
    batch = make_batch("one image")
    ids, n = batch.input_ids[0], len(reference.features(model, batch.pixel_values)[0])
    if n == 37:  # "full" hands the class token to the language model
        first = int((ids == IMAGE).nonzero()[0])
        ids = torch.cat([ids[:first], torch.tensor([IMAGE]), ids[first:]])
    method = me.DivPrune(tokens=9)
    kwargs = me.prepare(model, method, input_ids=ids[None], pixel_values=batch.pixel_values).model_kwargs
    out = model.generate(**kwargs, max_new_tokens=5)[0, kwargs["input_ids"].shape[1] :].tolist()
    visual = [f[method.select(f)] for f in reference.features(model, batch.pixel_values)]
    assert out == reference.greedy(model, ids, visual, n, 5)


def test_two_images_in_one_run_of_placeholders_are_told_apart_by_their_lengths(tiny_llava, make_batch, reference):
    batch = make_batch("touching images")
    prepared = me.prepare(tiny_llava, "divprune:tokens=9", **batch)
    first = int((batch.input_ids[0] == IMAGE).nonzero()[0])
    for i, (image, full) in enumerate(zip(prepared.report.images, reference.features(tiny_llava, batch.pixel_values))):
        assert torch.equal(image.indices, me.DivPrune(tokens=9).select(full))
        kept = prepared.visual_keep_mask[0, first + i * N : first + (i + 1) * N]
        assert torch.equal(kept.nonzero()[:, 0], image.indices)


def test_kept_tokens_keep_their_old_positions_on_request(tiny_llava, make_batch):
    batch = make_batch("one image", "long text")
    prepared = me.prepare(tiny_llava, "uniform:tokens=9,positions=keep", **batch)
    kwargs = prepared.model_kwargs
    for row in range(2):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        places = torch.arange(len(ids))
        start = int((ids == IMAGE).nonzero()[0])
        inside = (places >= start) & (places < start + N)
        inside[start + prepared.report.images[row].indices] = False
        assert torch.equal(kwargs["position_ids"][row][kwargs["attention_mask"][row].bool()], places[~inside])


# ------------------------------------------------------------------------------------------------ report and layout


def test_the_report_says_what_was_done(tiny_llava, make_batch):
    batch = make_batch(*MIXED)
    report = me.prepare(tiny_llava, "divprune:tokens=9,positions=keep", **batch).report
    assert [i.row for i in report.images] == [0, 1, 1, 3]
    assert [(i.full, i.kept, i.grid, i.clamped) for i in report.images] == [(N, 9, GRID, False)] * 4
    for image in report.images:
        assert image.indices.device.type == "cpu" and image.indices.dtype == torch.long
        assert (image.indices.diff() > 0).all() and image.indices.max() < N
    assert (report.visual_tokens_full, report.visual_tokens_kept, report.tokens_per_layer) == (4 * N, 36, [36] * 3)
    assert report.positions == "keep" and me.build(report.stages[0]) == me.DivPrune(tokens=9, positions="keep")
    assert report.compress_seconds > 0
    assert str(report) == "kept 36 of 144 visual tokens in 4 image(s)"


def test_a_method_gets_all_images_of_a_call_at_once_and_its_indices_are_copied_once(tiny_llava, make_batch, registered, monkeypatch):
    calls, copies = [], []

    @registered("together")
    @dataclass(frozen=True, kw_only=True)
    class Together(me.Selector):
        def compress_all(self, parts, ks):
            calls.append([(len(v), k) for v, k in zip(parts, ks)])
            first = [torch.arange(k, dtype=torch.int32) + i for i, k in enumerate(ks)]  # of each image another K tokens
            return [me.CompressedTokens(v.features[i], i) for v, i in zip(parts, first)]

    copy_to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copies.append(t.shape) or copy_to_cpu(t))
    report = me.prepare(tiny_llava, "together:tokens=9", **make_batch(*MIXED)).report
    assert calls == [[(N, 9)] * 4]
    assert copies.count(torch.Size([4 * 9])) == 1 and torch.Size([9]) not in copies
    assert [i.indices.tolist() for i in report.images] == [list(range(i, i + 9)) for i in range(4)]


@pytest.mark.parametrize(
    ("indices", "says"),
    [([0, 1, 1], "twice selected the same visual token twice"), ([0, 1], "twice gave 2 tokens where 3"), (None, "1 results for 2")],
)
def test_what_a_method_gives_for_many_images_is_checked(tiny_llava, make_batch, registered, indices, says):
    @registered("twice")
    @dataclass(frozen=True, kw_only=True)
    class Twice(me.Selector):
        def compress_all(self, parts, ks):
            chosen = torch.tensor(indices or [0, 1, 2])
            return [me.CompressedTokens(v.features[chosen], chosen) for v in (parts if indices else parts[:1])]

    with pytest.raises(me.CountMismatchError, match=says):
        me.prepare(tiny_llava, "twice:tokens=3", **make_batch("two images"))


@pytest.mark.parametrize("spec", ["pool:tokens=9", "resize:tokens=9"])
def test_merged_tokens_have_no_indices_but_a_grid(tiny_llava, make_batch, spec):
    (image,) = me.prepare(tiny_llava, spec, **make_batch("one image")).report.images
    assert image.indices is None and image.grid == (3, 3) and (image.full, image.kept) == (N, 9)


def test_the_report_of_an_identity_lists_every_token(tiny_llava, make_batch):
    (image,) = me.prepare(tiny_llava, "random:keep=1", **make_batch("one image")).report.images
    assert torch.equal(image.indices, torch.arange(N)) and image.kept == N


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_stays_on_its_side(tiny_llava, make_batch, padding_side):
    batch = make_batch(*MIXED, padding_side=padding_side)
    kwargs = me.prepare(tiny_llava, "uniform:tokens=9", **batch).model_kwargs
    for full_ids, full_mask, ids, mask in zip(batch.input_ids, batch.attention_mask, kwargs["input_ids"], kwargs["attention_mask"]):
        length = int(mask.sum())
        ones, zeros = [1] * length, [0] * (len(mask) - length)
        assert mask.tolist() == (ones + zeros if padding_side == "right" else zeros + ones)
        real = full_ids[full_mask.bool()]
        assert torch.equal(ids[mask.bool()][ids[mask.bool()] != IMAGE], real[real != IMAGE])
        assert int((ids == IMAGE).sum()) == int((real == IMAGE).sum()) // 4
        assert (ids[~mask.bool()] == 0).all()
    assert kwargs["attention_mask"].sum(1).max() == kwargs["input_ids"].shape[1]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_of_a_padded_batch_are_those_of_each_row_alone(tiny_llava, make_batch, padding_side):
    kwargs = me.prepare(tiny_llava, "divprune:tokens=9", **make_batch(*MIXED, padding_side=padding_side)).model_kwargs
    together = tiny_llava(**kwargs).logits
    for row, name in enumerate(MIXED):
        alone = tiny_llava(**me.prepare(tiny_llava, "divprune:tokens=9", **make_batch(name)).model_kwargs).logits[0]
        # Left padding shifts the row's RoPE angles and padding changes the order of sums: rounding, nothing else.
        torch.testing.assert_close(together[row, kwargs["attention_mask"][row].bool()], alone, atol=2e-5, rtol=1e-5)


def test_model_kwargs_serve_two_calls_with_beams(tiny_llava, make_batch):
    prepared = me.prepare(tiny_llava, "divprune:tokens=9", **make_batch(*MIXED))
    first, second = (tiny_llava.generate(**prepared.model_kwargs, num_beams=3, max_new_tokens=5) for _ in range(2))
    assert torch.equal(first, second)
    assert prepared.model_kwargs["mm_encoder_outputs"] is not prepared.model_kwargs["mm_encoder_outputs"]


def test_one_encoding_serves_several_methods(tiny_llava, make_batch):
    batch = make_batch("two images")
    encoded = encode(tiny_llava, "divprune:tokens=9", **batch)
    for spec in ("divprune:tokens=4", "random:tokens=12", "pool:tokens=9"):
        again, afresh = (me.prepare(tiny_llava, spec, encoded=e, **batch).model_kwargs for e in (encoded, None))
        assert torch.equal(tiny_llava(**again).logits, tiny_llava(**afresh).logits)


@pytest.mark.parametrize("made_for, used_by", [
    ("resize:tokens=9", "divprune:tokens=4"), ("resize:tokens=9", "resize:tokens=4"), ("divprune:tokens=9", "resize:tokens=9"),
    ("resize:tokens=9", "divprune:keep=1"), ("divprune:tokens=9", "recorder:tokens=9"),
])  # fmt: skip
def test_an_encoding_made_for_another_need_is_refused(tiny_llava, make_batch, recorder, made_for, used_by):
    """A smaller picture, or one without the attention the method asks for."""
    batch = make_batch("one image")
    encoded = encode(tiny_llava, made_for, **batch)
    with pytest.raises(me.CountMismatchError):
        me.prepare(tiny_llava, used_by, encoded=encoded, **batch)


def test_an_encoding_of_another_batch_is_refused(tiny_llava, make_batch):
    encoded = encode(tiny_llava, "divprune:tokens=9", **make_batch("two images"))
    with pytest.raises(me.CountMismatchError, match="36 image placeholders .* 2 image"):
        me.prepare(tiny_llava, "divprune:tokens=9", encoded=encoded, **make_batch("one image"))


def test_a_wrapped_model_is_prepared_like_a_bare_one(tiny_llava, make_batch):
    batch = make_batch("one image")
    bare = me.prepare(tiny_llava, "random:tokens=9", **batch)
    me.wrap(tiny_llava, "divprune:tokens=4")
    wrapped = me.prepare(tiny_llava, "random:tokens=9", **batch)
    assert torch.equal(bare.report.images[0].indices, wrapped.report.images[0].indices)
    out = tiny_llava.generate(**wrapped.model_kwargs, max_new_tokens=4)
    assert torch.equal(out, me.unwrap(tiny_llava).generate(**bare.model_kwargs, max_new_tokens=4))


def test_token_type_ids_lose_the_same_columns(tiny_llava, make_batch):
    batch = make_batch("one image", "long text")
    types = (batch.input_ids == IMAGE).long()
    kwargs = me.prepare(tiny_llava, "uniform:tokens=9", mm_token_type_ids=types, **batch).model_kwargs
    assert torch.equal(kwargs["mm_token_type_ids"], (kwargs["input_ids"] == IMAGE).long())


# ------------------------------------------------------------------------------------------------ image keys


def test_the_default_key_is_the_images_index_in_its_row(tiny_llava, make_batch):
    report = me.prepare(tiny_llava, "random:tokens=9", **make_batch("two images", "one image")).report
    method = me.Random(tokens=9)
    expected = [torch.randperm(N, generator=generator_for(method, key))[:9].sort().values for key in (0, 1, 0)]
    assert all(torch.equal(i.indices, e) for i, e in zip(report.images, expected))


def test_an_image_key_decides_the_draw_wherever_the_image_is(tiny_llava, make_batch):
    def draw(keys, *rows):
        report = me.prepare(tiny_llava, "random:tokens=9", image_keys=keys, **make_batch(*rows)).report
        return [image.indices for image in report.images]

    together = draw(["a", 7, "b"], "two images", "one image")
    assert torch.equal(together[1], draw([7, "c"], "two images")[0])
    assert torch.equal(together[2], draw(["b"], "one image")[0])
    assert not torch.equal(together[0], together[2])


def test_there_is_one_key_per_image(tiny_llava, make_batch):
    with pytest.raises(me.CountMismatchError, match="1 image_keys for 2 images"):
        me.prepare(tiny_llava, "random:tokens=9", image_keys=["a"], **make_batch("two images"))


# ------------------------------------------------------------------------------------------------ what is refused


def with_placeholders(counts):
    rows = [[1, 5] + [IMAGE] * c + [6] * (max(counts) - c + 2) for c in counts]
    return torch.tensor(rows)


@pytest.mark.parametrize("counts, images", [([35], 1), ([37], 1), ([36], 2), ([72], 1), ([0], 1), ([36, 36], 1)])
def test_a_wrong_number_of_placeholders_is_refused(tiny_llava, counts, images):
    with pytest.raises(me.CountMismatchError, match=f"{sum(counts)} image placeholders .* {images} image.* {images * N} tokens"):
        me.prepare(tiny_llava, "uniform:tokens=9", input_ids=with_placeholders(counts), pixel_values=torch.rand(images, 3, 48, 48))


def test_an_image_that_would_span_two_rows_is_refused(tiny_llava):
    with pytest.raises(me.CountMismatchError, match="image 0 would span two rows"):
        me.prepare(tiny_llava, "uniform:tokens=9", input_ids=with_placeholders([30, 42]), pixel_values=torch.rand(2, 3, 48, 48))


def test_a_mismatch_is_refused_when_everything_is_kept_too(tiny_llava):
    with pytest.raises(me.CountMismatchError):
        me.prepare(tiny_llava, "uniform:keep=1", input_ids=with_placeholders([35]), pixel_values=torch.rand(1, 3, 48, 48))


@pytest.mark.parametrize("change, message", [
    ({"attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask must be"),
    ({"attention_mask": torch.ones(1, 5, dtype=torch.long)}, "attention_mask .* differ"),
    ({"labels": torch.ones(1, 5, dtype=torch.long)}, "labels .* differ"),
    ({"position_ids": torch.arange(5)[None]}, "position_ids cannot be given"),
    ({"pixel_values": torch.rand(3, 48, 48)}, "pixel_values must be one tensor"),
])  # fmt: skip
def test_tensors_of_the_wrong_shape_are_refused(tiny_llava, make_batch, change, message):
    with pytest.raises(me.CountMismatchError, match=message):
        me.prepare(tiny_llava, "uniform:tokens=9", **{**make_batch("one image"), **change})


def test_more_tokens_than_an_image_has_are_refused(tiny_llava, make_batch):
    with pytest.raises(me.BadBudgetError, match="tokens=37 is more than the 36"):
        me.prepare(tiny_llava, "divprune:tokens=37", **make_batch("one image"))


def test_features_with_nan_are_refused(tiny_llava, make_batch):
    batch = make_batch("one image")
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(me.CountMismatchError, match="NaN"):
        me.prepare(tiny_llava, "divprune:tokens=9", **batch)


@pytest.mark.parametrize("indices", [[0, 0, 1], [0, 1], [0, 1, N], [-1, 0, 1]], ids=["twice", "too few", "above N", "negative"])
def test_a_method_that_selects_nonsense_is_refused(tiny_llava, make_batch, indices):
    @dataclass(frozen=True, kw_only=True)
    class Nonsense(me.Selector):
        name: ClassVar[str] = "nonsense"

        def select(self, v, k):
            return torch.tensor(indices)

    with pytest.raises(me.CountMismatchError):
        me.prepare(tiny_llava, Nonsense(tokens=3), **make_batch("one image"))


# ------------------------------------------------------------------------------------------------ labels


def labelled(batch):
    """Labels of a batch: the ids, -100 on padding and placeholders."""
    return batch.input_ids.masked_fill((batch.attention_mask == 0) | (batch.input_ids == IMAGE), -100)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("spec", ["divprune:tokens=9", "pool:tokens=9", "resize:tokens=9"])
def test_the_loss_is_the_loss_of_each_sample(tiny_llava, make_batch, reference, spec, padding_side):
    batch = make_batch(*ROWS, padding_side=padding_side)
    labels = labelled(batch)
    total, count = 0.0, 0
    for row, (ids, pixels) in enumerate(rows_of(batch)):
        visual, _ = reference.compressed(tiny_llava, spec, pixels)
        loss, tokens = reference.loss(tiny_llava, ids, labels[row][batch.attention_mask[row].bool()], visual, N)
        total, count = total + loss.item(), count + tokens
    prepared = me.prepare(tiny_llava, spec, labels=labels, **batch)
    assert tiny_llava(**prepared.model_kwargs).loss.item() == pytest.approx(total / count, rel=1e-5)  # order of summation


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_labels_follow_their_tokens(tiny_llava, make_batch, padding_side):
    batch = make_batch(*ROWS, padding_side=padding_side)
    labels = labelled(batch)
    kwargs = me.prepare(tiny_llava, "uniform:tokens=9", labels=labels, **batch).model_kwargs
    real, text = kwargs["attention_mask"].bool(), kwargs["input_ids"] != IMAGE
    first = real & ~torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], 1)
    assert (kwargs["labels"][~real] == -100).all() and (kwargs["labels"][~text] == -100).all()
    assert (kwargs["labels"][first] == -100).all(), "the first token after padding would be predicted from padding"
    learned = real & text & ~first
    assert torch.equal(kwargs["labels"][learned], kwargs["input_ids"][learned])


def test_labels_stay_as_they_are_where_nothing_is_removed(tiny_llava, make_batch):
    batch = make_batch("one image")
    kwargs = me.prepare(tiny_llava, "uniform:keep=1", labels=labelled(batch), **batch).model_kwargs
    assert torch.equal(tiny_llava(**kwargs).loss, tiny_llava(labels=labelled(batch), **batch).loss)


@pytest.mark.parametrize("spec", ["divprune:tokens=9", "pool:tokens=9", "resize:tokens=9"])
def test_gradients_reach_the_tower_through_the_kept_tokens(tiny_llava, make_batch, spec):
    batch = make_batch("one image", "two images")
    tiny_llava(**me.prepare(tiny_llava, spec, labels=labelled(batch), **batch).model_kwargs).loss.backward()
    for part in (tiny_llava.model.multi_modal_projector.linear_1, tiny_llava.model.vision_tower.get_submodule(first_mlp(tiny_llava))):
        assert part.weight.grad.abs().sum() > 0


def first_mlp(model):
    return next(n for n, _ in model.model.vision_tower.named_modules() if n.endswith("mlp.fc1"))


# ------------------------------------------------------------------------------------------------ needs


@pytest.fixture
def recorder(registered):
    """A registered method that asks for everything the family gives and keeps what it got."""
    seen = []

    @registered("recorder")
    @dataclass(frozen=True, kw_only=True)
    class Recorder(me.Selector):
        needs: ClassVar[frozenset] = frozenset({"attention", "keys", "text", "grid"})

        def score(self, v):
            seen.append(v)
            return v.attention

    return seen


@pytest.mark.parametrize(
    "tower, layer, index", [("clip", -1, 2), ("clip", -2, 1), ("clip", 1, 0), ("clip", 3, 2), ("siglip", -1, 2), ("siglip", -2, 1)]
)
def test_attention_and_keys_are_those_of_the_eager_tower(make_llava, make_batch, recorder, tower, layer, index):
    model = make_llava(tower, vision_layers=3, vision_feature_layer=layer)
    batch = make_batch("one image", "two images")
    me.prepare(model, "recorder:tokens=9", **batch)
    attention, keys = eager_attention(model, batch.pixel_values, index)
    if tower == "clip":  # from the class token, over the patches
        attention, keys = attention.mean(1)[:, 0, 1:], keys[:, 1:]
    else:
        attention = attention.mean((1, 2))
    assert len(recorder) == 3
    for i, v in enumerate(recorder):
        assert v.attention.shape == (N,) and v.keys.shape == (N, 8) and v.grid == GRID
        # Two kernels and two orders of summation.
        torch.testing.assert_close(v.attention, attention[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v.keys, keys[i], atol=1e-5, rtol=1e-5)


def test_attention_with_the_class_token_kept(make_llava, make_batch, recorder):
    model = make_llava(vision_feature_select_strategy="full")
    pixels = make_batch("one image").pixel_values
    me.prepare(model, "recorder:tokens=9", input_ids=with_placeholders([37]), pixel_values=pixels)
    attention, keys = eager_attention(model, pixels, 1)
    torch.testing.assert_close(recorder[0].attention, attention.mean(1)[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(recorder[0].keys, keys[0], atol=1e-5, rtol=1e-5)
    assert recorder[0].grid is None


def test_text_is_the_embeddings_of_the_rows_own_text(tiny_llava, make_batch, recorder):
    batch = make_batch("one image", "two images", "text only")
    me.prepare(tiny_llava, "recorder:tokens=9", **batch)
    for v, row in zip(recorder, (0, 1, 1)):
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert torch.equal(v.text, tiny_llava.get_input_embeddings()(ids[ids != IMAGE]))


def test_the_highest_scores_stay(tiny_llava, make_batch, recorder):
    (image,) = me.prepare(tiny_llava, "recorder:tokens=9", **make_batch("one image")).report.images
    assert torch.equal(image.indices, recorder[0].attention.topk(9).indices.sort().values)


def test_recording_leaves_no_hook_on_the_tower(tiny_llava, make_batch, recorder):
    def hooks():
        return [(list(m._forward_pre_hooks.items()), list(m._forward_pre_hooks_with_kwargs)) for m in tiny_llava.modules()]

    batch = make_batch("one image")
    logits, before = tiny_llava(**batch).logits, hooks()  # the first call puts transformers' own hooks there
    me.prepare(tiny_llava, "recorder:tokens=9", **batch)
    assert hooks() == before and torch.equal(tiny_llava(**batch).logits, logits)


def test_methods_see_only_what_they_asked_for(tiny_llava, make_batch):
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Modest(me.Selector):
        name: ClassVar[str] = "modest"

        def select(self, v, k):
            seen.append(v)
            return torch.arange(k)

    me.prepare(tiny_llava, Modest(tokens=9), **make_batch("one image"))
    assert (seen[0].attention, seen[0].keys, seen[0].text, seen[0].clip_text) == (None, None, None, None)


def test_a_need_the_family_cannot_meet_is_named(make_llava, tiny_llava, make_batch, registered):
    @registered("clipper")
    @dataclass(frozen=True, kw_only=True)
    class Clipper(me.Selector):
        needs: ClassVar[frozenset] = frozenset({"clip_text", "attention"})

        def score(self, v):
            return v.attention

    with pytest.raises(me.UnsupportedModelError, match="clipper needs clip_text, which LlavaForConditionalGeneration does not give"):
        me.prepare(make_llava(tower="siglip"), "clipper:tokens=9", **make_batch("one image"))
    with pytest.raises(me.UnsupportedModelError, match="clipper needs clip_text and names no CLIP: give it a setting clip"):
        me.prepare(tiny_llava, "clipper:tokens=9", **make_batch("one image"))


@pytest.mark.parametrize("spec", ["pool:tokens=10", "resize:tokens=10"])
def test_a_class_token_that_is_kept_stays_beside_the_grid(make_llava, make_batch, spec):
    model = make_llava(vision_feature_select_strategy="full")
    report = me.prepare(model, spec, input_ids=with_placeholders([37]), pixel_values=make_batch("one image").pixel_values).report
    assert [(p.rows, p.columns) for p in report.images[0].kept_planes] == [(1, 1), (3, 3)]
    assert (report.images[0].full, report.images[0].kept, report.images[0].grid) == (37, 10, None)


def test_an_unsupported_model_is_named_with_the_supported_ones(make_batch):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(me.UnsupportedModelError, match="LlamaForCausalLM is not supported.*LlavaForConditionalGeneration"):
        me.prepare(llama, "divprune:tokens=9", **make_batch("one image"))


def test_prepared_calls_are_frozen(tiny_llava, make_batch):
    prepared = me.prepare(tiny_llava, "divprune:tokens=9", **make_batch("one image"))
    with pytest.raises(AttributeError):
        prepared.layout = None
