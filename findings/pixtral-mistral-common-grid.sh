#!/usr/bin/env bash
# Pixtral: Mistral's own tokenizer library and transformers cut the same picture into different grids.
# Expected: mistral_common (which vLLM uses for Mistral's models) and transformers' Pixtral processor count the same image tokens at the
# same settings (patch 16, longest side 1024).
# Happens: above 1024 pixels one rounds the scaled side and the other floors it, which now and then moves it over a multiple of 16. Of
# 2,000 sizes drawn evenly up to 3,000 x 3,000, 52 get one row or column more in mistral_common and none gets fewer: 1234x1435 is 56 x 64
# there and 55 x 64 in transformers, 64 tokens fewer. A comment in transformers says that flooring is meant; no page of either library
# says that the counts differ.
# Versions: mistral_common 1.13.1, opencv 5.0.0.93, transformers 5.24.0, pillow 13.0.0; seen 2026-11. No torch needed.
# Matters: token counts of a served model and of its transformers twin differ before anything is compressed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install --no-compile "$@"; }
pip pillow==13.0.0 numpy==2.3.5 transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0
pip tiktoken==0.14.0 jsonschema==4.26.0 pydantic==2.14.4 requests==2.34.2
pip --no-deps mistral_common==1.13.1 opencv-python-headless==5.0.0.93
cd "$tmp"
cat > run.py <<'PY'
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from PIL import Image
from transformers import PixtralImageProcessorPil

encoder = ImageEncoder(ImageConfig(16, 1024), SpecialImageIDs(img=10, img_break=12, img_end=13))
processor = PixtralImageProcessorPil(size={"longest_edge": 1024}, patch_size={"height": 16, "width": 16})
for size in [(1000, 700), (1024, 1024), (2000, 1000), (1234, 1435), (1971, 1942)]:
    image = Image.new("RGB", size)
    tokens = encoder(ImageChunk(image=image)).tokens
    rows, count = tokens.count(12) + 1, tokens.count(10)
    height, width = processor(image, return_tensors="np")["image_sizes"][0] // 16
    print(f"{size[0]}x{size[1]}: mistral_common {count // rows} x {rows} = {count}, transformers {width} x {height} = {width * height}")
PY
cat > expected <<'OUT'
1000x700: mistral_common 63 x 44 = 2772, transformers 63 x 44 = 2772
1024x1024: mistral_common 64 x 64 = 4096, transformers 64 x 64 = 4096
2000x1000: mistral_common 64 x 32 = 2048, transformers 64 x 32 = 2048
1234x1435: mistral_common 56 x 64 = 3584, transformers 55 x 64 = 3520
1971x1942: mistral_common 64 x 64 = 4096, transformers 64 x 63 = 4032
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: mistral_common and transformers count Pixtral's tokens in another way now" >&2; exit 1; }
