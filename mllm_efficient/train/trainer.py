"""Runs a recipe: stage after stage with transformers' Trainer, each resumed from its newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..apply.plan import check
from ..compressors.projector import Projector
from ..errors import MllmEfficientError, NotFiniteError
from ..loading.lora import base_of_folder
from ..loading.models import BUILTIN, Loaded, ModelOptions, load, pick_device, require_supported
from ..locking import owned
from ..records import read_all
from ..records.files import fail
from ..registry import get_method
from ..trained import folder as trained
from ..trained.base_model import base_of
from ..trained.files import RANDOM
from ..trained.install import install
from ..writing import writing
from .callbacks import Bar, LogFile
from .config import DataConfig, Recipe, StageConfig
from .data import builtin_records
from .encoding import Collator
from .feed import SKIPPED, feed
from .model import TrainingModel
from .routing import routing_log

SETTLED = 256  # records
WEIGHTS, LOG, FINAL, RECIPE = "model.safetensors", "log.jsonl", "final", "recipe.json"


class CountTrainer(Trainer):
    """A Trainer that draws a token count for every batch, the same on every rank, and logs loss and accuracy by count.

    Without counts it logs what a router did instead.
    """

    def __init__(self, *args: Any, counts: dict[int, float], stage: StageConfig, data: DataConfig, seed: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counts, self.stage, self.data, self.draw_seed = counts, stage, data, seed
        self.model_accepts_loss_kwargs = False
        self.seen: dict[int, torch.Tensor] = {}  # by count: sum of losses, batches, answer tokens guessed, answer tokens
        self.routed: torch.Tensor | None = None  # the sum of ``routing_sums``
        self.skipped = torch.zeros((), dtype=torch.long)  # records that could not be used, since the last log
        self.skipped_in_all = 0
        self.micro = (-1, -1)

    def draw(self) -> int | None:
        """The count of the batch at hand, from (seed, step, number of the batch within the step)."""
        step = self.state.global_step
        self.micro = (step, self.micro[1] + 1 if self.micro[0] == step else 0)
        if not self.counts:
            return None
        weights = np.array(list(self.counts.values()), dtype=float)
        chosen = np.random.default_rng([self.draw_seed, *self.micro]).choice(len(weights), p=weights / weights.sum())
        return list(self.counts)[chosen]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs, count = dict(inputs), self.draw()
        if SKIPPED in inputs:
            self.skipped = self.skipped + inputs.pop(SKIPPED).sum().to(self.skipped.device)
        seed = [self.draw_seed, *self.micro, self.args.process_index]
        try:
            out = model(self.stage.objective, count, inputs, self.stage.routing, seed)
        except NotFiniteError as error:
            raise MllmEfficientError(f"stage {self.stage.name}, step {self.micro[0] + 1}: the training diverged: {error}") from error
        if self.stage.objective == "answers" and not int(out["asked"]):
            raise MllmEfficientError(
                f"stage {self.stage.name}, step {self.micro[0] + 1}: no token of the batch has a label, so there is nothing to learn"
            )
        loss = out["loss"].detach().double()
        now = torch.stack([loss, torch.ones_like(loss), out["right"].to(loss), out["asked"].to(loss)])
        key = count or 0
        self.seen[key] = self.seen[key] + now if key in self.seen else now
        if "routed" in out:
            self.routed = out["routed"] if self.routed is None else self.routed + out["routed"]
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        counts = sorted(self.seen)  # the same on every rank
        if counts:
            totals = self.accelerator.reduce(torch.stack([self.seen[c] for c in counts]), "sum").tolist()
            for count, (loss, batches, right, asked) in zip(counts, totals):
                if count:
                    logs[f"loss_{count}"] = round(loss / batches, 4)
                if asked:
                    logs[f"accuracy_{count}" if count else "accuracy"] = round(100 * right / asked, 2)
            self.seen.clear()
        if not self.counts:
            model = self.accelerator.unwrap_model(self.model)
            sums = torch.zeros(model.routing_size) if self.routed is None else self.routed
            total = self.accelerator.reduce(sums.to(self.accelerator.device, torch.float32), "sum").tolist()
            logs.update(routing_log(total, *model.routing_names) if total[0] else {})
            self.routed = None
        if self.data.on_bad == "skip":
            logs["skipped"] = int(self.accelerator.reduce(self.skipped.to(self.accelerator.device), "sum"))
            self.skipped_in_all += int(logs["skipped"])
            self.skipped = torch.zeros_like(self.skipped)
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """One group for each part, with its own learning rate; vectors (norms, biases) do not decay."""
        if self.optimizer is None:  # type: ignore[has-type]
            target = self.model if model is None else model
            groups = []
            for part, members in target.parts().items():
                moving = [p for _, p in members if p.requires_grad]
                for decays in (True, False):
                    params = [p for p in moving if (p.ndim > 1) == decays]
                    decay = self.args.weight_decay if decays else 0.0
                    groups.append(
                        {"params": params, "lr": self.stage.learning_rates.get(part, self.args.learning_rate), "weight_decay": decay}
                    )
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = cls([g for g in groups if g["params"]], **settings)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _write(self.accelerator.unwrap_model(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _read(self.model if model is None else model, Path(resume_from_checkpoint) / WEIGHTS)


def _write(model: TrainingModel, path: Path) -> None:
    with writing(path):
        save_file({k: v.contiguous() for k, v in model.trained_state().items()}, path)


def _read(model: TrainingModel, path: Path) -> None:
    state, own = load_file(path), dict(model.named_parameters())
    unknown = [k for k in state if k not in own or own[k].shape != state[k].shape]
    if unknown:
        raise MllmEfficientError(f"{path} does not belong to this recipe: {unknown[0]}; use another output_dir")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def loaded_for(recipe: Recipe) -> Loaded:
    """The base model of a recipe, on this process's own device."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and recipe.device != "cpu" and torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if several else recipe.device
    base = base_of_folder(recipe.model)
    if base is not None:
        raise MllmEfficientError(f"model={recipe.model} is an adapter of {base}: merge it with PEFT first, or train on {base}")
    return load(
        ModelOptions(
            model=recipe.model, device=device, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation, seed=recipe.seed,
            processor_kwargs=recipe.processor_kwargs,
        )
    )  # fmt: skip


