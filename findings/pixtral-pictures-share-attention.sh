#!/usr/bin/env bash
# transformers: in Pixtral's tower a picture costs more the more pictures are in the call.
# Expected: pictures do not see each other, so eight cost eight times one.
# Happens: the patches of all pictures of a call are one sequence, attention is computed between all of them, and a mask throws away what
# crosses pictures: eight pictures of 280x280 cost over four times as much each as one alone.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), a tower of one layer, eager attention; seen 2026-11.
# Matters: a batch of prompts is one call: throughput of Mistral 3, Pixtral and LightOnOCR falls with the batch, and FLOPs per picture
# that were counted on one picture are wrong for it.
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import PixtralVisionConfig, PixtralVisionModel

transformers.logging.set_verbosity_error()
config = PixtralVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=448, patch_size=14)
config._attn_implementation = "eager"  # whose products torch counts
tower = PixtralVisionModel(config).eval()
alone = None
for n in (1, 2, 4, 8):
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        tower(torch.zeros(n, 3, 280, 280), image_sizes=torch.tensor([(280, 280)] * n))
    alone = alone or counted.get_total_flops()
    print(f"{n} picture(s) in a call: {counted.get_total_flops() / n / alone:.2f} of one picture's FLOPs each")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
1 picture(s) in a call: 1.00 of one picture's FLOPs each
2 picture(s) in a call: 1.47 of one picture's FLOPs each
4 picture(s) in a call: 2.41 of one picture's FLOPs each
8 picture(s) in a call: 4.28 of one picture's FLOPs each
OUT
diff expected seen || { echo "changed: Pixtral's tower computes otherwise now" >&2; exit 1; }
