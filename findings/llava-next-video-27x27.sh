#!/usr/bin/env bash
# LLaVA-NeXT-Video: its own processor and model disagree by 13 tokens a frame when the tower has an odd grid.
# Expected: the processor writes as many video placeholders as the model has features.
# Happens: with a 27x27 tower (384 pixels, patch 14, as SigLIP-so400m) the processor divides the area (27 * 27 // 4 = 182), the model
# pools 2x2 windows (13 * 13 = 169), and forward raises. With CLIP's 24x24 both say 144, so nobody who uses the usual tower meets it.
# Versions: torch 2.13.0, transformers 5.24.0, pillow 13.0.0; seen 2026-11.
# Matters: a token count taken from the prompt is not the number of features that a compressor gets; read the grid instead.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install --no-compile "$@"; }
pip torch==2.13.0
pip pillow==13.0.0 transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > run.py <<'PY'
from types import SimpleNamespace

import torch
from transformers import (
    CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration, LlavaNextVideoProcessor,
)

# The processor's own rule, called alone: to build a whole one for videos takes torchvision.
settings = SimpleNamespace(patch_size=14, video_token="V")
for side in (336, 384):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, bos_token_id=1, eos_token_id=2
    )
    model = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(text_config=text, vision_config=vision, image_token_index=3, video_token_index=4)
    ).eval()
    video = torch.zeros(1, 2, 3, side, side)
    prompt = LlavaNextVideoProcessor.replace_video_token(settings, {"pixel_values_videos": video}, 0)
    ids = torch.tensor([[4 if letter == "V" else 5 for letter in prompt + "?"]])
    print(f"{side // 14}x{side // 14}: {prompt.count('V') // 2} placeholders a frame,", end=" ")
    with torch.no_grad():
        features = model.model.get_video_features(video).pooler_output
        print(f"{sum(f.numel() for f in features) // 32 // 2} features,", end=" ")
        try:
            model(input_ids=ids, pixel_values_videos=video, attention_mask=torch.ones_like(ids))
            print("forward: ok")
        except ValueError as error:
            print("forward:", type(error).__name__)
PY
cat > expected <<'OUT'
24x24: 144 placeholders a frame, 144 features, forward: ok
27x27: 182 placeholders a frame, 169 features, forward: ValueError
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: LLaVA-NeXT-Video counts odd grids in another way now" >&2; exit 1; }
