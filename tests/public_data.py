"""Small seeded data sets of public benchmarks, in the layout of the hub, with the right and a wrong answer to each sample."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Doc = dict[str, Any]
STOCK = {"me_pope": "pope", "me_gqa": "gqa", "me_mme": "mme", "me_textvqa_ocr": "textvqa_val"}  # ours, and whose data they ask
COLORS = ("red", "blue", "green", "black", "white", "yellow")
ABSURD = "xylophone"
LETTERS = "ABCD"


@dataclass(frozen=True)
class Fixture:
    """The data set of a task. right, wrong: answers to a sample. more: tables of other configurations."""

    hub: str
    split: str
    rows: Callable[[], list[Doc]]
    right: Callable[[Doc], str]
    wrong: Callable[[Doc], str] = lambda doc: ABSURD
    config: str = "default"
    more: dict[str, Callable[[], list[Doc]]] = field(default_factory=dict)


def make(root: Path, only: Sequence[str] | None = None) -> None:
    """Writes the data sets of these tasks, or of all, to ``root/<hub id>``."""
    from datasets import Dataset

    for task in only or FIXTURES:
        fixture = FIXTURES[STOCK.get(task, task)]
        folder, tables = root / fixture.hub, {fixture.config: fixture.rows, **fixture.more}
        card = ["---", "configs:"]
        for config, rows in tables.items():
            inside = "data" if config == "default" else config
            (folder / inside).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows(), features=features_of(rows())).to_parquet(folder / inside / f"{fixture.split}-00000-of-00001.parquet")
            card += [f"- config_name: {config}", f"  data_files: [{{split: {fixture.split}, path: {inside}/{fixture.split}-*.parquet}}]"]
        if list(tables) != ["default"]:
            (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def right_answer(task: str, doc: Doc) -> str:
    """What brings full marks."""
    return FIXTURES[STOCK.get(task, task)].right(doc)


def wrong_answer(task: str, doc: Doc) -> str:
    """What a model could well say, and what brings nothing."""
    return FIXTURES[STOCK.get(task, task)].wrong(doc)


def features_of(rows: Sequence[Doc]) -> Any:
    """The features of rows; a column without any value is one of images."""
    from datasets import Features, List, Value
    from datasets import Image as Pictures

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return List(of(value[0]))
        if isinstance(value, dict):
            return {k: of(v) for k, v in value.items()}
        return Pictures() if value is None or isinstance(value, Image.Image) else Value("int64" if isinstance(value, int) else "string")

    return Features({k: of(next((r[k] for r in rows if r[k] is not None), None)) for k in rows[0]})


def picture(seed: int, width: int = 12, height: int = 8) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


# ---------------------------------------------------------------------------------------------------------- answers


def answer(doc: Doc) -> str:
    return doc["answer"]


def most_given(doc: Doc) -> str:
    given = [a if isinstance(a, str) else a["answer"] for a in doc["answers"]]
    return collections.Counter(given).most_common(1)[0][0]


def index_letter(doc: Doc) -> str:
    return LETTERS[int(doc["answer"])]


def other_yes_no(doc: Doc) -> str:
    return "No" if doc["answer"].lower() == "yes" else "Yes"


def other_letter(doc: Doc) -> str:
    right = index_letter(doc) if str(doc["answer"]).isdigit() else doc["answer"]
    return LETTERS[1 - LETTERS.index(right)] if right in "AB" else "A"


# ------------------------------------------------------------------------------------------------------------- rows


def pope() -> list[Doc]:
    asked = [(category, said) for said in ("yes", "no") for category in ("adversarial", "popular", "random")]
    return [
        {"id": str(i), "question_id": str(i), "question": f"Is there a cup number {i} in the image?", "answer": said,
         "image_source": f"COCO_{i}", "image": picture(i), "category": category}
        for i, (category, said) in enumerate(asked)
    ]  # fmt: skip


def gqa() -> list[Doc]:
    return [
        {"id": f"q{i}", "imageId": f"n{i % 3}", "question": f"What color is thing {i}?", "answer": color, "fullAnswer": f"It is {color}."}
        for i, color in enumerate(COLORS)
    ]


def gqa_images() -> list[Doc]:
    return [{"id": f"n{i}", "image": picture(20 + i)} for i in (2, 0, 3, 1)]


def mme() -> list[Doc]:
    pairs = [("existence", 1), ("existence", 2), ("OCR", 1), ("code_reasoning", 1)]
    return [
        {"question_id": f"{category}/{n}.png", "image": picture(30 + n), "answer": said, "category": category,
         "question": f"Is this {category} {n} {said}? Please answer yes or no."}
        for category, n in pairs for said in ("Yes", "No")
    ]  # fmt: skip


def ten(right: str) -> list[str]:
    return [right] * 7 + ["unsure", f"light {right}", "grey"]


def textvqa() -> list[Doc]:
    return [
        {"image_id": f"i{i}", "question_id": i, "question": f"what word is on sign {i}?", "image": picture(40 + i), "answers": ten(color),
         "ocr_tokens": [color.upper(), "STOP"]}
        for i, color in enumerate(COLORS)
    ]  # fmt: skip


def scienceqa() -> list[Doc]:
    return [
        {"image": picture(50 + i), "question": f"Which of these is {i}?", "choices": list(COLORS[: 2 + i]), "answer": i,
         "hint": "Look at the picture." if i else ""}
        for i in range(3)
    ] + [{"image": None, "question": "Which one is red?", "choices": ["blue", "red"], "answer": 1, "hint": ""}]  # fmt: skip


def mmbench() -> list[Doc]:
    def row(index: int, options: Sequence[str], right: str) -> Doc:
        return {
            "index": index, "question": f"What color is thing {index % 1_000_000}?", "hint": "nan" if index % 2 else "Look at the corner.",
            "answer": right, **dict(zip(LETTERS, [*options, "nan", "nan"])), "category": "color", "image": picture(60 + index % 1_000_000),
            "source": "made", "L2-category": "perception", "comment": "nan", "split": "dev",
        }  # fmt: skip

    once = [row(i, COLORS[:4], LETTERS[i]) for i in range(4)] + [row(4, COLORS[:2], "B")]
    return [*once, row(1_000_001, COLORS[1:5], "A")]  # question 1 again, its options turned


def vqav2() -> list[Doc]:
    return [
        {"question_type": "what color", "multiple_choice_answer": color, "image_id": i, "answer_type": "other", "question_id": 1000 + i,
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(ten(color))],
         "question": f"What color is thing {i}?", "image": picture(70 + i)}
        for i, color in enumerate(COLORS)
    ]  # fmt: skip


def vizwiz() -> list[Doc]:
    return [
        {"question_id": f"VizWiz_val_{i}", "image": picture(80 + i), "question": "what is this?", "answers": ten(right),
         "category": "other"}
        for i, right in enumerate((*COLORS[:3], "unanswerable"))
    ]  # fmt: skip


def seedbench() -> list[Doc]:
    return [
        {"question_id": str(i), "question": f"What color is thing {i}?", **{f"choice_{c}": color for c, color in zip("abcd", COLORS)},
         "answer": LETTERS[i % 4], "data_type": kind, "image": [picture(90 + i)] * (1 if kind == "image" else 2)}
        for i, kind in enumerate(("image", "image", "image", "image", "video"))
    ]  # fmt: skip


def mmmu() -> list[Doc]:
    def row(subject: str, n: int, right: str, options: Sequence[str], images: int = 1) -> Doc:
        shown = {f"image_{i + 1}": picture(100 + 10 * n + i) if i < images else None for i in range(7)}
        question = f"Which is it: {' or '.join(f'<image {i + 1}>' for i in range(images))}?"
        return {
            "id": f"validation_{subject}_{n}", "question": question, "options": str(list(options)), "answer": right,
            "question_type": "multiple-choice" if options else "open", **shown,
        }  # fmt: skip

    return [
        row("Art", 1, "A", COLORS[:4]), row("Art", 2, "C", COLORS[:4], images=2), row("Math", 3, "B", COLORS[:2]),
        row("Math", 4, "12.5", ()), row("Music", 5, "blue", ()),
    ]  # fmt: skip


def captions_of(i: int) -> list[str]:
    subjects = ("dog runs across wet grass", "man rides an old bicycle", "woman paints a wooden fence", "cat sleeps under the table")
    return [f"a {COLORS[i]} {subjects[i]}{when}" for when in ("", " today", " at noon", " in summer", " again")]


def coco() -> list[Doc]:
    return [
        {"question_id": f"{i:012d}.jpg", "image": picture(200 + i), "question": "Please describe it.", "answer": captions_of(i), "id": i}
        for i in range(4)
    ]


def flickr30k() -> list[Doc]:
    return [{"image": picture(210 + i), "caption": captions_of(i), "img_id": str(i), "filename": f"{i}.jpg"} for i in range(4)]


def ai2d() -> list[Doc]:
    return [{"question": f"Which is {i}?", "options": list(COLORS[:4]), "answer": str(i), "image": picture(220 + i)} for i in range(4)]


def chartqa() -> list[Doc]:
    asked = [("human_test", "14"), ("human_test", "Yes"), ("augmented_test", "3.75"), ("augmented_test", "France")]
    return [{"type": t, "question": f"Which is value {i}?", "answer": a, "image": picture(230 + i)} for i, (t, a) in enumerate(asked)]


def docvqa() -> list[Doc]:
    return [
        {"questionId": str(i), "question": f"What is in line {i}?", "image": picture(240 + i), "docId": i,
         "answers": [f"{color} Street {i}", f"{color} St. {i}"]}
        for i, color in enumerate(COLORS)
    ]  # fmt: skip


def ocrbench() -> list[Doc]:
    asked = [
        ("IIIT5K", "Regular Text Recognition", "CENTRE"), ("STVQA", "Scene Text-centric VQA", "Pepsi"),
        ("SROIE", "Key Information Extraction", "12.50"), ("HME100k", "Handwritten Mathematical Expression Recognition", "a ^ { 2 } + b"),
    ]  # fmt: skip
    return [
        {"dataset": source, "question": "What is written here?", "question_type": kind, "answer": [right], "image": picture(250 + i)}
        for i, (source, kind, right) in enumerate(asked)
    ]


HUB = "lmms-lab-encoder"
FIXTURES = {
    "pope": Fixture(f"{HUB}/POPE", "test", pope, answer, other_yes_no),
    "gqa": Fixture(
        f"{HUB}/GQA", "testdev", gqa, answer, config="testdev_balanced_instructions", more={"testdev_balanced_images": gqa_images}
    ),
    "mme": Fixture(f"{HUB}/MME", "test", mme, answer, other_yes_no),
    "textvqa_val": Fixture(f"{HUB}/textvqa", "validation", textvqa, most_given),
    "scienceqa_img": Fixture(f"{HUB}/ScienceQA", "test", scienceqa, index_letter, other_letter, config="ScienceQA-IMG"),
    "mmbench_en_dev_static": Fixture(f"{HUB}/MMBench", "dev", mmbench, answer, other_letter, config="en"),
    "vqav2_val": Fixture(f"{HUB}/VQAv2", "validation", vqav2, most_given),
    "vizwiz_vqa_val": Fixture(f"{HUB}/VizWiz-VQA", "val", vizwiz, most_given),
    "seedbench": Fixture(f"{HUB}/SEED-Bench", "test", seedbench, answer, other_letter),
    "mmmu_val": Fixture(
        f"{HUB}/MMMU", "validation", mmmu, answer, lambda doc: other_letter(doc) if doc["question_type"] == "multiple-choice" else ABSURD
    ),
    "coco2017_cap_val": Fixture(f"{HUB}/COCO-Caption2017", "val", coco, lambda doc: doc["answer"][0]),
    "flickr30k_test": Fixture(f"{HUB}/flickr30k", "test", flickr30k, lambda doc: doc["caption"][0]),
    "ai2d": Fixture(f"{HUB}/ai2d", "test", ai2d, index_letter, other_letter),
    "chartqa": Fixture(f"{HUB}/ChartQA", "test", chartqa, answer),
    "docvqa_val": Fixture(f"{HUB}/DocVQA", "validation", docvqa, lambda doc: doc["answers"][1], config="DocVQA"),
    "ocrbench": Fixture("echo840/OCRBench", "test", ocrbench, lambda doc: doc["answer"][0]),
}
