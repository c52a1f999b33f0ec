"""Training: recipes that are wrong, losses that must equal slow ones, runs that are killed, several processes, what is published."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mllm_efficient as me
from mllm_efficient import locking
from mllm_efficient.cli import main
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.patches import adapter_for
from mllm_efficient.train import trainer as training
from mllm_efficient.train.build import build_model
from mllm_efficient.train.count_trainer import CountTrainer
from mllm_efficient.train.data import builtin_records
from mllm_efficient.train.encoding import Collator
from mllm_efficient.train.model import TrainingModel, independent
from mllm_efficient.train.publish import lasting
from mllm_efficient.train.reading import read
from mllm_efficient.train.sampling import by_flops, consistency, likelihoods, ramped
from mllm_efficient.train.trainer import run
from mllm_efficient.trained import folder as trained
from mllm_efficient.trained.install import install

RECIPES = Path(me.__file__).resolve().parent.parent / "configs" / "train"
SMALL = ["data.scenes=24", "data.questions=3", "stages.0.data.scenes=24", "logging_steps=1", "counts={36: 1, 9: 1}"]
PROJECTOR_ALONE = ["stages.1.train=[projector]", "stages.1.learning_rates={}"]
TWO = ["stages.0.steps=2", "stages.0.batch_size=4", "stages.1.steps=3", "stages.1.batch_size=2"]


def recipe(tmp_path, *more, name="tokenflex_builtin"):
    return read(RECIPES / f"{name}.yaml", [f"output_dir={tmp_path / 'run'}", *SMALL, *TWO, *more])


def log_of(folder, stage="full"):
    return [entry for entry in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if entry["stage"] == stage]


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("override, message", [
    ("sede=1", "the recipe has no setting sede"),
    ("seed", "not key=value"),
    ("seed=x", "seed='x': int is wanted"),
    ("bf16=1", "bf16=1: bool is wanted"),
    ("seed=true", "seed=True: int is wanted"),
    ("stages.7.steps=1", "there is no stage 7"),
    ("stages.0.stpes=1", "no setting stages.0.stpes"),
    ("stages.0.steps=null", "give steps or epochs"),
    ("stages.0.epochs=1", "give steps or epochs"),
    ("stages.0.steps=0", "steps=0 must be positive"),
    ("stages.0.steps=-3", "steps=-3 must be positive"),
    ("stages.0.learning_rate=.nan", "a finite number is wanted"),
    ("stages.0.train=[tower]", "projector, router, language_model, lora"),
    ("stages.0.train=[projector, language_model]", "distil fits the projector alone"),
    ("stages.0.learning_rates={lora: 1e-3}", "a learning rate of lora has no effect"),
    ("stages.1.train=[vision_tower];stages.1.learning_rates={}", "the vision tower stays as it is"),
    ("stages.1.name=distil", "stages need names of their own"),
    ("stages=[]", "no stages"),
    ("counts={}", "counts says which token counts"),
    ("counts={35: 1}", "no square: 25 and 36 are"),
    ("counts={36: 0}", "a positive weight is wanted"),
    ("method=divprune", "divprune is not trained"),
    ("method=tokenflx", "did you mean 'tokenflex'"),
    ("data.builtin=test", "test questions are for testing"),
    ("data={builtin: train, path: x.json}", "one of them"),
    ("data={builtin: train, images: x}", "no effect on generated data"),
    ("data={}", "give path"),
    ("lora={r: 4}", "lora has no effect"),
    ("stages.1.train=[projector, lora];stages.1.learning_rates={};lora={r: 0}", "r and alpha are at least 1"),
    ("stages.1.train=[projector, lora];stages.1.learning_rates={};lora={targets: [nope]}", "lora: "),
    ("seed=-1", "seed=-1: at least 0"),
    ("logging_steps=0", "logging_steps=0: at least 1"),
    ("workers=-1", "workers=-1: at least 0"),
    ("dtype=auto", "float32, bfloat16 or float16"),
    ("device=cuda:1", "CUDA_VISIBLE_DEVICES"),
    ("stages.1.name=final", "cannot be named final"),
    ("stages.1.weight_decay=-1", "at least 0"),
    ("stages.0.learning_rates={projector: -1}", "learning_rates are positive"),
    ("settings={expansion: x}", "a whole number from 1"),
    ("settings={expansion: 0}", "a whole number from 1"),
    ("start=/nowhere", "settings have no effect with start"),
    ("start=/nowhere;settings={}", "no config.json there"),
    ("stages.1.batch_size=64", "24 records are fewer than one step takes, 64"),
    ("settings={layers: conv}", "layers='conv' of a TokenFLEX projector: swiglu, mlp"),
    ("settings={mixer: rafts}", "mixer='rafts' of a TokenFLEX projector: none, pool, raft"),
    ("settings={width: 3}", "no setting width"),
    ("settings={over: frames}", "training takes no videos; train over=views"),
    ("settings={over: views}", "over=views has no effect on LlavaForConditionalGeneration, whose images have no views"),
    ("settings.distill=-1", "settings.distill=-1.0: at least 0"),
    ("settings.distill=much", "distill='much': a number is wanted"),
    ("settings.distill=0.5;counts={36: 1}", "settings.distill has no effect on a single count"),
    ("counts.sampling=even", "counts.sampling=even: one of shares, flops"),
    ("counts={36: 1, sampling: flops}", "counts.sampling has no effect on a single count"),
    ("counts={169: 1}", "169 is more than the 144"),
])  # fmt: skip
def test_a_recipe_that_is_wrong_is_one_line_and_exit_code_2(tmp_path, capsys, override, message):
    out = tmp_path / "run"
    code = main(["train", "--config", str(RECIPES / "tokenflex_builtin.yaml"), f"output_dir={out}", *SMALL, *TWO, *override.split(";")])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in said[-1] and said[-1].startswith("mllm-efficient: ")
    assert not (out / "distil").exists()


@pytest.mark.parametrize("content, message", [
    ("- 1", "a recipe is a mapping"), (": :", "is not YAML"), ("model: builtin", "the recipe lacks method, output_dir, data, stages"),
])  # fmt: skip
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(me.MllmEfficientError, match=message):
        read(tmp_path / "r.yaml")
    with pytest.raises(me.MllmEfficientError, match="cannot read the recipe"):
        read(tmp_path / "none.yaml")


def test_bad_data_is_named_before_anything_is_loaded(tmp_path, capsys):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"image": "gone.png", "conversations": said}) + "\n")
    config = str(RECIPES / "tokenflex_builtin.yaml")
    code = main(["train", "--config", config, f"output_dir={tmp_path / 'run'}", f"data={{path: {data}}}", "stages.0.data.scenes=32"])
    assert code == 2 and "d.jsonl:1: no image file" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path):
    read(path)


# ------------------------------------------------------------------------------------------------ losses


def builtin_batch(count, questions=3, independent_turns=True):
    loaded = load(ModelOptions())
    records = builtin_records("train", count, questions)
    return loaded, records, Collator(loaded.processor, independent_turns=independent_turns)(list(records))


def test_the_loss_of_a_batch_is_that_of_its_conversations_one_by_one(tmp_path):
    """Packed and pooled against single conversations through the stock model with the projector put in by hand."""
    loaded, records, batch = builtin_batch(3)
    model = build_model(recipe(tmp_path), loaded).eval()
    out = model("answers", 9, batch)
    single = Collator(loaded.processor)
    losses, right = [], 0
    with torch.no_grad():
        for record in records:
            for question, answer in record.turns:
                text = question if question.startswith("<image>") else f"<image>\n{question}"
                one = single([type(record)(record.images, ((text, answer),))])
                image = one["input_ids"][0] == loaded.model.config.image_token_id
                keep = ~image | (image.cumsum(0) <= 9)
                features = loaded.model.model.vision_tower(one["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]
                embeds = loaded.model.get_input_embeddings()(one["input_ids"][0][keep])
                embeds[image[keep]] = model.trained_module(features, side=3)[0]
                logits = loaded.model.lm_head(loaded.model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state)[0, :-1]
                labels = one["labels"][0][keep][1:]
                asked = labels != -100
                losses.append(torch.nn.functional.cross_entropy(logits[asked], labels[asked], reduction="none"))
                right += int((logits[asked].argmax(-1) == labels[asked]).sum())
    torch.testing.assert_close(out["loss"].detach(), torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    assert (int(out["right"]), int(out["asked"])) == (right, len(torch.cat(losses)))


def test_conversations_of_several_turns_are_read_in_order(tmp_path):
    """Without independent turns a later answer sees the earlier ones: the loss is the stock model's own."""
    loaded, _, batch = builtin_batch(3, independent_turns=False)
    stock = loaded.model(**batch).loss.detach()
    model = build_model(recipe(tmp_path, "settings={layers: mlp}"), loaded)
    model.trained_module.load_state_dict(model.outside[1][0].state_dict())
    with torch.no_grad():
        out = model("answers", 144, batch)
    torch.testing.assert_close(out["loss"], stock, atol=1e-5, rtol=1e-5)


