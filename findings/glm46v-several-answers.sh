#!/usr/bin/env bash
# transformers: GLM-4.6V asked for two answers about two pictures answers about a prompt in which the pictures are mixed up.
# Expected: with num_return_sequences=2 (or beams) the first logits of every answer are those of one answer, as on Qwen3-VL.
# Happens: with one picture they are. With two, the features are repeated picture by picture (A A B B) while the prompt is repeated whole
# (A B, A B): both answers begin from logits of another prompt. No error, no warning.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), random weights in float32; seen 2026-11.
# Matters: self-consistency, best of n and beam search over several pictures measure something else, and only on this family.
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
from transformers import Glm46VConfig, Glm46VForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

transformers.logging.set_verbosity_error()
text = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
rope = dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 2, 2])
vision = dict(depth=1, hidden_size=32, out_hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, spatial_merge_size=2, image_size=32)
ids = dict(image_token_id=5, video_token_id=6)
glm = Glm46VConfig(text_config={**text, "rope_parameters": {**rope, "partial_rotary_factor": 1.0}}, vision_config=vision, **ids)
qwen = Qwen3VLConfig(
    text_config={**text, "rope_parameters": rope}, vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}, **ids
)


def first_logits(model, call, **how):
    out = model.generate(**call, max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **how)
    return out.logits[0]


for name, model in (("GLM-4.6V", Glm46VForConditionalGeneration(glm)), ("Qwen3-VL", Qwen3VLForConditionalGeneration(qwen))):
    model = model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn_like(weight) * 0.2
    for images in (1, 2):
        row = [1, 9] + [5, 5, 5, 5, 10] * images + [11]
        prompt = torch.tensor([row])
        call = dict(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), mm_token_type_ids=(prompt == 5).int(),
            pixel_values=torch.randn(16 * images, 3 * 2 * 16), image_grid_thw=torch.tensor([[1, 4, 4]] * images),
        )
        one = first_logits(model, call, do_sample=False)
        two = first_logits(model, call, do_sample=True, top_k=1, num_return_sequences=2)
        same = torch.allclose(two, one.expand(2, -1), atol=1e-4)
        print(f"{name}, {images} image(s), two answers: the logits of {'one answer' if same else 'another prompt'}")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
GLM-4.6V, 1 image(s), two answers: the logits of one answer
GLM-4.6V, 2 image(s), two answers: the logits of another prompt
Qwen3-VL, 1 image(s), two answers: the logits of one answer
Qwen3-VL, 2 image(s), two answers: the logits of one answer
OUT
diff expected seen || { echo "changed: several answers of GLM-4.6V begin otherwise now" >&2; exit 1; }
