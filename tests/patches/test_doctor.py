"""The doctor, and what hooks read of a host: a version that names things otherwise is refused, never answered wrongly."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto import configuration_auto
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import mllm_efficient as me
from mllm_efficient import cli, patches
from mllm_efficient.apply import signatures as host
from mllm_efficient.patches import checkup
from mllm_efficient.patches.decoder import hooks as decoder
from mllm_efficient.patches.decoder import passes
from mllm_efficient.patches.facts import FACTS
from mllm_efficient.patches.rules import FAMILIES as TABLE
from mllm_efficient.patches.rules import rules_class

from .. import families


@pytest.fixture
def renamed(monkeypatch):
    """Llama's layers as a later transformers could have them: the cache is called ``kv``."""
    forward, call = LlamaDecoderLayer.forward, LlamaDecoderLayer.__call__

    def renamed_forward(
        self, hidden_states, attention_mask=None, position_ids=None, kv=None, use_cache=False, position_embeddings=None, **kwargs
    ):
        name = host.cache_name(forward)
        return forward(
            self, hidden_states, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            position_embeddings=position_embeddings, **{name: kv}, **kwargs,
        )  # fmt: skip

    def renamed_call(self, *args, **kwargs):
        for name in host.CACHE_NAMES:
            if name in kwargs:
                kwargs["kv"] = kwargs.pop(name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", renamed_forward)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", renamed_call)


@pytest.fixture
def fresh_check():
    checkup._fault.cache_clear()
    yield
    checkup._fault.cache_clear()


