"""A wrapped model as a folder; ``pretrained`` brings it back.

The folder holds the model that ``unwrap`` would leave, as transformers saves it, and ``compression.json`` with the method. Under
a trained method it holds ``compressor.safetensors`` too, and the weights of the model hold everything trained a second time,
under names of their own (``compressor.`` and ``base_delta.``): a Trainer that resumes reads nothing else.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..apply.active import active_on
from ..apply.sharding import has_shards
from ..apply.signatures import parameters_of
from ..compressors.base import Compressor
from ..errors import MllmEfficientError, UnsupportedModelError
from .base_model import base_of
from .files import COMPRESSION, DELTA_KEYS, PART_KEYS, WEIGHTS
from .install import Undo
from .relocated import relocated

PUSH = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "tags", "token")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
processors: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of the models that were loaded with one


def save_pretrained(model: Any, stock: Any, method: Compressor, undo: Undo, where: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """``save_pretrained`` of a wrapped model. Adapters that the model itself holds (``add_adapter``) are saved as they are without a wrap.

    Raises:
        UnsupportedModelError: weights of a trained method are quantized, sharded or offloaded.
    """
    call = {**dict(zip(parameters_of(stock)[1:], args)), **kwargs}
    if getattr(model, "_hf_peft_config_loaded", False):
        stock(model, where, **call)
        return
    push = call.pop("push_to_hub", False)
    to_hub = {name: call.pop(name) for name in PUSH if name in call} if push else {}
    parts = None
    if undo.parts:
        require_savable(model, method, call)
        parts = taken_apart(model, undo, call.get("state_dict"))
        call |= {"state_dict": parts.together, "save_original_format": call.get("save_original_format", False)}
    stock(model, where, **call)
    if _writes(model, call.get("is_main_process", True)):
        _describe(Path(where), model, method, undo, parts)
    if push:
        model.push_to_hub(to_hub.pop("repo_id", Path(where).name), **to_hub)


@dataclass(frozen=True)
class Apart:
    """The weights of a model that holds a trained method's.

    base: those that ``unwrap`` would leave, by their names in the model. part: of the projector or router, by their names in it.
    delta: of the language model, those that the method put there, in the state they are in by now.
    """

    base: dict[str, Tensor]
    part: dict[str, Tensor]
    delta: dict[str, Tensor]

    @property
    def together(self) -> dict[str, Tensor]:
        """All of them, as they are written into one checkpoint."""
        named = {PART_KEYS + k: v for k, v in self.part.items()} | {DELTA_KEYS + k: v for k, v in self.delta.items()}
        return {**self.base, **named}


def taken_apart(model: Any, undo: Undo, state: Mapping[str, Tensor] | None = None) -> Apart:
    """state: of the wrapped model, its own if None. Raises ``MllmEfficientError`` for one that lacks what was trained."""
    state = model.state_dict() if state is None else state
    name, _, own = undo.part_of(model)
    delta_names = set(undo.tensors_of(model))
    part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    lacking = [f"{name}.{key}" for key in own.state_dict() if key not in part] + [key for key in delta_names if key not in state]
    if lacking:
        raise MllmEfficientError(f"this state_dict lacks {lacking[0]}, which was trained: pass the whole one, or none")
    delta = {key: state[key] for key, _ in model.named_parameters() if key in delta_names}  # which names a tied head once
    base = {key: value for key, value in state.items() if not key.startswith(f"{name}.") and key not in delta_names}
    like = next(iter(part.values()))
    originals = {key: value.to(state[key].dtype if key in state else like.dtype) for key, value in undo.originals(model).items()}
    return Apart(base | originals, part, delta)


def require_savable(model: Any, method: Compressor, call: dict[str, Any]) -> None:
    """Raises ``UnsupportedModelError`` where the trained weights cannot be told apart from the base model's, or read."""
    advice = "unwrap it and save it without the method, or write both with mllm-efficient export"
    names = [name for name, _ in model.named_parameters()]
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(f"a quantized model under {method.spec()} cannot be saved: {advice}")
    if any(".lora_" in name or ".modules_to_save." in name for name in names):
        raise UnsupportedModelError(
            f"a PEFT model's base under {method.spec()} cannot be saved: save the adapter, or merge_and_unload() first"
        )
    if call.get("distributed_checkpoint") or (has_shards(model) and call.get("state_dict") is None):
        raise UnsupportedModelError(
            f"a sharded model under {method.spec()}: pass state_dict= with whole weights, as accelerator.get_state_dict(model) gives them"
        )
    if call.get("state_dict") is None and any(value.is_meta for value in model.state_dict().values()):
        raise UnsupportedModelError(f"an offloaded model under {method.spec()} cannot be saved: {advice}")


