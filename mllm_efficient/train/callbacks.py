"""What a training says of itself: a progress bar, and a log that survives a resume."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from ..parsing import finished_lines
from ..writing import write_text, writing


class Bar(TrainerCallback):
    """A progress bar on stderr with the newest loss. Off a terminal it is drawn twice a minute."""

    def __init__(self, stage: str):
        self.stage, self.bar = stage, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            pause = 0.5 if sys.stderr.isatty() else 30
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step", mininterval=pause)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=logs["loss"], refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class LogFile(TrainerCallback):
    """Appends what the Trainer logs to a file, one line of JSON each; after a resume the lines beyond it are taken back."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = list[bytes]()
        for line in finished_lines(self.path):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["stage"] != self.stage or entry["step"] <= state.global_step:
                kept.append(line)
        write_text(self.path, b"".join(kept).decode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")
