"""Methods one after the other: a projector, a method on its tokens, one inside the decoder.

Each stage alone is tested where it is. Here the plain projector put in by hand and the stage on what it gives, token by token, are
the reference of the first two; a decoder stage on what stands in the prompt is in ``test_reducers``.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import mllm_efficient as me
from mllm_efficient.apply.prepare import encode, look
from mllm_efficient.cli import app, main
from mllm_efficient.compressors.base import generator_for
from mllm_efficient.compressors.composed import Composed, before_of, inside_of, or_random, projector_of, stages_of
from mllm_efficient.measure.counter import Counted, count
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.media.overlay import Result as Drawn
from mllm_efficient.media.overlay import render, views
from mllm_efficient.patches import adapter_for

from ..conftest import image_features, slow_greedy
from ..families import make, tiny
from .test_tokenflex import ByHand, random_folder

ROWS = ("one image", "two images", "text only")
SECOND = [
    "divprune:keep=0.5",
    "random:tokens=5,seed=3",
    "uniform:tokens=4",
    "pool:tokens=4",
    "tome:tokens=5",
    "spp:tokens=6",
    "cdpruner:tokens=3",
]
ANYRES = ("llava_next", "llava_onevision", "llava_next_video")


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def rows_of(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


# ------------------------------------------------------------------------------------------------ what it is


def test_it_is_one_method_of_its_stages():
    method = me.build("fastv:ratio=0.5 | divprune:tokens=20,newline=keep | tokenflex:tokens=36")
    assert isinstance(method, Composed) and [s.name for s in method.stages] == ["tokenflex", "divprune", "fastv"]
    assert method.name == "tokenflex | divprune | fastv" and method.kind == "projector | pre_llm | in_llm" and method.newline == "keep"
    assert method.trained and method.merges and method.installs == me.TokenFlex(tokens=36) and method.same_weights == "none@tokenflex"
    assert (
        me.build(method.spec()) == me.build(method.to_dict()) == me.build(method) == method and len({method, me.build(method.spec())}) == 1
    )
    assert projector_of(method) == me.TokenFlex(tokens=36) and inside_of(method) == me.FastV(ratio=0.5)
    assert before_of(method) == me.build("tokenflex:tokens=36 | divprune:tokens=20,newline=keep")
    assert before_of(me.FastV(ratio=0.5)) is None and stages_of(me.FastV(ratio=0.5)) == (me.FastV(ratio=0.5),)
    assert or_random(method).stages[0].weights == "random" and or_random(method).stages[1:] == method.stages[1:]
    assert me.build("cdpruner:tokens=9 | fastv:ratio=0.5").needs == {"text"}  # what fastv needs is of the decoder


@pytest.mark.parametrize(
    "spec, says",
    [
        ("divprune:tokens=9 | pool:tokens=9", "divprune and pool are of one kind"),
        ("tokenflex:tokens=9 | dpn", "tokenflex and dpn each bring trained weights: one of them can run"),
        ("tokenflex:tokens=9 | none@dpn", "tokenflex and none each bring trained weights"),
    ],
)
def test_what_cannot_be_composed_is_one_line(spec, says):
    with pytest.raises(me.MllmEfficientError, match=says):
        me.build(spec)


def test_it_has_no_budget_of_its_own():
    method = me.build("divprune:tokens=9 | fastv:ratio=0.5")
    assert method.fraction is None
    with pytest.raises(me.BadBudgetError, match="a budget for each of its stages"):
        method.budget  # noqa: B018


@pytest.mark.parametrize(
    "spec, says",
    [
        (
            "tokenflex:tokens=9,weights=random | fastervlm:tokens=4",
            "fastervlm needs attention of the tower's tokens, which the tokens of tokenflex",
        ),
        ("tokenflex:tokens=9,weights=random | visionzip:tokens=4", "visionzip needs attention, keys of the tower's tokens"),
        ("tokenflex:tokens=9,weights=random | resize:tokens=4", "resize makes the picture smaller, and tokenflex gives as many tokens"),
        (
            "tokenflex:tokens=9,weights=random | divprune:tokens=4,positions=keep",
            "positions='keep' has no effect on the tokens of tokenflex",
        ),
        ("tokenflex:tokens=9,weights=random | divprune:tokens=10", "tokens=10 is more than the 9"),
        ("divprune:tokens=9 | dpn:weights=random,at=1", "dpn pools rectangles of tokens, and divprune leaves none"),
        ("tokenflex:tokens=9,weights=random | divprune:tokens=4 | dpn:weights=random", "each bring trained weights"),
        ("divprune:tokens=20 | fastv:keep=0.01,layer=2", "a layer average of 1 of 20 tokens cannot be reached"),
        ("divprune:tokens=20 | fastv:layer=1,tokens=21", "tokens=21 is more than the 20"),
        *(
            (f"{before}:tokens=16 | dpn:weights=random,at=1", f"dpn pools rectangles of tokens, and {before} leaves none")
            for before in ("tome", "visionzip", "spp", "prumerge_plus")
        ),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused_before_any_call(tiny_llava, spec, says):
    with pytest.raises(me.MllmEfficientError, match=says):
        me.wrap(tiny_llava, spec)
    assert not adapter_for(tiny_llava).reached_inside


@pytest.mark.parametrize("before", ["tokenflex:tokens=9,weights=random", "divprune:keep=0.5", "pool:keep=0.5"])
def test_newline_columns_that_are_gone_cannot_be_kept_inside(before):
    name = before.partition(":")[0]
    with pytest.raises(me.UnsupportedModelError, match=f"fastv: newline='keep' has no effect after {name}, which leaves none"):
        me.wrap(copy.deepcopy(tiny("llava_next")), f"{before} | fastv:layer=1,ratio=0.5,newline=keep")


def test_newline_columns_cannot_be_kept_behind_a_projector_that_keeps_none():
    with pytest.raises(me.UnsupportedModelError, match="newline='keep' has no effect on the tokens of tokenflex"):
        me.wrap(copy.deepcopy(tiny("llava_next")), "tokenflex:tokens=4,weights=random | divprune:tokens=4,newline=keep")


# ------------------------------------------------------------------------------------------------ what it does


def second_by_hand(model, method, rows, ids, keys):
    """What a method leaves of the tokens (side * side, D) of each picture of a row."""
    side = int(len(rows[0]) ** 0.5) if rows else 0
    text = model.get_input_embeddings()(ids[ids != model.config.image_token_id])
    given = [me.VisualTokens(x, grid=(side, side), text=text, generator=generator_for(method, key)) for x, key in zip(rows, keys)]
    return [method.compress(v, method.yields(method.budget.count(len(v)), v.grid)) for v in given]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("second", SECOND)
def test_a_method_runs_on_what_the_projector_gives(make_llava, make_batch, tmp_path, second, beams):
    model = make_llava()
    module, method = random_folder(tmp_path, model), me.build(second)
    by_hand, batch = copy.deepcopy(model), make_batch(*ROWS)
    by_hand.model.multi_modal_projector = ByHand(module, 3)
    me.wrap(model, f"tokenflex:tokens=9,weights={tmp_path} | {second}")
    ends = model.generate(**batch, max_new_tokens=5, num_beams=beams)[:, batch["input_ids"].shape[1] :]
    report = me.last_report(model)
    assert [s["method"] for s in report.stages] == ["tokenflex", method.name]
    for row, kind in enumerate(ROWS):
        one = make_batch(kind)
        ids = one["input_ids"][0]
        rows = image_features(by_hand, one["pixel_values"]) if "pixel_values" in one else []
        left = second_by_hand(model, method, rows, ids, range(len(rows)))
        images = [image for image in report.images if image.row == row]
        assert [(i.full, i.kept, i.indices) for i in images] == [(36, len(x), None) for x in left]
        for image, x in zip(images, left):
            if x.indices is None:
                assert image.of_merged is None and sum(map(len, image.kept_planes)) == len(x)
            else:
                assert torch.equal(image.of_merged, x.indices) and [(p.rows, p.columns) for p in image.kept_planes] == [(3, 3)]
        if beams == 1:
            assert ends[row].tolist() == slow_greedy(model, ids, [x.features for x in left], 36, 5), kind
        else:
            alone = model.generate(**one, max_new_tokens=5, num_beams=beams)[0, len(ids) :]
            assert torch.equal(ends[row], alone)


@pytest.mark.parametrize("name", ANYRES)
@pytest.mark.parametrize("second", ["divprune:keep=0.4", "divprune:tokens=3,per=tile", "pool:keep=0.5", "random:tokens=5"])
def test_tiled_pictures_have_a_method_on_what_the_projector_gives(name, second):
    """Features, places in the prompt and cells of the picture, of a batch and of each of its rows."""
    model, method = tiny(name), me.build(second)
    first = "tokenflex:tokens=9,weights=random"
    batch = make(name, "one image", "text only", "long text")
    whole, done = me.prepare(model, first, **batch), me.prepare(model, f"{first} | {second}", **batch)
    found = zip(whole.features, done.features, whole.report.images, done.report.images)
    for number, ((_, all_of_it, _), (_, left, _), before, image) in enumerate(found):
        assert image.kept == len(left) and image.full == before.full and image.indices is None
        tiles = torch.arange(len(all_of_it)) // 9
        key = 0  # the number of a picture in its row
        assert number < 3
        if method.merges or method.per == "tile":
            parts = [all_of_it[tiles == t] for t in range(int(tiles[-1]) + 1)]
        else:
            parts = [all_of_it]
        k = method.budget.count(len(all_of_it), fixed=False)
        if method.per == "tile":
            wanted = [method.compress(me.VisualTokens(x, grid=(3, 3)), 3).features for x in parts]
        elif method.merges:
            from mllm_efficient.budget import apportion

            shares = apportion(k, [9] * len(parts))
            wanted = [method.compress(me.VisualTokens(x, grid=(3, 3)), share).features for x, share in zip(parts, shares)]
        else:
            v = me.VisualTokens(all_of_it, generator=generator_for(method, key))
            wanted = [method.compress(v, k).features]
        assert torch.equal(left, torch.cat(wanted))
    keep = done.visual_keep_mask
    assert (whole.visual_keep_mask | ~keep).all() and int((~keep).sum()) == sum(
        i.full + i.separators_full - i.kept for i in done.report.images
    )


@pytest.mark.parametrize("name", ANYRES)
def test_a_batch_of_tiled_pictures_equals_its_rows(name):
    model = copy.deepcopy(tiny(name))
    rows = ("one image", "two images", "text only")
    with me.compressed(model, "tokenflex:tokens=9,weights=random | cdpruner:tokens=4 | fastv:layer=1,ratio=0.5"):
        batch = make(name, *rows)
        together = model.generate(**batch, max_new_tokens=4)[:, batch["input_ids"].shape[1] :]
        for ids, kind in zip(together, rows):
            one = make(name, kind)
            assert torch.equal(ids, model.generate(**one, max_new_tokens=4)[0, one["input_ids"].shape[1] :]), kind


def test_a_stage_that_keeps_all_changes_nothing(make_llava, make_batch):
    """Bit for bit, whichever stage it is."""
    model, batch = make_llava(), make_batch(*ROWS)
    first = "tokenflex:tokens=9,weights=random"
    same = [first, f"{first} | divprune:keep=1", f"{first} | fastv:ratio=1", f"{first} | random:keep=1 | fastv:ratio=1"]
    found = []
    for spec in same:
        with torch.no_grad(), me.compressed(model, spec):
            found.append(model(**batch).logits)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_three_stages_report_what_each_layer_sees(make_llava, make_batch):
    model, batch = make_llava(), make_batch("one image")
    spec = "tokenflex:tokens=25,weights=random | divprune:tokens=10 | fastv:layer=1,ratio=0.5"
    with me.compressed(model, spec):
        out = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
        report = out.compression
        assert [s["method"] for s in report.stages] == ["tokenflex", "divprune", "fastv"]
        assert report.tokens_per_layer == [10, 5, 5] and report.visual_tokens_full == 36 and report.visual_tokens_kept == 7
        assert report.images[0].per_layer == (10, 5, 5) and report.compress_seconds > 0
        more = torch.cat([out.sequences, torch.tensor([[20, 21]])], 1)  # a second turn
        mask = torch.ones_like(more)
        second = model.generate(input_ids=more, attention_mask=mask, past_key_values=out.past_key_values, max_new_tokens=2)
        assert second.shape == (1, more.shape[1] + 2)
        whole = model.generate(**batch, max_new_tokens=2, compression=None)
        assert me.last_report(model).stages == () and whole.shape == out.sequences.shape
    assert not adapter_for(model).reached_inside


def test_gradients_of_a_composition_equal_those_without_its_wrapper(make_llava, make_batch):
    """Labels are cut as the prompt is; the loss reaches the projector in place."""
    model, batch = make_llava(), make_batch("one image", "two images")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    me.wrap(model, "tokenflex:tokens=9,weights=random | uniform:tokens=4")
    model.model.multi_modal_projector.requires_grad_(True)
    out = model(**batch, labels=labels)
    out.loss.backward()
    assert out.visual_keep_mask.shape == batch["input_ids"].shape and out.logits.shape[1] < batch["input_ids"].shape[1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.multi_modal_projector.parameters())


def test_pool_and_a_router_of_the_decoder_follow_each_other(make_llava, make_batch):
    """The router's rectangles are those that pool leaves; the plan knows them before."""
    model, batch = make_llava(layers=4), make_batch("one image")
    spec = "pool:tokens=16 | dpn:weights=random,at=2"
    method = me.build(spec)
    with me.compressed(model, spec):
        model.generate(**batch, max_new_tokens=2)
        report = me.last_report(model)
    assert report.tokens_per_layer[0] == 16 and report.tokens_per_layer[-1] <= 16 and report.images[0].kept_planes is not None
    from mllm_efficient.apply.plan import plan

    adapter = adapter_for(model)
    planned = plan(adapter, method, adapter.items(batch)[0])
    assert planned.per_layer[0] == 16


