#!/usr/bin/env bash
# Qwen2-VL's processor squeezes a thin strip to half its width: 14 pixels high costs 17 tokens, 15 pixels high costs 36.
# Expected: a picture with more pixels than the minimum (3,136) and fewer than the maximum keeps its size, but for the rounding to 28.
# Happens: a side of up to 14 pixels rounds to 0, the area 0 is below the minimum, and the branch that enlarges small pictures shrinks
# this one: 1000x14 (14,000 pixels) becomes 476x28, while 1000x15 becomes 1008x28. A strip twice as wide costs less, too: 2000x14 has 24
# tokens, 1000x15 has 36. qwen-vl-utils 0.0.14, the model's own helper, takes at least 28 a side first: 1008x28 for all the first four.
# Versions: transformers 5.24.0, pillow 13.0.0, numpy 2.4.6; seen 2026-11. No torch needed.
# Matters: lines of text cut out by an OCR pipeline lose half their pixels, and token counts are not monotone in the picture's size.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip pillow==13.0.0 transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > run.py <<'PY'
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

processor = Qwen2VLImageProcessorPil()
assert processor.size["shortest_edge"] == 3136, processor.size
for w, h in [(1000, 13), (1000, 14), (1000, 15), (1000, 28), (2000, 14), (14, 1000)]:
    t, rows, columns = processor(Image.new("RGB", (w, h)), return_tensors="np")["image_grid_thw"][0]
    print(f"{w}x{h}: {w * h} pixels, resized to {columns * 14}x{rows * 14}, {t * rows * columns // 4} tokens")
PY
cat > expected <<'OUT'
1000x13: 13000 pixels, resized to 504x28, 18 tokens
1000x14: 14000 pixels, resized to 476x28, 17 tokens
1000x15: 15000 pixels, resized to 1008x28, 36 tokens
1000x28: 28000 pixels, resized to 1008x28, 36 tokens
2000x14: 28000 pixels, resized to 672x28, 24 tokens
14x1000: 14000 pixels, resized to 28x476, 17 tokens
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: Qwen2-VL's processor resizes thin strips in another way now" >&2; exit 1; }
