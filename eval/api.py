"""The commands in Python: ``me.evaluate``, ``me.sweep``, ``me.bench`` and ``me.flops``. Each gives back ``Results``."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.embedded import model_name
from mllm_efficient.errors import BadSettingError, MllmEfficientError, did_you_mean
from mllm_efficient.loading.models import BUILTIN, Loaded, ModelOptions
from mllm_efficient.progress import Progress
from mllm_efficient.registry import runnable

from .arguments import (
    Many,
    Method,
    Methods,
    budgets,
    listed,
    many,
    named_as_arguments,
    one_of,
    or_usual,
    require_effect,
    require_sources,
    require_whole,
    several,
    unusual_range,
)
from .builtin import is_public
from .results import Results

if TYPE_CHECKING:
    from .lmms.run import TaskOptions

SPLITS = ("test", "val")
OF_TASKS = ("data_root", "include", "on_error", "cache", "image_padding", "prompt_format", "reference", "coco_instances")


@named_as_arguments(*OF_TASKS)
def evaluate(
    model: Any, processor: Any, methods: Methods = (), *, suite: str | None = None, tasks: Sequence[str] | None = None,
    data: str | Path | None = None, categories: Sequence[str] | None = None, split: str | None = None, turns: int | None = None,
    corrupt: Sequence[str] | None = None, limit: int | None = None, batch_size: int | None = None, max_new_tokens: int | None = None,
    against: Method | None = None, image_range: str = "full", output_dir: str | Path | None = None, seed: int = 0,
    progress: bool = False, **of_tasks: Any,
) -> Results:  # fmt: skip
    """How good the answers of a model are under methods, the uncompressed model first.

    Args:
        model, processor: as transformers has them, not wrapped; they are left as they were.
        methods: specifications such as "divprune:keep=0.25", dicts, or objects such as ``me.DivPrune(keep=0.25)``; or one alone.
        suite: "builtin" (the default), "builtin-hard": embedded benchmarks; or public ones by name ("quick", "ocr" ...).
        tasks: instead, tasks of lmms-eval. data: instead, a file of requests of one's own, answered as by the uncompressed model.
        categories: of an embedded benchmark; None asks all that the model takes.
        split: of it, "test" or "val". turns: 2 asks every question of it a second time.
        corrupt: its questions also about pictures with "noise", "blur", "jpeg", "watermark", "patch" (``eval.builtin.corruptions``).
        limit: questions, requests, or samples of each task. batch_size: 32, of ``data`` 8, of tasks 1.
        max_new_tokens: of ``data`` and of tasks that name none. against: a method that every row is compared with.
        image_range: of pictures with more than 8 bits, "full" or "auto".
        output_dir: keeps answers and results; a run that was stopped goes on from there.
        seed: of the bootstrap. progress: a bar and what is being done on stderr.
        of_tasks: of public tasks: data_root, include, on_error, cache, image_padding, prompt_format, reference, coco_instances.

    Raises:
        MllmEfficientError: an argument that is unknown, has no effect, or that the model cannot run; before anything is answered.
    """
    public = is_public(tasks, suite)
    require_sources(suite=suite, tasks=tasks, data=data)
    require_whole(limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens)
    require_effect(
        public, data, of_tasks, categories=categories, split=split, turns=turns, corrupt=corrupt, against=against,
        max_new_tokens=max_new_tokens, image_range=unusual_range(image_range),
    )  # fmt: skip
    specs = [built(m) for m in many(methods)]
    how: dict[str, Any] = {"output_dir": None if output_dir is None else Path(output_dir), "progress": _progress(progress)}
    with lent(model, processor, seed) as loaded:
        if public:
            asked = task_options(suite, tasks, limit, batch_size, max_new_tokens, image_range, of_tasks, _progress(progress))
            return _on_tasks(loaded, asked, specs, how)
        from .harness import with_baselines

        chosen = with_baselines([runnable("none"), *specs])
        how |= {"against": named_among(chosen, against), "limit": limit}
        require_runnable(loaded, chosen)
        if data is None:
            from .builtin.corruptions import corruptions_of
            from .evaluate import BATCH, on_benchmark

            how |= {"split": one_of("split", or_usual(split, "test"), SPLITS), "turns": one_of("turns", or_usual(turns, 1), (1, 2))}
            how["corrupt"] = corruptions_of(listed(corrupt), how["turns"])
            return on_benchmark(loaded, chosen, suite=suite, categories=listed(categories), batch_size=batch_size or BATCH, **how)
        from .evaluate import DATA_BATCH, on_requests
        from .requests import read_requests

        requests = read_requests(Path(data), limit, image_range)
        how |= {"batch_size": batch_size or DATA_BATCH, "max_new_tokens": max_new_tokens}
        return on_requests(loaded, chosen, requests, Path(data), **how)


def _on_tasks(loaded: Loaded, asked: TaskOptions, methods: Sequence[Compressor], how: dict[str, Any]) -> Results:
    from .lmms.evaluate import on_tasks

    found = on_tasks(asked, [m.spec() for m in methods], loaded, settings=loaded.options, **how)
    if found is None:
        raise MllmEfficientError("this process is not the launcher's first: its results are there")
    return found


@named_as_arguments(*OF_TASKS)
def sweep(
    model: Any, processor: Any, methods: Methods, *, keep: float | Sequence[float] | None = None, tokens: Many | None = None,
    suite: str | None = None, tasks: Sequence[str] | None = None, data: str | Path | None = None,
    categories: Sequence[str] | None = None, split: str | None = None, limit: int | None = None, batch_size: int | None = None,
    max_new_tokens: int | None = None, image_range: str = "full", max_drop: float = 1.0, match: str | None = None, timed: bool = True,
    image_size: tuple[int, int] | None = None, text_tokens: int = 64, output_tokens: int = 32, repeats: int = 7, warmup: int = 1,
    output_dir: str | Path | None = None, seed: int = 0, progress: bool = False, **of_tasks: Any,
) -> Results:  # fmt: skip
    """Accuracy or agreement, FLOPs, latency and memory of methods x budgets, and the budget to take.

    Args:
        methods: with a budget, or without one ("divprune") to be tried at each of ``keep`` (fractions) or ``tokens`` (counts).
        suite, tasks, data, categories, split, limit, batch_size, max_new_tokens, image_range, of_tasks: as ``evaluate`` takes them.
        max_drop: points that may be lost at most. match: "flops" solves budgets to the prefill FLOPs of a pure token drop.
        timed: whether latency and memory are measured, of one prompt of ``image_size`` (width, height), ``text_tokens`` and
            ``output_tokens``, ``repeats`` times after ``warmup`` rounds.
        output_dir: keeps answers, timings and the report, and resumes; without one nothing is kept but what is returned.

    Returns: ``Results``, whose ``meta["recommendation"]`` has the method to take, its ``line`` in words.
    Raises ``MllmEfficientError`` as ``evaluate`` does.
    """
    from mllm_efficient.measure.bench import Settings
    from mllm_efficient.measure.workload import Workload

    from .sweeping import Plan, asker
    from .sweeping import sweep as run

    require_sources(suite=suite, tasks=tasks, data=data)
    public = is_public(tasks, suite)
    require_whole(limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, repeats=repeats)
    require_whole(0, warmup=warmup)
    require_effect(
        public, data, of_tasks, categories=categories, split=split, max_new_tokens=max_new_tokens, image_range=unusual_range(image_range)
    )
    specs = [m if isinstance(m, str) else built(m).spec() for m in many(methods)]
    one_of("match", match, (None, "flops"))
    wanted = task_options(suite, tasks, limit, batch_size, max_new_tokens, image_range, of_tasks, _progress(progress)) if public else None
    ask = asker(
        wanted, None if data is None else Path(data), suite=suite, categories=listed(categories),
        split=one_of("split", or_usual(split, "test"), SPLITS), limit=limit, batch_size=batch_size,
        max_new_tokens=max_new_tokens, image_range=image_range, progress=_progress(progress),
    )  # fmt: skip
    settings = Settings(Workload(image_size, 1, text_tokens, output_tokens), (1,), repeats, warmup, seed)
    head = {"command": None, "limit": limit, "max_drop": max_drop}
    plan = Plan(specs, budgets(keep, tokens), ask, settings, timed, match, head)
    with lent(model, processor, seed) as loaded, contextlib.ExitStack() as kept:
        folder = output_dir or kept.enter_context(tempfile.TemporaryDirectory())
        return run(loaded, plan, Path(folder), _progress(progress))


@named_as_arguments()
def bench(
    model: Any, processor: Any, methods: Methods = (), *, batch_size: Many = 1, image_size: tuple[int, int] | None = None,
    images: int = 1, text_tokens: int = 64, output_tokens: int = 32, repeats: int = 10, warmup: int = 2, max_batch: int | None = None,
    seed: int = 0, progress: bool = False,
) -> Results:  # fmt: skip
    """Latency by phase, throughput and memory of methods, the uncompressed model and a free choice of tokens beside them.

    Args:
        batch_size: one or several. image_size: (width, height) in pixels; None is what the model takes. images: of a prompt.
        text_tokens: of the prompt beside its images'. output_tokens: generated, neither more nor fewer.
        max_batch: searches the largest batch that fits, up to this one (CUDA).

    Raises ``MllmEfficientError`` for what the model cannot run, before anything is timed.
    """
    from mllm_efficient.measure.bench import Settings
    from mllm_efficient.measure.workload import Workload

    from .timings import bench_of

    chosen = [built(m) for m in many(methods)]
    require_whole(repeats=repeats, max_batch=max_batch)
    require_whole(0, warmup=warmup)
    sizes = tuple(dict.fromkeys(several("batch_size", batch_size, 1)))
    settings = Settings(Workload(image_size, images, text_tokens, output_tokens), sizes, repeats, warmup, seed, max_batch)
    with lent(model, processor, seed) as loaded:
        require_runnable(loaded, chosen)
        return bench_of(loaded, chosen, settings, progress=_progress(progress))


@named_as_arguments()
def flops(
    model: Any = BUILTIN, methods: Methods = (), *, text_tokens: Many = 64, visual_tokens: Many | None = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None, images: int = 1, new_tokens: int = 0, batch_size: int = 1,
    convention: str = "exact", processor: Any = None,
) -> Results:  # fmt: skip
    """What methods cost without running anything: FLOPs by phase, the ratio to no compression, the size of the KV cache.

    Args:
        model: a shape such as "llava-1.5-7b", a folder, a hub id, "builtin"; or a model of transformers, whose ``processor`` may be given.
        text_tokens, visual_tokens, image_size: of a prompt; lists zip to several prompts, of which rows are means.
        convention: "exact", or a paper's: "divprune", "sparsevlm".

    Raises ``MllmEfficientError`` for a model or a method whose FLOPs are not known.
    """
    from mllm_efficient.loading.processor import image_settings
    from mllm_efficient.measure.shapes import load_shape, shape_of

    from .costs import Prompts, flops_of, zipped

    chosen = [built(m) for m in many(methods)]
    require_whole(images=images, batch_size=batch_size)
    require_whole(0, new_tokens=new_tokens)
    if isinstance(model, str | Path):
        shape = load_shape(str(model))
    else:
        shape = shape_of(model.config, _name(model), None if processor is None else image_settings(processor))
    sizes: Any = image_size if image_size is None or isinstance(image_size[0], Sequence) else [image_size]
    visuals = None if visual_tokens is None else several("visual_tokens", visual_tokens, 1)
    pairs = zipped(several("text_tokens", text_tokens, 0), visuals, sizes)
    prompts = Prompts(pairs, images, new_tokens, batch_size, convention)
    return flops_of(shape, chosen, prompts, settings=ModelOptions(shape.name))


# ------------------------------------------------------------------------------------------------ what they share


def built(method: Method) -> Compressor:
    """A method that this version runs. Raises ``MllmEfficientError`` for any other."""
    return runnable(method)


@contextlib.contextmanager
def lent(model: Any, processor: Any, seed: int = 0) -> Iterator[Loaded]:
    """The model as commands have a loaded one, in eval mode inside. Raises for a wrapped one and for what is no model."""
    from mllm_efficient.apply.wrap import is_wrapped

    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise MllmEfficientError(f"{type(model).__name__} is no model of transformers: me.builtin() and me.from_pretrained() give one")
    if processor is None:
        raise MllmEfficientError("the processor is missing: give what AutoProcessor.from_pretrained() makes for the model")
    if is_wrapped(model):
        raise MllmEfficientError("the model is wrapped, and methods are compared on the model as it came: me.unwrap(model) first")
    modes = [(module, module.training) for module in model.modules()]  # a model may have parts in one and parts in the other
    model.eval()
    try:
        yield Loaded(model, processor, ModelOptions(_name(model), seed=seed), in_memory=True)
    finally:
        for module, training in modes:
            module.training = training


def _name(model: Any) -> str:
    """An embedded model's name, the folder or hub id that a model came from, or its class."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return model_name(name)