def test_independent_turns_see_the_images_and_themselves():
    turns = torch.tensor([[0, 0, 1, 1, 2, 2, -1], [0, 0, 0, 1, 1, 1, 2]])
    mask = (turns >= 0).long()
    call = independent(turns, mask, adapter_for(load(ModelOptions()).model))
    assert call["position_ids"][:, :-1].tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 4, 5]] and call["position_ids"][1, -1] == 3
    seen = call["attention_mask"][:, 0]
    for row in range(2):
        for q in range(7):
            for k in range(7):
                wanted = k <= q and turns[row, k] in (0, turns[row, q]) and turns[row, k] >= 0
                assert seen[row, q, k] == (wanted or q == k), (row, q, k)


def test_distil_is_zero_where_the_new_projector_is_the_old_one_pooled(tmp_path):
    loaded, _, batch = builtin_batch(4)
    model = build_model(recipe(tmp_path, "settings={layers: mlp}"), loaded)
    assert float(model("distil", 36, batch)["loss"]) > 0.1
    model.trained_module.load_state_dict(model.outside[1][0].state_dict())
    assert float(model("distil", 144, batch)["loss"]) < 1e-10


def test_a_count_learns_from_the_largest_where_that_is_right(tmp_path):
    loaded, _, batch = builtin_batch(3)
    model = build_model(recipe(tmp_path), loaded).eval()
    alone, wide, both = model("answers", 9, batch), model("answers", 144, batch), model("answers", 9, batch, teacher=(144, 0.5))
    student, wanted = model._answered(me.TokenFlex(tokens=9, weights="random"), batch)
    teacher, _ = model._answered(me.TokenFlex(tokens=144, weights="random"), batch)
    terms = [
        sum(p * (p.log() - q.log()) for p, q in zip(t.double().softmax(0), s.double().softmax(0)))
        for s, t, token in zip(student, teacher, wanted) if t.argmax() == token
    ]  # fmt: skip
    assert 0 < len(terms) == int(wide["right"]) < len(wanted)
    torch.testing.assert_close((both["loss"] - alone["loss"]).double(), 0.5 * sum(terms) / len(terms), atol=1e-5, rtol=1e-4)
    assert float(consistency(student.detach(), teacher, torch.full_like(wanted, 3))) == 0
    given = torch.autograd.grad(consistency(student, teacher, wanted), (student, teacher), allow_unused=True)
    assert given[0].abs().sum() > 0 and given[1] is None  # the teacher learns nothing
    assert [round(ramped(0.5, step, 100), 2) for step in (0, 2, 4, 50)] == [0.1, 0.3, 0.5, 0.5]


