#!/usr/bin/env bash
# LLaVA-OneVision's processor: two pictures cost 9,450 or 1,460 tokens, depending on brackets.
# Expected: the same two 800x600 pictures behind the same prompt cost the same number of placeholders, however the list is nested.
# Happens: in the flat list [a, b] each picture is tiled (7 crops, 4,725 placeholders); in [[a, b]], one list for each prompt, which is
# the form that apply_chat_template hands on, neither is (1 crop, 730 placeholders). Nothing is logged. With one picture the nesting
# changes nothing, so a test with one picture does not find it.
# Versions: transformers 5.24.0, tokenizers 0.23.3, pillow 13.0.0; seen 2026-11. No torch needed.
# Matters: the uncompressed baseline of a multi-image benchmark differs 6.5 times between two harnesses that feed the same pictures.
set -euo pipefail
PYTHON=${PYTHON:-python3}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"$PYTHON" -m venv "$tmp/venv"
pip() { "$tmp/venv/bin/pip" -q --disable-pip-version-check install --no-compile "$@"; }
pip jinja2==3.1.6 pillow==13.0.0 transformers==5.24.0 tokenizers==0.23.3 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > run.py <<'PY'
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<unk>": 0, "<image>": 1, "<video>": 2, "compare": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


class ImagesOnly(LlavaOnevisionProcessor):
    """Without the video part, which needs torchvision; nothing else is changed."""

    def check_argument_for_proper_class(self, name, part):
        pass


processor = ImagesOnly(
    image_processor=LlavaOnevisionImageProcessorPil(),
    tokenizer=PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", additional_special_tokens=["<image>", "<video>"]
    ),
    num_image_tokens=729,
    vision_feature_select_strategy="full",
    chat_template="{% for p in messages[0]['content'] %}{{ '<image> ' if p['type'] == 'image' else p['text'] }}{% endfor %}",
)
a, b = Image.new("RGB", (800, 600), "red"), Image.new("RGB", (800, 600), "blue")


def show(name, inputs):
    print(f"{name}: {list(inputs['input_ids'][0]).count(1)} placeholders, crops {[len(p) for p in inputs['pixel_values']]}")


show("one, flat", processor(images=[a], text="<image> compare"))
show("one, nested", processor(images=[[a]], text="<image> compare"))
show("two, flat", processor(images=[a, b], text="<image> <image> compare"))
show("two, nested", processor(images=[[a, b]], text="<image> <image> compare"))
content = [{"type": "image", "image": a}, {"type": "image", "image": b}, {"type": "text", "text": "compare"}]
chat = [{"role": "user", "content": content}]
show("two, apply_chat_template", processor.apply_chat_template(chat, tokenize=True, return_dict=True))
PY
cat > expected <<'OUT'
one, flat: 4725 placeholders, crops [7]
one, nested: 4725 placeholders, crops [7]
two, flat: 9450 placeholders, crops [7, 7]
two, nested: 1460 placeholders, crops [1, 1]
two, apply_chat_template: 1460 placeholders, crops [1, 1]
OUT
HF_HUB_OFFLINE=1 venv/bin/python run.py > seen 2> log || { cat log >&2; exit 1; }
cat seen
diff expected seen || { echo "changed: nesting no longer decides whether LLaVA-OneVision's pictures are tiled" >&2; exit 1; }
