"""``mllm-efficient bench --server`` and ``--backend vllm``: servers under load."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError
from ..tables import Table
from . import options

if TYPE_CHECKING:
    from ..eval.results import Results
    from ..loading.models import ModelOptions

BACKENDS = ("transformers", "vllm")
OF_SERVERS = ("--server-model", "--concurrency", "--requests", "--serve-args")
NOT_FOR_BOTH = (
    "--batch-size", "--max-batch", "--max-batch-limit", "--quantized", "--overhead", "--selection", "--threads", "--device-map",
    "--attn-implementation", "--quantization", "--device", "--adapter", "--min-pixels", "--max-pixels", "--processor-kwargs",
)  # fmt: skip
NOT_FOR_SERVER = ("--random-weights", "--method", "--dtype", "--revision", "--trust-remote-code", "--serve-args")


def concurrency_of(text: str) -> tuple[int, ...]:
    """``"1,8,32"`` as numbers."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise MllmEfficientError(f"--concurrency {text!r} is not one or several whole numbers, such as 1,8,32")
    return tuple(dict.fromkeys(int(p) for p in parts))


def require_effect(given: Sequence[str], backend: str, servers: Sequence[str]) -> None:
    """Raises for options that have no effect with the ones that say what is measured. given: options that differ from their default."""
    if backend not in BACKENDS:
        raise MllmEfficientError(f"--backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if servers and backend != BACKENDS[0]:
        raise MllmEfficientError("--server measures servers that run already, and --backend vllm starts them: give one of the two")
    measured = "--server" if servers else "--backend vllm" if backend != BACKENDS[0] else ""
    wrong = [*NOT_FOR_BOTH, *(NOT_FOR_SERVER if servers else ("--server-model",))] if measured else list(OF_SERVERS)
    for name in given:
        if name in wrong:
            raise MllmEfficientError(f"{name} has no effect {f'with {measured}' if measured else 'without --server or --backend vllm'}")


def run_servers(
    settings: ModelOptions, methods: Sequence[Any], load: dict[str, Any], *, servers: Sequence[str], server_model: str | None,
    tokenizer: str | None, random_weights: bool, serve_args: str,
) -> Results:  # fmt: skip
    """Servers under load. load: what ``Load`` takes, its image size None for the one that the model takes."""
    from ..eval.results import BENCH, Results
    from ..measure.machine import busy, machine, versions
    from ..measure.serving import MEANING, Load, measure, runs, table, uncompressed
    from ..measure.timing import ORDER
    from ..patches.vllm.benchmark import require_vllm, tool

    version, about = require_vllm(), dict[str, Any]()
    with contextlib.ExitStack() as running:
        if servers:
            if load["image_size"] is None:
                raise MllmEfficientError("--server does not tell what pictures its model takes: give --image-size, such as 336x336")
            given, arms = Load(**load), _found(servers, server_model, tokenizer, load["image_size"], load["images"])
        else:
            from ..measure.launching import Launch, launched

            launch = Launch(
                settings, methods, random_weights=random_weights, image_size=load["image_size"], images=load["images"]
            )  # fmt: skip
            given = Load(**{**load, "image_size": launch.image_size})
            arms, about = running.enter_context(launched(launch, given, shlex.split(serve_args), options.say))
        ask, state = running.enter_context(tool()), machine()
        with options.progress().bar(runs(arms, given), "run") as bar:
            rows = measure(arms, given, ask, bar.update)
        after = machine()
    if warning := busy(state):
        options.warn(warning)
    for name in uncompressed(rows):
        options.warn(f"{name}: its prompts are as long as the baseline's, so it compresses nothing")
    failed = [f"{r['method']} at {r['concurrency']} requests at a time: {r['failed']}" for r in rows if r["failed"]]
    meta = {
        "model": server_model or (settings.model if not servers else ", ".join(dict.fromkeys(a.model for a in arms))),
        "weights": "the server's" if servers else "vLLM's dummy weights" if random_weights else "the model's",
        "measured_by": f"vllm bench serve {version}, openai-chat, random-mm", "backend": "server" if servers else "vllm",
        "workload": {
            "image_size": list(given.image_size), "images": given.images, "text_tokens": given.text_tokens,
            "output_tokens": given.output_tokens,
        },
        "concurrency": list(given.concurrency), "repeats": given.repeats, "warmup": given.warmup, "seed": given.seed,
        "order": f"servers {ORDER}; the same requests for all, new ones in every repeat",
        "caches": "the server's own settings" if servers else "off (prefix, images)",
        "methods": [m.to_dict() for m in methods], "urls": {a.name: a.url for a in arms} if servers else None, **about,
        "meaning": MEANING, "failed": failed, "versions": versions("torch", "transformers") | {"vllm": version},
        "machine": state, "machine_after": after,
    }  # fmt: skip
    note = (
        "Medians over repeats; p50 and p99 are over the requests of a run. 'prompt tokens' are a run's, as the server counts them. "
        f"{given.text_tokens} text tokens and {given.images} image(s) in, {given.output_tokens} tokens out; caches: {meta['caches']}."
    )
    return Results(BENCH, rows, meta, (Table(*table(rows), note=note),), tuple(f"failed: {line}" for line in failed))


def _found(servers: Sequence[str], model: str | None, tokenizer: str | None, image_size: tuple[int, int], images: int) -> list[Any]:
    """Arms of running servers, the first of which is the baseline."""
    import json

    from ..eval.lmms.server import server_cells
    from ..measure.probing import answer, visual_tokens
    from ..measure.serving import Served

    arms = []
    for cell in server_cells(servers, model):
        with answer(f"{cell.url.rstrip('/')}/models") as reply:
            about = next(m for m in json.load(reply)["data"] if m["id"] == cell.model)
        own, url = tokenizer or about.get("root") or cell.model, cell.url.rstrip("/").removesuffix("/v1")
        full, kept = visual_tokens(url, cell.model, image_size, images)
        arms.append(Served(name=cell.name, role=cell.role, url=url, model=cell.model, tokenizer=own, full=full, kept=kept))
    return arms
