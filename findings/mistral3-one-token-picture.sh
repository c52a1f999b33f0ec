#!/usr/bin/env bash
# transformers: Mistral 3 fails on a single picture of one token, and takes two of them.
# Expected: a 28x28 picture (the smallest the model has: one token of 2 x 2 patches of 14 pixels) gives one token.
# Happens: the features of the call are squeezed, a single token loses its own axis, and splitting them by picture raises. Two such
# pictures in a call work.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU); seen 2026-11.
# Matters: icons, and what a method that makes pictures smaller can come to, fail or not by what else is in the batch.
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
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
vision = dict(model_type="pixtral", image_size=112, patch_size=14, **common)
text = dict(model_type="mistral", vocab_size=64, num_key_value_heads=1, head_dim=16, **common)
config = Mistral3Config(vision_config=vision, text_config=text, image_token_index=10, spatial_merge_size=2)
model = Mistral3ForConditionalGeneration(config).eval()
for sizes in ([(56, 28)], [(28, 28)], [(28, 28), (28, 28)]):
    pixels = torch.zeros(len(sizes), 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    try:
        with torch.no_grad():
            made = model.model.get_image_features(pixel_values=pixels, image_sizes=torch.tensor(sizes), return_dict=True).pooler_output
        print(f"pictures of {sizes}: tokens {[len(part) for part in made]}")
    except RuntimeError as error:
        print(f"pictures of {sizes}: {type(error).__name__}")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
pictures of [(56, 28)]: tokens [2]
pictures of [(28, 28)]: RuntimeError
pictures of [(28, 28), (28, 28)]: tokens [1, 1]
OUT
diff expected seen || { echo "changed: Mistral 3 takes a picture of one token otherwise now" >&2; exit 1; }
