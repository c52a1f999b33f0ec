"""Several methods on one picture. The vision tower runs once for all that need the same of it.

python examples/compare.py
"""

import torch

import mllm_efficient as me

METHODS = ("none", "divprune:tokens=18", "tome:tokens=18", "uniform:tokens=18", "random:tokens=18")

model, processor = me.builtin()
image, question = me.sample(2)
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

encoded = me.encode(model, "none", **inputs)  # methods that ask the tower for attention encode by themselves
print(question)
for method in METHODS:
    prepared = me.prepare(model, method, encoded=encoded, **inputs)
    with torch.no_grad():
        out = model.generate(**prepared.model_kwargs, max_new_tokens=8, do_sample=False)
    text = processor.decode(out[0, prepared.model_kwargs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{method:20} {prepared.report.visual_tokens_kept:4} tokens  {text}")
