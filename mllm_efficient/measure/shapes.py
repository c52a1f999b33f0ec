"""The sizes of a model that its cost depends on, read from a configuration. No weights, no torch.

A shape is one of ``configs/models/*.yaml``, the config.json of a folder, or a transformers config. Sizes that a file
leaves out are filled in by transformers, which is then imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import MllmEfficientError, UnsupportedModelError, did_you_mean
from ..parsing import read_json
from ..patches.rules import FILES, merged, read_object, read_settings, require_counting, settings_of

FAMILIES = (
    "llava", "llava_next", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"
)  # fmt: skip
# Matrices in the MLP of a decoder layer: gate, up and down, or up and down.
MLP_MATRICES = {
    "llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "gemma": 3, "gemma2": 3, "phi3": 3,
    "qwen2_vl_text": 3, "qwen2_5_vl_text": 3, "qwen3_vl_text": 3, "phi": 2, "gpt_neox": 2,
}  # fmt: skip
SLIDING = ("mistral", "phi3", "gemma2")  # whose layers have a sliding window if the configuration names one
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Decoder:
    """A language model: ``layers`` alike, grouped heads, an MLP of two or three matrices, a head (tied or not).

    width: d, mlp_width: m, vocabulary: rows of the head. dtype: of the weights and the KV cache. windows: of each layer with
    sliding-window attention, the tokens that a token sees, itself among them; 0 for a layer that sees all. Empty: all do.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    mlp_matrices: int = 3
    dtype: str = "float16"
    windows: tuple[int, ...] = ()

    def cached(self, lengths: Sequence[int]) -> list[int]:
        """What is left in the cache of each layer after ``lengths[i]`` tokens: a window holds what its next token will see."""
        windows = self.windows or (0,) * len(lengths)
        return [min(n, window - 1) if window else n for n, window in zip(lengths, windows)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache of one token in one layer: a key and a value for every key-value head."""
        return 2 * self.kv_heads * self.head_dim * BYTES[self.dtype]


@dataclass(frozen=True)
class Tower:
    """A vision transformer over patches of ``patch`` x ``patch`` pixels.

    frames: pictures that one patch spans (Qwen-VL takes a still twice). class_token: one more token than patches.
    mlp_matrices: 2, or 3 with a gate. pooling_head: SigLIP's attention pooling, which runs although nothing uses it.
    window: side of an attention window in patches, 0 for none; ``full_layers`` attend without it.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    patch: int
    channels: int = 3
    frames: int = 1
    class_token: bool = False
    mlp_matrices: int = 2
    pooling_head: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Projector:
    """Two matrices from ``inputs`` over ``hidden`` to ``outputs`` per visual token; ``copies`` of it (deepstack)."""

    inputs: int
    hidden: int
    outputs: int
    copies: int = 1


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model. family: its ``model_type``; config: what the shape was read from, complete.

    processor: its image processor's settings, as ``patches.rules`` reads them; empty where nothing is known of one.
    """

    name: str
    family: str
    decoder: Decoder
    tower: Tower
    projector: Projector
    config: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vision(self) -> Mapping[str, Any]:
        return self.config["vision_config"]


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
    require_counting(shape.family, processor or {}, model)
    return with_settings(shape, processor or {})


def with_settings(shape: ModelShape, given: Mapping[str, Any]) -> ModelShape:
    """The shape with settings of its image processor on top of those that it has."""
    for name in given:
        if name in shape.config:  # what the model's own config says of pictures too
            shape = replace(shape, config={**shape.config, name: given[name]})
    return replace(shape, processor=merged(shape.processor, given))


def _load(model: str, revision: str | None, trust_remote_code: bool) -> ModelShape:
    from ..loading.lora import base_of_folder, without_base
    from ..loading.models import BUILTIN, builtin_folder

    given, model = model, base_of_folder(model) or model
    if model in _shipped():
        if revision or trust_remote_code:
            raise MllmEfficientError(f"{model} is a shipped shape: --revision and --trust-remote-code have no effect on it")
        return shape_of(shape_config(model), model)
    folder = builtin_folder() if model == BUILTIN else Path(model).expanduser()
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
            f"no shape or folder {model!r}{hint} (shapes: {', '.join(_shipped())}; or a folder, a hub id, builtin){away}"
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
    except KeyError:
        plain = _completed(plain, name)
    try:
        return _read(plain, name)
    except KeyError as error:
        raise UnsupportedModelError(f"{name}: its configuration has no {error}") from None


def _completed(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what its file leaves to transformers' defaults."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as error:
        raise MllmEfficientError(f"{name}: not a configuration that transformers reads ({type(error).__name__}: {error})") from error


def _read(config: Mapping[str, Any], name: str) -> ModelShape:
    text, vision, family = config["text_config"], config["vision_config"], config["model_type"]
    decoder = _decoder(text, str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype")), name)
    if family.startswith("qwen"):
        tower, projector = _qwen(vision, family)
    else:
        tower = _internvl(vision) if family == "internvl" else _clip_or_siglip(vision, name)
        layers = config["vision_feature_layer"]
        inputs = tower.width * (1 if isinstance(layers, int) else len(layers))
        if family == "internvl":
            inputs = tower.width * int(1 / config["downsample_ratio"]) ** 2
        projector = Projector(inputs, decoder.width, decoder.width)
    return ModelShape(name, family, decoder, tower, projector, config)


def _decoder(text: Mapping[str, Any], dtype: str, name: str) -> Decoder:
    kind = text["model_type"]
    if kind not in MLP_MATRICES:
        raise UnsupportedModelError(f"{name} has a {kind} decoder: FLOPs are known for {', '.join(MLP_MATRICES)}")
    heads = text["num_attention_heads"]
    kv_heads = heads if kind in ("phi", "gpt_neox") and not text.get("num_key_value_heads") else text["num_key_value_heads"]
    dtype = dtype.removeprefix("torch.")
    return Decoder(
        text["num_hidden_layers"], text["hidden_size"], heads, kv_heads or heads, text.get("head_dim") or text["hidden_size"] // heads,
        text["intermediate_size"], text["vocab_size"], MLP_MATRICES[kind], dtype if dtype in BYTES else "float16", _windows(text),
    )  # fmt: skip


def _windows(text: Mapping[str, Any]) -> tuple[int, ...]:
    """The sliding window of each layer, as transformers takes it from the configuration."""
    kind, layers = text["model_type"], text["num_hidden_layers"]
    if kind.startswith("qwen"):
        window = text["sliding_window"] if text.get("use_sliding_window") else None
    else:
        window = text["sliding_window"] if kind in SLIDING else None
    if not window:
        return ()
    types = text.get("layer_types")
    if types is None and kind.startswith("qwen"):
        types = ["sliding_attention" if i >= text["max_window_layers"] else "full_attention" for i in range(layers)]
    elif types is None and kind == "gemma2":
        raise KeyError("layer_types")
    windows = tuple(window if types is None or types[i] == "sliding_attention" else 0 for i in range(layers))
    return windows if any(windows) else ()


def _clip_or_siglip(vision: Mapping[str, Any], name: str) -> Tower:
    kind = vision["model_type"]
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedModelError(f"{name} has a {kind} tower: FLOPs are known for clip_vision_model and siglip_vision_model")
    return Tower(
        vision["num_hidden_layers"], vision["hidden_size"], vision["num_attention_heads"], vision["intermediate_size"],
        vision["patch_size"], vision.get("num_channels", 3), class_token=kind == "clip_vision_model",
        pooling_head=kind == "siglip_vision_model" and vision.get("vision_use_head", True),
    )  # fmt: skip


def _internvl(vision: Mapping[str, Any]) -> Tower:
    patch = vision["patch_size"]
    return Tower(
        vision["num_hidden_layers"], vision["hidden_size"], vision["num_attention_heads"], vision["intermediate_size"],
        patch if isinstance(patch, int) else patch[0], vision.get("num_channels", 3), class_token=True,
    )  # fmt: skip


def _qwen(vision: Mapping[str, Any], family: str) -> tuple[Tower, Projector]:
    """Qwen2-VL names its width ``embed_dim`` and gives the language model's as ``hidden_size``."""
    old = family == "qwen2_vl"
    width = vision["embed_dim" if old else "hidden_size"]
    windowed = family == "qwen2_5_vl"
    tower = Tower(
        vision["depth"], width, vision["num_heads"], int(width * vision["mlp_ratio"]) if old else vision["intermediate_size"],
        vision["patch_size"], vision.get("in_channels") or vision.get("in_chans") or 3, vision["temporal_patch_size"],
        mlp_matrices=3 if windowed else 2,
        window=vision["window_size"] // vision["patch_size"] if windowed else 0,
        full_layers=tuple(vision["fullatt_block_indexes"]) if windowed else (),
    )  # fmt: skip
    merged = width * vision["spatial_merge_size"] ** 2
    copies = 1 + len(vision["deepstack_visual_indexes"]) if family == "qwen3_vl" else 1
    return tower, Projector(merged, merged, vision["hidden_size" if old else "out_hidden_size"], copies)
