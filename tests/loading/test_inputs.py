"""One way in: the same pictures are as many visual tokens in every command, and a folder's own limits count everywhere."""

from __future__ import annotations

import json
import random

import pytest

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.flops import cost, load_shape
from mllm_efficient.patches import adapter_for

from ..families import noise
from ..folders import NAMES, parts_of, save

SIZE = (70, 50)
QUESTION = "what is the big ring ?"


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_llava, make_processor):
    """``made(name)``: a family's folder, and what is loaded from it, once."""
    root, known = tmp_path_factory.mktemp("folders"), {}

    def make(name):
        if name not in known:
            folder = save(name, root / name, *parts_of(name, make_llava, make_processor))
            known[name] = folder, load(ModelOptions(str(folder), device="cpu"))
        return known[name]

    return make


def run(capsys, *arguments) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ the same tokens everywhere


def generated(capsys, folder, loaded, paths):
    (row,) = run(capsys, "generate", "--model", folder, *images(paths), "--prompt", QUESTION, "--max-new-tokens", 1)["rows"]
    return row["visual_tokens_full"]


def shown(capsys, folder, loaded, paths):
    to = paths[0].with_name("shown.png")
    rows = run(capsys, "show", "--model", folder, *images(paths), "--method", "none", "--output", to)["rows"]
    assert len(rows) == len(paths)
    return sum(row["full"] for row in rows)


def benched(capsys, folder, loaded, paths):
    size = () if adapter_for(loaded.model).fixed_count else ("--image-size", "{}x{}".format(*SIZE))
    once = ("--repeats", 1, "--warmup", 0, "--output-tokens", 1, "--text-tokens", 40)
    rows = run(capsys, "bench", "--model", folder, *size, "--images", len(paths), *once)["rows"]
    return next(row["visual_tokens_full"] for row in rows if row["method"] == "none")


def evaluated(capsys, folder, loaded, paths):
    requests = paths[0].with_name("requests.jsonl")
    requests.write_text(json.dumps({"images": [p.name for p in paths], "prompt": QUESTION}) + "\n")
    out = paths[0].with_name("out")
    run(capsys, "eval", "--model", folder, "--data", requests, "--max-new-tokens", 2, "--output-dir", out)
    return json.loads((out / "samples.jsonl").read_text().splitlines()[0])["visual_tokens_full"]


def asked_as_a_task(capsys, folder, loaded, paths):
    """What ``eval --tasks`` and lmms-eval's own command ask through."""
    from mllm_efficient.eval.lmms.asking import Content, Request
    from mllm_efficient.eval.lmms.model import ModelAsker
    from mllm_efficient.media.images import load_image

    content = [*({"type": "image"} for _ in paths), {"type": "text", "text": QUESTION}]
    pictures = [load_image(p) for p in paths]
    asked = Content([{"role": "user", "content": content}], pictures, [p.name for p in paths])
    asker = ModelAsker(loaded=loaded, method=me.build("none"), max_new_tokens=1)
    (answer,) = asker.ask([Request("task/0", {}, lambda: asked)])
    return answer.visual_tokens_full


def trained(capsys, folder, loaded, paths):
    from mllm_efficient.records import Record
    from mllm_efficient.train.encoding import Collator
    from mllm_efficient.train.survey import survey

    record = Record(tuple(paths), (("<image>\n" * len(paths) + QUESTION, "red"),), "record 1")
    adapter = adapter_for(loaded.model)
    seen = sum(item.shape.n for item in adapter.items(Collator(loaded.processor)([record])))
    assert survey([record], loaded.processor, adapter=adapter)["visual_tokens"] == {"mean": seen, "max": seen}
    return seen


def counted(capsys, folder, loaded, paths):
    size = () if adapter_for(loaded.model).fixed_count else ("--image-size", "{}x{}".format(*SIZE))
    row, *_ = run(capsys, "flops", "--model", folder, *size, "--images", len(paths))["rows"]
    return row["visual_tokens_full"]


def images(paths):
    return [word for path in paths for word in ("--image", path)]


