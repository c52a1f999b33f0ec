#!/usr/bin/env bash
# The same transparent picture is red to a CLIP model in transformers 5.19 and white in 5.24.
# Expected: a processor's saved settings say what a model sees; a minor release does not repaint pictures.
# Happens: for an RGBA pixel (255, 0, 0, 0), red that is wholly transparent, 5.19.0 drops the alpha channel and keeps the red, 5.24.0
# puts the picture on white. In both the only setting for it is do_convert_rgb=True, and nothing is logged.
# Versions: transformers 5.19.0 and 5.24.0, pillow 13.0.0, numpy 2.4.6; seen 2026-11. No torch needed.
# Matters: logos, icons and screenshots with transparent corners change under a baseline that was measured one upgrade earlier.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip pillow==13.0.0 transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
pip --no-deps --target "$tmp/old" transformers==5.19.0
cd "$tmp"
cat > run.py <<'PY'
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil

processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False, do_resize=False, do_center_crop=False)
pixel = processor(Image.new("RGBA", (32, 32), (255, 0, 0, 0)), return_tensors="np")["pixel_values"][0, :, 0, 0]
print(f"{transformers.__version__}: {[int(v) for v in pixel]}, do_convert_rgb {processor.do_convert_rgb}")
PY
cat > expected <<'OUT'
5.19.0: [255, 0, 0], do_convert_rgb True
5.24.0: [255, 255, 255], do_convert_rgb True
OUT
{ PYTHONPATH=old venv/bin/python run.py && venv/bin/python run.py; } > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: transformers paints transparent pixels in another way now" >&2; exit 1; }
