"""AnchorAttention against its rule, query by query, and in models beside transformers' own kernels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import mllm_efficient as me
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.patches.anchor import Anchor, causal, require_registered, spans_of

H, D, SCALE = 2, 8, 0.5


def drawn(n, heads=H, rows=1):
    torch.manual_seed(n)
    return [torch.randn(rows, h, n, D) * 1.5 for h in (H, heads, heads)]


def keys_of(how, q, k):
    """Of each query of one head the keys it attends to, each once."""
    n, group = len(q), how.block * how.step
    out = []
    for first in range(0, n, group):
        rows = range(first, min(first + group, n))
        sure = {i: sorted({*range(min(group, i + 1)), *range(first, i + 1)}) for i in rows}
        most = {i: max(float(q[i] @ k[j]) * SCALE for j in sure[i]) for i in rows}
        kept = set()
        for low in range(first, rows.stop, how.block):
            block = range(low, min(low + how.block, rows.stop))
            mean = torch.stack([q[i] for i in block]).mean(0)
            anchor = sum(most[i] for i in block) / len(block)
            kept |= {j for j in range(group, first) if float(mean @ k[j]) * SCALE + how.theta >= anchor}
        out += [sorted({*sure[i], *kept}) for i in rows]
    return out


def slow(how, query, key, value):
    out = torch.zeros_like(query)
    for b in range(len(query)):
        for h in range(query.shape[1]):
            q, k, v = (x[b, h].double() for x in (query, key, value))
            for i, seen in enumerate(keys_of(how, q, k)):
                out[b, h, i] = ((k[seen] @ q[i] * SCALE).softmax(0) @ v[seen]).float()
    return out


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 1


@pytest.mark.parametrize("n", [17, 32, 45, 48])
@pytest.mark.parametrize("theta", [-2.0, 1.0, 3.0])
def test_it_equals_its_rule(n, theta):
    how, (query, key, value) = Anchor(4, 2, theta), drawn(n, rows=2)
    out, _ = how(Layer(), query, key, value, None, scaling=SCALE)
    torch.testing.assert_close(out.transpose(1, 2), slow(how, query, key, value), atol=1e-5, rtol=1e-5)
    kept = [len(keys) for keys in keys_of(how, query[0, 0].double(), key[0, 0].double())]
    assert n < 25 or theta > 1 or sum(kept) < n * (n + 1) // 2  # something is left out


def test_it_is_full_attention_where_its_threshold_keeps_everything():
    for n in (5, 16, 17, 64, 75):
        query, key, value = drawn(n)
        out, _ = Anchor(4, 2, math.inf)(Layer(), query, key, value, None, scaling=SCALE)
        wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)
        torch.testing.assert_close(out.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


def test_by_its_defaults_everything_is_computed_up_to_4096_tokens():
    how = Anchor()
    assert 2 * how.group == 4096

    def pairs(n):
        return sum(min(how.group, i + 1) + (i - max(how.group, i // how.group * how.group) + 1 if i >= how.group else 0) for i in range(n))

    assert pairs(4096) == 4096 * 4097 // 2 and round(100 * pairs(8192) / (8192 * 8193 // 2), 1) == 62.5


def test_heads_that_share_keys_choose_their_own():
    how, (query, key, value) = Anchor(4, 2, 1.0), drawn(45, heads=1)
    layer = Layer()
    layer.num_key_value_groups = 2
    out, _ = how(layer, query, key, value, None, scaling=SCALE)
    wanted = slow(how, query, key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1))
    torch.testing.assert_close(out.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


def test_padding_on_either_side_changes_no_answer():
    how, (query, key, value) = Anchor(4, 2, 1.0), drawn(45, rows=2)
    spans = [(9, 45), (0, 38)]
    mask = torch.zeros(2, 1, 45, 45, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        mask[row, 0, start:stop, start:stop] = causal(stop - start, mask.device)
    assert spans_of(mask, 2, 45) == spans
    out, _ = how(Layer(), query, key, value, mask, scaling=SCALE)
    for row, (start, stop) in enumerate(spans):
        one = [x[row : row + 1, :, start:stop] for x in (query, key, value)]
        alone, _ = how(Layer(), *one, None, scaling=SCALE)
        torch.testing.assert_close(out[row, start:stop], alone[0])


@pytest.mark.parametrize("change", ["window", "numbers", "packed", "bidirectional", "decoding"])
def test_whatever_is_no_causal_prefill_is_computed_in_full(change):
    how, (query, key, value), layer = Anchor(4, 2, -9.0), drawn(45), Layer()
    mask = causal(45, query.device)[None, None]
    if change == "window":
        mask = mask & ~causal(45, query.device).tril(-20)
    elif change == "numbers":
        mask = torch.zeros(1, 1, 45, 45).masked_fill(~mask, float("-inf"))
        mask[..., 3] += 0.5
    elif change == "packed":
        mask[..., 20:, :20] = False
    elif change == "bidirectional":
        layer.is_causal, mask = False, None
    else:
        query, mask = query[:, :, -1:], None
    out, _ = how(layer, query, key, value, mask, scaling=SCALE)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
    torch.testing.assert_close(out.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"block": 0}, {"step": True}, {"theta": math.nan}, {"theta": "12"}])
def test_a_setting_that_is_wrong_is_one_line(settings):
    with pytest.raises(me.MllmEfficientError, match=f"anchor attention: {next(iter(settings))}="):
        me.anchor_attention(**settings)


@pytest.fixture
def registered():
    yield me.anchor_attention
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop("anchor", None)


def test_a_model_is_loaded_with_it_and_runs_with_compressors(registered, make_batch):
    """With every key kept the logits are those of SDPA; with few, a batch still answers as its prompts do alone."""
    own = load(ModelOptions())
    loaded = load(ModelOptions(attn_implementation="anchor"))  # registers it
    assert loaded.model.config.get_text_config()._attn_implementation == "anchor"
    image, question = me.sample(4)
    other, longer = me.sample(5)
    texts = [f"USER: <image>\n{question} ASSISTANT:", f"USER: <image>\n{longer} which is the larger one ? ASSISTANT:"]
    batch = own.processor(images=[image, other], text=texts, return_tensors="pt", padding=True)
    methods = (None, "divprune:keep=0.5", "fastv:ratio=0.5,layer=2")

    def logits(model, method, inputs):
        with torch.no_grad():
            if method is None:
                return model(**inputs, logits_to_keep=1).logits[:, -1]
            with me.compressed(model, method):
                return model(**inputs, logits_to_keep=1).logits[:, -1]

    for theta in (math.inf, 0.5):
        registered(block=4, step=2, theta=theta)
        for method in methods:
            found, full = (logits(one.model, method, batch) for one in (loaded, own))
            if theta == math.inf:
                torch.testing.assert_close(found, full, atol=1e-4, rtol=1e-4)
                continue
            assert not torch.allclose(found, full, atol=1e-3)
            for row, (text, picture) in enumerate(zip(texts, (image, other))):
                alone = logits(loaded.model, method, own.processor(images=[picture], text=[text], return_tensors="pt"))
                torch.testing.assert_close(found[row], alone[0], atol=1e-4, rtol=1e-4)
    registered(block=4, step=2, theta=0.5)
    require_registered("anchor")  # what is registered stays
    assert AttentionInterface()["anchor"] == Anchor(4, 2, 0.5)
    one = own.processor(images=[image], text=texts[:1], return_tensors="pt")
    assert loaded.model.generate(**one, max_new_tokens=3).shape[1] > one["input_ids"].shape[1]
