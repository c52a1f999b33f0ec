"""The sizes of a model that its cost depends on, read from a configuration. No weights, no torch.

A shape is one of ``configs/models/*.yaml``, the config.json of a folder, or a transformers config. Sizes that a file
leaves out are filled in by transformers, which is then imported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..embedded import FOLDERS, model_source
from ..errors import MllmEfficientError, UnsupportedModelError, did_you_mean
from ..parsing import read_json
from ..patches.pictures import FILES, merged, read_object, read_settings, settings_of
from ..patches.rules import FAMILIES, Rules, rules_class
from ..patches.sizes import Decoder, MissingSetting, Plain, ProjectorSize, Tower


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model. family: its ``model_type``; config: what the shape was read from, complete.

    processor: its image processor's settings, as ``patches.rules`` reads them; empty where nothing is known of one.
    """

    name: str
    family: str
    decoder: Decoder
    tower: Tower
    projector: ProjectorSize
    config: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vision(self) -> Mapping[str, Any]:
        return self.config["vision_config"]

    @functools.cached_property
    def rules(self) -> Rules:
        """What its family makes of images."""
        return rules_class(self.family)(self.name, Plain(self.config), self.processor)


@cache
def _shipped() -> dict[str, Path]:
    from importlib.resources import files

    folder = Path(str(files("mllm_efficient.configs") / "models"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shape_names() -> list[str]:
    """The names of the shipped shapes."""
    return list(_shipped())


def shape_config(name: str) -> dict[str, Any]:
    """The configuration of a shipped shape, as transformers' ``AutoConfig.for_model(**config)`` takes it."""
    import yaml

    return yaml.safe_load(_shipped()[name].read_text())


def load_shape(
    model: str, revision: str | None = None, trust_remote_code: bool = False, processor: Mapping[str, Any] | None = None
) -> ModelShape:
    """The shape of a shipped name, ``builtin``, a folder (one of an adapter is its base's) or a hub id, with its processor's settings.

    processor: settings on top of those, such as ``{"max_pixels": 1003520}``. Raises ``MllmEfficientError`` for a model that is
    not there and for settings without effect on its tokens, ``UnsupportedModelError`` for a model of another kind.
    """
    shape = _load(model, revision, trust_remote_code)
    shape.rules.require_counting(processor or {})
    return with_settings(shape, processor or {})


def with_settings(shape: ModelShape, given: Mapping[str, Any]) -> ModelShape:
    """The shape with settings of its image processor on top of those that it has."""
    for name in given:
        if name in shape.config:  # what the model's own config says of images too
            shape = replace(shape, config={**shape.config, name: given[name]})
    return replace(shape, processor=merged(shape.processor, given))


def _load(model: str, revision: str | None, trust_remote_code: bool) -> ModelShape:
    from ..loading.lora import base_of_folder, without_base

    given, model = model, base_of_folder(model) or model
    if model in _shipped():
        if revision or trust_remote_code:
            raise MllmEfficientError(f"{model} is a shipped shape: --revision and --trust-remote-code have no effect on it")
        return shape_of(shape_config(model), model)
    folder = Path(model_source(model)).expanduser()
    if folder.is_dir():
        if revision:
            raise MllmEfficientError(f"--revision has no effect on the folder {folder}: leave it out")
        try:
            config = read_json(folder / "config.json")
        except (OSError, ValueError) as error:
            raise MllmEfficientError(f"{folder}: no readable config.json ({error})") from None
        if not isinstance(config, dict):
            raise MllmEfficientError(f"{folder}/config.json is not a model configuration")
        return shape_of(config, model, read_settings(folder))
    away = without_base(given, weights=False)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        hint = did_you_mean(model, _shipped())
        raise MllmEfficientError(
            f"no shape or folder {model!r}{hint} (shapes: {', '.join(_shipped())}; or a folder, a hub id, {', '.join(FOLDERS)}){away}"
        )
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the libraries below raise without network, access or a readable file
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MllmEfficientError(f"cannot read the configuration of {model}: {reason}{away}") from error
    return shape_of(found, model, _of_hub(model, revision))


def _of_hub(model: str, revision: str | None) -> dict[str, Any]:
    """The processor's settings of a hub model."""
    from transformers.utils import cached_file

    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    paths = [cached_file(model, name, revision=revision, **missing) for name in FILES]
    return settings_of([{} if path is None else read_object(Path(path)) for path in paths])


def shape_of(config: Any, name: str = "model", processor: Mapping[str, Any] | None = None) -> ModelShape:
    """The shape of a transformers config or of a dict like its ``to_dict()``. processor: its image processor's settings."""
    plain = config if isinstance(config, Mapping) else config.to_dict()
    return replace(_shape_of(plain, name), processor=dict(processor or {}))


def _shape_of(plain: Mapping[str, Any], name: str) -> ModelShape:
    kind = plain.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"{name} is of type {kind}: FLOPs are known for {', '.join(FAMILIES)}")
    try:
        return _read(plain, name)
    except MissingSetting:
        plain = _completed(plain, name)
    try:
        return _read(plain, name)
    except MissingSetting as error:
        raise UnsupportedModelError(f"{name}: its configuration has no {error}") from None


def _completed(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what its file leaves to transformers' defaults."""
    from transformers import AutoConfig

    from ..patches import require_present

    require_present(config["model_type"])
    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as error:
        raise MllmEfficientError(f"{name}: not a configuration that transformers reads ({type(error).__name__}: {error})") from error


def _read(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape by the family's rules. Raises ``MissingSetting`` where they ask for what the configuration does not say."""
    for part in ("text_config", "vision_config"):
        if part not in config:
            raise MissingSetting(repr(part))
    rules = rules_class(config["model_type"])(name, Plain(config))
    shape = ModelShape(name, config["model_type"], rules.decoder_size, rules.tower_size, rules.projector_size, config)
    with contextlib.suppress(MllmEfficientError):  # of an image that this model cannot have; all settings are read
        rules.typical()
    return shape
