"""Training a router: losses that must equal slow ones, gradients of the estimators, runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.patches import transformers_version
from mllm_efficient.patches.decoder.staging import StagedImage
from mllm_efficient.tokens import Decision
from mllm_efficient.train.build import build_model
from mllm_efficient.train.build import method_of as build_method
from mllm_efficient.train.config import RoutingConfig
from mllm_efficient.train.data import Record, builtin_records
from mllm_efficient.train.encoding import Collator
from mllm_efficient.train.model import separated
from mllm_efficient.train.reading import read
from mllm_efficient.train.routing import log_odds, mean_levels, reinforced, routing_log, routing_loss, routing_sums
from mllm_efficient.train.trainer import run
from mllm_efficient.trained import folder as trained

from .test_train import llava_data, log_of

RECIPES = Path(me.__file__).resolve().parent.parent / "configs" / "train"
SMALL = [
    "data.scenes=24", "data.questions=3", "logging_steps=1", "stages.0.steps=2", "stages.0.batch_size=2", "stages.1.steps=3",
    "stages.1.batch_size=2",
]  # fmt: skip


def recipe(tmp_path, *more):
    return read(RECIPES / "dpn_builtin_reinforce.yaml", [f"output_dir={tmp_path / 'run'}", *SMALL, *more])


def a_batch(count=3, questions=3, independent=True):
    loaded = load(ModelOptions())
    records = builtin_records("train", count, questions)
    return loaded, records, Collator(loaded.processor, independent_turns=independent)(list(records))


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("override, message", [
    ("counts={36: 1}", "counts have no effect: the router of dpn says"),
    ("routing.loss=hing", "loss is one of hinge, expected, removed, released"),
    ("routing.estimator=sampling", "estimator one of scaling"),
    ("routing.weight=-1", "weight and target are at least 0"),
    ("routing.samples=1", "estimator=reinforce and samples of at least 2 go together"),
    ("routing={estimator: gumbel};settings={}", "stands in for the factor"),
    ("routing={}", "estimator=scaling needs the factor"),
    ("routing.smaples=2", "no setting routing.smaples"),
    ("stages.0.routing=fixed", "routing=fixed is not learned or random"),
    ("stages.0.train=[router]", "a router does not learn while routing is random"),
    ("stages.1.train=[language_model];stages.1.learning_rates={}", "no stage trains the router"),
    ("stages.1.objective=distil", "objective=distil is for projectors"),
    ("settings={kernel: 2}", "settings.kernel: a router is trained under at, kernels, pool"),
    ("settings.routing=random", "settings.routing: a router is trained under"),
    ("settings.positions=keep", "settings.positions: a router is trained under"),
    ("stages.1.train=[router, lora, projector]", "a LoRA is published alone"),
    ("settings={poll: max}", "settings.poll: a router is trained under at, kernels, pool"),
    ("settings={at: 7}", "tokens cannot go at layer 7"),
    ("start=/nowhere;settings={}", "no config.json there"),
])  # fmt: skip
def test_a_recipe_that_is_wrong_is_one_line_and_exit_code_2(tmp_path, capsys, override, message):
    code = main(
        ["train", "--config", str(RECIPES / "dpn_builtin_reinforce.yaml"), f"output_dir={tmp_path / 'run'}", *SMALL, *override.split(";")]
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in said[-1] and said[-1].startswith("mllm-efficient: ")


def test_a_projector_has_no_router(tmp_path):
    for more in ("routing.weight=1", "stages.1.train=[projector, router]", "stages.1.routing=random"):
        with pytest.raises(me.MllmEfficientError, match="tokenflex has no router"):
            read(RECIPES / "tokenflex_builtin.yaml", [f"output_dir={tmp_path}", more, "stages.1.learning_rates={}"])


# ------------------------------------------------------------------------------------------------ batches and losses


def test_every_turn_is_a_prompt_of_its_own():
    loaded, records, batch = a_batch()
    rows, of = separated(batch, 2)
    single = Collator(loaded.processor)
    assert of == [r for r in range(3) for _ in range(3) for _ in range(2)] and len(rows["input_ids"]) == 18
    number = 0
    for record in records:
        for question, answer in record.turns:
            text = question if question.startswith("<image>") else f"<image>\n{question}"
            one = single([Record(record.images, ((text, answer),))])
            for _ in range(2):
                length = one["input_ids"].shape[1]
                for name in ("input_ids", "labels", "attention_mask"):
                    assert torch.equal(rows[name][number, :length], one[name][0])
                assert not rows["attention_mask"][number, length:].any() and (rows["labels"][number, length:] == -100).all()
                number += 1


@pytest.mark.parametrize("independent", [True, False])
def test_the_loss_is_that_of_the_wrapped_model_on_every_prompt_alone(tmp_path, independent):
    """In eval mode, where kernels are the likeliest: the cross-entropy and nothing else."""
    loaded, _, batch = a_batch(independent=independent)
    model = build_model(recipe(tmp_path), loaded).eval()
    with torch.no_grad():
        for p in model.trained_module.parameters():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        out = model("answers", None, batch)
        rows, of = separated(batch, 1)
        pixels = batch["pixel_values"][of] if independent else batch["pixel_values"]
        losses, right = [], 0
        stock = load(ModelOptions()).model
        with me.compressed(stock, replace(model.method)):
            stock.model.language_model.visual_router.load_state_dict(model.trained_module.state_dict())
            for i in range(len(rows["input_ids"])):
                real = rows["attention_mask"][i].bool()
                labels = rows["labels"][i][real]
                logits = stock(input_ids=rows["input_ids"][i][real][None], pixel_values=pixels[i][None], labels=labels[None]).logits[0, :-1]
                asked = labels[1:] != -100
                losses.append(torch.nn.functional.cross_entropy(logits[asked], labels[1:][asked], reduction="none"))
                right += int((logits[asked].argmax(-1) == labels[1:][asked]).sum())
    torch.testing.assert_close(out["loss"], torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    assert (int(out["right"]), int(out["asked"])) == (right, len(torch.cat(losses)))


def decided(*stages):
    """A forward's outcome with images 0, 1 of row 0 and 2 of row 1. Every stage: (experts, chances)."""
    method = type("Method", (), {"experts": lambda self, stage: [(1, 1), (1, 2), (2, 2)]})()
    images = tuple(
        StagedImage(row, torch.arange(16), torch.arange(0), torch.zeros(16, 4), (16,) * len(stages), torch.arange(16)) for row in (0, 0, 1)
    )
    made = [Decision(((1, 1),) * 3, tuple(experts), chances) for experts, chances in stages]
    left = [[16 // (1 + (e or 0)) for e in experts] for experts, _ in stages]
    return type("Staging", (), {"images": images, "method": method, "outcome": {"decided": made, "left": left}})()


CHANCES = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])


