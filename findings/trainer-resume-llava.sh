#!/usr/bin/env bash
# transformers' Trainer: a LLaVA that resumes from its own checkpoint goes on from the weights it was built with, not from those it saved.
# Expected: resume_from_checkpoint restores the weights, as it does for the language model alone.
# Happens: save_pretrained writes the names of the released checkpoints ("language_model.model..."), and the resuming Trainer hands the file
# to load_state_dict(strict=False), whose names are "model.language_model...". All keys are missing, all are unexpected, and a warning is
# all that says so; optimiser, scheduler and step count are restored, so that the loss curve looks like a resumed run's.
# from_pretrained of the same folder renames the keys and loads every weight.
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.13.0; a tiny LLaVA and its Llama from configs; seen 2026-11.
# Matters: a projector or a compressor trained in stages loses what the first part of the run learned, and evaluates as if it had not trained.
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
import copy

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers import Trainer, TrainerCallback, TrainingArguments

transformers.utils.logging.set_verbosity_error()
text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
llava = LlavaConfig(text_config=text, vision_config=vision, image_token_index=31, vision_feature_layer=-1, image_seq_length=4)
rows = [{"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor([1, 2, 3, 4])}] * 8


def head(model):
    return model.lm_head.weight.detach().clone()


class Begin(TrainerCallback):
    """Remembers the weights that the first step starts from."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.head, self.step = head(model), state.global_step


def train(model, steps, **how):
    arguments = TrainingArguments("out-" + type(model).__name__, max_steps=steps, save_steps=2, learning_rate=0.1, report_to="none",
                                  use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2)
    begin = Begin()
    Trainer(model, arguments, train_dataset=rows, callbacks=[begin]).train(**how)
    return begin


for kind, config in ((LlamaForCausalLM, text), (LlavaForConditionalGeneration, llava)):
    torch.manual_seed(0)
    fresh = kind(config)
    trained = copy.deepcopy(fresh)
    train(trained, 2)
    folder, saved = f"out-{kind.__name__}/checkpoint-2", head(trained)
    begin = train(copy.deepcopy(fresh), 3, resume_from_checkpoint=folder)
    said = "the saved" if torch.equal(begin.head, saved) else "the first" if torch.equal(begin.head, head(fresh)) else "other"
    loaded = "the saved" if torch.equal(head(kind.from_pretrained(folder)), saved) else "other"
    print(f"{kind.__name__}: step {begin.step} begins with {said} weights, from_pretrained has {loaded}")
PY
cat > expected <<'OUT'
LlamaForCausalLM: step 2 begins with the saved weights, from_pretrained has the saved
LlavaForConditionalGeneration: step 2 begins with the first weights, from_pretrained has the saved
OUT
venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
grep -v '^{' seen > lines || true
cat lines
diff expected lines || { echo "changed: Trainer resumes a LLaVA in another way now" >&2; exit 1; }
