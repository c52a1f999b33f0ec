#!/usr/bin/env bash
# transformers: Qwen3.5 reads masked padding when it comes in a later call on a cache, and not in the first.
# Expected: a masked column changes nothing, wherever it stands, as on Qwen3-VL.
# Happens: in the first call padding is kept out of the layers of linear attention; in a later call on the cache it enters their state,
# and the logits of what follows are others. No warning. (MiniCPM-V 4.6 has the same decoder.)
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), random weights in float32; seen 2026-11.
# Matters: a second turn of several conversations at once, padded to one length, answers otherwise than each alone.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0
pip transformers==5.24.0
cd "$tmp"
cat > ask.py <<'PY'
import torch
import transformers
from transformers import Qwen3_5ForConditionalGeneration, Qwen3_5Config, Qwen3VLConfig, Qwen3VLForConditionalGeneration

transformers.logging.set_verbosity_error()
text = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
rope = dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 2, 2])
vision = dict(
    depth=1, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2,
    num_position_embeddings=64,
)
configs = {
    "Qwen3.5": Qwen3_5Config(text_config={**text, **linear, "rope_parameters": {**rope, "partial_rotary_factor": 1.0}}, vision_config=vision),
    "Qwen3-VL": Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config={**vision, "deepstack_visual_indexes": [0]}),
}
classes = {"Qwen3.5": Qwen3_5ForConditionalGeneration, "Qwen3-VL": Qwen3VLForConditionalGeneration}
first, then = torch.tensor([[1, 9, 10, 11, 12]]), torch.tensor([[13, 14, 15]])


@torch.no_grad()
def last_logits(model, pads, later):
    """After both texts, the padding masked: in front of the second text on the cache of the first, or in front of both at once."""
    zeros = torch.zeros(1, pads, dtype=torch.long)
    texts = [torch.cat([zeros, first, then], 1)] if not later else [first, torch.cat([zeros, then], 1)]
    mask = torch.cat([(zeros if not later else zeros[:, :0]) + 0, torch.ones_like(first)], 1)
    mask = torch.cat([mask, zeros if later else zeros[:, :0], torch.ones_like(then)], 1)
    cache, seen, out = None, 0, None
    for ids in texts:
        here = mask[:, : seen + ids.shape[1]]
        places = (here.cumsum(1) - 1).clamp(min=0)[:, seen:]
        out = model(input_ids=ids, attention_mask=here, position_ids=places.expand(3, 1, -1), cache=cache, use_cache=True)
        cache, seen = out.cache, seen + ids.shape[1]
    return out.logits[:, -1]


for name, config in configs.items():
    torch.manual_seed(0)
    model = classes[name](config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.2
    for where, later in (("the first call", False), ("a later call", True)):
        off = float((last_logits(model, 0, later) - last_logits(model, 3, later)).abs().max())
        print(f"{name}, three masked paddings in {where}: {'the same logits' if off < 1e-3 else 'other logits'}")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
Qwen3.5, three masked paddings in the first call: the same logits
Qwen3.5, three masked paddings in a later call: other logits
Qwen3-VL, three masked paddings in the first call: the same logits
Qwen3-VL, three masked paddings in a later call: the same logits
OUT
diff expected seen || { echo "changed: Qwen3.5 takes padding in a later call otherwise now" >&2; exit 1; }