def test_the_routing_losses_by_hand():
    staging = decided(((0, 1, 1), CHANCES), ((2, None, 2), CHANCES))
    hinge = mean_levels(staging, "hinge")
    assert [round(float(level), 6) for level in hinge] == pytest.approx([(0.8 + 0.2) / 3, (2 * 0.2 + 2 * 0.6) / 3])
    released = mean_levels(staging, "released")  # the likeliest kernels are 0, 1, 2; one mean over both layers
    assert len(released) == 1 and float(released[0]) == pytest.approx((0.8 + 1.2) / 3)
    expected = mean_levels(staging, "expected")
    assert float(expected[0]) == pytest.approx((0.7 + 1.0 + 1.4) / 3)
    removed = mean_levels(staging, "removed")
    assert float(removed[0]) == pytest.approx(((0.3 + 0.8 + 0.2) / 2 + (0.2 + 0.1 + 0.6) * 3 / 4) / 3)
    assert float(routing_loss(hinge, 0.5)) == pytest.approx(((0.5 - 1 / 3) + 0) / 2)


def test_what_a_row_decided_has_the_odds_of_all_its_images_and_layers():
    odds = log_odds(decided(((0, 1, 1), CHANCES), ((2, 1, 2), CHANCES)), 3)
    expected = torch.tensor([0.5 * 0.8 * 0.2 * 0.8, 0.2 * 0.6, 1.0]).log()
    torch.testing.assert_close(odds, expected)


