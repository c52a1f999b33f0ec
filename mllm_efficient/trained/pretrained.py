"""Loads what a wrapped model saved (``saving`` says what that is), wrapped as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..apply.wrap import wrap
from ..errors import MllmEfficientError, UnsupportedModelError
from .files import COMPRESSION, DELTA_KEYS, PART_KEYS, WEIGHTS, read_compression
from .relocated import method_in
from .saving import PROCESSOR_FILES, processors

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(where: str | Path, *, logits: str | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """A model saved while it was wrapped, wrapped as it was, and its processor: ``model, processor = me.from_pretrained(DIR)``.

    Args:
        where: the folder, or a hub id. logits: as ``wrap`` takes it; None is as it was.
        kwargs: what transformers takes: ``dtype``, ``device_map``, ``revision``, ``token`` ...

    Returns: the model in eval mode, and the processor, or None (with a warning) where the folder has none.

    Raises:
        MllmEfficientError: no ``compression.json`` there; UnsupportedModelError: another family.
    """
    from transformers import AutoProcessor

    local = Path(where).expanduser().absolute()
    where = str(local if local.is_dir() else where)
    hub = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
    remote = {"trust_remote_code": kwargs.pop("trust_remote_code", False)}
    folder = _described(where, hub)
    about = read_compression(folder)
    model = _base(where, {**kwargs, **remote}, {**hub, **remote})
    if about.get("trained"):
        _file(where, WEIGHTS, hub)
    wrap(model, method_in(folder), logits=logits or about.get("logits", "short"))
    if not any((folder / name).is_file() or _file(where, name, hub, missing_is_none=True) for name in PROCESSOR_FILES):
        import warnings

        warnings.warn(f"{where} has no processor: processor.save_pretrained puts it there", stacklevel=2)
        return model, None
    processor = AutoProcessor.from_pretrained(where, **hub, **remote)
    processors[model] = processor
    return model, processor


def _described(where: str, hub: dict[str, Any]) -> Path:
    """The folder on this machine that has a saved model's ``compression.json``."""
    found = _file(where, COMPRESSION, hub, missing_is_none=True)
    if found is None:
        raise MllmEfficientError(
            f"{where} has no {COMPRESSION}: it was not saved from a wrapped model, so load it with transformers and wrap it"
        )
    return found.parent


def _file(where: str, name: str, hub: dict[str, Any], missing_is_none: bool = False) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(where, name, **hub)
    except OSError as error:
        if missing_is_none:
            return None
        raise MllmEfficientError(f"{where}: {str(error).splitlines()[0]}") from error
    return None if found is None else Path(found)


def _base(where: str, kwargs: dict[str, Any], common: dict[str, Any]) -> Any:
    """The model without its method. What was trained with that is not reported as unexpected."""
    import transformers

    from ..patches import advice_on, is_supported

    config = transformers.AutoConfig.from_pretrained(where, **common)
    names = config.architectures or []
    if not is_supported(names, config.model_type):
        raise UnsupportedModelError(
            f"{where} is a {', '.join(names)}, which is not supported{advice_on(names[0] if names else '', config.model_type)}"
        )
    known = [name for name in names if hasattr(transformers, name)]
    if not known:
        raise UnsupportedModelError(f"{where}: config.json names no class of transformers among its architectures")
    cls = getattr(transformers, known[0])
    own = [f"^{keys}".replace(".", r"\.") for keys in (PART_KEYS, DELTA_KEYS)]
    also = list(cls._keys_to_ignore_on_load_unexpected or [])
    quiet: Any = type(cls.__name__, (cls,), {"__module__": cls.__module__, "_keys_to_ignore_on_load_unexpected": [*also, *own]})
    model = quiet.from_pretrained(where, **kwargs)
    model.__class__ = cls
    return model
