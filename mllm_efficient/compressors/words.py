"""What methods and their parameters are called, and what the parameters mean: for the command line, LaTeX, figures and generated docs.

A method of a user's own says what a parameter means in its field: ``dataclasses.field(default=3, metadata={"help": "..."})``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import MllmEfficientError
from .base import BUDGET_FIELDS, Compressor

TITLES = {
    "none": "Uncompressed", "native": "The model's own control", "dart": "DART", "scope": "SCOPE",
    "prumerge_plus": "PruMerge+", "spp": "SPP", "hawk": "HAWK", "vcast": "V-CAST",
    "tokenflex": "TokenFLEX", "resize": "Resized image", "pool": "Pooling", "random": "Random", "uniform": "Uniform",
    "proportional": "Proportional attention",
}  # fmt: skip
SHARED = {
    "keep": "fraction of the tokens that stays, in (0, 1]", "tokens": "how many tokens stay", "prune": "fraction that goes, 1 - keep",
    "min_tokens": "fewest that stay, whatever the fraction", "max_tokens": "most that stay, whatever the fraction",
    "positions": "keep: tokens stay at their places in the uncompressed prompt; renumber: no gaps; left out: as the model needs it",
    "per": "what the budget is for: image (or video), tile of a tiled image, frame of a video",
    "newline": "keep: newline and separator columns stay; left out: those of an image that loses tokens go",
    "merge": "what becomes of the other tokens: left out, they are dropped; mean, similarity: averaged into the kept one most like them",
    "radius": "cosine distance within which every token has a kept one; as many stay as that takes, in place of a budget",
    "spend": "set: the budgets of a call's pictures are shared out among them by content",
    "age": "what the budget is multiplied by for every later turn of the prompt with images, between 0 and 1; left out: not at all",
    "ratio": "share of the tokens that every stage leaves, in place of a budget",
    "ratios": "share of all tokens that is left after each stage, such as 0.5/0.25, in place of a budget",
    "layer": "the decoder layer from which on tokens are dropped", "debias": "takes the linear trend over places out of the attention",
    "seed": "of what is drawn, together with the image's key",
    "metric": "distance between tokens: cosine, l2, l1 or whitened (cosine without what they have in common)",
    "groups": "of channels that metric=whitened works in; left out: of 16 channels each",
    "order": "raster, or picked: the order of choice", "weights": "folder or hub id of trained weights; random: drawn, for timing alone",
    "op": "avg, max, gem (generalised mean) or ggem (one for each group of channels)", "mode": "op by its earlier name",
    "p": "the power of gem, or of each group of ggem such as 1/3/5; left out: 3",
}  # fmt: skip
OWN = {
    "tokenflex.over": "`views` or `frames` of a picture or video become one set of tokens, with weights that were trained for it",
    "none.on": "a trained method whose weights the model holds meanwhile; none@tokenflex says it short",
    "uniform.raster": "the earlier rule: every (N/K)-th token of the raster",
    "sparsevlm.recycle": "share of the dropped tokens, the best rated, that are merged by groups instead of lost",
    "sparsevlm.clusters": "how many groups, as a share of the recycled tokens",
    "pixelprune.dedup": "true: what an earlier picture of the prompt, or the frame before, has at the same place goes too",
    "pixelprune.tau": "largest difference of normalised pixel values that counts as equal; 0: exactly equal",
    "dart.pivots": "visual tokens, those with the largest keys, that the others are compared with",
    "dart.text_pivots": "text tokens that the others are compared with",
    "dpn.at": "the layers before which tokens are pooled, such as 8/16/24; left out: a quarter, half and three quarters of the depth",
    "dpn.kernels": "what the router chooses from: rows x columns that are pooled to one token",
    "dpn.pool": "max or avg", "dpn.temperature": "what the router's softmax is divided by",
    "dpn.scaling": "whether pooled tokens are multiplied by the probability of the chosen kernel",
    "dpn.router_token": "id of a token whose mean state the router reads, instead of the instruction's last",
    "dpn.routing": "learned, random (drawn evenly) or fixed (kernel)", "dpn.kernel": "of routing=fixed: one for all layers, or one each",
    "cdpruner.relevance": "what the question is compared with: llm (projected tokens) or clip (CLIP's space, as in the paper's LLaVA runs)",
    "cdpruner.clip": "folder or hub id of the CLIP model that the tower is from; needed for relevance=clip",
    "tome.at": "projector: projected tokens are merged; tower: in the blocks of the tower, as in the paper",
    "tome.r": "pairs merged in a round; left out: as many as leave K tokens after all rounds",
    "vispruner.r": "share of the kept tokens that is chosen by attention, the rest by diversity",
    "visionzip.contextual": "share of the kept tokens that are merged contextual ones",
    "fastvid.contextual": "share of a frame's tokens that others are merged into; the rest is what attention points at",
    "fastvid.threshold": "cosine of the means of two frames below which a video is cut between them",
    "scope.alpha": "how much attention counts beside coverage; 0: coverage alone",
    "prumerge_plus.uniform": "share of the kept tokens that is sampled evenly",
    "prumerge_plus.neighbours": "how many of the most similar tokens are merged into each kept one",
    "flowcut.entropy": "concentration of attention taken for all images, 0 to 1; left out: each image's own",
    "mmtok.alpha": "how much covering the image counts beside covering the text",
    "mmtok.text_temperature": "of the softmax that says which visual tokens cover a text token",
    "mmtok.vision_temperature": "of the softmax that says which visual tokens cover a visual token",
    "apet.basis": "tokens in the basis that all others are approximated by",
    "otprune.gamma": "what the products of tokens count beside the identity in the determinant",
    "vscan.window": "tokens along a side of the windows that half of the kept tokens come from",
    "hawk.head_weights": "file with one weight for each query head; left out: all alike",
}  # fmt: skip


def title_of(name: str) -> str:
    """A method's name as papers write it: ``DivPrune``, ``PruMerge+``. A name that nothing registered is given back."""
    from ..registry import get_method

    if name in TITLES:
        return TITLES[name]
    try:
        return get_method(name).__name__
    except MllmEfficientError:
        return name


def title(method: Compressor) -> str:
    """``DivPrune (metric=l2)``: the method's name and its settings beside the budget."""
    if len(method.parts) > 1:
        return ", then ".join(title(stage) for stage in method.parts)
    settings = ", ".join(f"{k}={v}" for k, v in method.to_dict().items() if k != "method" and k not in BUDGET_FIELDS)
    return f"{title_of(method.name)} ({settings})" if settings else title_of(method.name)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """name, default and meaning of a setting; shared: whether most methods have it."""

    name: str
    default: Any
    meaning: str
    shared: bool

    @property
    def shown(self) -> str:
        """The default as a specification writes it; a dash where there is none."""
        return "-" if self.default is None else str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def parameters_of(cls: type[Compressor]) -> list[Parameter]:
    """The settings of a method, its own first, with what each means; empty where nothing says it."""
    base = {field.name for field in dataclasses.fields(Compressor)}
    found = []
    for field in dataclasses.fields(cls):
        if field.init:
            meaning = field.metadata.get("help") or OWN.get(f"{cls.name}.{field.name}") or SHARED.get(field.name, "")
            found.append(Parameter(field.name, field.default, meaning, field.name in base))
    return sorted(found, key=lambda p: p.shared)
