#!/usr/bin/env bash
# accelerate launch: on a machine without a GPU, --num_processes 2 starts one process and does not say so.
# Expected: two processes, which see each other, or an error; torchrun --nproc_per_node 2 starts two on the same machine.
# Happens: one process runs, with --cpu and without it. It says that it is process 0 of 1, the exit status is 0, and no line of what the
# launcher prints names the number that was asked for.
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU); seen 2026-11.
# Matters: an evaluation or a training that was split over processes is none; a script that takes its share of the work by its rank and
# writes one part of several is complete for nobody.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0
pip accelerate==1.15.0
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' HF_HOME="$tmp/home"
cat > who.py <<'PY'
import os

from accelerate import Accelerator

state = Accelerator(cpu=True).state
print(f"process {state.process_index} of {state.num_processes}, WORLD_SIZE {os.environ.get('WORLD_SIZE', 'not set')}", flush=True)
PY
{
  echo "accelerate launch --cpu --num_processes 2"
  venv/bin/accelerate launch --cpu --num_processes 2 who.py 2> log1
  echo "accelerate launch --num_processes 2"
  venv/bin/accelerate launch --num_processes 2 who.py 2> log2
  echo "torchrun --nproc_per_node 2"
  venv/bin/torchrun --nproc_per_node 2 who.py 2> log3 | sort
} > seen
cat seen
grep -q 'num_processes.*2' log1 log2 && { echo "changed: the launcher now speaks of the processes that were asked for" >&2; exit 1; }
cat > expected <<'OUT'
accelerate launch --cpu --num_processes 2
process 0 of 1, WORLD_SIZE not set
accelerate launch --num_processes 2
process 0 of 1, WORLD_SIZE not set
torchrun --nproc_per_node 2
process 0 of 2, WORLD_SIZE 2
process 1 of 2, WORLD_SIZE 2
OUT
diff expected seen || { echo "changed: accelerate launch starts another number of processes on a CPU now" >&2; exit 1; }
