"""NaN and infinity among what a method works on raise by name, on every way in; what nothing works on is as in the plain model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.compressors.math import finite as _finite
from mllm_efficient.compressors.math.finite import Watch, require_finite, require_scores
from mllm_efficient.registry import BUILTIN

NEW = {"max_new_tokens": 2, "do_sample": False}
SPECS = (
    "divprune:tokens=9", "random:tokens=9", "uniform:tokens=9", "pool:tokens=9", "pool:tokens=9,op=gem", "spp:tokens=9", "resize:tokens=9",
    "divmerge:tokens=9", "uniform:tokens=9,merge=mean", "mmtok:tokens=9", "apet:tokens=9", "prunesid:tokens=9", "otprune:tokens=9",
    "hawk:tokens=9", "vscan:tokens=9", "vidcom2:tokens=9", "vcast:tokens=9", "fastvid:tokens=9",
    "cdpruner:tokens=9", "tome:tokens=9", "tome:tokens=18,at=tower", "flowcut:tokens=9", "fastervlm:tokens=9", "vispruner:tokens=9",
    "visionzip:tokens=9",
    "scope:tokens=9", "prumerge_plus:tokens=9", "tokenflex:tokens=9,weights=random", "fastv:layer=1,ratio=0.5",
    "pyramiddrop:ratio=0.5,debias=true",
    "sparsevlm:ratio=0.5", "sparsevlm:ratio=0.5,recycle=0.5", "dart:layer=1,ratio=0.5", "dpn:weights=random,at=1/2",
    "divmerge:tokens=9 | proportional",
)  # fmt: skip
KEEP_ALL = ("none", "divprune:keep=1", "pool:keep=1", "resize:keep=1", "fastv:keep=1", "dart:keep=1")


@pytest.fixture
def spoilt(make_batch):
    """A batch whose second picture has one pixel that is not finite."""

    def make(value=math.nan):
        batch = make_batch("one image", "long text")
        batch["pixel_values"][1, 0, 20, 20] = value
        return batch

    return make


def test_the_list_has_every_method():
    listed = {stage.name for spec in SPECS for stage in me.build(spec).parts}
    # The first two run nothing of their own on a model's values, pixelprune looks at pixels and does not run on a LLaVA; evs has tests of
    # its own, because it leaves images alone.
    assert listed | {"none", "native", "pixelprune", "evs"} == set(BUILTIN)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_one_pixel_that_is_not_finite_raises_by_name(tiny_llava, spoilt, spec, value):
    batch, name = spoilt(value), spec.partition(":")[0]
    with me.compressed(tiny_llava, spec):
        with pytest.raises(me.NotFiniteError, match=f"{name}.* NaN or infinity"):
            tiny_llava.generate(**batch, **NEW)
        with pytest.raises(me.NotFiniteError, match=f"{name}.* NaN or infinity"):
            tiny_llava(**batch)
        with pytest.raises(me.NotFiniteError, match=f"{name}.* NaN or infinity"):  # in the decoder when that runs
            tiny_llava.generate(**me.prepare(tiny_llava, spec, **batch).model_kwargs, **NEW)


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_projector_that_overflows_raises_by_name(tiny_llava, make_batch, spec):
    """The tower, its attention and its keys are finite here."""
    tiny_llava.model.multi_modal_projector.linear_2.weight.mul_(math.inf)
    with me.compressed(tiny_llava, spec):
        if spec.startswith("tokenflex"):  # which has that projector's place
            for part in tiny_llava.model.multi_modal_projector.parameters():
                part.mul_(math.inf)
        with pytest.raises(me.NotFiniteError, match=f"{spec.partition(':')[0]}.* NaN or infinity"):
            tiny_llava.generate(**make_batch("one image"), **NEW)


@pytest.mark.parametrize("spec", KEEP_ALL)
@torch.no_grad()
def test_where_nothing_goes_the_answer_is_the_plain_models(tiny_llava, spoilt, spec):
    batch = spoilt()
    logits, answer = tiny_llava(**batch).logits, tiny_llava.generate(**batch, **NEW)
    assert logits.isnan().any()
    with me.compressed(tiny_llava, spec):
        assert torch.equal(tiny_llava(**batch).logits.nan_to_num(-7), logits.nan_to_num(-7))
        assert torch.equal(tiny_llava.generate(**batch, **NEW), answer)


@pytest.mark.parametrize("spec", ["divprune:tokens=9", "uniform:tokens=9", "pool:tokens=9", "fastv:layer=1,ratio=0.5"])
@torch.no_grad()
def test_the_next_call_is_right(tiny_llava, make_batch, spoilt, spec):
    batch = make_batch("one image", "long text")
    me.wrap(tiny_llava, spec)
    wanted = tiny_llava.generate(**batch, **NEW)
    with pytest.raises(me.NotFiniteError):
        tiny_llava.generate(**spoilt(), **NEW)
    assert torch.equal(tiny_llava.generate(**batch, **NEW), wanted)


@pytest.mark.parametrize("at", ["states", "scores"])
@torch.no_grad()
def test_states_and_scores_in_the_decoder_raise_by_name(tiny_llava, make_batch, registered, at):
    @registered("mine")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(me.Reducer):
        def layers(self, depth):
            return (1,)

        def score(self, v):
            return v.index / 0 if at == "scores" else v.index.float()

    if at == "states":
        tiny_llava.model.language_model.layers[0].mlp.down_proj.weight.mul_(math.inf)
    with me.compressed(tiny_llava, "mine:ratio=0.5"), pytest.raises(me.NotFiniteError, match="mine"):
        tiny_llava.generate(**make_batch("one image"), **NEW)


@pytest.mark.parametrize(
    "spec", ["divprune:tokens=9", "fastervlm:tokens=9", "pool:tokens=9,op=gem", "dart:layer=1,ratio=0.5", "dpn:weights=random,at=1/2"]
)
@torch.no_grad()
def test_the_answers_are_read_once_a_call(tiny_llava, make_batch, spec, monkeypatch):
    """However many images there are; on a GPU every reading waits for it."""
    read = []
    monkeypatch.setattr(_finite.Watch, "read", lambda self, stock=Watch.read: read.append(len(self._found)) or stock(self))
    me.wrap(tiny_llava, spec)
    for rows in (("one image",), ("one image", "two images", "long text")):
        read.clear()
        tiny_llava(**make_batch(*rows))
        assert len(read) == 1 and read[0] >= sum({"one image": 1, "two images": 2, "long text": 1}[row] for row in rows)


def test_a_watch_names_the_first_that_is_not_finite_and_says_nothing_until_it_is_read():
    good, bad = torch.ones(3), torch.tensor([1.0, math.inf])
    with Watch() as watch:
        require_finite(good, "one", "tokens")
        require_scores(torch.tensor([-math.inf, 1.0]), "two")
        require_scores(bad, "three")
        require_finite(bad, "four", "keys")
    with pytest.raises(me.NotFiniteError, match="three: score gave NaN or infinity"):
        watch.read()
    with pytest.raises(me.NotFiniteError, match="five: the keys hold NaN or infinity"):  # outside, at once
        require_finite(bad, "five", "keys")
    require_finite(bad.to("meta"), "six", "keys")


@pytest.mark.parametrize("spec", ["divprune:tokens=3", "scope:tokens=3", "fastervlm:tokens=3"])
def test_a_method_by_itself_raises_at_once(spec):
    """Also what serving calls, for which nothing changes: no watch is on there."""
    v = me.VisualTokens(torch.full((9, 4), math.nan), attention=torch.full((9,), math.nan))
    with pytest.raises(me.NotFiniteError, match="NaN or infinity"):
        me.build(spec).compress(v, 3)
    blind = me.build("uniform:tokens=3").compress(v, 3)
    assert blind.indices.tolist() == [1, 4, 7]


@pytest.mark.parametrize("error, of", [(me.NotFiniteError, me.CountMismatchError), (me.BadSettingError, me.BadBudgetError)])
def test_the_errors_are_of_the_kinds_that_were_raised_before(error, of):
    assert issubclass(error, of) and issubclass(error, me.MllmEfficientError) and issubclass(error, ValueError)


@pytest.mark.parametrize("spec", [
    "divprune:tokens=9,metric=l3", "divprune:tokens=9,budget=3", "divprune:tokens=9,per=row", "divprune:tokens=9,newline=no",
    "scope:tokens=9,alpha=-1", "tome:tokens=9,r=0", "pool:tokens=9,op=sum", "random:tokens=9,seed=x", "fastv:layer=0,keep=0.5",
    "dart:keep=0.5,pivots=0", "dpn:pool=sum", "cdpruner:tokens=9,clip=x", "sparsevlm:keep=0.5,recycle=2", "none:per=tile",
    "visionzip:tokens=9,contextual=1", "vispruner:tokens=9,r=2", "prumerge_plus:tokens=9,neighbours=0", "tokenflex:tokens=9,per=tile",
    "divprune:tokens=9,positions=up", "divprune:tokens=9,merge=sum", "divmerge:tokens=9,merge=", "none:merge=mean",
])  # fmt: skip
def test_a_bad_setting_is_a_bad_setting(spec):
    with pytest.raises(me.BadSettingError):
        me.build(spec)


@pytest.mark.parametrize("spec", ["divprune:tokens=0", "divprune:keep=2", "tokenflex:tokens=8", "fastv:keep=0.5,ratio=0.5"])
def test_a_bad_budget_is_no_bad_setting(spec):
    with pytest.raises(me.BadBudgetError) as caught:
        me.build(spec)
    assert not isinstance(caught.value, me.BadSettingError)