def data_of(recipe: Recipe, stage: StageConfig) -> DataConfig:
    """What a stage is trained on."""
    return stage.data or recipe.data


def records_of(recipe: Recipe, stage: StageConfig, keep: bool = True, look: bool = True) -> Sequence[Any]:
    """The conversations of a stage, all checked, without those that ``on_bad`` leaves out, which are told.

    keep: generated pictures, in a folder ``data`` beside the output folder. look: whether the images of records must be there.
    """
    data = data_of(recipe, stage)
    if data.builtin is not None:
        folder, natural = Path(recipe.output_dir).parent / "data" if keep else None, recipe.model != BUILTIN
        records: Sequence[Any] = builtin_records(data.builtin, data.scenes, data.questions, folder, natural, recipe.seed)
    else:
        assert data.path is not None
        records, bad = read_all(Path(data.path), None if data.images is None else Path(data.images), learned=True, look=look)
        if bad and (data.on_bad == "stop" or not records):
            fail(bad)
        if bad and int(os.environ.get("RANK", 0)) == 0:
            print(f"left out: {len(bad)} of {len(bad) + len(records)} records; the first: {bad[0].said}", file=sys.stderr, flush=True)
    least = stage.batch_size * stage.gradient_accumulation * int(os.environ.get("WORLD_SIZE", 1))
    if len(records) < least:
        raise MllmEfficientError(
            f"stage {stage.name}: {len(records)} records are fewer than one step takes, {least}: make the batch smaller"
        )
    return records


def build_model(recipe: Recipe, loaded: Loaded) -> TrainingModel:
    """The base model with the method's projector in it, and a LoRA around it if a stage trains one."""
    adapter = require_supported(loaded)
    method: Any = method_of(recipe)
    for each in [replace(method, tokens=count) for count in recipe.counts] or [method]:
        check(adapter, each)
    own = getattr(*adapter.projector_at) if adapter.projects else torch.nn.Identity()
    if recipe.start is None:
        torch.manual_seed(recipe.seed)
        sizes = method.sizes(adapter.decoder_layers) if method.as_reducer is not None else recipe.settings
        parts = trained.Parts(method.module(*adapter.widths(method), **sizes).to(loaded.model.device, loaded.model.dtype))
    else:
        parts = trained.parts_of(adapter, method)
        lost = method.as_projector is not None or any("lora" in s.train for s in recipe.stages)
        if parts.delta and lost and not any("language_model" in s.train for s in recipe.stages):
            raise MllmEfficientError(f"start={recipe.start} has a language model of its own, which would be lost: train language_model too")
    if recipe.bf16:
        parts.module.float()  # small updates are lost in bfloat16 weights
    install(adapter, method, parts)
    if method.as_reducer is not None:
        adapter.reach_inside()
    else:
        own.requires_grad_(False)
    host = loaded.model
    if any("lora" in s.train for s in recipe.stages):
        host = _with_lora(recipe, host)
    model = TrainingModel(host, adapter, method, own, recipe.routing)
    model.carried = set(parts.delta)
    return model