def test_distilling_and_sampling_by_flops_train_and_are_remembered(tmp_path):
    final = run(recipe(tmp_path, "settings.distill=0.5", "counts={36: 0.3, 9: 0.2, 4: 0.1, 1: 0.4, sampling: flops}"))
    said = json.loads((final / "config.json").read_text())
    assert (said["recipe"]["distill"], said["recipe"]["sampling"]) == (0.5, "flops") and "distill" not in said["sizes"]
    plain = lasting(recipe(tmp_path))
    assert "distill" not in plain and "sampling" not in plain


def test_groups_of_about_equal_flops_are_equally_likely():
    shares = {144: 0.5, 1: 1.0, 4: 3.0, 9: 1.0, 100: 1.0}
    likely = by_flops(shares, {count: 1000.0 + 10 * count for count in shares})  # 5% of the range is 71.5: 1 and 4 are one group
    assert likely == {1: 0.0625, 4: 0.1875, 9: 0.25, 100: 0.25, 144: 0.25}
    drawn = likelihoods(
        read(RECIPES / "tokenflex_builtin.yaml", ["counts={144: 1, 4: 1, 1: 3, sampling: flops}"]), load(ModelOptions()).model.config
    )
    assert drawn == {1: 0.375, 4: 0.125, 144: 0.5}


