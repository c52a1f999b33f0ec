"""transformers' Trainer on a wrapped model: its loss is that of the labels that enter it, whatever the batches and processes."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.apply import labels
from mllm_efficient.patches import trainer as shims

from ..trainer_runs import BATCHES, NAMES, RUNS, SPECS, by_hand, make, predicted, reported, step_loss, tiny, trainer

ONE = BATCHES[0]
BESIDE_LOGITS = ["cache", "past_key_values", "image_outputs", "image_hidden_states", "video_outputs", "video_hidden_states", "rope_deltas"]


@functools.cache
def parts(name: str, spec: str) -> list[tuple[float, int]]:
    return [by_hand(name, spec, rows) for rows in BATCHES]


def wanted(name: str, spec: str, together: int) -> list[float]:
    """The losses of steps of so many micro-batches."""
    every = parts(name, spec)
    return [step_loss(name, every[i : i + together]) for i in range(0, len(every), together)]


@pytest.mark.every_family
@pytest.mark.parametrize("name, spec, side, accumulation", RUNS)
def test_the_reported_loss_is_the_loss_by_hand(name, spec, side, accumulation):
    run = trainer(me.wrap(tiny(name), spec), name, side, gradient_accumulation_steps=accumulation)
    assert reported(run) == pytest.approx(wanted(name, spec, accumulation), rel=1e-5)  # order of summation


@pytest.mark.slow  # two processes that import everything
def test_two_processes_report_the_loss_by_hand(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.trainer_runs"]
    done = subprocess.run(
        [*command, str(tmp_path / "losses.json")], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == len(RUNS)
    for key, got in losses.items():
        name, spec, _, accumulation = key.split("|")
        assert got == pytest.approx(wanted(name, spec, 2 * int(accumulation)), rel=1e-5), key  # order of summation


@pytest.mark.parametrize("spec", ["none", "divprune:keep=1", "fastv:layer=1,keep=1"])
@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_compressed_trainer_reports_what_it_reports_of_the_stock_model(name, spec):
    settings = {"gradient_accumulation_steps": 2}
    assert reported(trainer(me.wrap(tiny(name), spec), name, "left", **settings)) == reported(trainer(tiny(name), name, "left", **settings))


@pytest.mark.parametrize("spec", SPECS[:-1])
@pytest.mark.parametrize("name", NAMES)
def test_evaluation_gives_predictions_beside_their_labels(name, spec):
    """``compute_metrics`` sees logits and labels of one length, and the accuracy is that of each row alone."""
    seen = {}

    def accuracy(evaluated):
        logits, wanted = torch.from_numpy(evaluated.predictions), torch.from_numpy(evaluated.label_ids)
        assert logits.shape[:2] == wanted.shape and logits.isfinite().all()
        asked = wanted[:, 1:] != -100
        seen["right"] = (logits[:, :-1].argmax(-1) == wanted[:, 1:])[asked].sum().item()
        seen["asked"] = asked.sum().item()
        return {"right": seen["right"]}

    batches = BATCHES[:2]
    run = trainer(me.wrap(tiny(name), spec), name, "left", batches, {"compute_metrics": accuracy})
    loss = run.evaluate(ignore_keys=BESIDE_LOGITS)["eval_loss"]
    alone = [predicted(name, spec, row) for rows in batches for row in rows]
    assert seen["right"] == sum(int((logits.argmax(-1) == words).sum()) for logits, words in alone)
    assert seen["asked"] == sum(len(words) for _, words in alone)
    each = [total / count for total, count in (by_hand(name, spec, rows) for rows in batches)]
    assert loss == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("spec", SPECS[:-1])
@pytest.mark.parametrize("name", NAMES)
def test_label_smoothing(name, spec):
    """Trainer smooths what it finds beside its labels. It does not shift the labels of these classes before, in stock either."""
    run = trainer(me.wrap(tiny(name), spec), name, "left", label_smoothing_factor=0.1)
    losses = []
    for rows in BATCHES[:3]:
        each = []
        for row in rows:
            batch = make(name, row)
            with torch.no_grad():
                out = me.wrap(tiny(name), spec, logits="full")(**batch)
            words = (
                me.mask_labels(run.model, batch)[0] if "pixel_values" in batch else batch["labels"][0].index_fill(0, torch.tensor(0), -100)
            )
            asked = words != -100
            chances = out.logits[0].log_softmax(-1)[asked]
            each.append(-0.9 * chances.gather(1, words[asked][:, None])[:, 0] - 0.1 * chances.mean(1))
        losses.append(torch.cat(each).mean().item())
    assert reported(run)[:3] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("spec", SPECS[:-1])
def test_a_loss_function_of_the_users_own(spec, accumulation):
    def loss(outputs, labels, num_items_in_batch):
        return (
            torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            / num_items_in_batch
        )

    run = trainer(
        me.wrap(tiny("llava"), spec), "llava", "right", more={"compute_loss_func": loss}, gradient_accumulation_steps=accumulation
    )
    assert reported(run) == pytest.approx(wanted("llava", spec, accumulation), rel=1e-5)


def test_trainer_made_before_the_model_was_wrapped_and_peft_around_it():
    from peft import LoraConfig, get_peft_model

    spec = SPECS[0]
    run = trainer(tiny("llava"), "llava", "left", gradient_accumulation_steps=2)
    me.wrap(run.model, spec)
    assert reported(run) == pytest.approx(wanted("llava", spec, 2), rel=1e-5)
    for settings in ({"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}):
        adapted = get_peft_model(me.wrap(tiny("llava"), spec), LoraConfig(r=2, **settings))  # starts as the identity
        run = trainer(adapted, "llava", "left", gradient_accumulation_steps=2)
        assert reported(run) == pytest.approx(wanted("llava", spec, 2), rel=1e-5)


def test_a_trainer_is_its_own_for_models_that_are_not_wrapped_and_when_released():
    import transformers

    me.wrap(tiny("llava"), SPECS[0])
    trainer(me.wrap(tiny("llava"), SPECS[0]), "llava", "left")
    own = {name: transformers.Trainer.__dict__[name] for name in shims.AROUND}
    assert all(hasattr(method, "visual") for method in own.values())
    shims.release()
    try:
        assert all(transformers.Trainer.__dict__[name] is method.__wrapped__ for name, method in own.items())
        stock = reported(trainer(tiny("llava"), "llava", "left"))
    finally:
        shims.watch_if_there()
    assert reported(trainer(tiny("llava"), "llava", "left")) == stock
    batch = make("llava", *ONE)
    model = me.wrap(tiny("llava"), SPECS[0])
    assert me.mask_labels(me.unwrap(model), batch) is batch["labels"]
    assert not hasattr(model, shims.ASKED_BY_TRAINER) and type(model) is type(tiny("llava"))


@pytest.mark.slow  # a new process
def test_importing_the_package_and_wrapping_does_not_import_trainer():
    code = (
        "import sys, tests.trainer_runs as runs, mllm_efficient as me; model = me.wrap(runs.tiny('llava'), 'divprune:keep=0.3'); "
        "assert 'transformers.trainer' not in sys.modules; import transformers; "
        "assert not hasattr(transformers.Trainer.training_step, 'visual'); hasattr(model, 'accepts_loss_kwargs'); "
        "assert hasattr(transformers.Trainer.training_step, 'visual')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_models_of_others_are_left_alone():
    """Whatever a module calls ``module`` or ``peft_config``, Trainer's methods do to it what they did."""

    class Odd(torch.nn.Module):
        module, peft_config = "a name", {"default": object()}

    assert shims._wrapped_inside(Odd()) is None and shims._wrapped_inside(None) is None
    model, around = me.wrap(tiny("llava"), SPECS[0]), torch.nn.Module()
    around.module = model
    assert shims._wrapped_inside(around) is model


