"""torch.compile around a wrapped model, and wrapped models parts of which were compiled before."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

import mllm_efficient as me

from .. import families

SPEC = "divprune:tokens=9"
INSIDE = "fastv:layer=1,ratio=0.5"
WATCHING = ("visionzip", "fastervlm", "scope", "prumerge_plus", "vispruner")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """What was compiled for another test is forgotten, and with it what torch says only once."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def said_of_us(records) -> list[str]:
    """Warnings that name code of this package."""
    return [text for text in map(str, records) if any(part in text for part in ("mllm_efficient", "patches/", "lru_cache", "perf_counter"))]


@pytest.mark.parametrize(
    ("spec", "backend", "least"),
    [
        (SPEC, "eager", 0.0),
        (INSIDE, "eager", 0.0),
        pytest.param(SPEC, "inductor", 1e-5, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_wrapped_model_compiles(make_llava, make_batch, caplog, spec, backend, least):
    """Compression runs outside of what is traced, so that torch has nothing to say of it."""
    batch = make_batch("one image")
    wanted = me.wrap(make_llava(layers=2, vision_layers=2), spec)(**batch)
    model = me.wrap(make_llava(layers=2, vision_layers=2), spec)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        out = torch.compile(model, backend=backend)(**batch)
    torch.testing.assert_close(out.logits, wanted.logits, atol=least, rtol=0)
    assert torch.equal(out.visual_keep_mask, wanted.visual_keep_mask)
    assert me.last_report(model).visual_tokens_kept < 36
    assert said_of_us([*caught, *(record.getMessage() for record in caplog.records)]) == []


@torch.no_grad()
def test_the_language_model_alone_is_compiled_after_wrap(make_llava, make_batch):
    """The form in which ``generate`` runs compiled code: ``torch.compile(model).generate`` is the uncompiled model's."""
    batch = make_batch("one image", "two images")
    wanted = me.wrap(make_llava(layers=1), SPEC).generate(**batch, max_new_tokens=2)
    model, calls = me.wrap(make_llava(layers=1), SPEC), []

    def backend(graph, inputs):
        def run(*args):
            calls.append(len(args))
            return graph.forward(*args)

        return run

    assert torch.equal(torch.compile(model, backend=backend).generate(**batch, max_new_tokens=2), wanted)
    assert not calls
    model.model.language_model.compile(backend=backend)
    assert torch.equal(model.generate(**batch, max_new_tokens=2), wanted)
    assert calls


def compile_tower(model):
    model.model.vision_tower.compile(backend="eager")


def compile_features(model):
    model.model.get_image_features = torch.compile(model.model.get_image_features, backend="eager")


@pytest.mark.parametrize(("name", "compiled"), [*((name, compile_tower) for name in WATCHING), ("fastervlm", compile_features)])
@torch.no_grad()
def test_a_tower_that_was_compiled_and_has_run_is_watched(make_llava, make_batch, name, compiled):
    """Compiled code has no place for hooks that come later: the tower then runs as it is written."""
    batch, spec = make_batch("one image", "two images"), f"{name}:tokens=9"
    wanted = me.wrap(make_llava(), spec)(**batch).logits
    model = make_llava()
    compiled(model)
    plain = model(**batch).logits
    me.wrap(model, spec)
    for _ in range(2):
        assert torch.equal(model(**batch).logits, wanted)
    assert torch.equal(me.unwrap(model)(**batch).logits, plain)


@torch.no_grad()
def test_a_compiled_tower_of_tiles_is_watched():
    batch = families.make("llava_next", "one image")
    wanted = me.wrap(families.tiny("llava_next"), "visionzip:keep=0.5")(**batch).logits
    model = families.tiny("llava_next")
    compile_tower(model)
    model(**batch)
    assert torch.equal(me.wrap(model, "visionzip:keep=0.5")(**batch).logits, wanted)


@torch.no_grad()
def test_another_projector_reaches_what_compiled_code_hands_to_the_models_own(make_llava, make_batch):
    spec, batch = "tokenflex:tokens=9,weights=random", make_batch("one image")
    wanted = me.prepare(make_llava(layers=1), spec, **batch).features
    model = make_llava(layers=1)
    compile_features(model)
    model.model.get_image_features(pixel_values=batch.pixel_values)
    prepared = me.prepare(model, spec, **batch).features
    assert all(torch.equal(a[1], b[1]) for a, b in zip(prepared, wanted))


def test_a_tower_that_passes_hooks_by_is_an_error(make_llava, make_batch):
    model, batch = make_llava(), make_batch("one image")
    layer = model.model.vision_tower.encoder.layers[-1]
    layer.self_attn.__class__ = type(
        "Fused", (type(layer.self_attn),), {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
    )
    with pytest.raises(me.UnsupportedModelError, match="cannot be watched for attention"):
        me.wrap(model, "fastervlm:tokens=9")(**batch)


@torch.no_grad()
def test_what_runs_uncompiled_for_a_while_is_compiled_again(make_llava):
    from mllm_efficient.patches.running import uncompiled

    runs = []

    def backend(graph, inputs):
        runs.append("compiled")
        return graph.forward

    double = torch.compile(lambda x: x * 2, backend=backend)
    with uncompiled(), uncompiled():
        double(torch.ones(2))
    assert runs == []
    double(torch.ones(2))
    assert runs == ["compiled"]
    with torch.compiler.set_stance("fail_on_recompile"):  # a user's own
        with uncompiled():
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"


@pytest.mark.parametrize("host", ["CPU", "disk"])
@pytest.mark.parametrize("name", ["clip", *(f for f in families.FAMILIES if f not in ("glm46v", "idefics3"))])  # which do not run offloaded
@torch.no_grad()
def test_smaller_pictures_reach_an_offloaded_tower(make_llava, make_batch, tmp_path, name, host):
    """CLIP and SigLIP interpolate position embeddings that they read outside of the module whose they are."""
    import accelerate

    batches = [make_batch("one image", "two images")] if name == "clip" else [families.make(name, "one image")]
    if name in families.WITH_VIDEO:
        batches.append(families.make(name, "video"))
    make = make_llava if name == "clip" else lambda: families.tiny(name)
    plain, model = me.wrap(make(), "resize:keep=0.5"), make()
    cpu = torch.device("cpu")
    model = (
        accelerate.cpu_offload(model, execution_device=cpu)
        if host == "CPU"
        else accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
    )
    me.wrap(model, "resize:keep=0.5")
    for batch in batches:
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert all(parameter.is_meta for parameter in model.parameters())