def method_of(recipe: Recipe) -> Any:
    """The method that a recipe trains, a projector at the first of its counts."""
    cls: Any = get_method(recipe.method)
    weights = recipe.start or RANDOM
    if issubclass(cls, Projector):
        return cls(tokens=next(iter(recipe.counts)), weights=weights)
    from ..registry import build

    return build({"method": recipe.method, "weights": weights, **recipe.settings})


def _with_lora(recipe: Recipe, model: Any) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MllmEfficientError("a LoRA needs peft: pip install peft") from None
    lora = recipe.lora
    targets = rf".*language_model.*\.({'|'.join(lora.targets)})"
    try:
        return get_peft_model(model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets))
    except ValueError as error:
        raise MllmEfficientError(f"lora: {str(error).splitlines()[0]}") from error


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
            _read(model, done)
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
    mine, path = _lasting(recipe), folder / RECIPE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(mine, indent=1) + "\n")
            partial.replace(path)
        there = json.loads(path.read_text())
    except OSError as error:
        raise MllmEfficientError(f"cannot write to {folder}: {error.strerror}") from None
    except ValueError:
        raise MllmEfficientError(f"{path} is not the recipe of a training: use another output_dir") from None
    odd = [k for k in mine if there.get(k) != mine[k]]
    if odd:
        raise MllmEfficientError(f"{folder} holds a training with another {', '.join(odd)}: use another output_dir")


def _lasting(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe the weights depend on: everything but where and how fast it runs."""
    every = json.loads(json.dumps(asdict(recipe)))
    for data in [every["data"], *(s["data"] for s in every["stages"] if s["data"])]:
        for name in ("on_bad", "image_range"):  # which recipes did not have at first
            if data[name] == getattr(DataConfig, name):
                del data[name]
    return {k: v for k, v in every.items() if k not in ("output_dir", "shape", "device", "workers", "logging_steps")}


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
        counts=recipe.counts, stage=stage, data=data_of(recipe, stage), seed=recipe.seed,
        callbacks=[LogFile(folder / LOG, stage.name), bar],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    checkpoints = folder / stage.name / "checkpoints"
    newest, state = _newest(checkpoints)
    if newest is not None and state["global_step"] >= state["max_steps"]:  # only its last weights were not written yet
        _read(model, newest / WEIGHTS)
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
        _write(model, partial)
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


def publish(recipe: Recipe, model: TrainingModel, base: dict[str, Any], folder: Path) -> None:
    """Writes the trained method's folder, the language model's weights with it where a stage moved them.

    It appears whole or not at all. Raises ``MllmEfficientError`` for weights that are no numbers.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    about: dict[str, Any] = {"trained_on": recipe.model, "recipe": _lasting(recipe)}
    shown: Any = replace(model.method, tokens=max(recipe.counts)) if recipe.counts else model.method
    if shown.as_reducer is not None:
        about |= {**shown.as_trained, "kept": model.kept}
    trained.save(partial, shown, model.trained_module, base, about)
    kinds = {part for s in recipe.stages for part in s.train}
    if "lora" in kinds:
        model.host.save_pretrained(partial / trained.DELTA)
    else:
        hosts = ("language_model", *(("projector", "vision_tower") if shown.as_reducer is not None else ()))
        named = {name.removeprefix("host."): (part, p) for part in hosts for name, p in model.parts()[part]}
        moved: dict[str, torch.Tensor] = {name: p for name, (part, p) in named.items() if part in kinds or name in model.carried}
        if moved:
            trained.save_delta(partial, moved)
    trained.move(partial, folder)
