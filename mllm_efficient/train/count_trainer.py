"""transformers' Trainer, with a token count drawn for every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from ..errors import MllmEfficientError, NotFiniteError
from ..writing import writing
from .config import DataConfig, StageConfig
from .feed import SKIPPED
from .model import TrainingModel
from .routing import routing_log
from .sampling import ramped

WEIGHTS = "model.safetensors"


class CountTrainer(Trainer):
    """A Trainer that draws a token count for every batch, the same on every rank, and logs loss and accuracy by count.

    Without counts it logs what a router did instead.
    """

    def __init__(
        self, *args: Any, counts: dict[int, float], stage: StageConfig, data: DataConfig, seed: int, distill: float = 0.0,
        **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.counts, self.stage, self.data, self.draw_seed, self.distill = counts, stage, data, seed, distill
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

    def teacher(self, count: int | None) -> tuple[int, float] | None:
        """The largest count and the weight by which this one learns from it; None where it does not."""
        if not self.distill or count is None or count == max(self.counts):
            return None
        return max(self.counts), ramped(self.distill, self.state.global_step, self.state.max_steps)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs, count = dict(inputs), self.draw()
        if SKIPPED in inputs:
            self.skipped = self.skipped + inputs.pop(SKIPPED).sum().to(self.skipped.device)
        seed = [self.draw_seed, *self.micro, self.args.process_index]
        try:
            out = model(self.stage.objective, count, inputs, self.stage.routing, seed, self.teacher(count))
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
        write_weights(self.accelerator.unwrap_model(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_weights(self.model if model is None else model, Path(resume_from_checkpoint) / WEIGHTS)


def write_weights(model: TrainingModel, path: Path) -> None:
    with writing(path):
        save_file({k: v.contiguous() for k, v in model.trained_state().items()}, path)


def read_weights(model: TrainingModel, path: Path) -> None:
    state, own = load_file(path), dict(model.named_parameters())
    unknown = [k for k in state if k not in own or own[k].shape != state[k].shape]
    if unknown:
        raise MllmEfficientError(f"{path} does not belong to this recipe: {unknown[0]}; use another output_dir")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
