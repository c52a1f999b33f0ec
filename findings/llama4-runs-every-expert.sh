#!/usr/bin/env bash
# transformers: a Llama 4 that sends each token to one of 16 experts computes all 16 and multiplies 15 results' inputs by zero.
# Expected: a layer costs one routed and one shared expert a token, whatever the number of experts: 17B of 109B weights "active".
# Happens: with 16 experts a prefill is 7 times the FLOPs of one with a single expert. A Qwen3-MoE of the same sizes costs the same but for its router.
# Versions: transformers 5.24.0, torch 2.13.0 (CPU), tiny text models of random weights; seen 2026-11.
# Matters: FLOPs and times of Llama 4 in transformers are those of a dense 109B model. Half the prompt saves what it would save there, so
# ratios hold and absolute numbers say nothing of a server that routes.
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

transformers.logging.set_verbosity_error()
shared = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts_per_tok=1)


def llama4(experts):
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **shared, intermediate_size=128, intermediate_size_mlp=128, num_local_experts=experts, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def qwen3(experts):
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **shared, moe_intermediate_size=128, intermediate_size=128, num_experts=experts, decoder_sparse_step=1, mlp_only_layers=[]))


def flops(model):
    model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=torch.arange(10, 42)[None], logits_to_keep=1)
    return counter.get_total_flops()


for name, make in (("Llama 4", llama4), ("Qwen3-MoE", qwen3)):
    torch.manual_seed(0)
    one, sixteen = flops(make(1)), flops(make(16))
    print(f"{name}: 16 experts of which a token goes to one cost {sixteen / one:.2f} times as much as one expert")
PY
venv/bin/python -W ignore ask.py > seen
cat seen
cat > expected <<'OUT'
Llama 4: 16 experts of which a token goes to one cost 7.00 times as much as one expert
Qwen3-MoE: 16 experts of which a token goes to one cost 1.03 times as much as one expert
OUT
diff expected seen || { echo "changed: Llama 4 or Qwen3-MoE runs other experts now" >&2; exit 1; }
