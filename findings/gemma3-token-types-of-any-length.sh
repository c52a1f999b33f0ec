#!/usr/bin/env bash
# transformers: Gemma 3 takes token_type_ids of another length than its prompt, and answers otherwise without a word.
# Expected: an error, as attention_mask of a wrong length gives in most models; or the same logits.
# Happens: the mask that lets the tokens of a picture see each other is made from token_type_ids by position. Ids that are longer than the
# prompt (those of the prompt before it was cut) mark the wrong columns; left out, attention over the picture is causal. Both run.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), random weights in float32; seen 2026-11.
# Matters: whoever shortens, pads or caches a multimodal prompt by hand and forgets one tensor gets another model, not an error.
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
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
text = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=5, mm_tokens_per_image=4, boi_token_index=3, eoi_token_index=4)
model = Gemma3ForConditionalGeneration(config).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight += torch.randn_like(weight) * 0.2
ids = torch.tensor([[1, 9, 5, 5, 5, 5, 10, 11, 12]])
pixels = torch.randn(1, 3, 16, 16)
right = (ids == 5).long()
longer = torch.cat([torch.zeros(1, 5, dtype=torch.long), right], 1)  # as of a prompt that had five more words in front


def logits(**more):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, **more).logits


base = logits(token_type_ids=right)
for name, more in (("of the prompt", {"token_type_ids": right}), ("five longer", {"token_type_ids": longer}), ("left out", {})):
    off = float((logits(**more) - base).abs().max())
    print(f"token_type_ids {name}: {'the same logits' if off == 0 else 'other logits' if off > 0.01 else off}")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
token_type_ids of the prompt: the same logits
token_type_ids five longer: other logits
token_type_ids left out: other logits
OUT
diff expected seen || { echo "changed: Gemma 3 takes token_type_ids otherwise now" >&2; exit 1; }