def _writes(model: Any, main: bool) -> bool:
    """Whether this process is the one whose files count, as transformers decides it where it does."""
    decide = getattr(model, "should_save_on_this_rank", None)
    return bool(main if decide is None else decide(main))


def _describe(folder: Path, model: Any, method: Compressor, undo: Undo, parts: Apart | None) -> None:
    """Writes what is beside the weights."""
    from safetensors.torch import save_file

    about: dict[str, Any] = {"version": __version__, "method": relocated(method, None).to_dict()}
    active = active_on(model)
    if active is not None:
        about["logits"] = active.logits_here(model)
    (folder / WEIGHTS).unlink(missing_ok=True)  # of an earlier method
    if parts is not None:
        installed = method.installs
        _, _, module = undo.part_of(model)
        assert installed is not None
        settings = {k: v for k, v in installed.to_dict().items() if k != "weights"} | getattr(installed, "settled", {})
        sizes = {"inputs": module.inputs, "outputs": module.outputs, **module.config}  # type: ignore[dict-item]
        about["trained"] = {**settings, "sizes": sizes, "delta": bool(parts.delta), "base": base_of(model, parts.base)}
        save_file({key: value.detach().contiguous().cpu() for key, value in parts.part.items()}, folder / WEIGHTS)
    (folder / COMPRESSION).write_text(json.dumps(about, indent=2) + "\n")
    processor = _processor_of(model)
    if processor is not None and not any((folder / name).is_file() for name in PROCESSOR_FILES):
        processor.save_pretrained(folder)


def _processor_of(model: Any) -> Any:
    """The processor that a model was loaded with, or the one beside its weights on this machine; None if there is none."""
    if model not in processors:
        from transformers import AutoProcessor

        where, commit = getattr(model, "name_or_path", None), getattr(model.config, "_commit_hash", None)
        try:
            found = AutoProcessor.from_pretrained(where, revision=commit, local_files_only=True, trust_remote_code=False) if where else None
        except Exception:  # whatever transformers and the hub's library raise for a place without one
            found = None
        processors[model] = found if hasattr(found, "image_processor") else None
    return processors[model]


# ------------------------------------------------------------------------------------------------ loading


def state_for(model: Any, undo: Undo, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What ``load_state_dict`` of a wrapped model is given, by the names that its weights have in it.

    Takes what ``save_pretrained`` wrote, whole or file by file: weights of the base model go where ``unwrap`` puts them back from.
    A state of the wrapped model itself stays as it is. And names of a checkpoint that transformers renames when it loads a model
    are renamed, which its Trainer does not do: resuming would otherwise load nothing.
    """
    own = model.state_dict()
    originals = undo.originals(model)
    state = _renamed(model, {**own, **originals}, state)
    if not undo.parts:
        return state
    name, _, _ = undo.part_of(model)
    of_base = any(key.startswith((PART_KEYS, DELTA_KEYS)) for key in state)
    out, trained = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        if key.startswith(PART_KEYS):
            trained[f"{name}.{key.removeprefix(PART_KEYS)}"] = value
        elif key.startswith(DELTA_KEYS):
            trained[key.removeprefix(DELTA_KEYS)] = value
        elif key in originals and (of_base or key not in own or _same(value, originals[key])):
            with torch.no_grad():
                originals[key].copy_(value)
        else:
            out[key] = value
    return {**out, **trained}


def _same(value: Tensor, original: Tensor) -> bool:
    return value.shape == original.shape and torch.equal(value.to(original.device, original.dtype), original)


def _renamed(model: Any, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state by the names of ``own``, where it has those that transformers writes instead of them."""
    odd = [key for key in state if key not in own and not key.startswith((PART_KEYS, DELTA_KEYS))]
    if not odd:
        return state
    from transformers.core_model_loading import revert_weight_conversion

    name_of = {id(value): key for key, value in own.items()}
    written = {key: name_of[id(value)] for key, value in revert_weight_conversion(model, dict(own)).items() if id(value) in name_of}
    return {written.get(key, key) if key in odd else key: value for key, value in state.items()}


def __getattr__(name: str) -> Any:
    from mllm_efficient.moved import moved_name

    return moved_name("trained.saving", name)
