"""TRL's trainers on wrapped models: the loss of SFT, the log-probabilities of DPO and the steps of GRPO."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import mllm_efficient as me

from .. import families
from ..trainer_runs import predicted_of, processor, tiny

trl = pytest.importorskip("trl", reason="TRL is not installed in this environment")
datasets = pytest.importorskip("datasets", reason="TRL's trainers take datasets, which is not installed in this environment")

SPECS = ("divprune:keep=0.3", "pool:keep=0.3", "fastv:layer=1,ratio=0.3")
ASKED = [{"role": "user", "content": "what is the big ring ?"}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }} {% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(autouse=True)
def with_template(monkeypatch):
    monkeypatch.setattr(processor("llava", "right"), "chat_template", TEMPLATE)


def answered(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def picture(i: int):
    return families.noise(i, 30, 30)


def settings(folder: Path, **own: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential", **own,
    }  # fmt: skip


def rows_of(batch: dict[str, Any]):
    """Every row of a batch alone, without padding, every id a label."""
    for ids, mask, pixels in zip(batch["input_ids"], batch["attention_mask"], batch["pixel_values"]):
        alone = ids[mask.bool()][None]
        yield {"input_ids": alone, "attention_mask": torch.ones_like(alone), "pixel_values": pixels[None], "labels": alone}


def sft(spec: str, folder: Path, **own: Any):
    data = [{"images": [picture(i)], "messages": ASKED + answered("red big" + " small" * (i % 5))} for i in range(12)]
    given = trl.SFTConfig(**settings(folder, max_length=None, learning_rate=0.0, gradient_accumulation_steps=2, **own))
    rows = datasets.Dataset.from_list(data)
    return trl.SFTTrainer(
        me.wrap(tiny("llava"), spec), given, train_dataset=rows, eval_dataset=rows, processing_class=processor("llava", "right")
    )


@pytest.mark.parametrize("spec", SPECS)
def test_the_loss_of_sft_is_the_loss_by_hand(spec, tmp_path):
    trainer = sft(spec, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model = me.wrap(tiny("llava"), spec)
    assert len(losses) == 3
    for step, got in enumerate(losses):
        rows = [trainer.train_dataset[4 * step + i] for i in range(4)]
        parts = [predicted_of(model, row) for row in rows_of(trainer.data_collator(rows))]
        total = sum(float(cross_entropy(*part, reduction="sum")) for part in parts)
        assert got == pytest.approx(total / sum(len(words) for _, words in parts), rel=1e-5)


@pytest.mark.parametrize("own", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}], ids=["dft", "smoothing"])
def test_sft_with_other_losses(own, tmp_path):
    trainer = sft(SPECS[0], tmp_path, **own)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_sft_evaluates_and_gives_metrics_their_predictions(tmp_path):
    trainer = sft(SPECS[0], tmp_path)
    shapes = []
    trainer.compute_metrics = lambda seen: shapes.append((seen.predictions.shape, seen.label_ids.shape)) or {}
    metrics = trainer.evaluate()
    ((predictions, wanted),) = shapes
    assert predictions[:2] == wanted and math.isfinite(metrics["eval_loss"])


def dpo(spec: str, folder: Path, **own: Any):
    data = [
        {"images": [picture(i)], "prompt": ASKED, "chosen": answered("red big" + " small" * i), "rejected": answered("blue")}
        for i in range(6)
    ]
    given = trl.DPOConfig(**settings(folder, max_length=None, learning_rate=1e-3, **own))
    reference = me.wrap(tiny("llava"), spec)  # one that TRL loads by itself would see every token
    return trl.DPOTrainer(
        me.wrap(tiny("llava"), spec), reference, given, train_dataset=datasets.Dataset.from_list(data),
        processing_class=processor("llava", "right"),
    )  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_dpo_compares_log_probabilities_of_the_shortened_prompts(spec, tmp_path):
    trainer = dpo(spec, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    model, sums = me.wrap(tiny("llava"), spec), []
    for row, completion, mask in zip(rows_of(batch), batch["completion_mask"], batch["attention_mask"]):
        answer = completion[mask.bool()].bool()
        row["labels"] = row["labels"].masked_fill(~answer, -100)
        logits, words = predicted_of(model, row)
        chances = logits.log_softmax(-1).gather(1, words[:, None])[:, 0]
        sums.append(float(chances[-int(answer.sum()) :].sum()))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and all(math.isfinite(entry["loss"]) for entry in logged)
    assert logged[0]["logps/chosen"] == pytest.approx((sums[0] + sums[1]) / 2, rel=1e-5)
    assert logged[0]["logps/rejected"] == pytest.approx((sums[2] + sums[3]) / 2, rel=1e-5)
    assert logged[2]["rewards/margins"] > 0


@pytest.mark.parametrize("spec", SPECS)
def test_grpo_trains(spec, tmp_path):
    """Generation, the scores of what was generated, and the gradient, on the same shortened prompts: the first ratio is 1."""
    rewards = iter(range(100))
    given = trl.GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=5, learning_rate=1e-3, beta=0.1, num_iterations=1))
    from peft import LoraConfig

    trainer = trl.GRPOTrainer(  # with adapters the reference is the same model with them off
        me.wrap(tiny("llava"), spec), lambda completions, **_: [float(next(rewards)) for _ in completions], given,
        train_dataset=datasets.Dataset.from_list([{"image": picture(i), "prompt": ASKED} for i in range(6)]),
        processing_class=processor("llava", "right"), peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(math.isfinite(entry["loss"]) for entry in logged)
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-6) and logged[0]["grad_norm"] > 0
