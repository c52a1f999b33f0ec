"""``mllm-efficient eval --data --server``: a user's own requests to servers that run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError
from . import options

if TYPE_CHECKING:
    from ..eval.results import Results
    from ..loading.models import ModelOptions

OF_SERVERS = {
    "--method": "the server decides what it compresses: start one for each method and give --server NAME=URL for each",
    "--against": "every server is compared with the first",
}


def on_running(
    settings: ModelOptions, servers: Sequence[str], model: str | None, data: Path, given: Mapping[str, Any], limit: int | None,
    batch_size: int | None, max_new_tokens: int | None, output_dir: Path | None, image_range: str, turns: int,
) -> Results:  # fmt: skip
    """Agreement, latency and tokens. given: options that have no effect here. Raises ``MllmEfficientError`` for one that is set."""
    from ..eval.agreement import MAX_NEW_TOKENS
    from ..eval.evaluate import DATA_BATCH
    from ..eval.lmms.server import server_cells
    from ..eval.requests import read_requests
    from ..eval.served import on_servers
    from ..loading.models import ModelOptions

    own = settings != ModelOptions(seed=settings.seed)
    found = {**given, "--turns": turns > 1, "--model and how it is loaded": own}
    for name, value in found.items():
        if value:
            raise MllmEfficientError(f"{name} has no effect with --data and --server: {OF_SERVERS.get(name, 'leave it out')}")
    requests = read_requests(data, limit, image_range)
    cells = server_cells(servers, model)
    return on_servers(
        cells, requests, data, batch_size=batch_size or DATA_BATCH, max_new_tokens=max_new_tokens or MAX_NEW_TOKENS, limit=limit,
        output_dir=output_dir, seed=settings.seed, progress=options.progress(),
    )  # fmt: skip
