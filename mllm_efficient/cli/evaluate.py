"""``mllm-efficient eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options
from .answering import answered, failures

if TYPE_CHECKING:
    from ..compressors.base import Compressor
    from ..loading.models import ModelOptions

BATCH, DATA_BATCH = 32, 8
AGREEMENT = """\
'same answer', 'same words': percent of requests answered as by the uncompressed model, to the letter and apart from
case, punctuation, articles and numbers spelled out; 'first other token': where different answers part, on average; 'KL':
of the next token along the uncompressed model's answer; 'right': percent of the requests that have an answer."""


@options.of_model
def evaluate(
    *,
    settings: Any,
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="builtin (the default), builtin-hard: embedded benchmarks; or public ones: divprune-paper, cdpruner-paper, ocr, quick.",
        ),
    ] = None,
    categories: options.Categories = None,
    tasks: options.Tasks = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Your own requests, a JSON object a line: images, prompt or messages, answer.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="test (the default), or val for tuning.")] = None,
    turns: Annotated[
        int, typer.Option("--turns", min=1, max=2, help="2: every question also as the second of a conversation about its image.")
    ] = 1,
    limit: options.Limit = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help=f"Default {BATCH}; with --data {DATA_BATCH}; with --tasks 1.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    data_root: options.DataRoot = None,
    coco_instances: options.CocoInstances = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="With tasks: a folder with task YAML of your own. Repeatable.")
    ] = None,
    on_error: Annotated[
        str | None, typer.Option("--on-error", help="With tasks: record (the default, a failed sample is wrong) or raise (stop).")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="With tasks: a folder of answers for several runs; default the output folder.")
    ] = None,
    image_padding: options.ImagePadding = None,
    image_range: options.ImageRange = "full",
    prompt_format: options.PromptFormat = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="With tasks: published numbers beside ours: divprune-table1.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            "--server", help="With tasks, instead of --model: [NAME=]URL of an OpenAI-compatible server, the baseline first. Repeatable."
        ),
    ] = None,
    server_model: Annotated[
        str | None, typer.Option("--server-model", help="What the servers call the model, if they have several.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="A method of this run to compare each row with.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Keeps answers and results here; resumes.")] = None,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Accuracy of methods, the uncompressed baseline first, with paired intervals and the no-image floor; on public benchmarks
    with --tasks; or, with --data, how far answers to your own requests stay those of the uncompressed model."""
    options.import_files(imports)
    public = options.is_public(tasks, suite)
    check_tasks_options(
        public,
        {
            "--data-root": data_root, "--coco-instances": coco_instances, "--include-path": include_path, "--on-error": on_error,
            "--cache": cache, "--image-padding": image_padding, "--prompt-format": prompt_format, "--reference": reference,
            "--server": server, "--server-model": server_model,
        },
        {"--data": data, "--split": split, "--categories": categories, "--against": against, "--turns": turns if turns > 1 else None},
    )  # fmt: skip
    if public:
        from .launching import check_launch

        check_launch(distributed_on_cpu=True)

        from ..eval.lmms.run import TaskOptions
        from .tasks import evaluate_tasks, even, task_names

        names, usual = task_names(tasks, suite)
        count = even(names, limit or usual, suite)
        asked = TaskOptions(
            names, count, batch_size or 1, data_root, tuple(include_path or ()), on_error or "record", cache, image_padding,
            prompt_format or "template", max_new_tokens, reference, tuple(server or ()), server_model, image_range, coco_instances,
        )  # fmt: skip
        return evaluate_tasks(settings, method or (), asked, output_dir, json)
    from ..eval.harness import with_baselines

    chosen = with_baselines([options.one_method("none"), *(options.one_method(m) for m in method or ())])
    other = options.one_method(against).spec() if against else None
    if other is not None and other not in [m.spec() for m in chosen]:
        raise MllmEfficientError(f"--against {against} is not among the methods of this run: add --method {against}")

    check_source(data, suite, split, max_new_tokens, turns, categories)
    if data is None and image_range != "full":
        raise MllmEfficientError("--image-range has no effect on the embedded benchmark, whose pictures have 8 bits: leave it out")

    if data is not None:
        return _data(data, settings, chosen, other, limit, batch_size or DATA_BATCH, max_new_tokens, output_dir, json, image_range)
    return _builtin(settings, chosen, other, suite, categories, split or "test", turns, limit, batch_size or BATCH, output_dir, json)


def check_tasks_options(public: bool, of_tasks: dict[str, Any], of_others: dict[str, Any]) -> None:
    """Raises for options of public benchmarks without one, and for options of the others beside one."""
    from ..eval.lmms.asking import FORMATS, PADDINGS

    for name, value in (of_others if public else of_tasks).items():
        if value is not None:
            raise MllmEfficientError(
                f"{name} has no effect {'with --tasks or a public suite' if public else 'without --tasks or a public suite'}: leave it out"
            )
    for name, among in (("--on-error", ("record", "raise")), ("--image-padding", PADDINGS), ("--prompt-format", FORMATS)):
        if of_tasks.get(name) not in (None, *among):
            raise MllmEfficientError(f"{name} {of_tasks[name]!r} is not one of {', '.join(among)}")
    if of_tasks.get("--server-model") is not None and not of_tasks["--server"]:
        raise MllmEfficientError("--server-model has no effect without --server: leave it out")


def check_source(
    data: Path | None, suite: str | None, split: str | None, max_new_tokens: int | None, turns: int = 1, categories: str | None = None
) -> None:  # fmt: skip
    """Raises for a benchmark's options beside ``--data``, for ``--data``'s without it, and for unknown values."""
    if data is not None:
        for name, given, instead in (
            ("--suite", suite is not None, "leave it out"), ("--split", split is not None, "leave it out"),
            ("--categories", categories is not None, "leave it out"),
            ("--turns", turns > 1, "put earlier turns into messages"),
        ):  # fmt: skip
            if given:
                raise MllmEfficientError(f"{name} has no effect with --data: {instead}")
        return
    if split not in (None, "test", "val"):
        raise MllmEfficientError(f"unknown split {split!r}: test, or val for tuning")
    if max_new_tokens is not None:
        raise MllmEfficientError("--max-new-tokens has no effect on the embedded benchmark, whose answers are words: leave it out")


def _builtin(
    settings: ModelOptions, chosen: Sequence[Compressor], against: str | None, name: str | None, asked: str | None, split: str,
    turns: int, limit: int | None, batch_size: int, output_dir: Path | None, json: bool,
) -> int:  # fmt: skip
    """An embedded benchmark. name: its own; asked: categories."""
    from ..embedded import is_embedded
    from ..eval.builtin.suites import embedded_suite
    from ..eval.record.samples import fingerprint_of
    from ..eval.runner import Run
    from ..eval.table import rows_of, text_table
    from ..loading.models import load

    loaded = load(settings)
    options.announce(loaded, chosen)
    suite = embedded_suite(name)
    categories = options.categories_of(suite, asked, loaded)
    questions = suite.samples(split, limit, categories)
    run = Run(loaded, questions, chosen, batch_size=batch_size, output_dir=output_dir, turns=turns, suite=suite)
    paired = len(run.asked) - len(questions)
    more = f", {paired} of them also as a second turn" if turns > 1 else ""
    options.say(f"{len(questions)} questions x {len(run.arms)} arms (with the no-image floor){more}")
    records = answered(run)
    rows = rows_of(records, chosen, categories, against=against, seed=settings.seed)
    meta = {
        **run.config, "split": split, "turns": turns, "questions": len(questions), "second_turns": paired,
        "questions_fingerprint": fingerprint_of({"ids": sorted(s.id for s in questions)}),
        "images": len({s.image for s in questions}), "batch_size": batch_size, "limit": limit,
        "methods": [m.to_dict() for m in chosen], "interval": "95%, 2000 paired resamples of images",
        **suite.blind(questions),
    }  # fmt: skip
    _finish(rows, meta, output_dir, json)
    if not json:
        options.print_table(*text_table(rows, categories))
        if "blind_floor" in meta:
            floors = ", ".join(f"{name} {f['floor']:.1f} (at most {f['upper']:.1f})" for name, f in meta["blind_floor"].items())
            print(f"Answers learnt without images score: {floors}.")
        if any(r.get("hard_n") is not None for r in rows):
            print("'hard': right of what none gets right and resize at the same budget wrong; 'broken': wrong of what both get right.")
        print("Scores are percent right; 'macro' is the unweighted mean of the categories; 'in region' is the share of kept")
        last = "tokens on what the question is about; 'ECE', 'AURC': calibration of the answers' confidence, in percent (lower is better)."
        if turns > 1:
            print(f"{last} '2nd turn': the macro mean of the same questions asked second in a conversation, with the")
            last = "visual tokens that were chosen for the first question; none is then the uncompressed model in its second turn."
        print(f"{last} Offline self-test on a tiny model, not evidence about 7B models." if is_embedded(settings.model) else last)
    return failures(records)


def _data(
    data: Path, settings: ModelOptions, chosen: Sequence[Compressor], against: str | None, limit: int | None, batch_size: int,
    max_new_tokens: int | None, output_dir: Path | None, json: bool, image_range: str,
) -> int:  # fmt: skip
    """A user's own requests."""
    from ..eval.agreement_rows import agreement_rows, agreement_table, length_table, worst_table
    from ..eval.asked import OwnRequests
    from ..eval.requests import read_requests
    from ..loading.models import load

    requests = read_requests(data, limit, image_range)
    loaded = load(settings)
    options.announce(loaded, chosen)
    asked = OwnRequests(loaded, chosen, requests, data, batch_size, max_new_tokens, output_dir)
    options.say(asked.line)
    records = answered(asked.run)
    rows = agreement_rows(records, chosen, against=against, seed=settings.seed)
    methods = [m.to_dict() for m in chosen]
    meta = {**asked.run.config, "batch_size": batch_size, "limit": limit, "methods": methods, **asked.about(records)}
    _finish(rows, meta, output_dir, json)
    if not json:
        options.print_table(*agreement_table(rows))
        print(AGREEMENT)
        print_lengths(*length_table(rows))
        if meta["worst"]:
            print("\nFarthest from the uncompressed model (meta.worst in results.json and --json has more):")
            options.print_table(*worst_table(meta["worst"]), left=5)
    return failures(records)


def print_lengths(header: list[str], lines: list[list[str]]) -> None:
    """Agreement by the length of answers, where they are of several lengths."""
    if lines:
        print("\nSame words by the tokens of the uncompressed model's answer, its end among them [95%]:")
        options.print_table(header, lines)


def _finish(rows: list[dict[str, Any]], meta: dict[str, Any], output_dir: Path | None, json: bool) -> None:
    if output_dir is not None:
        from ..eval.record.bench_file import write_json

        write_json(output_dir / "results.json", {"rows": rows, "meta": meta})
    if json:
        options.print_json(rows, meta)
