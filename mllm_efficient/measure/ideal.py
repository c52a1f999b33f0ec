"""FLOPs of the prompt that is run: what the latency of a method is held against."""

from __future__ import annotations

from typing import Any

from ..compressors.base import Compressor
from ..compressors.none import NoCompression
from ..errors import MllmEfficientError
from ..loading.models import Loaded
from .flops import Cost, cost, shape_of
from .workload import Inputs, Workload


class PromptFlops:
    """FLOPs of a workload's prompt under any method, convention ``exact``.

    one: the prompt, a batch of one. call: what ``cost`` is told of it. full: its visual tokens. error: why there are no
    FLOPs, if so; ``of`` must not be asked then.
    """

    def __init__(self, loaded: Loaded, adapter: Any, workload: Workload, one: Inputs, new_tokens: int = 0):
        self.full, self.error = one.visual_tokens, None
        self.call: dict[str, Any] = {"text_tokens": one.lengths[1], "new_tokens": new_tokens, "images": workload.images}
        if not adapter.fixed_count:
            self.call["image_size"] = one.image_size
        try:
            self.shape = shape_of(loaded.model.config, loaded.options.model, loaded.picture_settings)
            self.baseline = self.of(NoCompression())
            if self.baseline.visual_tokens_full != self.full:
                raise MllmEfficientError(f"FLOPs are of {self.baseline.visual_tokens_full} visual tokens, and {self.full} are run")
        except MllmEfficientError as error:
            self.error = str(error)

    def of(self, method: Compressor) -> Cost:
        return cost(self.shape, method=method, **self.call)
