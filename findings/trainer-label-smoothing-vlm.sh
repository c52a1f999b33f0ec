#!/usr/bin/env bash
# transformers' Trainer: label smoothing teaches a vision-language model to repeat the current token.
# Expected: label_smoothing_factor smooths the loss that the model reports without it; at a factor near 0 both are the same number.
# Happens: Trainer computes the smoothed loss itself and shifts the labels by one only for classes that it lists as causal language models.
# LLaVA's and the Qwen-VL's classes are not on that list, so their logits are compared with the token that was just read. The Llama inside,
# given alone, is shifted.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0; tiny models from configs, learning rate 0; seen 2026-11.
# Matters: a run with label smoothing reports a falling loss and learns to copy; comparisons of compressed and full prompts inherit it.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0
pip transformers==5.24.0 accelerate==1.15.0
cd "$tmp"
cat > run.py <<'PY'
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers import Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
llava = LlavaConfig(text_config=text, vision_config=vision, image_token_index=31, vision_feature_layer=-1, image_seq_length=4)
ids = torch.arange(1, 25)
rows = [{"input_ids": ids, "labels": ids}] * 4


def smoothed(model):
    arguments = TrainingArguments("out", max_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, disable_tqdm=True,
                                  per_device_train_batch_size=4, save_strategy="no", label_smoothing_factor=1e-9)
    return Trainer(model, arguments, train_dataset=rows).train().training_loss


for kind, config in ((LlamaForCausalLM, text), (LlavaForConditionalGeneration, llava)):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(100 * model.get_input_embeddings().weight)  # says the token that it reads
        logits = model(input_ids=ids[None]).logits[0]
        loss = {"the next token": torch.nn.functional.cross_entropy(logits[:-1], ids[1:]), "the same token": torch.nn.functional.cross_entropy(logits, ids)}
    seen = smoothed(model)
    (against,) = [name for name, value in loss.items() if abs(float(value) - seen) < 1e-3 * float(value) + 1e-4]
    print(f"{kind.__name__}: label_smoothing_factor=1e-9 compares the logits with {against}")
PY
cat > expected <<'OUT'
LlamaForCausalLM: label_smoothing_factor=1e-9 compares the logits with the next token
LlavaForConditionalGeneration: label_smoothing_factor=1e-9 compares the logits with the same token
OUT
venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
grep -v '^{' seen > lines || true
cat lines
diff expected lines || { echo "changed: Trainer smooths the labels of vision-language models in another way now" >&2; exit 1; }
