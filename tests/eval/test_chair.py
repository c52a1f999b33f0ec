"""CHAIR: which objects a caption names, which of them the picture does not show, and the task from COCO's files to the table."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

import mllm_efficient as me
from mllm_efficient import stats
from mllm_efficient.cli import main
from mllm_efficient.eval.lmms.tasks import chair

from ..public_data import make

needs_lmms = pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval: make test-integration")


# ------------------------------------------------------------------------------------------------------ which objects


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two men ride their bikes.", ["person", "bicycle"]),
        ("A hot dog beside a dog; hot dogs, a hotdog", ["hot dog", "dog", "hot dog", "hot dog"]),
        ("children, women, geese, knives, mice", ["person", "person", "bird", "knife", "mouse"]),
        ("sheep, buses, puppies, benches", ["sheep", "bus", "dog", "bench"]),
        ("a teddy bear, a bear, a stuffed bear", ["teddy bear", "bear", "teddy bear"]),
        ("a baby elephant and a baby", ["elephant", "person"]),
        ("a passenger train on the train tracks at a train station", ["train"]),
        ("the toilet seat, a seat", ["toilet", "chair"]),
        ("a man in an orange shirt eats an orange. The wall is orange", ["person", "orange"]),
        ("oranges; a remote area; the remote", ["orange", "remote"]),
        ("a bus driver at the bus stop near a stop sign", ["person", "stop sign"]),
        ("a pair of skis, ski poles, the ski slope", ["skis"]),
        ("a zebra crossing, a zebra", ["zebra"]),
        ("the dining room table, a coffee-cup", ["dining table", "cup"]),
        ("the man's TV", ["person", "tv"]),
        ("carpet, catalog, category, beard, tables", ["dining table"]),  # words, not parts of words
        ("", []),
    ],
)  # fmt: skip
def test_objects_that_a_text_names(text, objects):
    assert chair.objects_in(text) == objects


def test_the_table_has_cocos_80_categories_and_no_word_twice():
    content = chair._words()
    names = [w for category, more in content["objects"].items() for w in (category, *more)] + content["others"]
    assert len(content["objects"]) == 80 and len(set(names)) == len(names)
    assert all(
        chair.objects_in(c) == chair.objects_in(chair.plural(c)) == [c] for c in content["objects"] if c not in content["adjectives"]
    )
    assert max(len(n.split()) for n in names) < chair.WORDS + 1


def test_scores_of_captions_are_those_of_the_paper():
    """Two of three mentions are there, then both of two, then nothing is named: by hand."""
    docs = [{"objects": ["cat", "couch"]}, {"objects": ["dog", "person"]}, {"objects": ["bus"]}, {"objects": []}]
    said = ["A cat and a dog on the sofa.", "A man with his dogs.", "A street.", "A boat, a boat."]
    kept = [chair.results(doc, [text]) for doc, text in zip(docs, said)]
    assert [k["chair_s"] for k in kept] == [1, 0, 0, 1]
    assert chair.share([k["chair_i"] for k in kept]) == 3 / 7 and chair.share([k["recall"] for k in kept]) == 4 / 5
    assert np.isnan(chair.share([kept[2]["chair_i"]]))


# ------------------------------------------------------------------------------------------------------- COCO's files

SHOWN = {0: ["dog", "bench"], 1: ["person", "bicycle"], 2: ["person"], 3: []}


def instances(folder, shown=None, name="instances_val2017.json"):
    """COCO's file with these categories in these pictures."""
    shown = SHOWN if shown is None else shown
    names = sorted({c for those in shown.values() for c in those})
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in shown],
        "categories": [{"id": 10 + n, "name": c, "supercategory": "x"} for n, c in enumerate(names)],
        "annotations": [{"id": n, "image_id": i, "category_id": 10 + names.index(c), "iscrowd": 0, "bbox": [0, 0, 1, 1]}
                        for n, (i, c) in enumerate((i, c) for i, those in shown.items() for c in those)],
    }  # fmt: skip
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is no instances_"), ("[]", "is no instances_"), ('{"images": []}', "is no instances_"), (None, "cannot be read")],
)
def test_a_file_that_is_none_of_cocos_is_one_line(tmp_path, text, says):
    file = tmp_path / "instances_val2017.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(me.MllmEfficientError, match=says):
        chair.outlined(str(file))


def test_categories_that_are_not_cocos_are_named(tmp_path):
    with pytest.raises(me.MllmEfficientError, match="none of COCO's 80: unicorn"):
        chair.outlined(str(instances(tmp_path, {0: ["unicorn"]})))


# ----------------------------------------------------------------------------------------------------------- the task


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make(root, ["coco2017_cap_val"])
    return root, instances(root)


SAID = {"none": "A dog on the grass.", "divprune:keep=0.25": "A dog and a cat on a couch.", "resize:keep=0.25": "Grass."}


@pytest.fixture
def captioned(monkeypatch):
    """The embedded model says what ``SAID`` has for its method."""
    from mllm_efficient.eval.lmms.asking import Answer
    from mllm_efficient.eval.lmms.model import ModelAsker

    def answers(self, batch, settings):
        assert settings["max_new_tokens"] == 512 and settings["until"] == []
        return [Answer(SAID[self.method.spec()], confidence=0.5) for _ in batch]

    monkeypatch.setattr(ModelAsker, "answers", answers)


def command(data, *more):
    root, file = data
    return ["eval", "--tasks", "me_coco_chair", "--data-root", str(root), "--coco-instances", str(file), *map(str, more)]