def test_a_batch_without_images_has_a_gradient_for_the_projector(tmp_path):
    from mllm_efficient.train.data import Record

    loaded = load(ModelOptions())
    model = build_model(recipe(tmp_path), loaded)
    model.freeze_but(("projector", "language_model"))
    batch = Collator(loaded.processor)([Record((), (("is there a red circle ?", "no"),))])
    model("answers", 9, batch)["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.trained_module.parameters())


def test_only_what_a_stage_trains_moves(tmp_path):
    folder = Path(recipe(tmp_path).output_dir)
    base = {k: v.clone() for k, v in load(ModelOptions()).model.state_dict().items()}
    run(recipe(tmp_path, *PROJECTOR_ALONE))
    assert trained.open_folder(str(folder / "final")).delta is None
    model = load(ModelOptions()).model
    method = me.load(folder / "final")
    with me.compressed(model, method):
        now = model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in base.items() if "projector" not in k)


def test_the_counts_drawn_are_those_asked_for_and_the_same_on_every_rank(tmp_path):
    made = [object.__new__(CountTrainer) for _ in range(2)]
    for trainer in made:
        trainer.counts, trainer.draw_seed, trainer.micro = {64: 0.2, 144: 0.3, 256: 0.5}, 3, (-1, -1)
        trainer.state = type("State", (), {"global_step": 0})()
    drawn = []
    for step in range(1000):
        for trainer in made:
            trainer.state.global_step = step
        first, second = ([t.draw() for _ in range(2)] for t in made)
        assert first == second
        drawn += first
    share = {c: drawn.count(c) / len(drawn) for c in (64, 144, 256)}
    assert all(abs(share[c] - p) < 0.04 for c, p in made[0].counts.items())
    assert len(set(drawn[::2]) - {drawn[0]}) and drawn[::2] != drawn[1::2]


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_is_published_and_runs_everywhere(tmp_path, capsys):
    final = run(recipe(tmp_path))
    folder = final.parent
    assert {e["step"] for e in log_of(folder)} == {1, 2, 3} and any("loss_36" in e or "loss_9" in e for e in log_of(folder))
    assert all("accuracy_9" in e for e in log_of(folder) if "loss_9" in e)
    assert not list(folder.rglob("checkpoint-*")) and not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    method = f"tokenflex:tokens=36,weights={final}"
    assert main(["eval", "--model", "builtin", "--method", method, "--limit", "14", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    overall = [r["method"] for r in rows if r["task"] == "overall"]
    assert overall == ["none", f"none@tokenflex:weights={final}", method]
    kept = {r["method"]: r["visual_tokens_kept"] for r in rows}
    assert kept[method] == 36 and kept["none"] == kept[overall[1]] == 144
    again = run(recipe(tmp_path))  # nothing is trained twice
    assert again == final and {e["step"] for e in log_of(folder)} == {1, 2, 3}


def test_what_was_trained_is_what_runs(tmp_path):
    """The published folder on a fresh model gives the loss that the training model has at its end."""
    final = run(recipe(tmp_path))
    loaded, _, batch = builtin_batch(4)
    fresh = load(ModelOptions())
    own = fresh.model.model.multi_modal_projector
    method = me.load(final)
    undo = install(adapter_for(fresh.model), method)
    published = TrainingModel(fresh.model, adapter_for(fresh.model), method, own)
    kept = build_model(recipe(tmp_path), loaded)
    kept.freeze_but(("projector", "language_model"))
    from mllm_efficient.train.count_trainer import WEIGHTS, read_weights

    read_weights(kept, final.parent / "full" / WEIGHTS)
    with torch.no_grad():
        assert torch.equal(published("answers", 9, batch)["loss"], kept("answers", 9, batch)["loss"])
    undo()


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    run(recipe(tmp_path))
    with pytest.raises(me.MllmEfficientError, match="holds a training with another seed"):
        run(recipe(tmp_path, "seed=1"))


def test_one_process_trains_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "loaded_for", lambda recipe: pytest.fail("the model is not loaded for that"))
    here = recipe(tmp_path)
    with locking.owned(Path(here.output_dir), ".lock", "output_dir"):
        with pytest.raises(me.MllmEfficientError, match=f"process {os.getpid()} is writing to .*: wait for it or use another output_dir"):
            run(here)
        monkeypatch.setenv("RANK", "1")  # the first rank's own other processes
        with pytest.raises(pytest.fail.Exception):
            run(here)


def test_a_second_training_can_start_from_the_first(tmp_path):
    first = run(recipe(tmp_path, *PROJECTOR_ALONE))
    start = load_file(first / "compressor.safetensors")
    model = build_model(recipe(tmp_path, f"start={first}", "settings={}"), load(ModelOptions()))
    assert all(torch.equal(v, start[k]) for k, v in model.trained_module.state_dict().items())


def test_a_language_model_of_the_start_is_not_lost(tmp_path):
    first = run(recipe(tmp_path))
    with pytest.raises(me.MllmEfficientError, match="train language_model too"):
        run(recipe(tmp_path / "second", f"start={first}", "settings={}", *PROJECTOR_ALONE))
    second = run(recipe(tmp_path / "second", f"start={first}", "settings={}"))
    assert trained.open_folder(str(second)).delta is not None


def test_a_run_that_diverges_publishes_nothing(tmp_path):
    with pytest.raises(me.MllmEfficientError, match="the training diverged"):
        run(recipe(tmp_path, "stages.1.learning_rate=1e30", "stages.1.learning_rates={}"))
    assert not (tmp_path / "run" / "final").exists()


def test_a_kill_while_publishing_leaves_no_half_of_a_folder(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trained, "save_delta", killed)
        run(recipe(tmp_path))
    assert not (tmp_path / "run" / "final").exists()
    assert trained.open_folder(str(run(recipe(tmp_path)))).delta is not None


def test_a_kill_between_the_last_step_and_the_stages_weights_trains_no_step_more(tmp_path, monkeypatch):
    whole = run(recipe(tmp_path / "whole"))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.shutil, "rmtree", killed)
        run(recipe(tmp_path / "cut"))
    distil = tmp_path / "cut" / "run" / "distil"
    (distil / "model.safetensors").unlink()
    cut = run(recipe(tmp_path / "cut"))
    assert {e["step"] for e in log_of(cut.parent, "distil")} == {1, 2}
    own_name, theirs = (load_file(folder / "compressor.safetensors") for folder in (cut, whole))
    assert all(torch.equal(own_name[k], v) for k, v in theirs.items())


