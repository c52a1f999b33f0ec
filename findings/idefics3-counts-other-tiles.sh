#!/usr/bin/env bash
# transformers: Idefics3's image processor says another number of tiles than it makes, for some sizes, where longest_edge is lowered.
# Expected: get_number_of_image_patches is what preprocessing gives; servers plan their prompts by it.
# Happens: with the released longest_edge (a multiple of the tile) they agree. With 1000, one picture in nine has another number: the
# count rounds the second side from another number than the resizing does.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), numpy 2.3.5, Pillow 12.0.0; seen 2026-11.
# Matters: lowering longest_edge is how Idefics3 and SmolVLM are made cheaper, and a prompt planned by the count does not fit then.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0
pip transformers==5.24.0 numpy==2.3.5 pillow==12.0.0
cd "$tmp"
cat > ask.py <<'PY'
import numpy as np
from PIL import Image
from transformers import Idefics3ImageProcessorPil

for longest in (1456, 1000):
    processor = Idefics3ImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": 364})
    tried = other = 0
    for width in range(300, 1500, 97):
        for height in range(250, 1400, 119):
            made = processor(Image.fromarray(np.zeros((height, width, 3), np.uint8)), return_tensors="pt")["pixel_values"].shape[1]
            said = processor.get_number_of_image_patches(height, width, {})[0]
            tried, other = tried + 1, other + (made != said)
            if (longest, width, height) == (1000, 494, 726):
                print(f"494x726 at longest_edge 1000: {made} tiles made, {said} said")
    print(f"longest_edge {longest}: {other} of {tried} sizes have another number of tiles than the processor says")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
longest_edge 1456: 0 of 130 sizes have another number of tiles than the processor says
494x726 at longest_edge 1000: 10 tiles made, 7 said
longest_edge 1000: 14 of 130 sizes have another number of tiles than the processor says
OUT
diff expected seen || { echo "changed: Idefics3's processor counts otherwise now" >&2; exit 1; }
