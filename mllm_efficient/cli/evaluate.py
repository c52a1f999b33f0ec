"""``mllm-efficient eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MllmEfficientError
from . import options


def evaluate(
    model: options.Model = "builtin",
    method: Annotated[list[str] | None, typer.Option("--method", help="Specification or YAML file. Repeatable.")] = None,
    suite: Annotated[str, typer.Option("--suite", help="builtin: the embedded benchmark.")] = "builtin",
    split: Annotated[str, typer.Option("--split", help="test, or val for tuning.")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Number of questions, round-robin over categories.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
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
    """Accuracy of methods, the uncompressed baseline first, with paired intervals and the no-image floor."""
    import json as json_module

    options.import_files(imports)
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
    from ..models import ModelOptions, environment, load

    settings = ModelOptions(
        model, device, dtype, device_map, attn_implementation, quantization, revision, seed, trust_remote_code
    )  # fmt: skip
    loaded = load(settings)
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