def test_an_evaluation_loop_is_called_by_place_too():
    seen = []

    class Held:
        args = type("Arguments", (), {"prediction_loss_only": True})
        label_smoother = compute_loss_func = None

    def stock(trainer, *args, **kwargs):
        seen.append((args, kwargs))

    shims._evaluation(stock, Held(), None, "loader", "Evaluation", True, ["cache"], "test")
    shims._evaluation(stock, Held(), None, "loader", "Evaluation", metric_key_prefix="test")
    assert seen == [
        (("loader", "Evaluation", True, ["cache"], "test"), {}),
        (("loader", "Evaluation", None), {"metric_key_prefix": "test"}),
    ]


# ------------------------------------------------------------------------------------------------ counts of the caller's own


@pytest.mark.parametrize("spec", SPECS[:-1])
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_count_of_this_call_is_put_right(spec, kind):
    model, batch = me.wrap(tiny("llava"), spec), make("llava", *ONE)
    with torch.no_grad():
        loss = model(**batch).loss
        every = int((batch["labels"][:, 1:] != -100).sum())
        torch.testing.assert_close(model(**batch, num_items_in_batch=kind(every)).loss, loss)
        masked = {**batch, "labels": me.mask_labels(model, batch)}
        own = int((masked["labels"][:, 1:] != -100).sum())
        assert own == by_hand("llava", spec, ONE)[1] < every
        torch.testing.assert_close(model(**batch, num_items_in_batch=kind(own)).loss, loss)
        torch.testing.assert_close(model(**masked, num_items_in_batch=kind(3 * own)).loss, loss / 3)


@pytest.mark.parametrize("spec", SPECS[:-1])
def test_a_count_over_several_calls_that_holds_visual_labels_is_refused(spec):
    model, batch = me.wrap(tiny("llava"), spec), make("llava", *ONE)
    with pytest.raises(me.CountMismatchError, match=r"num_items_in_batch=1000 counts .* me.mask_labels\(model, batch\) before counting"):
        model(**batch, num_items_in_batch=1000)


def test_it_is_said_once_that_visual_labels_are_ignored(monkeypatch):
    monkeypatch.setattr(labels, "_said", set())
    model, batch = me.wrap(tiny("llava"), SPECS[0]), make("llava", *ONE)
    clean = {**batch, "labels": me.mask_labels(me.wrap(tiny("llava"), "none"), batch)}
    with pytest.warns(UserWarning, match="labels on visual placeholders are ignored"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
        monkeypatch.setattr(labels, "_said", set())
        model(**{**clean, "labels": clean["labels"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)})


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", NAMES)
def test_masked_labels_are_the_words_behind_the_first(name, spec):
    """A label on padding, a placeholder or a row's first token behind padding goes; without compression all stay."""
    model, batch = me.wrap(tiny(name), spec), make(name, *ONE)
    masked = me.mask_labels(model, batch)
    if spec == "none":
        assert masked is batch["labels"]
        return
    by_row = [predicted(name, spec, row)[1] for row in ONE]
    for labels_of, words in zip(masked, by_row):
        assert torch.equal(labels_of[labels_of != -100], words)
    assert me.mask_labels(model, make(name, "text only", "text only")) is not None
