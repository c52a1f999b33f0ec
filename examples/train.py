"""Training with compressed prompts: the loss is over the answer's tokens, whatever left the prompt.

python examples/train.py
"""

import torch

import mllm_efficient as me

model, processor = me.builtin(device="cpu")
image, question = me.sample(4, split="train")
user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
told = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
template = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
prompt = processor.apply_chat_template([user], add_generation_prompt=True, **template)
batch = processor.apply_chat_template([user, told], **template)
labels = batch["input_ids"].clone()
labels[:, : prompt["input_ids"].shape[1]] = -100  # the answer alone

me.wrap(model, "divprune:keep=0.25")
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(5):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f} over {me.last_report(model).visual_tokens_kept} visual tokens")