def test_the_score_function_estimator_finds_the_gradient_of_the_mean_loss():
    """Against the exact gradient of the expected loss over three kernels."""
    torch.manual_seed(0)
    costs, logits = torch.tensor([1.0, 3.0, 0.5]), torch.tensor([0.2, -0.4, 0.1], requires_grad=True)
    (logits.softmax(-1) * costs).sum().backward()
    exact, logits.grad = logits.grad.clone(), None
    many = 40_000
    p = logits.softmax(-1)
    drawn = torch.multinomial(p.detach(), 2 * many, replacement=True)
    term = reinforced(costs[drawn], p.log()[drawn], 2)
    assert float(term) == 0
    term.backward()
    torch.testing.assert_close(logits.grad, exact, atol=0.01, rtol=0.02)


def test_what_is_logged_of_a_routing():
    sums = routing_sums(decided(((0, 1, 1), CHANCES), ((2, None, 2), CHANCES)))
    log = routing_log(sums.tolist(), (1, 3), ["1x1", "2x2", "4x4"])
    assert log["kept_1"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3, abs=0.01) and log["used_1_2x2"] == pytest.approx(2 / 3, abs=1e-4)
    assert log["used_3_1x1"] == pytest.approx(1 / 3, abs=1e-4) and log["likeliest_3_4x4"] == pytest.approx(1 / 3, abs=1e-4)
    assert set(log) == {f"kept_{n}" for n in (1, 3)} | {
        f"{w}_{n}_{k}" for w in ("used", "likeliest") for n in (1, 3) for k in ("1x1", "2x2", "4x4")
    }


@pytest.mark.parametrize("routing, settings", [
    ("{weight: 0}", "{}"),
    ("{weight: 0, estimator: straight_through}", "{scaling: false}"),
    ("{weight: 0, estimator: gumbel}", "{scaling: false}"),
    ("{weight: 0, estimator: reinforce, samples: 2}", "{scaling: false}"),
], ids=["scaling", "straight_through", "gumbel", "reinforce"])  # fmt: skip
def test_every_estimator_moves_the_router_by_the_answers_alone(tmp_path, routing, settings):
    """With a routing loss of weight 0 only the answers can say anything."""
    loaded, _, batch = a_batch()
    torch.manual_seed(0)
    model = build_model(recipe(tmp_path, f"routing={routing}", f"settings={settings}"), loaded)
    model.train()
    model.freeze_but(("router", "language_model"))
    model("answers", None, batch, seed=(0, 1))["loss"].backward()
    for part in ("router", "language_model"):
        assert any(p.grad is not None and p.grad.any() for _, p in model.parts()[part]), part


def test_kernels_are_drawn_anew_for_every_step_and_process_and_again_for_the_same(tmp_path):
    loaded, _, batch = a_batch()
    model = build_model(recipe(tmp_path), loaded).train()
    sums = [
        model("answers", None, batch, "random", seed)["routed"].tolist()
        for seed in ((0, 1, 0, 0), (0, 1, 0, 1), (0, 2, 0, 0), (0, 1, 0, 0))
    ]
    assert sums[0] == sums[3] and sums[0] != sums[1] and sums[0] != sums[2]


