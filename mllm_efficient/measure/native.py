"""``native``: a loaded model whose own image processor is set so that pictures have fewer tokens, in place of a compressed model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..compressors.base import Compressor
from ..compressors.none import NoCompression
from ..errors import UnsupportedModelError
from ..loading.models import Loaded, require_supported
from ..loading.processor import apply

if TYPE_CHECKING:
    from ..apply.prepare import Prepared
    from ..report import CompressionReport

Size = tuple[int, int]  # (width, height) in pixels
Settings = Mapping[str, Any]  # of an image processor


@dataclass(frozen=True)
class Asked:
    """How a method is asked about some pictures.

    loaded: the model with the processor that makes its inputs. method: what runs in the model. full: tokens of each picture as the
    model's own processor came; None where they are those of the call.
    """

    loaded: Loaded
    method: Compressor
    full: tuple[int, ...] | None = None

    def told(self, report: CompressionReport) -> CompressionReport:
        """The report of a call, its tokens against those of the processor as it came."""
        if self.full is None:
            return report
        return replace(report, images=tuple(replace(image, full=n) for image, n in zip(report.images, self.full, strict=True)))

    def shown(self, prepared: Prepared) -> Prepared:
        """A call with that report."""
        return prepared if self.full is None else replace(prepared, planned=self.told(prepared.planned))


class Control:
    """A loaded model under methods of which some set its processor. What is worked out for pictures of a size is kept."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.rules = require_supported(loaded).with_settings(loaded.picture_settings)
        self._counts: dict[tuple[Size, str], int] = {}
        self._chosen: dict[tuple[str, tuple[Size, ...]], Settings] = {}
        self._set: dict[str, Loaded] = {}

    def asked(self, method: Compressor, prompts: Sequence[Sequence[Size]]) -> Asked:
        """How a method is asked prompts with pictures of these sizes.

        Raises ``UnsupportedModelError`` for prompts of one batch that need different settings; ``alike`` tells them apart.
        """
        if not method.sets_processor:
            return Asked(self.loaded, method)
        settings = [self.setting(method, sizes) for sizes in prompts if sizes] or [{}]
        if any(setting != settings[0] for setting in settings):
            raise UnsupportedModelError(f"{method.spec()}: prompts of one batch need different settings: ask them one by one")
        every = [size for sizes in prompts for size in sizes]
        return Asked(self.under(settings[0]), NoCompression(), tuple(self.count(size, {}) for size in every))

    def setting(self, method: Any, sizes: Sequence[Size]) -> Settings:
        """The processor's setting for the pictures of one prompt. Raises ``BadBudgetError`` where none is small enough."""
        key = method.spec(), tuple(sizes)
        if key not in self._chosen:
            self._chosen[key] = method.chosen(list(dict.fromkeys(sizes)), self.rules.controls, self.count)
        return self._chosen[key]

    def alike(self, method: Compressor, batch: Sequence[Any], prompts: Sequence[Sequence[Size]]) -> list[list[Any]]:
        """A batch in parts that one setting serves, the order within each kept. prompts: sizes of the pictures of each."""
        if not method.sets_processor:
            return [list(batch)]
        parts: dict[str, list[Any]] = {}
        for one, sizes in zip(batch, prompts, strict=True):
            parts.setdefault(_name(self.setting(method, sizes)) if sizes else "", []).append(one)
        return list(parts.values())

    def count(self, size: Size, setting: Settings) -> int:
        """N of a picture under a setting: by the family's rule, or by its processor where no rule is known."""
        key = size, _name(setting)
        if key not in self._counts:
            by_rule = self.rules.counts_by_rule
            self._counts[key] = self.rules.tokens_under(size, setting) if by_rule else self._made(size, setting)
        return self._counts[key]

    def _made(self, size: Size, setting: Settings) -> int:
        """Placeholders that the processor makes of a picture."""
        from PIL import Image

        loaded = self.under(setting)
        ids = loaded.inputs([loaded.prompt("?", 1)], [[Image.new("RGB", size)]])["input_ids"]
        return int((ids == self.rules.placeholders["image"]).sum())

    def under(self, setting: Settings) -> Loaded:
        """The model with a processor that has a setting on top of its own. The model itself stays as it is."""
        if not setting:
            return self.loaded
        key = _name(setting)
        if key not in self._set:
            processor = copy.copy(self.loaded.processor)
            if processor is not None:
                apply(processor, None, setting)
            options = replace(self.loaded.options, processor_kwargs={**self.loaded.options.processor_kwargs, **setting})
            self._set[key] = replace(
                self.loaded, processor=processor, options=options, call={**self.loaded.call, **self.rules.call_under(setting)}
            )
        return self._set[key]


def asked(loaded: Loaded, method: Compressor, prompts: Sequence[Sequence[Any]]) -> Asked:
    """How a method is asked prompts with these pictures, once."""
    return Control(loaded).asked(method, [sizes_of(own) for own in prompts]) if method.sets_processor else Asked(loaded, method)


def _name(setting: Settings) -> str:
    return json.dumps(setting, sort_keys=True)


def sizes_of(pictures: Sequence[Any]) -> list[Size]:
    """(width, height) of pictures."""
    return [picture.size for picture in pictures]
