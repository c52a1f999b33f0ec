"""The embedded benchmark and model: frozen images, disjoint splits, a packed trainer equal to the stock model."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_efficient.eval.builtin.architecture import VOCABULARY, build_config, build_processor
from mllm_efficient.eval.builtin.questions import CATEGORIES, all_questions, benchmark_questions
from mllm_efficient.eval.builtin.recipe.data import encode, pack
from mllm_efficient.eval.builtin.recipe.muon import orthogonalise
from mllm_efficient.eval.builtin.recipe.packed import Packed
from mllm_efficient.eval.builtin.scenes import DIGITS, Stream, make_scene
from mllm_efficient.loading.models import ModelOptions, builtin_folder, load

# sha256 over the RGB bytes of scenes 0..49 at 144 px; a change means that published numbers no longer hold.
IMAGES = {
    "train": "bdcd2dd3c6109cf5a7b67aefa0e131ad0538fab8b6b09d08e8afd52d050d264a",
    "val": "8fe00b9c0a3f412b721b5d317508b4515b44544873419df431c026dfa758235d",
    "test": "d2b9a271acc97586e5c9003612888f50fc00f9cf017f9a68f9615b56d57cf143",
}


@pytest.mark.parametrize("split", IMAGES)
def test_images_never_change(split):
    digest = hashlib.sha256()
    for index in range(50):
        digest.update(make_scene(split, index).draw(144).tobytes())
    assert digest.hexdigest() == IMAGES[split]


def test_the_stream_is_splitmix64():
    """First outputs for state 1234567, the reference values of the algorithm's published C code."""
    stream = Stream()
    stream.state = 1234567
    assert [stream.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    stream.state = 1234567
    assert stream.block(3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_splits_share_no_image():
    images = [make_scene(split, i).draw(48).tobytes() for split in IMAGES for i in range(60)]
    assert len(set(images)) == len(images)


def test_a_scene_can_be_drawn_at_any_size():
    scene = make_scene("val", 5)
    for size in (96, 336, 672):
        image = scene.draw(size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        x, y = scene.big.x * size // 1440, scene.big.y * size // 1440
        if scene.big.shape != "ring":
            assert np.abs(image[y, x].astype(int) - scene.big.rgb).max() <= 60  # noise


def test_digits_are_ten_different_bitmaps():
    assert len({tuple(d) for d in DIGITS}) == 10


def test_questions_are_answered_by_the_scene():
    """Every question is checked against the scene by other means than the generator's."""
    for index in range(150):
        scene = make_scene("val", index)
        for question in (q for qs in all_questions(scene, Stream(1)).values() for q in qs):
            words = question.text.rstrip("?").lower().split()
            answer = question.answer
            assert answer in VOCABULARY and set(encode(question.text)) <= set(VOCABULARY.values())
            things = {f"{t.colour} {t.shape}": t for t in scene.things}
            if question.category == "presence":
                assert (answer == "yes") == (" ".join(words[-2:]) in things)
            elif question.category == "count":
                assert int(answer) == len(scene.things) - 1
            elif question.category == "reading":
                found = [d for d in scene.digits if d.corner == " ".join(words[-3:-1])]
                assert answer == (str(found[0].value) if found else "none")
            elif question.category == "attribute":
                asked = words[-2] if words[1] == "shape" else words[-1]
                (thing,) = [t for t in scene.small if asked in (t.colour, t.shape)]
                assert answer == (thing.shape if words[1] == "shape" else thing.colour)
            elif question.category == "position" and (" of the " in question.text or "above" in words):
                a, b = things[" ".join(words[2:4])], things[" ".join(words[-2:])]
                assert {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[answer]
            elif question.category == "position":
                a = things[" ".join(words[2:4])]
                assert {"left": a.x < 720, "right": a.x > 720, "top": a.y < 720, "bottom": a.y > 720}[answer]
            elif question.category == "comparison" and "digit" in words:
                at = {d.corner: d.value for d in scene.digits}
                assert (answer == "yes") == (at[" ".join(words[2:4])] > at[" ".join(words[8:10])])


def test_no_category_is_answered_by_one_word():
    """The most frequent answer of each category stays well below a working model's accuracy."""
    answers: dict[str, Counter] = {c: Counter() for c in CATEGORIES}
    for index in range(600):
        for question in benchmark_questions(make_scene("val", index)):
            answers[question.category][question.answer] += 1
    for counts in answers.values():
        assert counts.most_common(1)[0][1] / counts.total() < 0.55


def test_the_trainers_encoding_is_the_tokenizers():
    processor = build_processor()
    for index in range(40):
        for question in benchmark_questions(make_scene("val", index)):
            block, at, _ = pack(question)
            assert processor.tokenizer(question.text, add_special_tokens=False).input_ids == encode(question.text)
            assert block[at] == VOCABULARY[":"] and block[at + 1] == VOCABULARY[question.answer]


def test_packed_training_forward_equals_the_stock_model():
    """One prefix for many questions gives the logits of separate prompts; without its image, those of a text prompt."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(build_config(hidden=64, layers=3, vision_layers=2, mlp=96)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    packed, processor = Packed(model), build_processor()
    scene = make_scene("val", 1)
    image, questions = scene.draw(144), benchmark_questions(scene)
    blocks, at, _ = zip(*(pack(q) for q in questions))
    blind = torch.zeros(1, len(questions), dtype=torch.bool)
    blind[0, -1] = True
    with torch.no_grad():
        visual = packed.project(packed.tower(torch.from_numpy(image)[None]))
        got = packed.answer(visual, torch.tensor([blocks]), torch.tensor([at]), torch.ones(1), blind)
        for i, question in enumerate(questions):
            picture = None if blind[0, i] else Image.fromarray(image)
            text = f"USER: {'' if picture is None else '<image>' + chr(10)}{question.text} ASSISTANT:"
            inputs = processor(images=picture, text=text + " " + question.answer, return_tensors="pt")
            wanted = model(**inputs).logits[0, -2:]
            torch.testing.assert_close(got[0, i], wanted, atol=2e-5, rtol=0)  # float32, another order of summation


def test_newton_schulz_orthogonalises():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 24, 8), (2, 8, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.3  # the iteration's own band around 1


def test_the_shipped_model_is_small_safe_and_stock():
    folder = builtin_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12e6
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    loaded = load(ModelOptions(device="cpu"))
    assert type(loaded.model).__module__ == "transformers.models.llava.modeling_llava"
    assert loaded.model.config.architectures == ["LlavaForConditionalGeneration"]


def test_the_shipped_model_answers():
    """A floor far under the published accuracy and far above chance: the checkpoint, processor and prompt belong together."""
    from mllm_efficient.eval.builtin.suite import samples
    from mllm_efficient.eval.runner import Run
    from mllm_efficient.registry import build

    records = Run(load(ModelOptions(device="cpu")), samples("val", 140), [build("none")], floor=False).answer_all()
    assert sum(r["correct"] for r in records) / len(records) > 0.8
