#!/usr/bin/env bash
# transformers: MiniCPM-V 4.6 takes logits_to_keep=1 without a word and computes the logits of every token of the prompt.
# Expected: logits_to_keep=1 gives one row of logits; generate asks for it, so that a prefill runs the head over one token.
# Happens: the forward of 4.6 has no such argument and its **kwargs swallow it. Qwen2.5-VL gives one row.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), tiny models of random weights, text alone; seen 2026-11.
# Matters: with a vocabulary of 150,000 and width 4,096 the head has 0.6 billion weights, which an image prompt passes with every token,
# and the logits of 4,000 tokens in float32 are 2.4 GB. FLOPs and memory of a prefill are wrong where the head is counted once.
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

transformers.logging.set_verbosity_error()
text = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
linear = dict(linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2)
vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4)
ids = dict(image_token_id=7, video_token_id=8)
models = {
    "MiniCPM-V 4.6": transformers.MiniCPMV4_6ForConditionalGeneration(transformers.MiniCPMV4_6Config(
        text_config=dict(text, **linear, model_type="qwen3_5_text"), vision_config=dict(vision, model_type="minicpmv4_6_vision"),
        insert_layer_id=0, image_size=32, **ids)),
    "Qwen2.5-VL": transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=dict(text, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3])),
        vision_config=dict(depth=1, hidden_size=24, intermediate_size=48, num_heads=2, out_hidden_size=32), **ids)),
}
for name, model in models.items():
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(10, 42)[None], logits_to_keep=1).logits
    print(f"{name}: logits_to_keep=1 of 32 tokens gives {logits.shape[1]} row(s)")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
MiniCPM-V 4.6: logits_to_keep=1 of 32 tokens gives 32 row(s)
Qwen2.5-VL: logits_to_keep=1 of 32 tokens gives 1 row(s)
OUT
diff expected seen || { echo "changed: MiniCPM-V 4.6 heads other tokens now" >&2; exit 1; }