def test_a_batch_without_images_has_a_gradient_for_the_router(tmp_path):
    loaded = load(ModelOptions())
    model = build_model(recipe(tmp_path), loaded)
    model.train()
    model.freeze_but(("router", "language_model"))
    batch = Collator(loaded.processor)([Record((), (("is there a red circle ?", "no"),))])
    model("answers", None, batch)["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.trained_module.parameters())


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_is_published_and_runs_everywhere(tmp_path, capsys):
    final = run(recipe(tmp_path))
    entries = log_of(final.parent, "routing")
    assert {e["step"] for e in entries} == {1, 2, 3} and {"kept_1", "used_1_2x2", "likeliest_1_4x4", "accuracy"} <= set(entries[0])
    assert sum(entries[0][f"used_1_{k}"] for k in ("1x1", "2x2", "4x4")) == pytest.approx(1, abs=1e-3)
    settled = log_of(final.parent, "settled")
    config = json.loads((final / "config.json").read_text())
    assert len(settled) == 1 and config["kept"] == [settled[0]["kept_1"] / 100] and config["at"] == "1"
    method = f"dpn:weights={final}"
    assert (
        main(
            ["eval", "--model", "builtin", "--method", method, "--method", f"{method},routing=fixed,kernel=4x4", "--limit", "14", "--json"]
        )
        == 0
    )
    rows = [r for r in json.loads(capsys.readouterr().out)["rows"] if r["task"] == "overall"]
    assert [r["method"] for r in rows] == ["none", f"none@dpn:weights={final}", method, f"{method},routing=fixed,kernel=4x4"]
    assert rows[3]["visual_tokens_kept"] == round((144 + 3 * 9) / 4)
    again = run(recipe(tmp_path))  # nothing is trained twice
    assert again == final and len(log_of(final.parent, "settled")) == 1


def test_what_was_trained_is_what_runs(tmp_path):
    final = run(recipe(tmp_path))
    loaded, _, batch = a_batch()
    kept = build_model(recipe(tmp_path), loaded).eval()
    from mllm_efficient.train.count_trainer import WEIGHTS, read_weights

    kept.freeze_but(("router", "language_model"))
    for stage in ("pooling", "routing"):
        read_weights(kept, final.parent / stage / WEIGHTS)
    fresh = load(ModelOptions()).model
    rows, of = separated(batch, 1)
    with torch.no_grad():
        wanted = kept("answers", None, batch)
        with me.compressed(fresh, me.load(final)):
            out = fresh(
                input_ids=rows["input_ids"],
                attention_mask=rows["attention_mask"],
                labels=rows["labels"],
                pixel_values=batch["pixel_values"][of],
            )
    torch.testing.assert_close(out.loss, wanted["loss"], atol=1e-6, rtol=1e-6)


def test_a_router_alone_leaves_the_language_model_as_it_was(tmp_path):
    final = run(recipe(tmp_path, "stages=[{name: routing, train: [router], steps: 2, batch_size: 2}]"))
    assert trained.open_folder(str(final)).delta is None
    model = load(ModelOptions()).model
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with me.compressed(model, me.load(final)):
        now = model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in base.items()) and any("visual_router" in k for k in now)


def test_a_routers_token_stands_behind_every_question_of_the_training(tmp_path):
    loaded = load(ModelOptions())
    records = list(builtin_records("train", 3, 3))
    plain, _ = separated(Collator(loaded.processor, None, True)(records), 1)
    token = next(i for i in range(10, 74) if i not in plain["input_ids"])
    rows, _ = separated(Collator(loaded.processor, None, True, token)(records), 1)
    for row, before in zip(rows["input_ids"], plain["input_ids"]):
        ids, old = row[row != 0].tolist(), before[before != 0].tolist()
        at = next(i for i, (a, b) in enumerate(zip(ids, old)) if a != b)
        assert ids == [*old[:at], token, *old[at:]]
    final = run(recipe(tmp_path, f"settings.router_token={token}"))
    assert me.load(final).read_token == token
    model = load(ModelOptions()).model
    with me.compressed(model, me.load(final)), pytest.raises(me.CountMismatchError, match="append it to the question"):
        model(input_ids=plain["input_ids"][:1], pixel_values=Collator(loaded.processor)(records[:1])["pixel_values"])
    with pytest.raises(me.MllmEfficientError, match="no token that can be written after a question"):
        Collator(loaded.processor, ending=9999)


def test_a_projector_that_moved_with_the_router_is_published(tmp_path):
    stage = "stages=[{name: some, train: [router, projector], steps: 2, batch_size: 2, learning_rate: 1e-2}]"
    first = run(recipe(tmp_path, stage))
    model = load(ModelOptions()).model
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with me.compressed(model, me.load(first)):
        moved = {k for k, v in model.state_dict().items() if k in base and not torch.equal(v, base[k])}
        projector = {k: v.clone() for k, v in model.state_dict().items() if "projector" in k}
    assert moved and all("projector" in k for k in moved)
    # a training that starts from it and leaves the projector alone carries it on
    start = ["settings={}", f"start={first}", "stages=[{name: more, train: [router], steps: 1, batch_size: 2}]"]
    second = run(recipe(tmp_path / "second", *start))
    with me.compressed(model, me.load(second)):
        assert all(torch.equal(model.state_dict()[k], v) for k, v in projector.items())


