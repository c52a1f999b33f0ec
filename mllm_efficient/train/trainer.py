"""Runs a recipe: stage after stage with transformers' Trainer, each resumed from its newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainingArguments

from ..errors import MllmEfficientError, NotFiniteError
from ..loading.models import Loaded, ModelOptions, pick_device
from ..locking import owned
from ..trained.base_model import base_of
from ..writing import writing
from .build import build_model, data_of, loaded_for, records_of
from .callbacks import Bar, LogFile
from .config import Recipe, StageConfig
from .count_trainer import WEIGHTS, CountTrainer, read_weights, write_weights
from .encoding import Collator
from .feed import SKIPPED, feed
from .model import TrainingModel
from .publish import lasting, publish
from .routing import routing_log
from .sampling import likelihoods

SETTLED = 256  # records
LOG, FINAL, RECIPE = "log.jsonl", "final", "recipe.json"


def run(recipe: Recipe) -> Path:
    """Trains what is not trained yet and returns the trained method's folder.

    The same call goes on after an interruption: finished stages are loaded, the one at hand from its newest checkpoint.
    Raises ``MllmEfficientError`` for a folder that another recipe wrote in, or that another process is writing to.
    """
    folder = Path(recipe.output_dir)
    records = {s.name: records_of(recipe, s) for s in recipe.stages}
    first = int(os.environ.get("RANK", 0)) == 0  # which owns the folder for all
    with owned(folder, ".lock", "output_dir") if first else contextlib.nullcontext(), writing(folder):
        return _run(recipe, records, folder)


def _run(recipe: Recipe, records: dict[str, Any], folder: Path) -> Path:
    loaded = loaded_for(recipe)
    base = base_of(loaded.model)
    model = build_model(recipe, loaded)
    _own(folder, recipe)
    for stage in recipe.stages:
        model.freeze_but(stage.train)
        done = folder / stage.name / WEIGHTS
        if done.exists():
            read_weights(model, done)
        else:
            _run_stage(recipe, stage, loaded, model, records[stage.name], folder)
    final = folder / FINAL
    if not final.exists():
        if model.method.as_reducer is not None:
            _settle(recipe, loaded, model, records[recipe.stages[-1].name], folder)
        if int(os.environ.get("RANK", 0)) == 0:
            publish(recipe, model, base, final)
        PartialState().wait_for_everyone()
    return final


@torch.no_grad()
def _settle(recipe: Recipe, loaded: Loaded, model: TrainingModel, records: Any, folder: Path) -> None:
    """Finds what the router does after training, with the likeliest kernels, on up to ``SETTLED`` records; it goes into log and folder."""
    items, collate = _fed(recipe, recipe.stages[-1], loaded, model, records)
    total = torch.zeros(model.routing_size)
    model.eval()
    for low in range(0, min(len(items), SETTLED), 8):
        batch = collate([items[i] for i in range(low, min(len(items), SETTLED, low + 8))])
        batch.pop(SKIPPED, None)
        out = model("answers", None, {k: v.to(loaded.model.device) for k, v in batch.items()})
        total += out.get("routed", 0)
    found = routing_log(total.tolist(), *model.routing_names) if total[0] else {}
    model.kept = [found[f"kept_{layer}"] / 100 for layer in model.routing_names[0]] if found else None
    if int(os.environ.get("RANK", 0)) == 0:
        with writing(folder / LOG), (folder / LOG).open("a") as file:
            file.write(json.dumps({"stage": "settled", "step": 0, "images": int(total[0]), **found}) + "\n")


def _own(folder: Path, recipe: Recipe) -> None:
    """Remembers the recipe in the folder, so that no other one goes on in it."""
    own, path = lasting(recipe), folder / RECIPE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(own, indent=1) + "\n")
            partial.replace(path)
        there = json.loads(path.read_text())
    except OSError as error:
        raise MllmEfficientError(f"cannot write to {folder}: {error.strerror}") from None
    except ValueError:
        raise MllmEfficientError(f"{path} is not the recipe of a training: use another output_dir") from None
    odd = [k for k in own if there.get(k) != own[k]]
    if odd:
        raise MllmEfficientError(f"{folder} holds a training with another {', '.join(odd)}: use another output_dir")


def arguments(recipe: Recipe, stage: StageConfig, folder: Path) -> TrainingArguments:
    """What the Trainer is told of a stage."""
    cpu = torch.device(pick_device(ModelOptions(device=recipe.device))).type == "cpu"
    given = TrainingArguments(
        output_dir=str(folder / stage.name / "checkpoints"), per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation, learning_rate=stage.learning_rate, weight_decay=stage.weight_decay,
        max_steps=stage.steps or -1, num_train_epochs=stage.epochs or 1, lr_scheduler_type=stage.schedule, warmup_steps=stage.warmup,
        max_grad_norm=stage.clip, logging_steps=recipe.logging_steps, save_steps=stage.save_steps, save_total_limit=1, bf16=recipe.bf16,
        use_cpu=cpu, seed=recipe.seed, data_seed=recipe.seed, remove_unused_columns=False, report_to="none",
        dataloader_num_workers=recipe.workers, dataloader_drop_last=True, ddp_find_unused_parameters=False,
        dataloader_pin_memory=not cpu, logging_nan_inf_filter=False, disable_tqdm=True,
    )  # fmt: skip
    given._n_gpu = min(given.n_gpu, 1)  # several GPUs are for torchrun: DataParallel would replicate the adapter's model wrongly
    return given


def _run_stage(recipe: Recipe, stage: StageConfig, loaded: Loaded, model: TrainingModel, records: Any, folder: Path) -> None:
    if stage.gradient_checkpointing:
        _checkpointing(loaded.model, "enable", {"use_reentrant": False})
    bar = Bar(stage.name)
    items, collate = _fed(recipe, stage, loaded, model, records)
    trainer = CountTrainer(
        model=model, args=arguments(recipe, stage, folder), train_dataset=items, data_collator=collate,
        counts=likelihoods(recipe, loaded.model.config), stage=stage, data=data_of(recipe, stage), seed=recipe.seed,
        distill=recipe.distill if stage.objective == "answers" else 0.0,
        callbacks=[LogFile(folder / LOG, stage.name), bar],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    checkpoints = folder / stage.name / "checkpoints"
    newest, state = _newest(checkpoints)
    if newest is not None and state["global_step"] >= state["max_steps"]:  # only its last weights were not written yet
        read_weights(model, newest / WEIGHTS)
    else:
        try:
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        except NotFiniteError as error:
            raise NotFiniteError(f"stage {stage.name}: the training diverged, a smaller learning rate may help ({error})") from error
        except MllmEfficientError as error:  # a loader's worker puts its traceback before the line
            raise MllmEfficientError(str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.")) from error
        finally:
            bar.close()
    if trainer.skipped_in_all and trainer.is_world_process_zero():
        print(f"{stage.name}: {trainer.skipped_in_all:,} records could not be used and were skipped", file=sys.stderr, flush=True)
    if stage.gradient_checkpointing:
        _checkpointing(loaded.model, "disable")
    if trainer.is_world_process_zero():
        partial = folder / stage.name / f"{WEIGHTS}.partial"
        write_weights(model, partial)
        partial.replace(folder / stage.name / WEIGHTS)
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _fed(recipe: Recipe, stage: StageConfig, loaded: Loaded, model: TrainingModel, records: Sequence[Any]) -> tuple[Sequence[Any], Any]:
    """What the Trainer draws from, and the collator of what it drew."""
    data, independent = data_of(recipe, stage), recipe.independent_turns and stage.objective == "answers"
    ending = getattr(model.method, "read_token", None)
    return feed(Collator(loaded.processor, recipe.max_length, independent, ending, data.image_range), records, data.on_bad)


def _newest(checkpoints: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that was written to its end, and its state."""
    found = []
    for path in checkpoints.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(path.read_text()), path.parent))
        except ValueError:  # a kill in mid-write
            continue
    state, folder = max(found, key=lambda f: f[0]["global_step"], default=({}, None))
    return folder, state


def _checkpointing(model: Any, what: str, *how: Any) -> None:
    """Gradient checkpointing by whichever name this transformers has it."""
    (getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}"))(*how)
