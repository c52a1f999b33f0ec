#!/usr/bin/env bash
# Qwen3-VL: an input that forward refuses is answered by generate, with a picture that has no rows and columns.
# Expected: forward and generate of one model accept the same inputs. Without mm_token_type_ids (new in transformers 5; code that builds
# inputs from input_ids, pixel_values and image_grid_thw, as it did for years, does not have them) forward raises a ValueError that
# says that M-RoPE cannot be computed.
# Happens: generate takes the same dictionary without a word, counts the 16 image tokens as 16 words of text (the last prompt token is at
# position 21, not 9), and writes other tokens. Qwen2-VL and GLM-4V do the same; the second line is generate with the ids.
# Versions: torch 2.13.0, transformers 5.24.0; seen 2026-11.
# Matters: who shortens prompts by hand and drops the ids measures a model that lost the picture's geometry, and blames the compression.
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
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

torch.manual_seed(0)
text = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    vocab_size=200, bos_token_id=0, eos_token_id=199, pad_token_id=0, initializer_range=0.3,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6,
                     "mrope_section": [2, 3, 3], "mrope_interleaved": True},
)
vision = dict(
    depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=16, deepstack_visual_indexes=[]
)
config = Qwen3VLConfig(
    text_config=text, vision_config=vision, image_token_id=150, video_token_id=151, vision_start_token_id=152, vision_end_token_id=153
)
model = Qwen3VLForConditionalGeneration(config).eval()
ids = torch.tensor([[1, 2, 152] + [150] * 16 + [153, 3, 4]])
inputs = dict(
    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(64, 3 * 2 * 16 * 16),
    image_grid_thw=torch.tensor([[1, 8, 8]]),
)
positions = []
rotary = model.model.language_model.rotary_emb
rotary.register_forward_pre_hook(lambda m, args, kw: positions.append((kw.get("position_ids") if kw else args[1])[:, 0]), with_kwargs=True)


def generate(**extra):
    positions.clear()
    out = model.generate(**inputs, **extra, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    return out, positions[0][:, -1].tolist()


try:
    model(**inputs)
    print("forward: ok")
except ValueError as error:
    print("forward:", type(error).__name__, str(error)[:26])
without, at = generate()
print("generate without ids: last prompt token at", at)
with_ids, at = generate(mm_token_type_ids=(ids == 150).int())
print("generate with ids: last prompt token at", at)
print("same answer:", without == with_ids)
PY
cat > expected <<'OUT'
forward: ValueError Multimodal data was passed
generate without ids: last prompt token at [21, 21, 21]
generate with ids: last prompt token at [9, 9, 9]
same answer: False
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: generate and forward of Qwen3-VL treat missing mm_token_type_ids in another way now" >&2; exit 1; }
