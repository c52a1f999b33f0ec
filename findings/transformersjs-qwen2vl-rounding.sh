#!/usr/bin/env bash
# transformers.js gives a small Qwen2-VL picture up to 2.25 times the tokens that Python gives it.
# Expected: two implementations of one published image processor, from one publisher, make the same grid of the same picture.
# Happens: the side is rounded to a multiple of 28. Python's round takes a tie to the even neighbour, JavaScript's Math.round takes it up:
# 70x70 has 4 tokens in Python and 9 in JavaScript, 126x126 has 16 and 25. 42, 98 and 154 are ties too and agree, so a check of one or
# two sizes does not find it.
# Versions: @huggingface/transformers 4.3.2 on node 20, transformers 5.24.0, pillow 13.0.0; seen 2026-11. No torch needed.
# Matters: a placeholder count worked out in a browser is not the server's, and the uncompressed baseline of icons is another one.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip pillow==13.0.0 transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
echo '{"type": "module"}' > package.json
npm install --silent --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2
cat > run.py <<'PY'
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

processor = Qwen2VLImageProcessorPil()
for side in (42, 56, 70, 98, 126, 154, 224):
    grid = processor(Image.new("RGB", (side, side)), return_tensors="np")["image_grid_thw"][0]
    print(f"{side}x{side}: {grid.prod() // 4}")
PY
cat > run.mjs <<'JS'
import { Qwen2VLImageProcessor, RawImage } from "@huggingface/transformers";

const processor = new Qwen2VLImageProcessor({
  do_resize: true, do_rescale: true, rescale_factor: 1 / 255, do_normalize: true, image_mean: [0.5, 0.5, 0.5],
  image_std: [0.5, 0.5, 0.5], patch_size: 14, temporal_patch_size: 2, merge_size: 2, min_pixels: 3136, max_pixels: 12845056,
});
for (const side of [42, 56, 70, 98, 126, 154, 224]) {
  const { image_grid_thw } = await processor([new RawImage(new Uint8ClampedArray(side * side * 3), side, side, 3)]);
  console.log(`${side}x${side}: ${[...image_grid_thw.data].map(Number).reduce((a, b) => a * b) / 4}`);
}
JS
cat > expected <<'OUT'
42x42: 4 in Python, 4 in JavaScript
56x56: 4 in Python, 4 in JavaScript
70x70: 4 in Python, 9 in JavaScript
98x98: 16 in Python, 16 in JavaScript
126x126: 16 in Python, 25 in JavaScript
154x154: 36 in Python, 36 in JavaScript
224x224: 64 in Python, 64 in JavaScript
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > python 2> log || { cat log >&2; exit 1; }
node run.mjs > javascript 2> log || { cat log >&2; exit 1; }
paste python javascript | sed 's/\t.*: / in Python, /; s/$/ in JavaScript/' > seen
cat seen
diff expected seen || { echo "changed: transformers.js and transformers round Qwen2-VL's pictures in another way now" >&2; exit 1; }
