"""Wrap a model, ask it, read the report, unwrap it.

python examples/generate.py
python examples/generate.py --model llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?" --method divprune:keep=0.1
"""

import argparse

import mllm_efficient as me

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="Hugging Face id or folder; the embedded model without it")
parser.add_argument("--image")
parser.add_argument("--question", default="What is in the image?")
parser.add_argument("--method", default="divprune:keep=0.25")
args = parser.parse_args()

if args.model is None:
    model, processor = me.builtin()
    image, question = me.sample()
else:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(args.model)
    image, question = Image.open(args.image), args.question

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)


def answer() -> str:
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


full = answer()
me.wrap(model, args.method)
short = answer()
report = me.last_report(model)
me.unwrap(model)  # nothing is left behind

print(question)
print(f"{full!r} with {report.visual_tokens_full} visual tokens, {short!r} with {report.visual_tokens_kept}")
