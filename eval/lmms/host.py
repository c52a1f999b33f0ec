"""Everything this package needs of lmms-eval's inside: importing it, its tasks, local data, one evaluation."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError, did_you_mean

from .tasks import FOLDER

CAPTIONS = ("CIDEr", "METEOR", "SPICE")  # metrics that run Java
JUDGES = ("gpt", "judge")
SUBMISSION = "submission"  # a metric that only writes a file for a challenge's server


@dataclass(frozen=True)
class Task:
    """One task: its name, its number of samples, its metrics in order, which of them are better when higher, and how
    samples become a metric."""

    name: str
    size: int
    metrics: tuple[str, ...]
    higher: dict[str, bool]
    aggregate: dict[str, Callable[..., Any]]


def lmms_eval_module() -> Any:
    """``lmms_eval.evaluator``, with its log lines on stderr. Raises ``MllmEfficientError`` where it is missing or broken."""
    from mllm_efficient.patches.torchvision_cpu import declare

    try:
        version("lmms_eval")
    except PackageNotFoundError:
        raise MllmEfficientError('public benchmarks need lmms-eval: pip install "mllm-efficient[eval]"') from None
    declare()
    try:
        import lmms_eval.evaluator as evaluator
        from loguru import logger
    except Exception as error:
        raise MllmEfficientError(f"lmms-eval {version('lmms_eval')} does not import here: {type(error).__name__}: {error}") from error
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    return evaluator


class Host:
    """lmms-eval with the tasks of our own, and data sets from ``data_root`` by their hub ids where it is given."""

    def __init__(self, data_root: Path | None = None, include: Sequence[Path] = ()):
        self.evaluator = lmms_eval_module()
        from lmms_eval.tasks import TaskManager

        if data_root is not None and not data_root.is_dir():
            raise MllmEfficientError(f"--data-root: no folder {data_root}")
        self.data_root = None if data_root is None else data_root.resolve()
        self.include = [str(FOLDER), *(str(p) for p in include)]
        self._ours = TaskManager(include_path=self.include, include_defaults=False)
        self._all: Any = None

    def manager(self, name: str) -> Any:
        """The index of tasks that knows a name; lmms-eval's own, which takes seconds to read, only if ours has it not."""
        if name in self._ours.all_subtasks:
            return self._ours
        if self._all is None:
            from lmms_eval.tasks import TaskManager

            self._all = TaskManager(include_path=self.include)
        if name not in self._all.all_subtasks:
            if name in self._all.task_index:
                among = [t for t in self._all.task_index[name].get("task", []) if isinstance(t, str)] if name in self._all.all_tags else []
                raise MllmEfficientError(f"{name} is a group of tasks: name those you want{': ' + ', '.join(among) if among else ''}")
            raise MllmEfficientError(f"unknown task {name!r}{did_you_mean(name, self._all.all_subtasks)} (lmms-eval tasks lists all)")
        return self._all

    def require_data(self, names: Sequence[str]) -> None:
        """Raises ``MllmEfficientError`` naming all data sets of tasks that ``data_root`` lacks."""
        if self.data_root is None:
            return
        ids = dict.fromkeys(str(self.manager(name)._get_config(name).get("dataset_path")) for name in names)
        lacking = [i for i in ids if i not in BUILDERS and not Path(i).is_absolute() and not (self.data_root / i).is_dir()]
        if lacking:
            command = f"hf download ID --repo-type dataset --local-dir {self.data_root}/ID"
            raise MllmEfficientError(f"{self.data_root} has no folder {', '.join(lacking)}: {command} for each, or leave --data-root out")

    def check(self, name: str) -> Task:
        """A task whose data can be read and whose metrics can be computed here. Raises ``MllmEfficientError`` in one line."""
        task = self._load(name)
        if task.OUTPUT_TYPE != "generate_until":
            raise MllmEfficientError(f"task {name} is of type {task.OUTPUT_TYPE}: tasks that generate one answer (generate_until) are run")
        higher = {k: bool(v) for k, v in task.higher_is_better().items() if k != SUBMISSION}
        for metric in higher:
            if any(c.lower() in metric.lower() for c in CAPTIONS) and shutil.which("java") is None:
                raise MllmEfficientError(
                    f"task {name}: {metric} needs Java, which is not on the PATH: install it (apt install default-jre)"
                )
            judged = any(j in metric.lower() for j in JUDGES) and "static" not in name
            if judged and not os.environ.get("OPENAI_API_KEY"):
                raise MllmEfficientError(
                    f"task {name}: {metric} is judged by a model over the network: set OPENAI_API_KEY, or take another"
                )
        if not higher:
            raise MllmEfficientError(f"task {name} only writes a file for a challenge's server: it has no score")
        docs = task.eval_docs_no_media
        if len(docs) == 0:
            raise MllmEfficientError(f"task {name}: its data set is empty")
        return Task(name, len(docs), tuple(higher), higher, task.aggregation())

    def _load(self, name: str) -> Any:
        manager = self.manager(name)
        from lmms_eval.tasks import get_task_dict

        with self._local_data(), _once(), contextlib.redirect_stdout(sys.stderr):
            try:
                return get_task_dict([name], manager, "chat")[name]
            except Exception as error:
                reason = reason_of(error)
                empty = "corresponds to no data" in reason  # what datasets says of a file without rows
                raise MllmEfficientError(f"task {name}: {'its data set is empty' if empty else reason}") from error

    def evaluate(self, model: Any, name: str, limit: int | None, batch_size: int, files: Path | None) -> dict[str, Any] | None:
        """``simple_evaluate`` of one task; None on all ranks but the first. files: where the task may leave files.

        What the adapter raises comes out as it is, everything else as ``MllmEfficientError``.
        """
        from .asking import SampleError

        with contextlib.ExitStack() as inside:
            folder = files or Path(inside.enter_context(tempfile.TemporaryDirectory()))
            arguments = argparse.Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None)
            for context in (self._local_data(), _once(), contextlib.redirect_stdout(sys.stderr)):
                inside.enter_context(context)
            try:
                return self.evaluator.simple_evaluate(
                    model=model, tasks=[name], task_manager=self.manager(name), limit=limit, batch_size=batch_size, log_samples=True,
                    bootstrap_iters=0, cli_args=arguments, verbosity="WARNING",
                    process_docs_parallel=1,  # threads would share the random numbers that some tasks draw
                )  # fmt: skip
            except SampleError:
                raise
            except Exception as error:
                raise MllmEfficientError(f"task {name}: {reason_of(error)}") from error

    @contextlib.contextmanager
    def _local_data(self) -> Iterator[None]:
        """``datasets.load_dataset`` reads ``data_root/<hub id>`` instead of the hub."""
        if self.data_root is None:
            yield
            return
        import datasets

        stock, root = datasets.load_dataset, self.data_root

        def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
            if path in BUILDERS or Path(path).is_absolute():
                return stock(path, *args, **kwargs)
            if not (root / path).is_dir():
                raise MllmEfficientError(f"no folder {root / path}: hf download {path} --repo-type dataset --local-dir {root / path}")
            kwargs.pop("token", None)
            return stock(str(root / path), *args, **kwargs)

        datasets.load_dataset = load_dataset
        try:
            yield
        finally:
            datasets.load_dataset = stock


BUILDERS = ("json", "csv", "parquet", "text", "arrow", "imagefolder")


@contextlib.contextmanager
def _once() -> Iterator[None]:
    """Without lmms-eval's silent repetitions, which hide the cause of an error for up to a minute."""
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import stop_after_attempt

    policies = [function.retry for function in (ConfigurableTask.download, ConfigurableTask.process_results)]
    stops = [p.stop for p in policies]
    for policy in policies:
        policy.stop = stop_after_attempt(1)
    try:
        yield
    finally:
        for policy, stop in zip(policies, stops):
            policy.stop = stop


def reason_of(error: BaseException) -> str:
    """The cause in one line, out of tenacity's wrapping."""
    while hasattr(error, "last_attempt"):
        error = error.last_attempt.exception()
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, MllmEfficientError) else f"{type(error).__name__}: {text}"