def test_a_checkpoint_torn_by_a_kill_is_passed_over(tmp_path):
    from mllm_efficient.train.trainer import _newest

    for step, text in ((5, '{"global_step": 5, "max_steps": 9}'), (8, '{"global_st')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
    assert _newest(tmp_path) == (tmp_path / "checkpoint-5", {"global_step": 5, "max_steps": 9})
    assert _newest(tmp_path / "none") == (None, {})


def test_a_corrected_recipe_can_use_the_folder_in_which_nothing_was_trained(tmp_path):
    with pytest.raises(me.MllmEfficientError, match="cannot read the data"):
        run(recipe(tmp_path, "data={path: gone.json}"))
    run(recipe(tmp_path))
    (tmp_path / "run" / "recipe.json").write_text("")
    with pytest.raises(me.MllmEfficientError, match="is not the recipe of a training"):
        run(recipe(tmp_path))


def test_the_newline_embedding_of_anyres_models_is_no_part(tmp_path):
    """It stands in no prompt, so that it would have no gradient, which DDP does not forgive."""
    from ..families import tiny

    model = tiny("llava_next")
    method = me.TokenFlex(tokens=4, weights="random")
    training = TrainingModel(model, adapter_for(model), method, model.model.multi_modal_projector)
    names = [name for members in training.parts().values() for name, _ in members]
    assert names and not any("image_newline" in name for name in names)
    assert any("image_newline" in name for name, _ in training.named_parameters())


def test_a_lora_is_trained_and_published(tmp_path):
    pytest.importorskip("peft")
    final = run(recipe(tmp_path, "stages.1.train=[projector, lora]", "lora={r: 4, alpha: 8}", "stages.1.learning_rates={lora: 0.01}"))
    assert (final / "base_delta" / "adapter_model.safetensors").is_file()
    model = load(ModelOptions()).model
    own = {k: v for k, v in model.named_parameters() if "language_model" in k and "q_proj" in k}
    with me.compressed(model, me.load(final)):
        assert all(not torch.equal(model.get_parameter(k), v) for k, v in own.items())
    assert all(model.get_parameter(k) is v for k, v in own.items())


def test_under_bf16_the_projector_is_trained_in_float32(tmp_path):
    final = run(recipe(tmp_path, "bf16=true", "dtype=bfloat16"))
    assert {v.dtype for v in load_file(final / "compressor.safetensors").values()} == {torch.float32}
    assert {v.dtype for v in load_file(final / "base_delta" / "model.safetensors").values()} == {torch.bfloat16}
    me.wrap(load(ModelOptions()).model, me.load(final))


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    plain = run(recipe(tmp_path / "a")).parent
    checkpointed = run(recipe(tmp_path / "b", "stages.1.gradient_checkpointing=true")).parent
    losses = [[e["loss"] for e in log_of(folder) if "loss" in e] for folder in (plain, checkpointed)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)


COMMAND = [sys.executable, "-m", "mllm_efficient", "train", "--config", str(RECIPES / "tokenflex_builtin.yaml")]


def settings(folder, *more):
    return [f"output_dir={folder}", *SMALL, "stages.0.steps=2", "stages.0.batch_size=4", "stages.1.batch_size=2", *more]


@pytest.mark.once  # what is left of a killed run; that transformers goes on from it is tested without a kill in both environments
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """kill -9 between checkpoints: the first 20 losses are those of a run that nobody stopped."""
    steps = ["stages.1.steps=40", "stages.1.save_steps=5"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*COMMAND, *settings(tmp_path / "whole", *steps)], env=env, check=True, capture_output=True)
    killed = subprocess.Popen(
        [*COMMAND, *settings(tmp_path / "killed", *steps)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "killed" / "log.jsonl", time.monotonic() + 240
    while not log.exists() or sum('"full"' in line for line in log.read_text().splitlines()) < 13:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = [int(p.name.split("-")[1]) for p in (tmp_path / "killed" / "full" / "checkpoints").glob("checkpoint-*")]
    assert left and max(left) < 40 and not (tmp_path / "killed" / "final").exists()
    subprocess.run([*COMMAND, *settings(tmp_path / "killed", *steps)], env=env, check=True, capture_output=True)
    losses = {}
    for name in ("whole", "killed"):
        entries = [e for e in log_of(tmp_path / name) if "loss" in e]
        assert [e["step"] for e in entries] == list(range(1, 41))
        losses[name] = [float(e["loss"]) for e in entries]
    assert losses["killed"][:20] == pytest.approx(losses["whole"][:20], abs=1e-3)


@pytest.mark.once  # in both environments: two processes under transformers' Trainer, and those that train a router
@pytest.mark.slow
def test_two_processes_train_what_one_with_twice_the_batch_does(tmp_path):
    steps = ["stages.1.steps=4"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *COMMAND[1:]]
    done = subprocess.run([*torchrun, *settings(tmp_path / "two", *steps)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [e["step"] for e in log_of(tmp_path / "two") if "loss" in e] == [1, 2, 3, 4]
    one = settings(tmp_path / "one", *steps, "stages.0.batch_size=8", "stages.1.batch_size=4")
    subprocess.run([*COMMAND, *one], env=env, check=True, capture_output=True)
    losses = [[float(e["loss"]) for e in log_of(tmp_path / name) if "loss" in e] for name in ("two", "one")]
    published = [load_file(tmp_path / name / "final" / "compressor.safetensors") for name in ("two", "one")]
    assert published[0].keys() == published[1].keys() and all(v.shape == published[1][k].shape for k, v in published[0].items())
    assert losses[0] == pytest.approx(losses[1], abs=0.05)  # the batch is the same; its mean is over answers, not over halves


# ------------------------------------------------------------------------------------------------ dry runs


def llava_data(tmp_path):
    """The layout of LLaVA's own data, a few records of it."""
    from PIL import Image

    for folder in ("LLaVA-Pretrain/images/00000", "coco/train2017"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "LLaVA-Pretrain/images/00000/1.jpg")
    Image.new("RGB", (64, 48)).save(tmp_path / "coco/train2017/2.jpg")
    said = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A picture. " * 20}]
    (tmp_path / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").write_text(
        json.dumps([{"id": str(i), "image": "00000/1.jpg", "conversations": said} for i in range(512)])
    )
    text = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    more = [{**t, "value": t["value"].replace("<image>", "")} for t in said * 2]
    mixed = [{"id": str(i), "image": "coco/train2017/2.jpg", "conversations": said + (more if i % 2 else [])} for i in range(256)]
    mixed += [{"id": f"t{i}", "conversations": text} for i in range(64)]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(mixed))
    return [
        f"data={{path: {tmp_path}/llava_v1_5_mix665k.json, images: {tmp_path}}}",
        f"stages.0.data={{path: {tmp_path}/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json, images: {tmp_path}/LLaVA-Pretrain/images}}",
        f"output_dir={tmp_path}/run",
    ]


@pytest.mark.parametrize("name", ["tokenflex_llava_1.5_7b", "tokenflex_llava_1.5_7b_lora"])
def test_recipes_for_the_7b_model_are_dry_run_on_the_real_layout(tmp_path, capsys, name):
    assert main(["train", "--config", str(RECIPES / f"{name}.yaml"), "--dry-run", "--json", *llava_data(tmp_path)]) == 0
    out = json.loads(capsys.readouterr().out)
    alignment, full = out["rows"]
    assert (alignment["records"], full["records"], alignment["steps"], full["steps"]) == (512, 320, 16, 20)
    assert out["meta"]["parameters"]["projector"] == 1024 * 3072 * 2 + 2 * 3072 + 3072 * 4096 + 4096 + 2048
    assert out["meta"]["parameters"]["language_model"] == 6_738_415_616 + 2 * 64 * 4096  # Llama-2-7B and 64 more tokens
    assert alignment["trained_parameters"] == out["meta"]["parameters"]["projector"]
    weights = sum(v for k, v in out["meta"]["parameters"].items()) * (2 if "lora" in name else 4) / 1e9
    moving = 3 * full["trained_parameters"] * 4 / 1e9  # float32, where the weights around are bfloat16 too
    assert full["weights_gb"] == pytest.approx(weights, abs=0.01) and full["optimizer_gb"] == pytest.approx(moving, abs=0.01)
    assert full["memory_gb"] > weights + moving
    assert full["visual_tokens_full"] == pytest.approx(576 * 256 / 320, abs=0.1)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_trains_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(RECIPES / "tokenflex_builtin.yaml"), "--dry-run", f"output_dir={out}", *SMALL, *TWO]) == 0
    text = capsys.readouterr().out
    assert "Nothing was trained" in text and "projector+language_model" in text and not out.exists()


def test_recipes_are_shipped():
    names = {p.name for p in RECIPES.glob("*.yaml")}
    assert {"tokenflex_builtin.yaml", "tokenflex_llava_1.5_7b.yaml", "tokenflex_llava_1.5_7b_lora.yaml"} <= names
    for path in RECIPES.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["stages"]
