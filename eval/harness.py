"""What every evaluation shares: arms and batches, resuming, failures that are counted, the tower run once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_efficient.apply.encode import Encoded, encode_items, encoding_key
from mllm_efficient.compressors.base import Compressor
from mllm_efficient.loading.models import Loaded, require_supported
from mllm_efficient.measure.native import Asked, Control
from mllm_efficient.registry import runnable
from mllm_efficient.trained.folder import Parts
from mllm_efficient.trained.install import installed

from .record.samples import Records


@dataclass
class Harness:
    """A loaded model, samples and methods. A subclass says how a batch is asked (``answers``) and what is recorded of it."""

    loaded: Loaded
    samples: Sequence[Any]
    methods: Sequence[Compressor]
    batch_size: int = 32
    output_dir: Path | None = None
    progress: Callable[[int], None] = lambda n: None

    def __post_init__(self):
        self.adapter = require_supported(self.loaded)
        self.vision, self.parts, self.control = Vision(self.adapter), dict[str, Parts](), Control(self.loaded)
        self.prepare_samples()
        self.records = Records(self.output_dir, self.config)

    def prepare_samples(self) -> None:
        """What has to be known of the model and the samples before anything is asked."""

    @property
    def config(self) -> dict[str, Any]:
        """Everything that answers depend on besides the method and the sample; part of every record's fingerprint."""
        raise TypeError(f"{type(self).__name__} must define config")

    def head(self, arm: str, sample: Any) -> dict[str, Any]:
        """What a record says of the sample."""
        raise TypeError(f"{type(self).__name__} must define head")

    def answers(self, arm: str, method: Compressor | None, batch: Sequence[Any]) -> list[dict[str, Any]]:
        """One record for each sample of a batch under one method (None: the floor)."""
        raise TypeError(f"{type(self).__name__} must define answers")

    def sizes(self, sample: Any) -> list[tuple[int, int]]:
        """(width, height) of a sample's pictures."""
        raise TypeError(f"{type(self).__name__} must define sizes")

    def seen_under(self, method: Compressor, batch: Sequence[Any]) -> Asked:
        """How a batch is asked: on the model as it came, or with its processor set where the method does that."""
        return self.control.asked(method, [self.sizes(s) for s in batch] if method.sets_processor else ())

    def refer(self, arm: str, batch: Sequence[Any]) -> None:
        """What answers of an arm are held against, made on the model as it came."""

    @property
    def named_arms(self) -> list[tuple[str, Compressor | None]]:
        """Name and method of each arm, in the order they are asked."""
        return [(m.spec(), m) for m in self.methods]

    @property
    def arms(self) -> list[str]:
        return [arm for arm, _ in self.named_arms]

    @property
    def groups(self) -> list[Sequence[Any]]:
        """Samples that may share a batch."""
        return [self.samples]

    @property
    def asked(self) -> list[Any]:
        return [s for group in self.groups for s in group]

    @property
    def total(self) -> int:
        return len(self.arms) * len(self.asked)

    @property
    def done(self) -> int:
        """Answers that are recorded already."""
        return sum((arm, s.id) in self.records for arm in self.arms for s in self.asked)

    def answer_all(self) -> list[dict[str, Any]]:
        """Runs what is not recorded yet; returns the records of this run's methods and samples."""
        try:
            for group in self.groups:
                for low in range(0, len(group), self.batch_size):
                    self._batch(group[low : low + self.batch_size])
        finally:
            self.records.close()
        return [self.records.rows[arm, s.id] for arm in self.arms for s in self.asked]

    def _batch(self, batch: Sequence[Any]) -> None:
        """Every arm on one batch. A half-recorded batch is asked again whole, so that padding is as it was."""
        self.forget()
        for arm, method in self.named_arms:
            for part in [batch] if method is None else self.control.alike(method, batch, [self.sizes(s) for s in batch]):
                if not all((arm, s.id) in self.records for s in part):
                    self.records.add(self._ask(arm, method, part))
            self.progress(len(batch))

    def forget(self) -> None:
        """Lets go of what was kept for a batch."""
        self.vision.made.clear()

    def _ask(self, arm: str, method: Compressor | None, batch: Sequence[Any]) -> list[dict[str, Any]]:
        """Records of a batch; if it fails as a whole its samples are asked one by one, and those that fail say why."""
        try:
            self.refer(arm, batch)
            with installed(self.loaded.model, method, self.parts):
                return self.answers(arm, method, batch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        # outside the handler, so that the failed batch's tensors are free when its samples are tried
        if len(batch) > 1:
            return [row for s in batch for row in self._ask(arm, method, [s])]
        return [{**self.head(arm, batch[0]), "answer": None, "correct": False, "error": reason}]


class Vision:
    """What the tower made of a batch's images; each goes through it once for all methods that see it alike."""

    def __init__(self, adapter: Any):
        self.adapter = adapter
        self.made: dict[Any, tuple[Any, Any]] = {}

    def encoded(self, method: Compressor, items: list[Any], names: Sequence[Any]) -> Encoded:
        """The items' visual tokens as a method needs them. names: of each item, the same for the same picture."""
        keys = [(name, encoding_key(self.adapter, method, item)) for name, item in zip(names, items)]
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self.made}
        if new:
            with torch.no_grad():
                once = encode_items(self.adapter, method, [items[i] for i in new.values()])
            self.made |= zip(new, zip(once.encodings, once.made_for))
        return Encoded(items, [self.made[key][0] for key in keys], [self.made[key][1] for key in keys])


def with_baselines(methods: Sequence[Compressor]) -> list[Compressor]:
    """The methods, each once, and before the first on the weights of a trained one the baseline on those: ``none@tokenflex``."""
    out: dict[str, Compressor] = {}
    for method in methods:
        if method.same_weights is not None:
            baseline = runnable(method.same_weights)
            out.setdefault(baseline.spec(), baseline)
        out.setdefault(method.spec(), method)
    return list(out.values())


def endings(model: Any) -> set[int]:
    """The tokens that end an answer of ``generate``."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
