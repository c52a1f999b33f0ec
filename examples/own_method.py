"""A method of your own: the tokens with the longest feature vectors.

python examples/own_method.py
mllm-efficient eval --import examples/own_method.py --method longest:keep=0.25 --method random:keep=0.25 --limit 140
"""

from dataclasses import dataclass

from torch import Tensor

import mllm_efficient as me


@me.register("longest")
@dataclass(frozen=True, kw_only=True)
class Longest(me.Selector):
    """Keeps the K tokens with the longest feature vectors."""

    def score(self, v: me.VisualTokens) -> Tensor:
        """Scores (N,) of features (N, D)."""
        return v.features.float().norm(dim=1)


if __name__ == "__main__":
    model, processor = me.builtin()
    image, question = me.sample(1)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with me.compressed(model, "longest:keep=0.25"):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(question, processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print(me.last_report(model).images[0].indices.tolist())
