"""Methods that ask the tower for attention: which models they are served on, and what is read of vLLM's tower."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.patches.tower.attention import watched
from mllm_efficient.patches.vllm.settings import KEY, settings_of
from mllm_efficient.patches.vllm.tower import require_watchable, watching


def test_attention_of_the_tower_is_read_on_llava_alone():
    for name in ("fastervlm", "visionzip", "scope", "vispruner", "prumerge_plus"):
        config = SimpleNamespace(model_type="llava", **{KEY: f"{name}:tokens=36"})
        assert settings_of(config).method == me.build(f"{name}:tokens=36")
        config.model_type = "llava_next"
        with pytest.raises(
            me.UnsupportedModelError, match=f"{name} needs attention.*, which is read in vLLM's towers of LLaVA-1.5 alone; apet"
        ):
            settings_of(config)


class Joined(torch.nn.Module):
    """Queries, keys and values by one product, as vLLM's layers make them."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return torch.cat([getattr(self.attention, f"{name}_proj")(x) for name in "qkv"], -1), None


@pytest.mark.parametrize("kind, strategy", [("clip", "default"), ("clip", "full"), ("siglip", "full")])
def test_what_is_read_of_joined_projections_is_what_transformers_gives(kind, strategy):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=6)
    torch.manual_seed(0)
    if kind == "clip":
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)).eval()
    else:
        tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, vision_use_head=False)).eval()
    inner, pixels = getattr(tower, "vision_model", tower), torch.randn(3, 3, 24, 24)
    needs = frozenset({"attention", "keys"})
    with torch.no_grad():
        _, expected = watched(inner, lambda: tower(pixels), -1, strategy, needs)
    joined = Joined(inner.encoder.layers[-1].self_attn)
    attention = SimpleNamespace(num_heads=2, qkv_proj=joined)
    like_vllm = SimpleNamespace(encoder=SimpleNamespace(layers=[SimpleNamespace(self_attn=attention)]), embeddings=inner.embeddings)
    into: dict[str, torch.Tensor] = {}

    def called(module, args, kwargs):
        joined(args[0] if args else kwargs["hidden_states"])

    handle = inner.encoder.layers[-1].self_attn.register_forward_pre_hook(called, with_kwargs=True)
    with torch.no_grad(), watching(like_vllm, strategy, into):
        tower(pixels)
    handle.remove()
    assert set(into) == needs and all(torch.allclose(into[name], expected[name], atol=1e-6) for name in needs)
    into.clear()
    joined(torch.randn(1, 17, 32))
    assert into == {}  # nothing is left behind


@pytest.mark.parametrize("ranks, layer, says", [(2, -2, "heads 2 ranks share"), (1, [-2, -1], "this model takes 2")])
def test_where_a_process_sees_a_part_alone_is_refused(ranks, layer, says):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(vision_feature_layer=layer)),
    )
    with pytest.raises(me.UnsupportedModelError, match=says):
        require_watchable(config, "fastervlm")