# ------------------------------------------------------------------------------------------------ what it costs

PHASES = ("vision", "compress", "prefill", "decode")


@pytest.mark.parametrize(
    "spec",
    [
        "tokenflex:tokens=144 | divprune:keep=0.5",
        "divprune:tokens=128 | fastv:layer=2,keep=0.5",
        "tokenflex:tokens=144 | divprune:keep=0.5 | sparsevlm:ratio=0.5",
        "pool:tokens=144 | dart:tokens=32",
        "resize:tokens=144 | fastv:ratio=0.5",
        "visionzip:tokens=64 | pyramiddrop:ratio=0.5",
    ],
)
def test_a_7b_shape_costs_what_torch_counts(spec):
    from ..measure.test_flops import on_meta

    shape, call = load_shape("llava-1.5-7b"), {"text_tokens": 20, "new_tokens": 2}
    found, closed = count(on_meta("llava-1.5-7b"), shape, me.build(spec), **call), cost(shape, method=spec, **call)
    assert found == Counted(*(getattr(closed, phase) for phase in PHASES))
    assert closed.method == me.build(spec).spec()


@pytest.mark.parametrize("newline", ["null", "keep"])
@pytest.mark.parametrize("name", ANYRES)
def test_tiled_pictures_cost_what_torch_counts(name, newline):
    model = tiny(name)
    shape, call = shape_of(model.config, name), {"text_tokens": 9, "image_size": (70, 50), "new_tokens": 2}
    for spec in (
        f"divprune:keep=0.3,newline={newline} | fastv:layer=1,ratio=0.5,newline={newline}",
        "tokenflex:tokens=9,weights=random | divprune:keep=0.5 | fastv:layer=1,ratio=0.5",
        "cdpruner:tokens=9,per=tile | dart:layer=1,ratio=0.5",
    ):
        closed = cost(shape, method=spec, **call)
        found, expected = count(model, shape, me.build(spec), **call), Counted(*(getattr(closed, phase) for phase in PHASES))
        if spec.startswith("cdpruner"):  # a CPU looks at few tokens again
            assert 0 < found.compress <= expected.compress
            found = dataclasses.replace(found, compress=expected.compress)
        assert found == expected, spec


