"""What every ``--help`` has: options in groups, examples, completion of methods and models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer

GROUPS = {
    "What is compressed": ("method", "keep", "tokens", "match", "allowed_tokens", "imports"),
    "Model": (
        "model", "random_weights", "adapter", "revision", "trust_remote_code", "quantization", "quantized", "dtype", "device", "device_map",
        "attn_implementation", "attention", "threads", "backend", "server", "server_model", "serve_args",
    ),
    "Pictures and prompts": (
        "image", "video", "frames", "prompt", "image_range", "image_padding", "prompt_format", "min_pixels", "max_pixels",
        "processor_kwargs", "max_new_tokens",
    ),
    "What is asked": (
        "suite", "tasks", "data", "categories", "split", "turns", "corrupt", "limit", "batch_size", "data_root", "coco_instances",
        "include_path", "on_error", "cache", "reference", "against", "max_drop", "run", "budget", "explore", "labelled",
    ),
    "What is timed or counted": (
        "image_size", "images", "text_tokens", "visual_tokens", "new_tokens", "output_tokens", "repeats", "warmup", "no_bench", "max_batch",
        "max_batch_limit", "layers", "overhead", "selection", "concurrency", "requests", "convention", "measured",
    ),
    "Training": ("config", "dry_run", "overrides"),
    "Output": ("output", "output_dir", "columns", "json", "format", "caption", "label", "dim", "size", "seed", "every", "port"),
}  # fmt: skip
EXAMPLES = {
    "methods": ("mllm-efficient methods", "mllm-efficient methods divprune", "mllm-efficient methods --columns kind,paper"),
    "generate": (
        "mllm-efficient generate --image photo.jpg --prompt 'What is on the table?' --method divprune:keep=0.25",
        "mllm-efficient generate --model llava-hf/llava-1.5-7b-hf --image a.jpg --image b.jpg --prompt 'What changed?'",
    ),
    "show": (
        "mllm-efficient show --image photo.jpg --method divprune:keep=0.1 --method tome:keep=0.1 --output kept.png",
        "mllm-efficient show --image photo.jpg --method cdpruner:keep=0.1 --prompt 'What colour is the car?' --output kept.pdf",
    ),
    "eval": (
        "mllm-efficient eval --method divprune:keep=0.25 --method random:keep=0.25 --limit 500",
        "mllm-efficient eval --model llava-hf/llava-1.5-7b-hf --data requests.jsonl --method divprune:tokens=64",
        "mllm-efficient eval --model llava-hf/llava-1.5-7b-hf --tasks pope,gqa --method divprune:tokens=64 --output-dir run",
    ),
    "bench": (
        "mllm-efficient bench --method divprune:keep=0.1 --batch-size 1,8",
        "mllm-efficient bench --model llava-1.5-7b --random-weights --method divprune:tokens=64 --output-tokens 128",
    ),
    "flops": (
        "mllm-efficient flops --model llava-1.5-7b --method divprune:keep=0.1 --method fastv:layer=2,keep=0.5",
        "mllm-efficient flops --model qwen2.5-vl-7b --image-size 1280x960 --method divprune:keep=0.25 --new-tokens 128",
    ),
    "sweep": (
        "mllm-efficient sweep --method divprune --method fastv --keep 0.5,0.25,0.1 --output-dir sweep",
        "mllm-efficient sweep --data requests.jsonl --method divprune --tokens 192,64 --max-drop 2 --output-dir sweep",
    ),
    "report": (
        "mllm-efficient report sweep --format html --output report.html",
        "mllm-efficient report run1 run2 --format latex --columns tokens,score,FLOPs --caption 'Our runs.' --label tab:runs",
    ),
    "train": ("mllm-efficient train --config tokenflex_builtin", "mllm-efficient train --config recipe.yaml seed=1 --dry-run"),
    "export": (
        "mllm-efficient export --model llava-hf/llava-1.5-7b-hf --method divprune:tokens=64 --output-dir served",
        "vllm serve served",
    ),
    "demo": ("mllm-efficient demo", "mllm-efficient demo --model llava-hf/llava-1.5-7b-hf --port 8000"),
    "doctor": ("mllm-efficient doctor", "mllm-efficient doctor --all --json"),
    "choose": (
        "mllm-efficient choose --data requests.jsonl --run run --budget 50 --output chosen.jsonl",
        "mllm-efficient choose --labelled chosen.jsonl",
    ),
}  # fmt: skip
EVERYWHERE = "Every command takes --quiet (no lines about what is being done) and --traceback (where in the code an error comes from)."


def in_groups(command: Callable) -> Callable:
    """The command, its options under the titles of ``GROUPS``; ``method`` and ``model`` complete at the shell's prompt."""
    group_of = {name: title for title, names in GROUPS.items() for name in names}
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for p in signature.parameters.values():
        if get_origin(p.annotation) is Annotated:
            type_, info = get_args(p.annotation)
            info = copy.copy(info)
            info.rich_help_panel = group_of.get(p.name)
            info.autocompletion = {"method": _methods, "name": _methods, "model": _models}.get(p.name)
            p = p.replace(annotation=Annotated[type_, info])
        parameters.append(p)

    def run(*args: Any, **given: Any) -> Any:
        return command(*args, **given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": signature.return_annotation}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def epilog(name: str) -> str:
    """The examples of a command, a paragraph each: that is how typer keeps their lines."""
    return "\n\n".join(["Examples:", *EXAMPLES[name], EVERYWHERE])


def _methods(incomplete: str) -> list[str]:
    """Names of methods, or of parameters after the colon."""
    from ..compressors.base import parameters
    from ..registry import BUILTIN, get_method

    name, colon, rest = incomplete.partition(":")
    if not colon:
        return [method for method in BUILTIN if method.startswith(incomplete)]
    done, comma, last = rest.rpartition(",")
    known = parameters(get_method(name)) if name in BUILTIN else ()
    return [f"{name}:{done}{comma}{parameter}=" for parameter in known if parameter.startswith(last)]


def _models(incomplete: str) -> list[str]:
    from ..measure.shapes import shape_names

    return [name for name in ("builtin", *shape_names()) if name.startswith(incomplete)]


def add(app: typer.Typer, name: str, command: Callable) -> None:
    """The command under a name."""
    app.command(name, epilog=epilog(name))(in_groups(command))
