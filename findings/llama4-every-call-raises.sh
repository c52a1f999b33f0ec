#!/usr/bin/env bash
# transformers: every call of Llama4ForConditionalGeneration raises, with pictures and without.
# Expected: logits, as in 5.19, or at least as of the text model alone.
# Happens: the forward builds its output from `outputs.image_outputs`, and what it calls, the text model, has no such field. The text model of
# the same checkpoint answers.
# Versions: transformers 5.24.0 raises, 5.19.0 does not; torch 2.13.0 (CPU); seen 2026-11.
# Matters: whoever serves or evaluates Llama 4 Scout or Maverick through transformers stops at the first prompt after an upgrade, and the
# message names neither pictures nor the version.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0
cd "$tmp"
cat > ask.py <<'PY'
import torch
import transformers
from transformers import Llama4Config, Llama4ForConditionalGeneration

transformers.logging.set_verbosity_error()
vision = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4, vision_output_dim=32,
    projector_input_dim=32, projector_output_dim=32,
)
text = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
config = Llama4Config(vision_config=vision, text_config=text, image_token_index=5, boi_token_index=3, eoi_token_index=4)
model = Llama4ForConditionalGeneration(config).eval()
ids = torch.tensor([[1, 9, 10, 11]])
for name, call in (("text model", model.language_model), ("whole model", model)):
    try:
        with torch.no_grad():
            print(f"{transformers.__version__} {name}: logits {tuple(call(input_ids=ids).logits.shape)}")
    except AttributeError as error:
        print(f"{transformers.__version__} {name}: AttributeError: {error}")
PY
for version in 5.19.0 5.24.0; do
  pip "transformers==$version"
  venv/bin/python -W ignore ask.py
done > seen
cat seen
cat > expected <<'OUT'
5.19.0 text model: logits (1, 4, 64)
5.19.0 whole model: logits (1, 4, 64)
5.24.0 text model: logits (1, 4, 64)
5.24.0 whole model: AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'
OUT
diff expected seen || { echo "changed: Llama 4 answers otherwise now" >&2; exit 1; }