def test_everything_holds_here(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert {row["model_type"] for row in rows} == set(TABLE)
    assert {(row["kind"], row["check"]) for row in rows} == {(k, c) for k in checkup.KINDS for c in checkup.CHECKS}
    assert len(rows) == len(checkup._models()) * len(checkup.KINDS) * len(checkup.CHECKS)
    absent = {name for name in TABLE if FACTS[name].refusal(patches.transformers_version())}
    outside = {"minicpmv4_6", "minicpmv4_7", "llama4", "gemma4", *(f.name for f in families.EVERY.values() if not f.inside)}
    offered = {"pre_llm": set(TABLE) - absent, "in_llm": set(TABLE) - absent - outside}
    assert all(row["holds"] is True for row in rows if row["model_type"] in offered.get(row["kind"], ()))
    lacking = {kind: {row["model_type"] for row in rows if row["holds"] is None and row["kind"] == kind} for kind in checkup.KINDS}
    assert lacking["projector"] == absent | {name for name in TABLE if not rules_class(name).projects}
    blind = {"gemma3", "gemma4", "idefics3", "lighton_ocr", "llama4", "minicpmv4_6", "minicpmv4_7", "mistral3", "smolvlm"}
    assert lacking["attention"] == absent | blind
    assert lacking["in_llm"] == absent | outside
    assert lacking["in_tower"] == set(TABLE) - {"llava", "internvl", "cohere2_vision"} and not any(row["holds"] is False for row in rows)
    assert found["meta"]["versions"]["transformers"] == transformers.__version__


def test_a_family_that_this_transformers_does_not_have_is_named(monkeypatch, tmp_path, capsys):
    without = {k: None for k in configuration_auto.CONFIG_MAPPING.keys() if k != "cohere2_vision"}  # noqa: SIM118
    monkeypatch.setattr(configuration_auto, "CONFIG_MAPPING", without)
    rows = checkup.check("cohere2_vision", checkup.KINDS)
    version = ".".join(transformers.__version__.split(".")[:2])
    assert {(row.holds, row.why) for row in rows} == {(None, f"transformers {version} has no cohere2_vision: a newer one is needed")}
    config = {"architectures": ["Cohere2VisionForConditionalGeneration"], **checkup._models()["cohere2_vision"]["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    for command in (["bench", "--random-weights"], ["generate", "--image", str(tmp_path / "x.png"), "--prompt", "what ?"]):
        assert cli.main([*command, "--model", str(tmp_path)]) == 2
        assert f"transformers {version} has no cohere2_vision" in capsys.readouterr().err


def test_a_host_that_renames_an_argument_is_named(renamed, monkeypatch, capsys):
    only = {name: model for name, model in checkup._models().items() if name in ("llava", "internvl")}
    monkeypatch.setattr(checkup, "_models", lambda: only)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "llava in_llm cache: " in said and "takes its cache under none of the names cache, past_key_values" in said
    assert "llava pre_llm" not in said.split("checks hold")[1] and "internvl" not in said.split("checks hold")[1]


@pytest.mark.parametrize("kind", checkup.KINDS)
def test_a_check_can_fail(kind, monkeypatch):
    """Decoding at wrong positions, or a batch whose padding is seen, is found by what it answers."""
    broken = kind == "in_llm"
    if broken:
        places = passes.Pass._places

        def shifted(self, segment, hidden):
            return places(self, segment, hidden) + 2 * (hidden.shape[1] == 1)

        monkeypatch.setattr(passes.Pass, "_places", shifted)
    else:
        forward = transformers.LlavaForConditionalGeneration.forward

        def blind(self, *args, attention_mask=None, **kwargs):
            return forward(self, *args, attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **kwargs)

        monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", blind)
    rows = {row.check: row for row in checkup.check("llava", (kind,))}
    failed = "cache" if broken else "batch"
    assert rows[failed].holds is False and "differ" in rows[failed].why


@pytest.mark.parametrize("kind", ["attention", "in_tower"])
@pytest.mark.parametrize("model_type", ["llava", "internvl"])
def test_a_tower_that_attends_otherwise_is_found(model_type, kind, monkeypatch):
    """A step before its projections that is not known here."""
    from transformers.models.clip.modeling_clip import CLIPAttention
    from transformers.models.internvl.modeling_internvl import InternVLVisionAttention

    cls = CLIPAttention if model_type == "llava" else InternVLVisionAttention
    forward = cls.forward

    def otherwise(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states + hidden_states.sin(), *args, **kwargs)

    monkeypatch.setattr(cls, "forward", otherwise)
    says = {"attention": "its attention is not that of the tower's own kernel", "in_tower": "run block by block it gives other tokens"}
    identity = checkup.check(model_type, (kind,))[0]
    assert identity.check == "identity" and identity.holds is False and says[kind] in identity.why


def test_state_of_torch_does_not_matter_and_stays(fresh_check):
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert not checkup.host_fault("llava")
        assert torch.get_default_dtype() == torch.float64
        drawn = torch.rand(2)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2, dtype=torch.float64))


class TestUntested:
    """A transformers whose minor version is newer than the newest tested."""

    @pytest.fixture(autouse=True)
    def newer(self, monkeypatch, fresh_check):
        monkeypatch.setattr(patches, "NEWEST_TESTED", (5, 0))

    def test_one_check_runs_in_a_process(self, monkeypatch, tiny_llava):
        ran = []
        monkeypatch.setattr(checkup, "check", lambda *how, real=checkup.check: ran.append(how) or real(*how))
        for _ in range(2):
            me.unwrap(me.wrap(tiny_llava, "fastv:layer=1,ratio=0.5"))
        assert ran == [("llava", ("in_llm",))]
        me.unwrap(me.wrap(tiny_llava, "divprune:keep=0.5"))
        assert len(ran) == 1

    def test_what_fails_is_refused(self, renamed, monkeypatch, tiny_llava):
        monkeypatch.setattr(decoder, "check_layer", lambda layer: None)  # as if the name were hidden in **kwargs
        with pytest.raises(me.UnsupportedModelError, match="wrong on this transformers.*LlamaDecoderLayer"):
            me.wrap(tiny_llava, "fastv:layer=1,ratio=0.5")
        assert not tiny_llava._forward_pre_hooks
        me.unwrap(me.wrap(tiny_llava, "divprune:keep=0.5"))


@pytest.mark.parametrize("name", [f.name for f in families.FAMILIES.values() if f.inside])
def test_hooks_see_the_cache_in_every_step(name, monkeypatch):
    """The next name that a host gives its cache cannot pass in silence."""
    seen: list[tuple[int, object, int]] = []
    enter = passes.Pass.enter

    def spied(self, index, layer, hidden, kwargs):
        cache = host.cache_of(kwargs)
        seen.append((index, cache, 0 if cache is None else cache.get_seq_length(index)))
        return enter(self, index, layer, hidden, kwargs)

    monkeypatch.setattr(passes.Pass, "enter", spied)
    monkeypatch.setattr(passes.Prefill, "enter", lambda *args, real=passes.Prefill.enter: real(*args))
    model = families.tiny(name)
    depth = model.config.get_text_config().num_hidden_layers
    out = me.wrap(model, f"fastv:layer={depth - 1},ratio=0.5").generate(
        **families.make(name, "one image"), max_new_tokens=3, return_dict_in_generate=True
    )
    assert [index for index, _, _ in seen] == [*range(depth)] * 2  # both steps behind the prefill
    assert all(cache is host.cache_of(out) for _, cache, _ in seen)
    assert all(length > 0 for _, _, length in seen)


def test_a_layer_without_its_cache_is_refused(monkeypatch, tiny_llava, make_batch):
    model = me.wrap(tiny_llava, "fastv:layer=1,ratio=0.5")
    monkeypatch.setattr(host, "CACHE_NAMES", ("another_name",))
    with pytest.raises(me.UnsupportedModelError, match="LlamaDecoderLayer"):
        model(**make_batch("one image"), use_cache=True)


def test_cache_of_reads_either_name_without_a_warning(tiny_llava, make_batch, recwarn):
    out = tiny_llava(**make_batch("one image"), use_cache=True)
    assert host.cache_of(out) is not None and host.cache_of({"past_key_values": 1}) == 1 and host.cache_of({"cache": 2}) == 2
    assert host.cache_of({"past_key_values": None, "cache": 2}) == 2 and host.cache_of({}) is None
    assert host.cache_of(tiny_llava(**make_batch("one image"), use_cache=False)) is None
    assert not recwarn.list
