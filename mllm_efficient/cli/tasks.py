"""``mllm-efficient eval --tasks``: public benchmarks through lmms-eval, on a model here or on running servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..progress import SILENT
from . import options

if TYPE_CHECKING:
    from ..eval.lmms.run import TaskOptions
    from ..eval.results import Results
    from ..loading.models import ModelOptions


def evaluate_tasks(settings: ModelOptions, specs: Sequence[str], asked: TaskOptions, output_dir: Path | None) -> Results | int | None:
    """Runs everything; an exit code where a sample failed that may not, None in the processes of a launcher that are not the first."""
    from ..eval.lmms.adapter import rank_device
    from ..eval.lmms.asking import SampleError
    from ..eval.lmms.evaluate import cells_of, checked, on_tasks, require_reference
    from ..loading.models import load

    progress = options.progress() if int(os.environ.get("RANK", 0)) == 0 else SILENT
    require_reference(asked)
    if not asked.servers:
        cells_of(specs)  # before data are read
    host, tasks = checked(asked)
    loaded = None
    if not asked.servers:
        loaded = load(replace(settings, device=rank_device(settings.device) if settings.device_map is None else settings.device))
        for line in loaded.notes:
            progress.say(line)
    try:
        return on_tasks(
            asked, specs, loaded, settings=settings, output_dir=output_dir, progress=progress, host=host, tasks=tasks
        )  # fmt: skip
    except SampleError as error:
        progress.warn(f"failed: {error}")
        return 1
