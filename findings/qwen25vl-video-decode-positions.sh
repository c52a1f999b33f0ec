#!/usr/bin/env bash
# Qwen2.5-VL: after a video, forward's own cached step is 33 positions away from generate's.
# Expected: with a cache, forward(one token) continues the prompt, as generate does and as forward without a cache does.
# Happens: behind a video whose time axis is longer than its height and width (10 x 4 x 4 patches, one second a step), the prompt's last
# word is at position 6. generate puts the first new token at 7; so does forward on the whole sequence, and their logits are equal. A
# hand-written loop of forward(token, cache=...) puts it at 40, behind the video's last second, and gets other logits.
# Versions: torch 2.13.0, transformers 5.24.0 (5.19.0 alike); seen 2026-11.
# Matters: KL or perplexity of a compressed model is usually measured by such a loop; on videos it then compares two different positions.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0
pip transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > run.py <<'PY'
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

torch.manual_seed(0)
text = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=200, bos_token_id=0, eos_token_id=199, pad_token_id=0, initializer_range=0.3,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
)
vision = dict(
    depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=14, fullatt_block_indexes=[0]
)
config = Qwen2_5_VLConfig(
    text_config=text, vision_config=vision, image_token_id=150, video_token_id=151, vision_start_token_id=152, vision_end_token_id=153
)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
pixels = torch.randn(160, 3 * 2 * 14 * 14)
positions = []
rotary = model.model.language_model.rotary_emb
rotary.register_forward_pre_hook(
    lambda m, args, kw: positions.append(int((kw.get("position_ids") if kw else args[1])[0, 0, -1])), with_kwargs=True
)


def inputs(ids):
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 151).int() * 2, pixel_values_videos=pixels,
        video_grid_thw=torch.tensor([[10, 4, 4]]), second_per_grid_ts=torch.tensor([1.0]),
    )


prompt = torch.tensor([[1, 2, 152] + [151] * 40 + [3, 4]])
out = model.generate(**inputs(prompt), max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)
print("generate: prompt ends at", positions[0], "and goes on at", positions[1])
token, wanted = out.sequences[:, -2:-1], out.logits[1][0]
positions.clear()
with torch.no_grad():
    whole = model(**inputs(torch.cat([prompt, token], 1)), use_cache=False).logits[0, -1]
    print("forward on the whole sequence: new token at", positions[-1])
    step = model(input_ids=token, cache=model(**inputs(prompt), use_cache=True).cache, use_cache=True).logits[0, -1]
    print("forward on one token with the cache: new token at", positions[-1])
print("whole sequence has generate's logits:", torch.allclose(whole, wanted, atol=1e-4))
print("cached step has generate's logits:", torch.allclose(step, wanted, atol=1e-1))
PY
cat > expected <<'OUT'
generate: prompt ends at 6 and goes on at 7
forward on the whole sequence: new token at 7
forward on one token with the cache: new token at 40
whole sequence has generate's logits: True
cached step has generate's logits: False
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: the positions after a video are others now" >&2; exit 1; }