@needs_lmms
def test_the_table_has_both_rates_and_recall_with_intervals_over_pictures(data, captioned, capsys, tmp_path):
    """Pictures 0 to 3 show by outline or caption: bench and dog; bicycle and person; person; cat and dining table (a cat under a table)."""
    asked = command(data, "--method", "divprune:keep=0.25", "--output-dir", tmp_path / "run")
    assert main([*asked, "--json"]) == 0
    rows = {(r["method"], r["metric"]): r for r in json.loads(capsys.readouterr().out)["rows"] if r["task"] == "me_coco_chair"}
    assert {m for _, m in rows} == {"chair_s", "chair_i", "recall"}
    value = {key: r["value"] for key, r in rows.items()}
    assert value["none", "chair_s"] == 0.75 and value["none", "chair_i"] == 0.75 and value["none", "recall"] == pytest.approx(1 / 7)
    assert value["divprune:keep=0.25", "chair_s"] == 1 and value["divprune:keep=0.25", "chair_i"] == pytest.approx(10 / 12)
    row = rows["divprune:keep=0.25", "chair_s"]
    assert (row["score"], row["baseline"], row["difference"], row["clusters"]) == (0.0, 25.0, -25.0, 4)
    assert row["score_interval"] == [0.0, 60.24] and row["value_interval"] == [0.3976, 1.0]  # Clopper-Pearson of 0 of 4
    low, high = row["difference_interval"]
    assert low < -25 < high and row["ece"] == 50.0
    assert (row["hard_n"], row["broken_n"], row["broken"]) == (0, 1, 100.0)  # resize names nothing, and nothing wrong
    assert all(rows[m, name]["value_interval"] for m in ("none", "divprune:keep=0.25") for name in ("chair_i", "recall"))
    assert rows["resize:keep=0.25", "chair_s"]["score"] == 100.0 and rows["resize:keep=0.25", "recall"]["value"] == 0
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "CHAIR (me_coco_chair)" in out and "chair_i" in out and "recall" in out and "By a word list of our own" in out
    assert main(["report", str(tmp_path / "run")]) == 0 and "me_coco_chair" in capsys.readouterr().out


@needs_lmms
def test_a_share_of_objects_is_resampled_by_picture():
    """Against a plain loop; what is named counts, not how many captions there are."""
    from mllm_efficient.eval.lmms.scores import clustered

    rng = np.random.default_rng(0)
    named = rng.integers(0, 6, 30)
    items = [{"score": float(rng.integers(0, n + 1) / n) if n else 0.0, "weight": int(n)} for n in named]
    value = chair.share(items)
    parts = clustered(None, items, range(30), value, 1.0)
    right, asked = stats.sums(np.array([parts.right, parts.asked]).T, 0, "t").T
    slow = [chair.share([items[i] for i in drawn]) for block in stats.picks(30, 0, "t") for drawn in block]
    assert parts.why is None and parts.weighted and np.allclose(right / asked, slow)


@needs_lmms
def test_a_caption_that_failed_is_wrong(data, monkeypatch, capsys):
    from mllm_efficient.eval.lmms.asking import Answer
    from mllm_efficient.eval.lmms.model import ModelAsker

    def answers(self, batch, settings):
        if batch[0][0].keys == ["me_coco_chair/2/0"]:
            raise OSError("out of order")
        return [Answer("A man.", confidence=0.9) for _ in batch]

    monkeypatch.setattr(ModelAsker, "answers", answers)
    assert main([*command(data), "--json"]) == 1
    rows = {r["metric"]: r for r in json.loads(capsys.readouterr().out)["rows"] if r["task"] == "me_coco_chair"}
    assert rows["chair_s"]["value"] == 0.75 and rows["chair_s"]["failures"] == 1  # two of four name a man who is not there, and one failed
    assert rows["chair_i"]["value"] == pytest.approx(2 / 3) and rows["chair_s"]["n"] == 4


@needs_lmms
def test_without_cocos_file_or_with_another_one_it_is_one_line(data, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(chair.VARIABLE, raising=False)
    root, _ = data
    other = instances(tmp_path, {7: ["dog"]}, "other.json")
    for more, says in (
        ([], "give its path with --coco-instances"), (["--coco-instances", tmp_path / "none.json"], "cannot be read: No such file"),
        (["--coco-instances", other], "does not have 4 of the 4 pictures, such as 0: it is of another split"),
    ):  # fmt: skip
        assert main(["eval", "--tasks", "me_coco_chair", "--data-root", str(root), *map(str, more)]) == 2
        err = capsys.readouterr().err
        assert says in err.strip().splitlines()[-1] and "Traceback" not in err
    assert main(["eval", "--tasks", "me_builtin", "--coco-instances", str(other)]) == 2
    assert "has no effect without the task me_coco_chair" in capsys.readouterr().err
    assert main(["eval", "--coco-instances", str(other)]) == 2


@needs_lmms
def test_what_the_pictures_show_is_part_of_what_a_folder_was_asked(data, captioned, capsys, tmp_path):
    root, _ = data
    (tmp_path / "a").mkdir()
    asked = ["eval", "--tasks", "me_coco_chair", "--data-root", str(root), "--output-dir", str(tmp_path / "run"), "--coco-instances"]
    assert main([*asked, str(instances(root))]) == 0
    assert main([*asked, str(instances(tmp_path / "a", SHOWN | {3: ["zebra"]}))]) == 2
    assert "task me_coco_chair or its data changed" in capsys.readouterr().err
