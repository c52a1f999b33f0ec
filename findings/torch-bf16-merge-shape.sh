#!/usr/bin/env bash
# Merging bfloat16 tokens in torch: a trailing dimension of 1 decides which functions are right, and it decides both ways.
# Expected: the sum of 1,000 ones is 1000 and their mean 1.0 (both are exact in bfloat16), and (1000,) and (1000, 1) give the same.
# Happens: on a vector, index_add stops at 256 (256 + 1 = 256 in bfloat16) and index_reduce's mean is 1.0; on rows it is the other way
# round: index_add is exact and index_reduce's mean is 0.256. segment_reduce's mean is 0.256 in both, scatter_reduce's 1.0 in both.
# The same with 1 and 2 threads and with ATEN_CPU_CAPABILITY default, avx2 and avx512, so it is no quirk of one processor.
# Versions: torch 2.13.0, on a CPU; seen 2026-11. The mean of index_reduce alone is reported (pytorch issue 139242).
# Matters: average-merging of visual tokens is one of these calls; a slow reference on vectors does not show what happens to rows.
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

into = torch.zeros(1000, dtype=torch.long)
for shape in [(1000,), (1000, 1), (1000, 64)]:
    ones = torch.ones(shape, dtype=torch.bfloat16)
    zero = ones.new_zeros((1, *shape[1:]))
    where = into.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    seen = {
        "index_add": zero.index_add(0, into, ones),
        "index_reduce mean": zero.index_reduce(0, into, ones, "mean", include_self=False),
        "segment_reduce mean": torch.segment_reduce(ones, "mean", lengths=torch.tensor([1000])),
        "scatter_reduce mean": zero.scatter_reduce(0, where, ones, "mean", include_self=False),
    }
    print(f"{shape}:", ", ".join(f"{name} {value.flatten()[0].item():.3f}" for name, value in seen.items()))
PY
cat > expected <<'OUT'
(1000,): index_add 256.000, index_reduce mean 1.000, segment_reduce mean 0.256, scatter_reduce mean 1.000
(1000, 1): index_add 1000.000, index_reduce mean 0.256, segment_reduce mean 0.256, scatter_reduce mean 1.000
(1000, 64): index_add 1000.000, index_reduce mean 0.256, segment_reduce mean 0.256, scatter_reduce mean 1.000
OUT
venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: torch sums bfloat16 in another way now" >&2; exit 1; }