def test_everything_that_moved_is_published(tmp_path):
    """The published recipe moves tower and projector too."""
    stage = "stages=[{name: all, train: [router, projector, vision_tower, language_model], steps: 2, batch_size: 2, learning_rate: 1e-2}]"
    final = run(recipe(tmp_path, stage))
    model = load(ModelOptions()).model
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with me.compressed(model, me.load(final)):
        now = model.state_dict()
        moved = {
            part
            for k, v in base.items()
            for part in ("vision_tower", "projector", "language_model")
            if part in k and not torch.equal(now[k], v)
        }
    assert moved == {"vision_tower", "projector", "language_model"}
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_bf16_changes_nothing_but_rounding(tmp_path):
    plain = log_of(run(recipe(tmp_path / "a")).parent, "routing")
    bf16 = log_of(run(recipe(tmp_path / "b", "bf16=true")).parent, "routing")
    assert bf16[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.1)


@pytest.mark.skipif(transformers_version() < (5, 23), reason="in-decoder methods refuse gradient checkpointing before transformers 5.23")
def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = log_of(run(recipe(tmp_path / "a")).parent, "routing")
    again = log_of(run(recipe(tmp_path / "c", "stages.1.gradient_checkpointing=true")).parent, "routing")
    losses = [[e["loss"] for e in entries if "loss" in e] for entries in (again, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    from mllm_efficient.train.callbacks import LogFile

    more = ["stages.1.steps=6", "stages.1.save_steps=2"]
    whole = run(recipe(tmp_path / "whole", *more))
    on_log = LogFile.on_log

    def cut(self, args, state, control, logs=None, **kwargs):
        on_log(self, args, state, control, logs, **kwargs)
        if self.stage == "routing" and state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LogFile, "on_log", cut)
        run(recipe(tmp_path / "cut", *more))
    run(recipe(tmp_path / "cut", *more))
    own, theirs = (log_of(folder / "run", "routing") for folder in (tmp_path / "cut", tmp_path / "whole"))
    assert [e["loss"] for e in own if "loss" in e] == pytest.approx([e["loss"] for e in theirs if "loss" in e], abs=1e-3)
    assert whole.exists()


@pytest.mark.slow
def test_two_processes_train_all_parts(tmp_path):
    """As the 7B recipe does: what never gets a gradient, and a process whose batch has no pictures, stop nobody."""
    stage = "stages=[{name: all, train: [router, projector, vision_tower, language_model], steps: 3, batch_size: 2, learning_rate: 1e-4}]"
    settings = [f"output_dir={tmp_path / 'run'}", *SMALL[:3], "settings={}", "routing={}", stage]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm_efficient"]
    command = [*torchrun, "train", "--config", str(RECIPES / "dpn_builtin_reinforce.yaml"), *settings]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [e["step"] for e in log_of(tmp_path / "run", "all") if "loss" in e] == [1, 2, 3]
    me.wrap(load(ModelOptions()).model, me.load(tmp_path / "run" / "final"))


def test_the_recipe_for_the_7b_model_is_dry_run_on_the_real_layout(tmp_path, capsys):
    data = llava_data(tmp_path)
    config = str(RECIPES / "dpn_llava_1.5_7b.yaml")
    assert main(["train", "--config", config, "--dry-run", "--json", data[0], data[2]]) == 0
    out = json.loads(capsys.readouterr().out)
    (row,) = out["rows"]
    parameters = out["meta"]["parameters"]
    assert parameters["router"] == 3 * (2 * 4096 + 4096 * 1024 + 1024 * 3) and (row["records"], row["steps"]) == (320, 20)
    assert row["trained_parameters"] == sum(v for k, v in parameters.items() if k != "lora")
    mean = sum(me.DPN(weights="random").per_layer(576, 32, grids=[(24, 24)])) / 32
    assert row["visual_tokens_drawn"] == pytest.approx(mean * 256 / 320, abs=0.1) and not (tmp_path / "run").exists()
    read_as = read(RECIPES / "dpn_llava_1.5_7b.yaml")
    assert build_method(read_as).layers(32) == (8, 16, 24) and read_as.routing == RoutingConfig()
