"""Everything this package needs of lmms-eval's inside: importing it, its tasks, local data, one evaluation."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError, did_you_mean

from .scores import known
from .switches import once, own_draws, variable, without_bars
from .tasks import FOLDER
from .tasks.chair import VARIABLE

CAPTIONS = ("CIDEr", "METEOR", "SPICE")  # metrics that run Java
KEY = "OPENAI_API_KEY"
JUDGE = ("API_KEY", "API_URL", "OPENAI", "get_server", "get_chat_response")  # names in the module of a task that asks a judge
SUBMISSION = "submission"  # a metric that only writes a file for a challenge's server


@dataclass(frozen=True)
class Task:
    """One task.

    size: samples. higher: its metrics in order, and whether more is better. aggregate: how samples become a metric. length:
    whether it says how long answers may be. fingerprint: of its questions, answers and code; pictures are not in it.
    """

    name: str
    size: int
    higher: dict[str, bool]
    aggregate: dict[str, Callable[..., Any]]
    length: bool
    fingerprint: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.higher)


def lmms_eval_module() -> Any:
    """``lmms_eval.evaluator``, with its log lines on stderr. Raises ``MllmEfficientError`` where it is missing or broken."""
    from mllm_efficient.patches.torchvision_cpu import declare

    try:
        version("lmms_eval")
    except PackageNotFoundError:
        raise MllmEfficientError('public benchmarks need lmms-eval: pip install "mllm-efficient[eval]" (in a checkout ".[eval]")') from None
    declare()
    try:
        import lmms_eval.evaluator as evaluator
        from loguru import logger

        getattr(evaluator, "_enable_reentrant_filelocks", lambda: None)()  # what an evaluation begins with, and fails with alone
    except Exception as error:
        what = f"lmms-eval {version('lmms_eval')} does not run here: {type(error).__name__}: {error}"
        raise MllmEfficientError(what + _cure()) from error
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    return evaluator


def _cure() -> str:
    """What to install in place of packages that are outside the bounds of this package's ``eval`` extra."""
    from packaging.requirements import Requirement

    wrong = []
    for text in requires("mllm-efficient") or ():
        bound = Requirement(text)
        if bound.marker is None or not bound.marker.evaluate({"extra": "eval"}) or bound.marker.evaluate({"extra": ""}):
            continue
        with contextlib.suppress(PackageNotFoundError):
            found = version(bound.name)
            if not bound.specifier.contains(found, prereleases=True):
                wrong.append((f"{bound.name} {found}", f'"{bound.name}{bound.specifier}"'))
    if not wrong:
        return ""
    return f". It cannot run with {' and '.join(w for w, _ in wrong)}: pip install {' '.join(c for _, c in wrong)}"


