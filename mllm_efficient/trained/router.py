"""The routers of DPN as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import MllmEfficientError


class Router(nn.Module):
    """For every stage LayerNorm(d) -> Linear(d, d/4) -> GELU -> Linear(d/4, experts), without biases.

    Source: DPN (arXiv 2503.20322), the first version of its released router. ``nn.Linear`` starts as that does (Kaiming
    uniform, a = sqrt 5).
    """

    def __init__(self, inputs: int, *, stages: int, experts: int):
        super().__init__()
        if inputs < 4 or stages < 1 or experts < 1:
            raise MllmEfficientError(f"a router of width {inputs} with {stages} stages of {experts} kernels: at least 4, 1 and 1")
        self.config: dict[str, Any] = {"stages": stages, "experts": experts}
        self.inputs = self.outputs = inputs
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(inputs), nn.Linear(inputs, inputs // 4, bias=False), nn.GELU(), nn.Linear(inputs // 4, experts, bias=False)
            )
            for _ in range(stages)
        )  # fmt: skip

    def forward(self, stage: int, questions: Tensor) -> Tensor:
        """Logits (images, experts) for the states (images, d) of their questions at a stage."""
        logits: Tensor = self.stages[stage](questions)
        return logits
