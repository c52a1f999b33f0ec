"""The doctor: whether compression is right with the versions, the device and the attention kernel that are here.

A tiny model of random weights of each first-class family runs every kind of method. What holds:

* ``identity``: a method that keeps everything gives the logits of the plain model, bit for bit, and so does the model after
  ``unwrap``. A projector, which changes the model, gives those of its tokens put among the text by hand. Attention that is asked of the
  tower is that of its own kernel, and a tower that is run block by block gives the stock tokens where nothing is taken off.
* ``cache``: greedy decoding with a cache gives what it gives without one, token by token and within rounding logit by logit.
* ``batch``: two prompts of different lengths, padded, give what they give one by one.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from ..compressors.kinds import PRE_LLM
from ..errors import MllmEfficientError, UnsupportedModelError
from .facts import FACTS, REFUSED
from .rules import check_reducer

KINDS = ("pre_llm", "projector", "in_llm", "attention", "in_tower")  # and, before the decoder, what asks the tower or works in it
CHECKS = ("identity", "cache", "batch")
ROW_CHECKS = ("identity", "chosen", "batch", "inside", "count", "long")  # of ``contract``
NEW = 4  # tokens that are decoded


@dataclass(frozen=True)
class Row:
    """One check. holds: None where the family does not offer the kind of method; why: what went wrong, or is not offered.

    attention: the kernel of the decoder.
    """

    model_type: str
    kind: str
    check: str
    holds: bool | None
    why: str = ""
    attention: str = ""


@dataclass(frozen=True)
class Checkup:
    """What the doctor found. ``meta``: versions, device and dtype."""

    rows: tuple[Row, ...]
    meta: dict[str, Any]

    @property
    def holds(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.holds is False]

    def to_dict(self) -> dict[str, Any]:
        """``{"rows": [...], "meta": {...}}`` of plain values."""
        return {"rows": [asdict(row) for row in self.rows], "meta": self.meta}

    def __str__(self) -> str:
        held = sum(row.holds is True for row in self.rows)
        lines = [f"{held} checks hold, {len(self.failures)} do not"]
        return "\n".join(lines + [f"{r.model_type} {r.kind} {r.check}: {r.why}" for r in self.failures])


ROW = "row"  # the kind of a check of a row of ``facts``


def doctor(device: str = "auto", attn_implementation: str | None = None, every: bool = False) -> Checkup:
    """Checks every first-class family with every kind of method; some seconds on a CPU. Models are float32.

    Args:
        device: as torch names it; "auto" takes a GPU if there is one. every: also the contract of every row of ``facts``, on the CPU.
        attn_implementation: the attention kernel, such as "eager"; None is the model's default.

    Raises:
        MllmEfficientError: a device that is not here.
    """
    from ..loading.models import ModelOptions, pick_device

    device = pick_device(ModelOptions("tiny", device=device))
    rows = [row for model_type in _models() for row in check(model_type, KINDS, device, attn_implementation)]
    if every:
        rows += [row for model_type in FACTS for row in check_row(model_type)]
        rows += [Row(model_type, ROW, name, None, why) for model_type, why in REFUSED.items() for name in ROW_CHECKS]
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return Checkup(tuple(rows), {"versions": versions, "device": device, "dtype": "float32"})


def check(model_type: str, kinds: Sequence[str], device: str = "cpu", attn_implementation: str | None = None) -> list[Row]:
    """All checks of one family with some kinds of methods. Never raises for what a check finds."""
    import torch

    from . import require_present, require_whole

    try:
        require_present(model_type)
        require_whole(model_type)
    except MllmEfficientError as error:
        return [Row(model_type, kind, name, None, str(error)) for kind in kinds for name in CHECKS]
    rows: list[Row] = []
    with _undisturbed(), torch.device(device):
        try:
            patient = Patient(model_type, device, attn_implementation)
        except Exception as error:  # a host that cannot be built is a finding
            return [Row(model_type, kind, name, False, _said(error)) for kind in kinds for name in CHECKS]
        kernel = patient.model.config.get_text_config()._attn_implementation
        for kind in kinds:
            method, refusal = patient.method(kind)
            for name in CHECKS:
                try:
                    why = refusal or getattr(patient, name)(method)
                except Exception as error:  # whatever a host raises that does not fit is a finding
                    why = _said(error)
                rows.append(Row(model_type, kind, name, None if refusal else not why, why, kernel))
    return rows


def check_row(model_type: str) -> list[Row]:
    """The contract of a row of ``facts``. Never raises for what a check finds."""
    from transformers import AutoConfig

    from . import contract, require_present, transformers_version

    refusal = FACTS[model_type].refusal(transformers_version())
    try:
        require_present(model_type)
    except MllmEfficientError as error:
        refusal = str(error)
    if refusal:
        return [Row(model_type, ROW, name, None, refusal) for name in ROW_CHECKS]
    with _undisturbed():
        try:
            found = contract.keeps(AutoConfig.for_model(model_type), FACTS[model_type])
        except Exception as error:  # a host that cannot be built is a finding
            found = dict.fromkeys(ROW_CHECKS, _said(error))
    return [Row(model_type, ROW, name, not why, why) for name, why in found.items()]


_once = threading.RLock()
_running = threading.local()


def host_fault(model_type: str) -> str:
    """What is wrong with in-decoder methods on this version of a host, empty if nothing; checked once in a process."""
    if getattr(_running, "now", False):  # the check itself runs such a method
        return ""
    with _once:
        _running.now = True
        try:
            return _fault(model_type)
        finally:
            _running.now = False


@functools.cache
def _fault(model_type: str) -> str:
    rows = check(model_type, ("in_llm",)) if model_type in _models() else []
    return "; ".join(f"{row.check}: {row.why}" for row in rows if row.holds is False)


# ------------------------------------------------------------------------------------------------------------------- a model


class Patient:
    """A tiny model of a family, two prompts with a picture each, and their batch padded on the left."""

    def __init__(self, model_type: str, device: str, attn_implementation: str | None):
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText

        from ..loading.models import Loaded, ModelOptions
        from ..measure.workload import Workload, make_inputs
        from . import adapter_for

        given = _models()[model_type]
        config, more = AutoConfig.for_model(**given["config"]), {"attn_implementation": attn_implementation} if attn_implementation else {}
        torch.manual_seed(0)
        self.model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, **more).eval().to(device)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():  # larger than at the start of a training: answers are no loops
                weight += torch.randn_like(weight) * (0.3 if "language_model" in name and weight.ndim == 2 else 0.1)
        settings = self.model.generation_config
        settings.eos_token_id, settings.pad_token_id, settings.do_sample = None, 0, False
        self.adapter = adapter_for(self.model)
        loaded, size = Loaded(self.model, None, ModelOptions(model_type)), tuple(given["image_size"])
        self.prompts = [make_inputs(loaded, self.adapter, Workload(size, 1, 6 + 5 * i, NEW), 1, seed=i).call for i in range(2)]

    def method(self, kind: str) -> tuple[Any, str]:
        """The method that stands for a kind, or None and why the family does not offer it."""
        from ..registry import build

        if kind == "projector" and not self.adapter.projects:
            return None, "another projector cannot take the place of this family's"
        if {"attention": kind not in self.adapter.gives, "in_tower": not self.adapter.tower_blocks}.get(kind):
            return None, f"{kind}: nothing of this family's tower is known to methods"
        inside = f"fastv:layer={max(1, self.adapter.deep_layers)},ratio=0.5"
        specs = {
            "pre_llm": "divprune:keep=0.5", "projector": "tokenflex:tokens=4,weights=random", "in_llm": inside,
            "attention": "visionzip:keep=0.5", "in_tower": "flowcut:keep=0.5",
        }  # fmt: skip
        method: Any = build(specs[kind])
        with contextlib.suppress(UnsupportedModelError):
            if kind == "in_llm":
                check_reducer(self.adapter, method)
            return method, ""
        return None, "nothing can be dropped between this decoder's layers"

    # -------------------------------------------------------------------------------------------------------------- checks

    def identity(self, method: Any) -> str:
        import torch

        from ..apply.wrap import compressed
        from ..registry import build

        prompt = self.prompts[0]
        if why := self._of_tower(method, prompt):
            return why
        before = self._logits(prompt)
        if method.kind == "projector":
            with compressed(self.model, method):
                if not torch.allclose(self._logits(prompt)[:, -1], self._by_hand(method, prompt), rtol=1e-3, atol=1e-4):
                    return "its tokens put among the text by hand give other logits"
        else:
            whole = build({**{k: v for k, v in method.to_dict().items() if k not in ("keep", "tokens", "ratio", "ratios")}, **_all(method)})
            with compressed(self.model, whole):
                if not torch.equal(self._logits(prompt), before):
                    return "a method that keeps everything changes the logits"
        return "" if torch.equal(self._logits(prompt), before) else "unwrap does not give the plain model back"

    def _of_tower(self, method: Any, prompt: dict[str, Any]) -> str:
        """What is wrong with what a method asks of the tower, empty if nothing."""
        from .tower.checks import attention_fault, blocks_fault

        (item,) = self.adapter.items(prompt)
        if method.in_tower:
            return blocks_fault(self.adapter, item)
        return attention_fault(self.adapter, item) if "attention" in method.needs and method.kind == PRE_LLM else ""

    def cache(self, method: Any) -> str:
        from ..apply.wrap import compressed

        with compressed(self.model, method):
            return _differs("with and without a cache", *(self._answer(self.prompts[0], use_cache=use) for use in (True, False)))

    def batch(self, method: Any) -> str:
        from ..apply.wrap import compressed

        with compressed(self.model, method):
            together = self._answer(self._padded())
            for i, prompt in enumerate(self.prompts):
                row = tuple(part[i : i + 1] for part in together)
                if why := _differs("in a batch and alone", row, self._answer(prompt)):
                    return why
        return ""

    def _logits(self, call: dict[str, Any]) -> Any:
        import torch

        with torch.no_grad():
            return self.model(**call).logits

    def _answer(self, call: dict[str, Any], **how: Any) -> tuple[Any, Any]:
        """New tokens (B, NEW) and their logits (B, NEW, vocabulary)."""
        import torch

        with torch.no_grad():
            out = self.model.generate(**call, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **how)
        return out.sequences[:, -NEW:], torch.stack(out.logits, 1)

    def _by_hand(self, method: Any, call: dict[str, Any]) -> Any:
        """Logits (1, vocabulary) after a prompt whose placeholders gave way to the tokens of the projector in the model."""
        import torch

        from mllm_efficient.apply.projecting import through

        ids = call["input_ids"]
        visual = (ids[0] == self.adapter.placeholders["image"]).nonzero()[:, 0]
        with torch.no_grad():
            (item,) = self.adapter.items(call)
            features = through(self.adapter, method, [item], getattr(*self.adapter.projector_at))[0].features
            text = self.model.get_input_embeddings()(ids)[0]
            return self.model(inputs_embeds=torch.cat([text[: visual[0]], features.to(text), text[visual[-1] + 1 :]])[None]).logits[:, -1]

    def _padded(self) -> dict[str, Any]:
        """The prompts as one batch, padded on the left."""
        import torch

        longest = max(prompt["input_ids"].shape[1] for prompt in self.prompts)
        out = {}
        for name, value in self.prompts[0].items():
            parts = [prompt[name] for prompt in self.prompts]
            if value.shape == self.prompts[0]["input_ids"].shape:
                parts = [torch.nn.functional.pad(part, (longest - part.shape[1], 0)) for part in parts]
            out[name] = self.adapter.joined(name, parts)
        return out


def _all(method: Any) -> dict[str, float]:
    """The setting under which a method keeps everything."""
    return {"ratio": 1.0} if method.kind == "in_llm" else {"keep": 1.0}


def _differs(what: str, one: tuple[Any, Any], other: tuple[Any, Any]) -> str:
    import torch

    if not torch.equal(one[0], other[0]):
        return f"answers {what} differ: {one[0].tolist()} and {other[0].tolist()}"
    if not torch.allclose(one[1], other[1], rtol=1e-3, atol=1e-4):
        return f"logits {what} differ by up to {float((one[1] - other[1]).abs().max()):.2g}"
    return ""


def _said(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return first if isinstance(error, MllmEfficientError) else f"{type(error).__name__}: {first}"


@functools.cache
def _models() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((files("mllm_efficient.configs") / "doctor.yaml").read_text())


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever state torch is in, the check runs in its usual one and leaves it as it was."""
    import torch

    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


__all__ = ["Checkup", "Row", "doctor"]