class Host:
    """lmms-eval with the tasks of our own, and data sets from ``data_root`` by their hub ids where it is given.

    coco_instances: COCO's file of what its pictures show, for ``me_coco_chair``.
    """

    def __init__(self, data_root: Path | None = None, include: Sequence[Path] = (), coco_instances: Path | None = None):
        self.evaluator = lmms_eval_module()
        import datasets
        from lmms_eval.tasks import TaskManager

        datasets.disable_progress_bars()
        if data_root is not None and not data_root.is_dir():
            raise MllmEfficientError(f"--data-root: no folder {data_root}")
        for path in include:
            if not Path(path).is_dir():
                raise MllmEfficientError(f"--include-path: no folder {path}")
        self.data_root = None if data_root is None else data_root.resolve()
        self.coco_instances = coco_instances
        self.include = [str(FOLDER), *(str(p) for p in include)]
        self._ours = TaskManager(include_path=self.include, include_defaults=False)
        self._all: Any = None

    def manager_of(self, name: str) -> Any:
        """The index that knows a name; lmms-eval's own, which takes seconds to read, only if ours has it not."""
        if name in self._ours.all_subtasks:
            return self._ours
        if self._all is None:
            from lmms_eval.tasks import TaskManager

            self._all = TaskManager(include_path=self.include)
        return self._all

    def manager(self, name: str) -> Any:
        """The index of a task. Raises ``MllmEfficientError`` for an unknown name, and for a group naming its tasks."""
        found = self.manager_of(name)
        if name in found.all_subtasks:
            return found
        if name in found.task_index:
            among = found.task_index[name].get("task") if name in found.all_tags else self._read(name).get("task")
            listed = ", ".join(t for t in among or () if isinstance(t, str))
            raise MllmEfficientError(f"{name} is a group of tasks: name those you want{listed and ': ' + listed}")
        raise MllmEfficientError(f"unknown task {name!r}{did_you_mean(name, found.all_subtasks)} (lmms-eval tasks lists all)")

    def require_data(self, names: Sequence[str]) -> None:
        """Raises ``MllmEfficientError`` naming all data sets of tasks that ``data_root`` lacks."""
        if self.data_root is None:
            return
        ids = dict.fromkeys(str(self._read(name).get("dataset_path")) for name in names)
        lacking = [i for i in ids if i not in BUILDERS and not Path(i).is_absolute() and not (self.data_root / i).is_dir()]
        if lacking:
            command = f"hf download ID --repo-type dataset --local-dir {self.data_root}/ID"
            raise MllmEfficientError(f"{self.data_root} has no folder {', '.join(lacking)}: {command} for each, or leave --data-root out")

    def _read(self, name: str) -> dict[str, Any]:
        """The YAML of a task or group, without running the code that it names."""
        from lmms_eval.utils import load_yaml_config

        return load_yaml_config(self.manager_of(name).task_index[name]["yaml_path"], mode="simple")

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
        if name not in known() and _asks_a_judge(task) and not os.environ.get(KEY):
            raise MllmEfficientError(f"task {name}: answers are judged by a model over the network: set {KEY}, or take another task")
        if (task.config.repeats or 1) > 1:
            raise MllmEfficientError(f"task {name} asks every question {task.config.repeats} times: tasks that ask once are run")
        if not higher:
            raise MllmEfficientError(f"task {name} only writes a file for a challenge's server: it has no score")
        docs = task.eval_docs_no_media
        if len(docs) == 0:
            raise MllmEfficientError(f"task {name}: its data set is empty")
        if _lacks_answer_ids(task, docs):
            raise MllmEfficientError(
                f"task {name}: its answers have no answer_id, without which ten equal right answers score 0: take the data set as it is "
                "published"
            )
        length = "max_new_tokens" in (task.config.generation_kwargs or {})
        return Task(name, len(docs), higher, task.aggregation(), length, _fingerprint(task, docs))

    def _load(self, name: str) -> Any:
        manager = self.manager(name)
        from lmms_eval.tasks import get_task_dict

        with self._local_data(), once(), contextlib.redirect_stdout(sys.stderr):
            try:
                return get_task_dict([name], manager, "chat")[name]
            except Exception as error:
                reason = reason_of(error)
                empty = "corresponds to no data" in reason  # what datasets says of a file without rows
                raise MllmEfficientError(f"task {name}: {'its data set is empty' if empty else reason}") from error

    def evaluate(
        self, model: Any, name: str, limit: int | None, batch_size: int, files: Path | None, seed: int = 0
    ) -> dict[str, Any] | None:
        """``simple_evaluate`` of one task; None on all ranks but the first. files: where the task may leave files; emptied before.

        What the adapter raises comes out as it is, everything else as ``MllmEfficientError``.
        """
        from .asking import SampleError

        with contextlib.ExitStack() as inside:
            folder = files or Path(inside.enter_context(tempfile.TemporaryDirectory()))
            if files is not None and int(os.environ.get("RANK", 0)) == 0:
                shutil.rmtree(files, ignore_errors=True)  # some tasks read what an earlier run left
            arguments = argparse.Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None)
            for context in (self._local_data(), once(), own_draws(), without_bars(), contextlib.redirect_stdout(sys.stderr)):
                inside.enter_context(context)
            try:
                return self.evaluator.simple_evaluate(
                    model=model, tasks=[name], task_manager=self.manager(name), limit=limit, batch_size=batch_size, log_samples=True,
                    bootstrap_iters=0, cli_args=arguments, verbosity="WARNING",
                    process_docs_parallel=1, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                )  # fmt: skip
            except SampleError:
                raise
            except Exception as error:
                raise MllmEfficientError(f"task {name}: {reason_of(error)}") from error

    @contextlib.contextmanager
    def _local_data(self) -> Iterator[None]:
        """``datasets.load_dataset`` reads ``data_root/<hub id>`` instead of the hub, and tasks find COCO's file."""
        with contextlib.ExitStack() as inside:
            if self.data_root is not None:
                inside.enter_context(self._from_root(self.data_root))
            if self.coco_instances is not None:
                inside.enter_context(variable(VARIABLE, str(self.coco_instances.expanduser().resolve())))
            yield

    @contextlib.contextmanager
    def _from_root(self, root: Path) -> Iterator[None]:
        import datasets

        stock = datasets.load_dataset

        def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
            if path in BUILDERS or Path(path).is_absolute():
                return stock(path, *args, **kwargs)
            if not (root / path).is_dir():
                raise MllmEfficientError(f"no folder {root / path}: hf download {path} --repo-type dataset --local-dir {root / path}")
            kwargs.pop("token", None)
            kwargs["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / "mllm_efficient" / _state(root / path))
            return stock(str(root / path), *args, **kwargs)

        datasets.load_dataset = load_dataset
        try:
            yield
        finally:
            datasets.load_dataset = stock


ROWS = 1000
BUILDERS = ("json", "csv", "parquet", "text", "arrow", "imagefolder")


def _lacks_answer_ids(task: Any, docs: Any) -> bool:
    """Whether VQAv2's metric would take equal answers of different people for one: it tells them apart by all that stands beside them."""
    answers: Any = docs[0].get("answers") if "vqav2" in getattr(task.config.process_results, "__name__", "") else None
    return bool(answers) and isinstance(answers[0], dict) and "answer_id" not in answers[0]


def _asks_a_judge(task: Any) -> bool:
    """Whether what scores a task's answers comes from a module that asks a model over the network."""
    functions = [task.config.process_results, *task.aggregation().values()]
    names = {name for f in functions if callable(f) for name in getattr(f, "__globals__", {})}
    return any(word in name for name in names for word in JUDGE)


def _fingerprint(task: Any, docs: Any) -> str:
    """Of a task's settings, the code they name, and its samples without their pictures."""
    digest = hashlib.sha256()
    for key, value in sorted(vars(task.config).items()):
        digest.update(f"{key}={_text(value)};".encode())
    for low in range(0, len(docs), ROWS):
        digest.update(json.dumps(docs[low : low + ROWS], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _state(folder: Path) -> str:
    """What a folder's files are by now: datasets would go on with what it made of earlier ones."""
    files = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()]
    return hashlib.sha256(json.dumps([str(folder), files]).encode()).hexdigest()[:16]


def _text(value: Any) -> str:
    """A setting as text, a function as its source."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):
            return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, dict):
        return str({k: _text(v) for k, v in value.items()})
    return str([_text(v) for v in value]) if isinstance(value, list) else str(value)


def reason_of(error: BaseException) -> str:
    """The cause in one line, out of tenacity's wrapping."""
    while hasattr(error, "last_attempt"):
        error = error.last_attempt.exception()
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, MllmEfficientError) else f"{type(error).__name__}: {text}"
