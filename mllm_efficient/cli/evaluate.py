"""``mllm-efficient eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from ..models import ModelOptions


def evaluate(
    model: options.Model = "builtin",
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="builtin (the default): the embedded benchmark.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Your own requests, a JSON object a line: images, prompt, answer.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="test (the default), or val for tuning.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Number of questions, round-robin over categories.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Questions at once; 32 if not given.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="With --data; 64 if not given.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="A method of this run to compare each row with.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Keeps answers and results here; resumes.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    attn_implementation: options.Attention = None,
    quantization: options.Quantization = None,
    revision: options.Revision = None,
    seed: options.Seed = 0,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
    imports: options.Import = None,
) -> int:
    """Accuracy of methods, the uncompressed baseline first, with paired intervals; or agreement on your own requests."""
    import json as json_module

    options.import_files(imports)
    if data is not None:
        for name, value in (("--suite", suite), ("--split", split), ("--batch-size", batch_size), ("--against", against)):
            if value is not None:
                raise MllmEfficientError(f"{name} has no effect with --data, whose requests are asked one by one: leave it out")
        settings = _settings(model, device, dtype, device_map, attn_implementation, quantization, revision, seed, trust_remote_code)
        return _agreement(data, method, settings, limit, max_new_tokens or 64, output_dir, json)
    if max_new_tokens is not None:
        raise MllmEfficientError("--max-new-tokens has no effect on the embedded benchmark, whose answers are words: leave it out")
    suite, split, batch_size = suite or "builtin", split or "test", batch_size or 32
    if suite != "builtin":
        raise MllmEfficientError(f"unknown suite {suite!r}: this version has builtin")
    if split not in ("test", "val"):
        raise MllmEfficientError(f"unknown split {split!r}: test, or val for tuning")
    chosen = [options.one_method("none"), *(options.one_method(m) for m in method or ())]
    chosen = list(dict.fromkeys(chosen))
    other = options.one_method(against).spec() if against else None
    if other is not None and other not in [m.spec() for m in chosen]:
        raise MllmEfficientError(f"--against {against} is not among the methods of this run: add --method {against}")

    from tqdm import tqdm

    from ..eval.builtin.questions import CATEGORIES
    from ..eval.builtin.suite import samples
    from ..eval.runner import Run
    from ..eval.table import rows_of, text_table
    from ..models import environment, load

    loaded = load(_settings(model, device, dtype, device_map, attn_implementation, quantization, revision, seed, trust_remote_code))
    options.announce(loaded, chosen)
    questions = samples(split, limit)
    run = Run(loaded, questions, chosen, batch_size=batch_size, output_dir=output_dir)
    options.say(f"{len(questions)} questions x {len(run.arms)} arms (with the no-image floor)")
    with tqdm(total=run.total, unit="answer", mininterval=1, disable=None) as bar:
        run.progress = bar.update
        records = run.answer_all()
    rows = rows_of(records, chosen, CATEGORIES, against=other, seed=seed)
    meta = {
        **environment(loaded), "suite": suite, "split": split, "questions": len(questions),
        "images": len({s.image for s in questions}), "batch_size": batch_size, "limit": limit,
        "methods": [m.to_dict() for m in chosen], "interval": "95%, 2000 paired resamples of images",
    }  # fmt: skip
    if output_dir is not None:
        (output_dir / "results.json").write_text(json_module.dumps({"rows": rows, "meta": meta}, indent=1) + "\n")
    failed = [r for r in records if r["error"] is not None]
    for record in failed[:5]:
        options.say(f"failed: {record['method']} on {record['id']}: {record['error']}")
    if json:
        options.print_json(rows, meta)
    else:
        options.print_table(*text_table(rows, CATEGORIES))
        print("Scores are percent right; 'macro' is the unweighted mean of the categories; 'in region' is the share of kept")
        print("tokens on what the question is about. Offline self-test on a tiny model, not evidence about 7B models.")
    if failed:
        options.say(f"{len(failed)} of {len(records)} answers failed")
        return 1
    return 0


def _settings(*values: Any) -> ModelOptions:
    from ..models import ModelOptions

    return ModelOptions(*values)


def _agreement(
    data: Path,
    method: list[str] | None,
    settings: ModelOptions,
    limit: int | None,
    max_new_tokens: int,
    output_dir: Path | None,
    json: bool,
) -> int:
    """``eval --data``: a user's own requests."""
    import json as json_module

    from tqdm import tqdm

    from ..eval.agreement import WORST, Agreement, agreement_rows, agreement_table, worst
    from ..eval.requests import read_requests
    from ..models import environment, load

    chosen = list(dict.fromkeys([options.one_method("none"), *(options.one_method(m) for m in method or ())]))
    requests = read_requests(data, limit)
    loaded = load(settings)
    options.announce(loaded, chosen)
    run = Agreement(loaded, requests, chosen, max_new_tokens, output_dir)
    options.say(f"{len(requests)} requests x {len(chosen)} methods")
    with tqdm(total=run.total, unit="answer", mininterval=1, disable=None) as bar:
        run.progress = bar.update
        records = run.answer_all()
    rows, far = agreement_rows(records, chosen, settings.seed), worst(records)
    meta = {
        **environment(loaded), "suite": "data", "data": str(data), "requests": len(requests), "limit": limit,
        "max_new_tokens": max_new_tokens, "methods": [m.to_dict() for m in chosen], "interval": "95%, 2000 paired resamples of requests",
        "worst": far,
    }  # fmt: skip
    if output_dir is not None:
        (output_dir / "results.json").write_text(json_module.dumps({"rows": rows, "meta": meta}, indent=1) + "\n")
    failed = [r for r in records if r["error"] is not None]
    for record in failed[:5]:
        options.say(f"failed: {record['method']} on {record['id']}: {record['error']}")
    if json:
        options.print_json(rows, meta)
    else:
        options.print_table(*agreement_table(rows))
        print("Agreement with the uncompressed model's answers. KL: of the next-token distributions along its answer, in nats;")
        print("'first other token' is the mean place of the first difference among the answers that differ.")
        if far:
            print(f"\nFarthest from the uncompressed model (of the worst {min(len(far), WORST)}, all in results.json with --output-dir):")
            lines = [[r["method"], r["id"], f"{r['kl']:.3f}", _short(r["baseline_answer"]), _short(r["answer"])] for r in far[:5]]
            options.print_table(["method", "request", "KL", "uncompressed", "compressed"], lines, left=5)
    if failed:
        options.say(f"{len(failed)} of {len(records)} answers failed")
        return 1
    return 0


def _short(text: str, length: int = 48) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
