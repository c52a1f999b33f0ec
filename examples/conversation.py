"""A second question on the cache of the first one's compressed prompt: the picture is not encoded again.

python examples/conversation.py
"""

import mllm_efficient as me

model, processor = me.builtin()
image, first = me.sample(0)
me.wrap(model, "divprune:keep=0.5")

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": first}]}]
cache = None
for question in (first, "How many small shapes are there?"):
    if cache is not None:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    if cache is not None:
        inputs.pop("pixel_values")  # the cache holds the picture; input_ids are the whole conversation, in full length
        inputs["past_key_values"] = cache
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    answer = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    print(f"{question}  {answer}  (cache of {cache.get_seq_length()} positions, prompt of {inputs['input_ids'].shape[1]})")
