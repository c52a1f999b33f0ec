#!/usr/bin/env bash
# torch's FLOP counter: model.eval() makes a transformer encoder layer free.
# Expected: FlopCounterMode counts the same multiplications of nn.TransformerEncoderLayer in train() and in eval() (no dropout).
# Happens: in eval mode without gradients the layer takes its fused path, one operator that the counter has no formula for, and the total
# is 0, without a warning; in train mode it is 2,359,296. The usual way to count a tower, eval() under no_grad, is the one that counts
# nothing. With the fused path turned off it counts again, and the outputs are equal.
# Versions: torch 2.13.0, on a CPU; seen 2026-11. The layer's page names the fused path's conditions, the counter says nothing of it.
# Matters: FLOPs of a vision tower or resampler built of such layers are missing from a speed-up ratio.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install --no-compile "$@"; }
pip torch==2.13.0
pip numpy==2.4.6
cd "$tmp"
cat > run.py <<'PY'
import torch
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
torch.backends.cuda.enable_flash_sdp(False)  # torch 2.13 does not count the CPU's flash kernel either; that is another matter
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
tokens = torch.randn(1, 32, 64)


def flops():
    with FlopCounterMode(display=False) as counter:
        out = layer(tokens)
    return counter.get_total_flops(), out


count, trained = flops()
print("train:", count)
layer.eval()
with torch.no_grad():
    count, fused = flops()
    print("eval, no_grad:", count)
    torch.backends.mha.set_fastpath_enabled(False)
    print("eval, no_grad, fast path off:", flops()[0])
print("same output:", torch.allclose(trained, fused, atol=1e-5))
PY
cat > expected <<'OUT'
train: 2359296
eval, no_grad: 0
eval, no_grad, fast path off: 2359296
same output: True
OUT
venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: torch counts the encoder layer in another way now" >&2; exit 1; }
