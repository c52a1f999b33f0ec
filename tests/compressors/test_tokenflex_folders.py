"""TokenFLEX: its folders and its cost."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllm_efficient as me
from mllm_efficient.measure.counter import count
from mllm_efficient.measure.flops import cost, load_shape, shape_of
from mllm_efficient.trained import folder as trained
from mllm_efficient.trained.base_model import base_of, differs
from mllm_efficient.trained.install import installed

from .test_tokenflex import (
    random_folder,
)

LOGITS = """
import sys, torch, transformers
import mllm_efficient as me
torch.set_num_threads(1)  # as in this process: some CPUs add up in another order with more
model = transformers.LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
batch = torch.load(sys.argv[2], weights_only=True)
method = me.load(sys.argv[3])
assert method == me.TokenFlex(tokens=9, weights=sys.argv[3]), method
with torch.no_grad():
    torch.save(me.wrap(model, method)(**batch).logits, sys.argv[4])
"""


def test_saved_and_loaded_in_a_fresh_process_the_logits_are_the_same(tiny_llava, make_batch, tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    random_folder(tmp_path / "flex", tiny_llava, {name: tiny_llava.get_parameter(name) * 1.5})
    batch = make_batch("one image", "two images", "text only")
    tiny_llava.save_pretrained(tmp_path / "base")
    torch.save(dict(batch), tmp_path / "batch.pt")
    with torch.no_grad():
        wanted = me.wrap(tiny_llava, me.load(tmp_path / "flex"))(**batch).logits
    files = [str(tmp_path / name) for name in ("base", "batch.pt", "flex", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOGITS, *files], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), wanted)


def spoil(what):
    def edit(folder):
        state = load_file(folder / "compressor.safetensors")
        config = json.loads((folder / "config.json").read_text())
        if what == "missing":
            del state["gate.bias"]
        elif what == "extra":
            state["more.weight"] = torch.zeros(2)
        elif what == "size":
            state["down.weight"] = torch.zeros(3, 3)
        elif what == "width":
            config["sizes"]["outputs"] = 48
        elif what == "base":
            config["base"]["sample"]["model.language_model.norm.weight"] = [9.0, 9.0]
        elif what == "torn":
            (folder / "compressor.safetensors").write_bytes(b"torn")
            return
        elif what == "json":
            (folder / "config.json").write_text("{")
            return
        elif what == "other":
            (folder / "config.json").write_text('{"architectures": []}')
            return
        elif what == "gone":
            (folder / "config.json").unlink()
            return
        elif what == "delta":
            trained.save_delta(folder, {"model.language_model.nothing.weight": torch.zeros(2)})
        save_file(state, folder / "compressor.safetensors")
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize("what, message", [
    ("missing", "lacks gate.bias"), ("extra", "has unknown more.weight"), ("size", "wrong size of down.weight"),
    ("width", "projector 32 -> 48, and LlavaForConditionalGeneration needs 32 -> 32"), ("base", "trained on another model"),
    ("torn", "cannot read"), ("json", "not JSON"), ("other", "describes no trained method"), ("gone", "no config.json there"),
    ("delta", "is no weight of this model"),
])  # fmt: skip
def test_a_folder_that_does_not_fit_is_one_line_and_leaves_the_model_alone(tiny_llava, tmp_path, what, message):
    random_folder(tmp_path, tiny_llava)
    spoil(what)(tmp_path)
    own = tiny_llava.model.multi_modal_projector
    with pytest.raises(me.MllmEfficientError, match=message) as caught:
        me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")
    assert "\n" not in str(caught.value) and tiny_llava.model.multi_modal_projector is own
    me.wrap(tiny_llava, "divprune:tokens=9")


def test_without_weights_nothing_is_made_up(tiny_llava, make_batch):
    with pytest.raises(me.MllmEfficientError, match="no weights of it ship for this model"):
        me.wrap(tiny_llava, "tokenflex:tokens=9")
    with pytest.raises(me.MllmEfficientError, match="use wrap or compressed"):
        me.prepare(tiny_llava, "none@tokenflex:weights=random", **make_batch("one image"))


def test_load_takes_the_saved_budget_or_a_given_one(tiny_llava, tmp_path):
    random_folder(tmp_path, tiny_llava)
    assert me.load(tmp_path) == me.TokenFlex(tokens=9, weights=str(tmp_path))
    assert me.load(tmp_path, keep=0.5) == me.TokenFlex(keep=0.5, weights=str(tmp_path))
    with pytest.raises(me.MllmEfficientError, match="no parameter 'nonsense'"):
        me.load(tmp_path, nonsense=1)
    with pytest.raises(me.MllmEfficientError, match="no config.json there"):
        me.load(tmp_path / "nowhere")


def test_the_base_is_known_in_any_dtype_and_wrapping_and_told_from_others(tiny_llava, make_llava, tmp_path):
    base = base_of(tiny_llava)
    for dtype in (torch.bfloat16, torch.float16):
        assert differs(base, copy.deepcopy(tiny_llava).to(dtype)) is None
    assert "is another" in differs(base, make_llava(seed=1))
    assert "num_hidden_layers is another" in differs(base, make_llava(layers=2))
    tuned = copy.deepcopy(tiny_llava)
    with torch.no_grad():
        tuned.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert "layers.1.mlp.up_proj.weight is another" in differs(base, tuned)
    random_folder(tmp_path, tiny_llava)
    assert differs(base, me.wrap(tiny_llava, f"tokenflex:tokens=9,weights={tmp_path}")) is None


@pytest.mark.parametrize("name, picture", [
    ("llava-1.5-7b", {}), ("llava-1.6-7b", {"image_size": (672, 672)}), ("llava-onevision-7b", {"image_size": (768, 384)}),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 64, 144])
def test_flops_equal_the_counter(name, picture, tokens):
    from mllm_efficient.measure.counter import build_on_meta

    shape, method = load_shape(name), me.TokenFlex(tokens=tokens)
    found, counted = cost(shape, method=method, **picture), count(build_on_meta(shape), shape, method, **picture)
    assert (found.vision, found.compress, found.prefill) == (counted.vision, counted.compress, counted.prefill)


def test_flops_are_those_of_the_folders_own_layers(tiny_llava, tmp_path):
    for name, sizes in (("mlp", {"layers": "mlp"}), ("wide", {"expansion": 5})):
        random_folder(tmp_path / name, tiny_llava, **sizes)
        shape, method = shape_of(tiny_llava.config), me.TokenFlex(tokens=9, weights=str(tmp_path / name))
        assert cost(shape, method=method).vision == count(tiny_llava, shape, method).vision


BEFORE = [{"mixer": m} for m in ("pool", "raft", "strip", "shift", "csw", "dwconv")]
BEFORE += [{"pooling": p} for p in ("tap", "attsets", "ggem", "regional_gem", "prefix")] + [{"mixer": "csw", "pooling": "attsets"}]


@pytest.mark.parametrize("settings", BEFORE, ids=lambda s: "-".join(s.values()))
def test_mixers_and_poolings_are_saved_loaded_and_counted(tiny_llava, make_batch, tmp_path, settings):
    module = random_folder(tmp_path, tiny_llava, **settings)
    said = json.loads((tmp_path / "config.json").read_text())["sizes"]
    assert all(said[key] == value for key, value in settings.items())
    assert (said.get("mixer_side"), said.get("queries")) == (
        12 if settings.get("mixer") in ("raft", "strip") else None, 64 if settings.get("pooling") == "prefix" else None,
    )  # fmt: skip
    shape, method = shape_of(tiny_llava.config), me.load(tmp_path)
    for counted in (method, me.build(f"none@tokenflex:weights={tmp_path}")):
        with installed(tiny_llava, counted):
            assert cost(shape, method=counted).vision == count(tiny_llava, shape, counted).vision
    with torch.no_grad():
        me.wrap(tiny_llava, method)(**make_batch("one image"))
    held = tiny_llava.model.multi_modal_projector
    features = torch.randn(2, 36, 32)
    with torch.no_grad():
        assert torch.equal(held(features, side=3), module(features, side=3))
    me.unwrap(tiny_llava)


def test_a_folder_whose_settings_are_not_those_of_its_weights_is_one_line(tiny_llava, tmp_path):
    random_folder(tmp_path, tiny_llava, mixer="raft")
    config = json.loads((tmp_path / "config.json").read_text())
    for sizes, message in (
        ({"mixer": "csw"}, "no tokenflex has these sizes"),
        ({"mixer_side": 6}, "wrong size of mixer"),
        ({"mix": 1}, "no setting mix"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "sizes": {**config["sizes"], **sizes}}))
        with pytest.raises(me.MllmEfficientError, match=message):
            me.wrap(tiny_llava, me.load(tmp_path))


def test_all_tokens_on_its_weights_cost_its_projector():
    shape = load_shape("llava-1.5-7b")
    on, full = cost(shape, method="none@tokenflex"), cost(shape, method=me.TokenFlex(keep=1))
    assert replace(on, method="") == replace(full, method="") and on.vision != cost(shape).vision
