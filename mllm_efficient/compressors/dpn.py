"""DPN: inside the decoder a router chooses for every question how coarsely the visual tokens are pooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ..budget import Budget
from ..errors import BadBudgetError, BadSettingError, CountMismatchError
from ..lazy import torch
from ..registry import register
from ..tokens import Decision, Grid, LayerTokens, ReducedTokens
from ..trained.files import RANDOM, open_folder, shipped
from .base import Compressor, generator_for
from .math.finite import require_finite
from .reducer import Reducer

if TYPE_CHECKING:
    from torch import Tensor

ROUTINGS = ("learned", "random", "fixed")
POOLS = ("max", "avg")
DEFAULTS: dict[str, Any] = {
    "at": None, "kernels": "1x1/1x2/2x2", "pool": "max", "temperature": 10.0, "scaling": True, "router_token": None, "min_tokens": 18,
}  # fmt: skip


@register("dpn")
@dataclass(frozen=True, kw_only=True)
class DPN(Reducer):
    """Pools the visual tokens inside the decoder, as coarsely as a router finds that the question allows. Takes no budget.

    At the input of the layers ``at`` (``8/16/24``; default floor(L/4), floor(L/2), floor(3L/4) of L) a router reads the
    instruction's last token and chooses one of ``kernels`` (rows x columns, stride the same, what is left over at an edge
    dropped). Its softmax is divided by ``temperature``. ``scaling``: what is pooled is multiplied by the probability of
    the kernel chosen (1 for a fixed one). Kernels that would leave an image fewer than ``min_tokens`` are not to be
    chosen; if none is left, the image stays as it is. In training the kernel is drawn, else it is the likeliest.

    pool: max or avg. router_token: a token id, the mean of whose states up to the instruction's end is read instead.
    routing: "learned"; "random" draws kernels evenly; "fixed" takes ``kernel``, one for all layers or ``1x1/2x2/2x2``.
    weights: a folder that ``mllm-efficient train`` wrote, or a hub id; "random" draws them, for timing alone; None is what
    ships for the embedded model. What is left out is as it was in training.

    Source: Dynamic Pyramid Network (arXiv 2503.20322) and its released code, whose minimum holds in training alone.
    """

    trained: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2503.20322"

    keep: float | None = 1.0
    weights: str | None = None
    at: str | None = None
    kernels: str | None = None
    pool: str | None = None
    temperature: float | None = None
    scaling: bool | None = None
    router_token: int | None = None
    routing: str = "learned"
    kernel: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        budget = [n for n in ("tokens", "prune", "max_tokens", "ratio", "ratios") if getattr(self, n) is not None]
        if budget or self.keep != 1.0:
            raise BadBudgetError(f"dpn: {', '.join(budget or ['keep'])}= has no effect: its router says how many tokens stay")
        super().__post_init__()
        for name in ("at", "kernels", "kernel"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _joined(getattr(self, name)))
        if self.at is not None and not all(part.isdigit() for part in self.at.split("/")):
            raise BadSettingError(f"dpn: at={self.at} are no decoder layers, such as at=8/16/24")
        for name in ("kernels", "kernel"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, "/".join(f"{r}x{c}" for r, c in _kernels(name, getattr(self, name))))
        if self.pool is not None and self.pool not in POOLS:
            raise BadSettingError(f"dpn: pool={self.pool!r} is not one of {', '.join(POOLS)}")
        if self.routing not in ROUTINGS:
            raise BadSettingError(f"dpn: routing={self.routing!r} is not one of {', '.join(ROUTINGS)}")
        if (self.kernel is not None) != (self.routing == "fixed"):
            raise BadSettingError("dpn: kernel= and routing=fixed go together, as in routing=fixed,kernel=2x2")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if self.temperature is not None and not (number and 0 < self.temperature < math.inf):
            raise BadSettingError(f"dpn: temperature={self.temperature!r} is no positive number")
        if self.scaling is not None and not isinstance(self.scaling, bool):
            raise BadSettingError(f"dpn: scaling={self.scaling!r} is not true or false")
        if self.weights is not None and not isinstance(self.weights, str):
            raise BadSettingError(f"dpn: weights={self.weights!r} is no folder or hub id")
        least = self.min_tokens
        if least is not None and (isinstance(least, bool) or not isinstance(least, int) or least < 1):
            raise BadBudgetError(f"dpn: min_tokens={least!r} is no number of tokens from 1")
        token = self.router_token
        if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
            raise BadSettingError(f"dpn: router_token={token!r} is no token id")
        idle = [n for n in ("router_token", "temperature") if getattr(self, n) is not None and self.routing != "learned"]
        idle += ["seed"] if self.seed != 0 and self.routing != "random" else []
        if idle:
            raise BadSettingError(f"dpn: {idle[0]}= has no effect with routing={self.routing}")

    @property
    def budget(self) -> Budget:
        return Budget(keep=1.0)

    @property
    def installs(self) -> Compressor | None:
        return self

    @cached_property
    def settled(self) -> dict[str, Any]:
        """Every setting of ``DEFAULTS`` as it will be: the one given, else the one of training, else the default.

        And ``kept``: the shares of an image's tokens that training ended with, where every setting is that of training.
        """
        folder = None if self.weights == RANDOM else shipped(self.name) if self.weights is None else open_folder(self.weights)
        stored = {} if folder is None else folder.config
        out = {n: stored.get(n, default) if getattr(self, n) is None else getattr(self, n) for n, default in DEFAULTS.items()}
        if self.has_router and stored and out["kernels"] != stored.get("kernels"):
            raise BadSettingError(f"dpn: kernels={out['kernels']} for a router that was trained with {stored.get('kernels')}: leave it out")
        same = all(out[n] == stored.get(n) for n in DEFAULTS)
        return out | {"kept": stored.get("kept") if self.has_router and same else None}

    @property
    def has_router(self) -> bool:
        return self.routing == "learned"

    @property
    def read_token(self) -> int | None:
        return self.settled["router_token"] if self.routing == "learned" else None

    def layers(self, depth: int) -> tuple[int, ...]:
        at = self.settled["at"]
        if at is not None:
            return tuple(int(part) for part in at.split("/"))
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))

    def experts(self, stage: int) -> list[Grid]:
        """(rows, columns) of the kernels that stage ``stage`` chooses from."""
        if self.kernel is None:
            return _kernels("kernels", self.settled["kernels"])
        each = _kernels("kernel", self.kernel)
        return [each[0] if len(each) == 1 else each[stage]]

    def stages(self, depth: int) -> tuple[int, ...]:
        stages = super().stages(depth)
        if self.kernel is not None and self.kernel.count("/") not in (0, len(stages) - 1):
            raise BadSettingError(f"dpn: kernel={self.kernel} for {len(stages)} stages: one, or one for each")
        return stages

    def counts(self, n: int, depth: int, *, fixed: bool = True, grids: Sequence[Grid] | None = None) -> tuple[int, ...]:
        """Tokens after each stage: exact for one fixed kernel, else an estimate from the routing that training ended with.

        Without a record of that, kernels are taken to be equally likely.
        """
        side = math.isqrt(n)
        now = list(grids) if grids else [(side, side)] if side * side == n else None
        known, out, left = self.settled["kept"], [], float(n)
        for stage in range(len(self.stages(depth))):
            experts = self.experts(stage)
            if known is not None:
                left = n * known[stage]
            elif len(experts) == 1 and now is not None:
                now = _pooled(now, experts[0]) if self.allows(experts[0], now) else now
                left = sum(r * c for r, c in now)
            else:
                after = [left / (r * c) for r, c in experts if r * c == 1 or left / (r * c) >= self.settled["min_tokens"]]
                left = sum(after) / len(after) if after else left
            out.append(max(1, round(left)))
        return tuple(out)

    def allows(self, kernel: Grid, grids: Sequence[Grid]) -> bool:
        """Whether a kernel may be used on an image of these grids."""
        if kernel == (1, 1):
            return True
        fits = all(rows >= kernel[0] and columns >= kernel[1] for rows, columns in grids)
        return fits and sum(r * c for r, c in _pooled(grids, kernel)) >= self.settled["min_tokens"]

    def decide(
        self,
        stage: int,
        logits: Tensor | None,
        grids: Sequence[Sequence[Grid]],
        keys: Sequence[int | str],
        drawn: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Decision:
        """The kernel of every image: the likeliest, or one that is drawn, by the largest sum of log probability and Gumbel noise.

        drawn: "scaling" and "reinforce" just draw; "straight_through" has a factor that is 1 with the gradient of the
        probability; "gumbel" one with that of the softmax with the noise. generator: a CPU one, for the noise.
        """
        kernels = self.experts(stage)
        allowed = [[self.allows(kernel, g) for kernel in kernels] for g in grids]
        if logits is not None:
            require_finite(logits, self.name, "logits of the router")
        fits = torch.tensor(allowed, dtype=torch.bool).view(len(grids), len(kernels))
        stays = ~fits.any(1)
        fits |= stays[:, None]
        logits = torch.zeros(fits.shape) if logits is None else logits.float() / self.settled["temperature"]
        odds = logits.masked_fill(~fits.to(logits.device), -math.inf).log_softmax(-1)
        noisy = odds
        if drawn is not None:
            noisy = odds + _gumbel(torch.rand(odds.shape, generator=generator)).to(odds.device)
        elif not self.has_router:
            rows = [torch.rand(len(kernels), generator=generator_for(self, f"{key}/{stage}")) for key in keys]
            noisy = odds + _gumbel(torch.stack(rows)) if rows else odds
        picked, factors = noisy.argmax(-1), None
        if self.settled["scaling"] or (drawn in ("straight_through", "gumbel") and self.has_router):
            soft = noisy.softmax(-1) if drawn == "gumbel" else odds.exp()
            factors = soft.gather(1, picked[:, None])[:, 0]
            factors = factors if self.settled["scaling"] else factors - factors.detach() + 1
        experts = [None if stay else index for index, stay in zip(picked.tolist(), stays.tolist())]
        return Decision(tuple(None if e is None else kernels[e] for e in experts), tuple(experts), odds.exp(), factors)

    def reduce(self, v: LayerTokens, k: int) -> ReducedTokens:
        """k has no effect: the kernel that was decided says what stays."""
        if v.grids is None:
            raise CountMismatchError("dpn pools rectangles of tokens, and these are none: use it without a method that drops tokens first")
        features, indices, grids = v.hidden, None, v.grids
        if v.kernel is not None and v.kernel != (1, 1):
            features, indices = self._pool(v.hidden, v.grids, v.kernel)
            grids = tuple(_pooled(v.grids, v.kernel))
        if v.factor is not None and v.kernel is not None:
            features = features * v.factor.to(features.device, features.dtype)
        if indices is None:
            every = torch.arange(len(v), device=v.hidden.device)
            return ReducedTokens(every, None if features is v.hidden else features, None, v.grids)
        return ReducedTokens(indices, features, _places(v.places, v.grids, indices, v.kernel or (1, 1)), grids)

    def _pool(self, hidden: Tensor, grids: Sequence[Grid], kernel: Grid) -> tuple[Tensor, Tensor]:
        """Pooled features (k, d), and of each the number of the first token that went into it, (k,)."""
        pool = torch.nn.functional.max_pool2d if self.settled["pool"] == "max" else torch.nn.functional.avg_pool2d
        out, firsts, start = [], [], 0
        for rows, columns in grids:
            plane = hidden[start : start + rows * columns].T.unflatten(1, (rows, columns))
            out.append(pool(plane[None], kernel)[0].flatten(1).T)
            numbers = torch.arange(start, start + rows * columns, device=hidden.device).view(rows, columns)
            firsts.append(numbers[:: kernel[0], :: kernel[1]][: rows // kernel[0], : columns // kernel[1]].flatten())
            start += rows * columns
        return torch.cat(out), torch.cat(firsts)

    def router_flops(self, d: int) -> int:
        return 0 if not self.has_router else 2 * (d * (d // 4) + (d // 4) * len(self.experts(0)))

    def module(self, inputs: int, outputs: int, **config: Any) -> Any:
        """The routers of all stages. config: ``stages`` and ``experts``, their numbers."""
        from ..trained.router import Router

        return Router(inputs, **config)

    def routed(self, routing: str) -> DPN:
        """The same method with another routing."""
        if routing == "learned":
            return replace(self, routing=routing)
        return replace(self, routing=routing, temperature=None, router_token=None)

    @property
    def as_trained(self) -> dict[str, Any]:
        """Every setting that a router is trained under."""
        return {n: self.settled[n] for n in DEFAULTS}

    def sizes(self, depth: int) -> dict[str, int]:
        """What ``module`` takes, in a decoder of ``depth`` layers."""
        return {"stages": len(self.stages(depth)), "experts": len(_kernels("kernels", self.settled["kernels"]))}


def _gumbel(uniform: Tensor) -> Tensor:
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


def _joined(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _kernels(name: str, text: str) -> list[Grid]:
    """(rows, columns) of each of ``1x1/1x2/2x2``; ``2`` is 2x2."""
    out = []
    for part in text.split("/"):
        sides = part.split("x")
        if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
            raise BadSettingError(f"dpn: {name}={text} are no kernels, rows x columns, such as 1x1/1x2/2x2")
        out.append((int(sides[0]), int(sides[-1])))
    if name == "kernels" and len(set(out)) < len(out):
        raise BadSettingError(f"dpn: kernels={text} names a kernel twice")
    return out


def _pooled(grids: Sequence[Grid], kernel: Grid) -> list[Grid]:
    return [(rows // kernel[0], columns // kernel[1]) for rows, columns in grids]


def _places(places: Tensor, grids: Sequence[Grid], indices: Tensor, kernel: Grid) -> Tensor:
    """Places of the pooled tokens on the smaller grids."""
    down = places.new_tensor([1, 1, *kernel])
    return places[indices] // down
