"""Training on records that cannot be used: stopped at with a name, or left out and counted; nothing is trained on nothing."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.train.feed import Skipping

from .test_train import RECIPES

STEPS = [f"stages.{i}.{k}" for i in (0, 1) for k in ("steps=4", "batch_size=2")]


@pytest.fixture
def data(tmp_path):
    """Thirty-two records with pictures of their own, of which every eighth is a truncated JPEG."""
    lines = []
    for i in range(32):
        path = tmp_path / f"{i}.jpg"
        Image.effect_noise((144, 144), 60).convert("RGB").save(path)
        if i % 8 == 5:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        said = [{"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": "a red ring"}]
        lines.append(json.dumps({"image": path.name, "conversations": said}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


def train(data, *more):
    recipe = ["train", "--config", str(RECIPES / "tokenflex_builtin.yaml"), f"output_dir={data.parent / 'run'}", "counts={36: 1}"]
    given = f"{{path: {data}, on_bad: %s}}"
    skip = "skip" if "skip" in more else "stop"
    both = [f"data={given % skip}", f"stages.0.data={given % skip}", "independent_turns=false", "logging_steps=1"]
    return main([*recipe, *both, *STEPS, *(m for m in more if m != "skip")])


def test_a_truncated_picture_stops_a_training_in_one_line_that_names_its_record(data, capsys):
    assert train(data) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mllm-efficient: ") and "data.jsonl:" in said and ".jpg cannot be read as an image: " in said


def test_skip_leaves_truncated_pictures_out_and_counts_them(data, capsys):
    assert train(data, "skip", "stages.0.steps=16", "stages.1.epochs=1", "stages.1.steps=null") == 0
    err = capsys.readouterr().err
    for stage in ("distil", "full"):  # sixteen steps of two: each record once
        logged = [json.loads(line) for line in (data.parent / "run" / "log.jsonl").read_text().splitlines()]
        assert sum(entry.get("skipped", 0) for entry in logged if entry["stage"] == stage) == 4
        assert f"{stage}: 4 records could not be used" in err
    for i in (5, 13, 21, 29):
        assert f"skipped: {data}:{i + 1}: {data.parent / str(i)}.jpg cannot be read as an image" in err
    assert train(data, "stages.0.steps=16", "stages.1.epochs=1", "stages.1.steps=null") == 2
    assert "holds a training with another data, stages: use another output_dir" in capsys.readouterr().err


def test_records_that_are_malformed_are_left_out_and_counted_too(data, capsys):
    data.write_text(data.read_text() + '\n{"image": "0.jpg"}\n{"image": "none.jpg", "prompt": "is it ?", "answer": "no"}\n')
    assert train(data, "--dry-run", "skip", "--json") == 0
    out, err = capsys.readouterr()
    assert "left out: 1 of 34 records; the first: " in err and "data.jsonl:33: neither prompt" in err
    row = json.loads(out)["rows"][0]
    assert (row["records"], row["unreadable"], row["tiny"], row["cut_answers"]) == (33, 1, 0, 0)


def test_a_dry_run_says_what_a_training_would_stop_at(data, capsys):
    Image.new("RGB", (20, 7)).save(data.parent / "0.jpg")
    (data.parent / "1.jpg").unlink()
    (data.parent / "2.jpg").write_text("no picture")
    assert train(data, "--dry-run", "max_length=150") == 0
    out = capsys.readouterr().out
    stops = "2 unreadable pictures, 1 below 8 pixels, 29 records that max_length leaves no answer"
    assert f"Stage full: {stops}: training stops at the first" in out


@pytest.mark.parametrize("more", ((), ("skip",)))
def test_a_max_length_that_cuts_every_label_ends_with_an_error(data, capsys, more):
    assert train(data, "max_length=150", *more) == 2
    err = capsys.readouterr().err
    assert "data.jsonl:" in err and "max_length=150 cuts all of its answers, the first of which begins at token " in err
    assert not (data.parent / "run" / "final").exists()


def test_the_next_record_takes_the_place_of_one_that_cannot_be_used():
    def collate(records):
        if 3 in records or 4 in records:
            raise me.MllmEfficientError("three")
        return {"of": records}

    skipping = Skipping(collate, [0, 1, 2, 3, 4])
    found = [skipping(indices) for indices in ([0, 1], [2, 3], [4, 3], [1, 2])]
    assert [(f["of"], int(f["skipped"])) for f in found] == [([0, 1], 0), ([2, 0], 1), ([0, 0], 2), ([1, 2], 0)]
    assert skipping.bad == {3, 4}
    with pytest.raises(me.MllmEfficientError, match="no record can be used"):
        Skipping(collate, [3, 4])([0])


def test_a_step_without_a_label_is_an_error(data, capsys, monkeypatch):
    from mllm_efficient.train.encoding import Collator

    real = Collator.__call__

    def unlabelled(self, records):
        batch = real(self, records)
        return batch | {"labels": batch["labels"].fill_(-100)}

    monkeypatch.setattr(Collator, "__call__", unlabelled)
    assert train(data, "skip") == 2
    assert "step 1: no token of the batch has a label" in capsys.readouterr().err