def test_an_average_of_what_is_left_that_cannot_be_reached_is_an_error():
    with pytest.raises(me.BadBudgetError, match="a layer average of 6 of 64 tokens cannot be reached where 8 of 32 layers see them all"):
        cost("llava-1.5-7b", method="divprune:tokens=64 | pyramiddrop:keep=0.1")


# ------------------------------------------------------------------------------------------------ commands

THREE = "tokenflex:tokens=36 | divprune:keep=0.5 | fastv:ratio=0.5,layer=1"
TWO = "cdpruner:tokens=36,relevance=llm | fastv:ratio=0.5,layer=1"


def test_flops_says_what_every_layer_sees():
    none, row = rows_of(run("flops", "--model", "builtin", "--method", THREE, "--json"))
    assert row["method"] == THREE and row["visual_tokens_per_layer"] == [18, 9, 9, 9] and row["ratio"] < 70
    assert row["compress_tflops"] > 0 and none["compress_tflops"] == 0


def test_eval_runs_it_beside_the_baseline_on_its_weights():
    result = run("eval", "--limit", "21", "--method", THREE, "--method", TWO, "--json")
    rows = [r for r in rows_of(result) if r["task"] == "overall"]
    assert [r["method"] for r in rows if r["method"] != "no-image"] == ["none", "none@tokenflex", THREE, TWO]
    by = {r["method"]: r for r in rows}
    assert by[THREE]["visual_tokens_kept"] == 11 and by[THREE]["keep"] is None and by[THREE]["tokens"] is None
    assert by[TWO]["score"] > by[TWO]["floor"]
    assert "tokenflex keeps 36 of 144 tokens per image, then divprune 18 of them, then fastv keeps 18 tokens up to layer 1" in result.stderr