def require_runnable(loaded: Loaded, methods: Sequence[Compressor]) -> list[str]:
    """What each method keeps, in words. Raises for one that the model cannot run."""
    from mllm_efficient.apply.plan import check, describe
    from mllm_efficient.loading.models import require_supported
    from mllm_efficient.trained.folder import located

    adapter, said = require_supported(loaded).with_settings(loaded.picture_settings), []
    for method in methods:
        check(adapter, method)
        if method.installs is not None:
            located(adapter, method.installs)
        said.append(describe(method, adapter.usual(), adapter))
    return said


def named_among(chosen: Sequence[Compressor], against: Method | None) -> str | None:
    """The specification of a method of a run. Raises where it is none of them."""
    if against is None:
        return None
    other = built(against).spec()
    if other not in [m.spec() for m in chosen]:
        raise MllmEfficientError(f"--against {other} is not among the methods of this run: add --method {other}")
    return other


def task_options(
    suite: str | None, tasks: Sequence[str] | None, limit: int | None, batch_size: int | None, max_new_tokens: int | None,
    image_range: str, more: dict[str, Any], progress: Progress,
) -> TaskOptions:  # fmt: skip
    """What public tasks are asked, by name or by the name of a suite."""
    from .lmms.evaluate import even, task_names
    from .lmms.run import TaskOptions

    unknown = sorted(set(more) - set(OF_TASKS))
    if unknown:
        raise BadSettingError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0], OF_TASKS)}")
    names, usual = task_names(listed(tasks), suite)
    paths: dict[str, Any] = {name: Path(more.pop(name)) for name in ("data_root", "cache", "coco_instances") if more.get(name) is not None}
    return TaskOptions(
        names, even(names, limit or usual, suite, progress), batch_size or 1, max_new_tokens=max_new_tokens, image_range=image_range,
        **paths, **more,
    )  # fmt: skip


def _progress(shown: bool) -> Progress:
    return Progress(quiet=not shown)