WAYS = {
    "generate": generated, "show": shown, "bench": benched, "eval --data": evaluated, "eval --tasks": asked_as_a_task, "train": trained,
    "flops": counted,
}  # fmt: skip


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_command_sees_as_many_visual_tokens(capsys, tmp_path, made, monkeypatch, name, pictures):
    folder, loaded = made(name)
    monkeypatch.setattr("mllm_efficient.loading.models.load", lambda options: loaded)
    paths = [tmp_path / f"{i}.png" for i in range(pictures)]
    for i, path in enumerate(paths):
        noise(i, *SIZE).save(path)
    found = {way: count(capsys, folder, loaded, paths) for way, count in WAYS.items()}
    assert len(set(found.values())) == 1, found
    each = {"llava": 36, "llava_next": 112, "llava_next_video": 112, "llava_onevision": 121, "internvl": 45, "gemma3": 9}.get(name, 40)
    alone = {"llava_onevision": 25}.get(name, each)  # several pictures of a prompt are not tiled
    assert found["generate"] == (each if pictures == 1 else 2 * alone)


# ------------------------------------------------------------------------------------------------ a folder's own limits


PINPOINTS = [[24, 24], [24, 96], [48, 72], [72, 48], [96, 24], [72, 72]]
LIMITED = {
    "llava_next": {"image_grid_pinpoints": PINPOINTS},
    "llava_onevision": {"image_grid_pinpoints": [[25 * (h // 24), 25 * (w // 24)] for h, w in PINPOINTS]},
    "internvl": {"min_patches": 2, "max_patches": 7},
    "qwen2_vl": {"size": {"shortest_edge": 8 * 8 * 9, "longest_edge": 8 * 8 * 31}},
    "qwen2_5_vl": {"size": {"shortest_edge": 8 * 8 * 2, "longest_edge": 8 * 8 * 17}},
    "qwen3_vl": {"size": {"shortest_edge": 8 * 8 * 20, "longest_edge": 8 * 8 * 25}},
}


def limited(name, folder):
    """A folder with limits of its own, which the model's config shares where it has them."""
    model, processor = parts_of(name, None, None)
    settings = dict(LIMITED[name])
    if "image_grid_pinpoints" in settings:
        model.config.image_grid_pinpoints = settings["image_grid_pinpoints"]
    if name == "llava_onevision":
        model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_6"
    return save(name, folder, model, processor, **settings)


def sizes(name, count):
    """Seeded (width, height) from 8 to 400 pixels, some of them long, some of them multiples of a token or a tile."""
    draw = random.Random(name)
    for i in range(count):
        width, height = (draw.choice((8, 24, 25, 48, draw.randint(8, 130), draw.randint(8, 400))) for _ in range(2))
        yield (width, height) if i % 10 else (width, max(8, width // 20))


@pytest.mark.parametrize("name", LIMITED)
def test_flops_counts_what_generate_reports(name, tmp_path):
    """Of 200 pictures: what ``generate`` makes of a call before it decodes, for every sixteenth with its own report."""
    folder = limited(name, tmp_path)
    loaded, shape = load(ModelOptions(str(folder), device="cpu")), load_shape(str(folder))
    model, none, seen = loaded.model, me.build("none"), set()
    prompt = loaded.prompt(QUESTION, 1)
    for i, size in enumerate(sizes(name, 200)):
        inputs = loaded.inputs([prompt], [noise(0, *size)])
        reports = [me.prepare(model, none, **inputs).report]
        if i % 16 == 0:
            with me.compressed(model, none):
                reports.append(model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True).compression)
        closed = cost(shape, image_size=size)
        (item,) = adapter_for(model).items(inputs)
        assert closed.separators == item.shape.separators, size
        assert {report.visual_tokens_full for report in reports} == {closed.visual_tokens_full}, size
        assert len({report.visual_tokens_kept for report in reports}) == 1
        seen.add(closed.visual_tokens_full)
    assert len(seen) > 3


@pytest.mark.parametrize("name", LIMITED)
def test_flops_and_generate_report_the_same_number(capsys, tmp_path, name):
    folder = limited(name, tmp_path / "model")
    for i, size in enumerate([(201, 77), (31, 260)]):
        noise(i, *size).save(tmp_path / "picture.png")
        (row,) = run(capsys, "generate", "--model", folder, "--image", tmp_path / "picture.png", "--prompt", "a ?", "--max-new-tokens", 1)[
            "rows"
        ]
        counted = run(capsys, "flops", "--model", folder, "--image-size", "{}x{}".format(*size), "--measured", "--new-tokens", 3)["rows"][0]
        assert counted["visual_tokens_full"] == row["visual_tokens_full"] and counted["measured"]["difference_flops"] == 0