def test_bench_times_it_beside_random_and_resize_of_as_many_tokens():
    rows = rows_of(run("bench", "--method", TWO, "--repeats", "1", "--warmup", "0", "--output-tokens", "2", "--json"))
    assert [r["method"] for r in rows[:4]] == ["none", TWO, "random:tokens=22", "resize:tokens=22"]
    assert rows[1]["failed"] is None and rows[1]["visual_tokens_kept"] == 22 and 0 < rows[1]["flops_ratio"] < 1


def test_generate_and_show_take_it(tmp_path, picture):
    file = tmp_path / "a.png"
    picture(3).save(file)
    (row,) = rows_of(run("generate", "--image", str(file), "--prompt", "how many ?", "--method", THREE, "--json"))
    assert row["tokens_per_layer"] == [18, 9, 9, 9] and row["method"] == THREE
    result = run("show", "--image", str(file), "--method", THREE, "--method", TWO, "--output", str(tmp_path / "b.png"), "--json")
    assert [r["kept"] for r in rows_of(result)] == [11, 22] and (tmp_path / "b.png").stat().st_size > 1000


def test_sweep_crosses_the_stage_without_a_budget(tmp_path):
    result = run(
        "sweep", "--method", "divprune | fastv:ratio=0.5,layer=1", "--method", "tokenflex:tokens=36 | divprune:tokens=9",
        "--keep", "0.5,0.25", "--limit", "14", "--no-bench", "--output-dir", str(tmp_path), "--json",
    )  # fmt: skip
    by = {r["method"]: r for r in rows_of(result)}
    swept = [f"divprune:keep={k} | fastv:ratio=0.5,layer=1" for k in ("0.5", "0.25")]
    assert set(by) > {*swept, "tokenflex:tokens=36 | divprune:tokens=9", "none@tokenflex", "random:keep=0.5", "resize:keep=0.25"}
    assert [by[s]["visual_tokens_kept"] for s in swept] == [45, 22] and by[swept[0]]["asked"] == "keep=0.5"
    assert all(r["failed"] is None for r in by.values())
    table = run("report", str(tmp_path), "--format", "md").stdout
    assert r"divprune:keep=0.5 \| fastv:ratio=0.5,layer=1" in table


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--method", "divprune | fastv", "--keep", "0.5"], "crosses one stage with its budgets"),
        (["--method", "divprune | fastv:ratio=0.5"], "has no budget"),
        (["--method", "divprune | fastv:ratio=0.5", "--keep", "0.5", "--match", "flops"], "solves one budget"),
    ],
)
def test_what_a_sweep_cannot_cross_is_one_line(tmp_path, capsys, arguments, says):
    assert main(["sweep", *arguments, "--limit", "7", "--no-bench", "--output-dir", str(tmp_path / "a")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err.splitlines()[-1] and "Traceback" not in err


def test_a_file_composes_too(tmp_path):
    (tmp_path / "m.yaml").write_text("stages:\n- {method: divprune, tokens: 18}\n- fastv:ratio=0.5,layer=1\n")
    rows = rows_of(run("flops", "--model", "builtin", "--method", str(tmp_path / "m.yaml"), "--json"))
    assert rows[1]["method"] == "divprune:tokens=18 | fastv:ratio=0.5,layer=1"


def test_look_says_what_is_kept_without_an_answer(make_llava, make_batch):
    report = look(make_llava(), "divprune:tokens=20 | fastv:layer=1,ratio=0.5", **make_batch("one image"))
    assert report.tokens_per_layer == [20, 10, 10] and len(report.images[0].indices) == 10


def test_export_refuses_it(tmp_path, capsys):
    assert main(["export", "--method", "tokenflex:tokens=36 | divprune:keep=0.5", "--output-dir", str(tmp_path / "a")]) == 2
    assert "runs several methods one after the other" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_dataclasses_replace_keeps_what_is_of_the_whole():
    method = me.build("tokenflex:tokens=36 | divprune:keep=0.5")
    assert dataclasses.replace(method) == method and dataclasses.replace(method).name == method.name


# ------------------------------------------------------------------------------------------------ what is drawn


def test_what_is_dropped_of_merged_tokens_is_faded(make_llava, make_batch):
    """``render`` with the merged planes and what is left of them: the mean colour there, and nearly white elsewhere."""
    report = look(make_llava(), "pool:tokens=9 | fastv:layer=1,ratio=0.4", **make_batch("one image")).images[0]
    left = report.of_merged.tolist()
    assert report.indices is None and len(left) == report.per_layer[-1] == 4 and left == sorted(set(left)) and max(left) < 9
    picture = np.zeros((90, 90, 3), np.uint8)
    picture[..., 0] = 200
    result = Drawn("", 36, 4, report.planes, left, report.kept_planes)
    (view,) = views(report.planes)
    cells = render(picture, *view.of(result), lines=False)[15::30, 15::30].reshape(9, 3)
    for i, colour in enumerate(cells.tolist()):
        assert (colour == [200, 0, 0]) == (i in left), i


@pytest.mark.parametrize("spec, says", [(THREE, "of_merged"), ("divprune:tokens=36 | fastv:ratio=0.5,layer=1", "indices")])
def test_show_draws_the_last_stage(tmp_path, picture, spec, says):
    picture(3).save(tmp_path / "a.png")
    result = run("show", "--image", str(tmp_path / "a.png"), "--method", spec, "--output", str(tmp_path / "b.png"), "--json")
    (row,) = rows_of(result)
    assert len(row["indices"]) == row["tokens_per_layer"][-1]
    assert (row["kept_planes"] is not None) == (says == "of_merged")


# ------------------------------------------------------------------------------------------------ what was once wrong


def test_a_composition_is_built_not_put_together_by_hand():
    with pytest.raises(me.MllmEfficientError, match="two stages or more, in the order projector, pre_llm, in_llm"):
        Composed(stages=(me.FastV(layer=1, ratio=0.5),))
    with pytest.raises(me.MllmEfficientError, match="two stages or more, in the order projector, pre_llm, in_llm"):
        Composed(stages=(me.FastV(layer=1, ratio=0.5), me.DivPrune(tokens=9)))


@pytest.mark.parametrize("first", ["", "tokenflex:tokens=25,weights=random | "])
def test_tokens_in_the_order_of_choice_keep_their_numbers_inside(make_llava, make_batch, first):
    """What the decoder drops of a shuffled row, against the features that are left in it."""
    from mllm_efficient.patches.decoder.hooks import attached

    model, batch = make_llava(), make_batch("one image")
    spec = f"{first}divprune:tokens=10,order=picked | fastv:layer=1,ratio=0.5"
    whole = me.prepare(
        model, first[:-3] if first else "none", encoded=encode(model, first[:-3] or "none", **batch), input_ids=batch["input_ids"]
    )
    (_, everything, _) = whole.features[0]
    with torch.no_grad(), me.compressed(model, spec):
        prepared = me.prepare(model, spec, **batch)
        assert attached(model)
        model(**prepared.model_kwargs)
        (_, rows, _) = prepared.features[0]
        numbers = [int((everything == row).all(1).nonzero()[0]) for row in rows]
        (columns,) = prepared.staging.outcome["indices"]
        image = prepared.report.images[0]
    assert numbers != sorted(numbers)
    left = image.of_merged if first else image.indices
    assert left.tolist() == [numbers[c] for c in columns.tolist()]


@pytest.mark.parametrize(
    "spec, kept",
    [
        ("divprune:keep=0.5,newline=keep | fastv:layer=1,ratio=0.5", 0),
        ("divprune:keep=1 | fastv:layer=1,ratio=0.5", 0),
        ("divprune:keep=0.5,newline=keep | fastv:layer=1,ratio=0.5,newline=keep", None),
        ("divprune:keep=1 | fastv:layer=1,ratio=0.5,newline=keep", None),
    ],
)
def test_the_report_counts_newline_columns_at_the_end(spec, kept):
    model = tiny("llava_next")
    with torch.no_grad(), me.compressed(copy.deepcopy(model), spec) as wrapped:
        wrapped(**make("llava_next", "one image"))
        image = me.last_report(wrapped).images[0]
    assert image.separators_kept == (image.separators_full if kept is None else kept) and image.separators_full > 0


def test_more_than_is_left_is_clamped_where_pictures_differ():
    model = copy.deepcopy(tiny("llava_next"))
    for spec in ("divprune:keep=0.5 | fastv:layer=1,tokens=500", "fastv:layer=1,tokens=500"):
        with torch.no_grad(), me.compressed(model, spec):
            model(**make("llava_next", "one image"))
        assert me.last_report(model).images[0].clamped, spec


def test_a_kind_of_another_name_is_refused_by_flops_too(registered):
    @me.register("elsewhere")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Elsewhere(me.Selector):
        kind = "T"

    for spec in ("elsewhere:tokens=9 | fastv:ratio=0.5", "divprune:tokens=9 | elsewhere:tokens=3"):
        with pytest.raises(me.UnsupportedModelError, match="elsewhere is of kind T, which this version does not run"):
            cost("llava-1.5-7b", method=spec)


def test_a_sweep_stops_at_a_budget_that_no_model_can_meet(tmp_path, capsys):
    argv = [
        "sweep",
        "--method",
        "divprune:tokens=999 | fastv:ratio=0.5,layer=1",
        "--limit",
        "7",
        "--no-bench",
        "--output-dir",
        str(tmp_path / "a"),
    ]
    assert main(argv) == 2 and "tokens=999 is more than the 144" in capsys.readouterr().err


def test_compositions_are_series_and_pictures_of_their_own(tmp_path):
    from mllm_efficient.eval.report.plots import series_of

    names = [
        "divprune:tokens=64 | sparsevlm:ratio=0.3",
        "divprune:tokens=64,metric=l2 | fastv:keep=0.5,layer=1",
        "tokenflex:tokens=144 | divprune:keep=0.5",
    ]
    assert list(map(series_of, names)) == ["divprune | sparsevlm:ratio=0.3", "divprune:metric=l2 | fastv:layer=1", "tokenflex | divprune"]
    result = run(
        "sweep",
        "--method",
        "divprune | fastv:ratio=0.5,layer=1",
        "--keep",
        "0.25",
        "--limit",
        "7",
        "--no-bench",
        "--output-dir",
        str(tmp_path),
    )
    assert result.exit_code == 0
    shown = json.loads((tmp_path / "pictures.json").read_text())["samples"]
    assert all(any(m["method"] == "divprune:keep=0.25 | fastv:ratio=0.5,layer=1" for m in s["methods"]) for s in shown)


def test_nothing_published_is_of_a_composition():
    from mllm_efficient.eval.lmms.tables import beside

    row = {"task": "gqa", "primary": True, "value": 50.0, "score": 50.0, "top": None, "visual_tokens_full": 576, "visual_tokens_kept": 64}
    table = {"full": 576, "rows": {"divprune": {"GQA": 57.5}, "divprune@64": {"GQA": 57.5}}, "tasks": {"gqa": "GQA"}, "kept": {}}
    assert beside([{**row, "method": "divprune:tokens=128 | fastv:keep=0.5"}], table) == []
    assert len(beside([{**row, "method": "divprune:tokens=64"}], table)) == 1


def test_a_second_turn_runs_on_the_weights_that_the_first_put_in():
    result = run("eval", "--limit", "6", "--turns", "2", "--method", "tokenflex:tokens=16 | divprune:keep=0.5", "--json")
    rows = rows_of(result)
    assert not any(r["failures"] for r in rows) and {r["turns"] for r in rows if r["method"] == "none@tokenflex"} == {1, 2}
