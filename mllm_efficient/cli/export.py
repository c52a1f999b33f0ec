"""``mllm-efficient export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MllmEfficientError
from . import options


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
    print(f"vllm serve {output_dir}")
