"""One forward through a decoder that shortens: which part of the prompt each layer sees, with its mask and positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mllm_efficient.apply.prompt import SEGMENTS_ATTRIBUTE
from mllm_efficient.apply.signatures import cache_of
from mllm_efficient.apply.stopwatch import Stopwatch
from mllm_efficient.compressors.math.finite import Watch, require_finite
from mllm_efficient.errors import CountMismatchError
from mllm_efficient.tokens import Decision, LayerTokens

from ..rules import ROUTER
from .rating import causal_mask, heads_of, kind_of, rotary_tables, window_of
from .staging import Segment, Shortened, Staging
from .weighing import weigh, weights_of


class Pass:
    """One forward of the model: what part of the sequence each layer sees. Made anew for every call.

    state: the segments that are known; new: (B, E) bool, the columns after the prompts, those in the cache included;
    decoder: the language model.
    """

    def __init__(self, state: Shortened, new: Tensor, decoder: Any):
        self.state, self.new, self.decoder = state, new, decoder
        self.segment: Segment | None = None
        self._made: dict[Any, Any] = {}

    def enter(self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Called before layer ``index``: the states it shall see; its other arguments are changed in place."""
        for segment in self.state.segments:
            if segment.first == index:
                self.segment = segment
        self.substitute(index, layer, hidden, kwargs)
        return hidden

    def substitute(self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Mask and positions of the current segment in place of those of the full sequence; a mask that weighs its columns."""
        weigh(self, index, layer, hidden, kwargs)
        if self.segment is None:
            return
        kwargs["position_embeddings"] = self.tables(layer, hidden, kwargs["position_embeddings"])
        if "position_ids" in kwargs:
            kwargs["position_ids"] = None  # a gap in positions would be read as the start of a packed sequence
        kwargs["attention_mask"] = self.mask(index, layer, hidden, cache_of(kwargs))

    def tables(self, layer: Any, hidden: Tensor, full: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """cos and sin (.., B, length, d) of a layer for the columns of ``hidden``."""
        segment = self.segment
        assert segment is not None
        if self.state.positions == "keep":
            return self.kept(layer, hidden, full)
        key = ("renumber", segment.first, kind_of(layer), hidden.device)
        return self.once(key, lambda: rotary_tables(self.decoder, layer, hidden, self._places(segment, hidden)))

    def kept(self, layer: Any, hidden: Tensor, full: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tables where tokens keep their positions: columns after the prompts are all there."""
        return full

    def _places(self, segment: Segment, hidden: Tensor) -> Tensor:
        """(B, length) positions of the columns of ``hidden``, counted on within what is left."""
        n, lengths = segment.mask.shape[1], segment.lengths
        prompt = (torch.arange(n)[None] - (n - lengths)[:, None]).clamp(min=0)
        lengths, prompt = (self.rows(part.to(hidden.device), hidden) for part in (lengths, prompt))
        after = lengths[:, None] + self.new.to(hidden.device).long().cumsum(1) - 1
        return torch.cat([prompt, after.clamp(min=0)], 1)[:, -hidden.shape[1] :]

    def mask(self, index: int, layer: Any, hidden: Tensor, cache: Any) -> Any:
        segment, window = self.segment, window_of(layer)
        assert segment is not None

        def make() -> Any:
            whole = bool(segment.mask.all()) and self._all_new
            seen = None if whole else torch.cat([self.rows(segment.mask.to(hidden.device), hidden), self.new.to(hidden.device)], 1)
            return causal_mask(self.decoder.config, hidden, seen, cache, index, window)

        return self.once(("mask", segment.first, window, hidden.device), make)

    @cached_property
    def _all_new(self) -> bool:
        return bool(self.new.all())

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def rows(self, per_sample: Tensor, hidden: Tensor) -> Tensor:
        """(B, ..) of (S, ..): the rows of one sample follow each other."""
        times, rest = divmod(len(hidden), len(per_sample))
        if rest:
            raise CountMismatchError(f"{len(hidden)} rows on a cache that was made with {len(per_sample)} prompts")
        return per_sample if times == 1 else per_sample.repeat_interleave(times, 0)

    def restore(self, hidden: Tensor) -> Tensor:
        """States (B, n + E, d) after the last layer at every column of the prompt."""
        return hidden


class Prefill(Pass):
    """The forward that has the prompts in it, and shortens them."""

    def __init__(self, staging: Staging, new: Tensor, decoder: Any):
        super().__init__(Shortened(staging.length, staging.positions), new, decoder)
        self.staging, self.layer_mask = staging, staging.mask
        self.columns = torch.arange(staging.length).expand(len(staging.mask), -1)
        self.last, self.text, self.read = staging.last, list(staging.text), list(staging.read)
        self.at = [image.columns for image in staging.images]
        self.separators = [image.separators for image in staging.images]
        self.index: list[Tensor] = [torch.arange(len(image.columns)) for image in staging.images]
        self.places = [image.places for image in staging.images]
        self.grids = [image.grids for image in staging.images]
        self.decided: list[Decision] = []
        self.observed: dict[str, Tensor] = {}
        self.left: list[list[int]] = []
        self.entry: Tensor | None = None
        self.watches: list[Stopwatch] = []
        self.watch = Watch()

    def enter(self, index: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        method = self.staging.method
        if index == 0:
            self.move(hidden.device)
            self.entry = hidden if "entry" in method.needs else None
            if method.weighs:
                self.state.weights = weights_of(self.staging)
                self._remember(cache_of(kwargs))
        for number, stage in enumerate(self.staging.stages):
            rater = method.rater(stage)
            if index not in (rater, stage):
                continue
            watch = Stopwatch(hidden.device)
            self.move(hidden.device)
            with self.staging.meter(), self.watch:
                if index == rater and self._takes(number):
                    self.observe(layer, hidden, kwargs["position_embeddings"])
                if index == stage:
                    hidden = self.shorten(number, hidden)
            self.watches.append(watch.stop())
            if index == stage:
                self._remember(cache_of(kwargs))
        self.substitute(index, layer, hidden, kwargs)
        return hidden

    def kept(self, layer: Any, hidden: Tensor, full: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        segment = self.segment
        assert segment is not None
        return self.once(
            ("keep", segment.first, kind_of(layer), hidden.device), lambda: tuple(self._kept(part, segment, hidden) for part in full)
        )

    def _kept(self, part: Tensor, segment: Segment, hidden: Tensor) -> Tensor:
        after = torch.arange(self.state.length, part.shape[-2], device=hidden.device)
        at = self.rows(segment.columns.to(hidden.device), hidden)
        at = torch.cat([at, after.expand(len(at), -1)], 1)
        part = part.to(hidden.device).expand(*part.shape[:-3], len(at), *part.shape[-2:])
        return part.gather(-2, at[..., None].expand(*part.shape[:-2], at.shape[1], part.shape[-1]))

    def _takes(self, number: int) -> bool:
        """Whether stage ``number`` changes anything."""
        images = zip(self.staging.images, self.at)
        return self.staging.method.merges or any(image.counts[number] < len(at) for image, at in images)

    def move(self, device: torch.device) -> None:
        """Everything that is indexed with, to where the states are."""
        self.columns, self.last = self.columns.to(device), self.last.to(device)
        for parts in (self.text, self.read, self.at, self.separators, self.index, self.places):
            parts[:] = [part.to(device) for part in parts]
        self.observed = {name: value.to(device) for name, value in self.observed.items()}

    def _remember(self, cache: Any) -> None:
        if cache is not None:
            setattr(cache, SEGMENTS_ATTRIBUTE, self.state)
        self.staging.outcome.update(
            indices=list(self.index), left=self.left, decided=self.decided, grids=list(self.grids), watches=self.watches
        )

    def _prompts(self, states: Tensor) -> Tensor:
        """(S, n, ..): the prompt of each sample, of the first of its rows. Its other rows have the same one."""
        return states[:: len(states) // len(self.staging.mask), : self.layer_mask.shape[1]]

    # ------------------------------------------------------------------------------ what a method is shown

    @torch.no_grad()
    def observe(self, layer: Any, hidden: Tensor, tables: tuple[Tensor, ...]) -> None:
        """Attention and keys that the method needs, from the layer's own projections: no block runs twice."""
        needs = set(self.staging.method.needs) & {"attention", "text_attention", "keys"}
        if not needs:
            return
        if self.segment is not None:
            tables = self.tables(layer, hidden, tables)
        heads = heads_of(layer, self._prompts(hidden), [self._table(part, hidden) for part in tables])
        seen = self.layer_mask.to(hidden.device)
        if "keys" in needs:
            self.observed["keys"] = heads.keys.transpose(1, 2).flatten(2)
        if "attention" in needs:
            self.observed["attention"] = heads.attention(self.last[:, None], seen)[:, 0]
        if "text_attention" in needs:
            asked = torch.nn.utils.rnn.pad_sequence(self.text, batch_first=True)
            self.observed["text_attention"] = heads.attention(asked, seen)

    def _table(self, part: Tensor, hidden: Tensor) -> Tensor:
        part = part.to(hidden.device)[..., : self.layer_mask.shape[1], :]
        return self._prompts(part) if part.shape[0] == len(hidden) else part

    def decide(self, number: int, prompts: Tensor) -> None:
        """Lets a method that routes decide what stage ``number`` does to each image."""
        method, images = self.staging.method, self.staging.images
        router: Any = getattr(self.decoder, ROUTER, None)
        logits = None
        if method.has_router and images:
            read = [self.read[image.row] for image in images]
            states = self._states(prompts, [image.row for image in images], read)
            asked = torch.stack([state.mean(0) for state in states])
            weight = next(router.parameters())
            inside = asked.to(weight.dtype) if weight.is_meta else asked.to(weight.device, weight.dtype)  # offloaded: its hook moves it
            logits = router(number, inside).to(asked.device)
        drawn = self.staging.estimator if router is not None and router.training else None
        grids, keys = [g or () for g in self.grids], [image.key for image in images]
        self.decided.append(method.decide(number, logits, grids, keys, drawn, self.staging.generator))

    def _states(self, prompts: Tensor, rows: Sequence[int], columns: Sequence[Tensor]) -> Sequence[Tensor]:
        """States (n, d) at some columns of some rows, all gathered at once: each by itself would cost a gradient of the whole batch."""
        if not rows:
            return []
        counts = [len(part) for part in columns]
        of = torch.tensor([row for row, count in zip(rows, counts) for _ in range(count)], device=prompts.device)
        return prompts[of, torch.cat(list(columns))].split(counts)

    def shown(self, i: int, hidden: Tensor, prompts: Tensor) -> LayerTokens:
        """What the method gets of image i, whose states are ``hidden``; only these have a gradient."""
        image, at = self.staging.images[i], self.at[i]
        row, text = image.row, self.text[image.row]
        extra: dict[str, Any] = {"grids": self.grids[i]}
        if self.decided:
            now = self.decided[-1]
            extra |= {"kernel": now.kernels[i], "factor": None if now.factors is None else now.factors[i]}
        if "attention" in self.observed:
            extra["attention"] = self.observed["attention"][row, at]
        if "text_attention" in self.observed:
            extra["text_attention"] = self.observed["text_attention"][row, : len(text)][:, at]
        if "keys" in self.observed:
            extra["keys"], extra["text_keys"] = (self.observed["keys"][row, where] for where in (at, text))
        if self.entry is not None:
            entered = self.entry[:: len(self.entry) // len(prompts)][row]
            extra["entry"], extra["text_entry"] = (entered[where.to(entered.device)] for where in (image.columns, self.staging.text[row]))
        prompt = prompts[row].detach()
        question = prompt.index_select(0, self.last[row : row + 1])[0]  # a single number as index would make the CPU wait
        return LayerTokens(hidden, prompt[text], question, self.index[i], self.places[i], **extra)

    # ------------------------------------------------------------------------------ a stage

    def shorten(self, number: int, hidden: Tensor) -> Tensor:
        """States (B, n' + E, d) of what stage ``number`` leaves of (B, n + E, d)."""
        prompts, lengths = self._prompts(hidden), self.layer_mask.sum(1).tolist()
        before = list(lengths)
        if self.staging.method.routes:
            self.decide(number, prompts)
        stay = self.layer_mask.to(hidden.device).clone()
        merged: list[tuple[int, int, Tensor]] = []
        images = self.staging.images
        name = f"{self.staging.method.name}: layer {self.staging.stages[number]}"
        goes = [i for i, image in enumerate(images) if image.counts[number] < len(self.at[i]) or self.staging.method.merges]
        for i, states in zip(goes, self._states(prompts, [images[i].row for i in goes], [self.at[i] for i in goes])):
            require_finite(states, name, "states of an image's tokens")
            lengths[images[i].row] -= self._reduce(i, images[i].counts[number], states, prompts, stay, merged)
        self.left.append([len(at) for at in self.at])
        n = self.layer_mask.shape[1]
        short = hidden[:, :n]
        if lengths != before:
            source = self._renumber(stay, lengths)
            valid, rows = self.layer_mask.to(hidden.device), self.rows(source, hidden)
            short = short.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            short = torch.where(self.rows(valid, hidden)[..., None], short, 0)
            self.columns = self.columns.gather(1, source)
            self.segment = Segment(self.staging.stages[number], self.layer_mask, self.columns)
            self.state.segments.append(self.segment)
        elif not merged:
            return hidden
        if merged:
            short = self._put(short, merged, len(hidden) // len(stay))
        return torch.cat([short, hidden[:, n:]], 1)

    def _put(self, states: Tensor, merged: list[tuple[int, int, Tensor]], times: int) -> Tensor:
        """Merged tokens in their places, alike in all rows of a sample."""
        features = torch.cat([features for _, _, features in merged]).to(states.dtype)
        columns = torch.cat([self.at[i] for i, _, _ in merged])
        counts = torch.tensor([len(features) for _, _, features in merged], device=states.device)
        rows = torch.tensor([row for _, row, _ in merged], device=states.device).repeat_interleave(counts, output_size=len(columns))
        every = rows * times + torch.arange(times, device=states.device)[:, None]
        return states.index_put((every, columns.expand(times, -1)), features.expand(times, -1, -1))

    def _reduce(self, i: int, k: int, states: Tensor, prompts: Tensor, stay: Tensor, merged: list[tuple[int, int, Tensor]]) -> int:
        """Runs the method on image i, marks what stays, and returns how many columns go."""
        method, image, at = self.staging.method, self.staging.images[i], self.at[i]
        with torch.set_grad_enabled(torch.is_grad_enabled() and method.merges):
            done = method.reduce(self.shown(i, states, prompts), k)
        gone = len(at) - len(done)
        stay[image.row, at] = False
        self.at[i] = at[done.indices]
        stay[image.row, self.at[i]] = True
        if gone and not image.keep_separators:
            stay[image.row, self.separators[i]] = False
            gone += len(self.separators[i])
            self.separators[i] = self.separators[i][:0]
        self.index[i] = self.index[i][done.indices]
        self.places[i] = self.places[i][done.indices] if done.places is None else done.places
        self.grids[i] = done.grids
        if done.features is not None:
            merged.append((i, image.row, done.features))
        return gone

    def _renumber(self, stay: Tensor, lengths: Sequence[int]) -> Tensor:
        """The old slot of each new one, (S, n'); slots that are tracked move along."""
        longest, device = max(lengths), stay.device
        self.layer_mask = torch.tensor([[j >= longest - length for j in range(longest)] for length in lengths])
        pads = torch.tensor([longest - length for length in lengths], device=device)[:, None]
        order = (~stay).to(torch.uint8).argsort(dim=1, stable=True)
        source = order.gather(1, (torch.arange(longest, device=device)[None] - pads).clamp(min=0))
        rank = (stay.long().cumsum(1) - 1 + pads).clamp(min=0)
        for i, image in enumerate(self.staging.images):
            self.at[i], self.separators[i] = rank[image.row, self.at[i]], rank[image.row, self.separators[i]]
        self.text, self.read = ([rank[row, at] for row, at in enumerate(part)] for part in (self.text, self.read))
        self.last = rank.gather(1, self.last[:, None])[:, 0]
        return source

    def restore(self, hidden: Tensor) -> Tensor:
        """A column whose token went gets the state of the one before it, which is what predicts the token after it.

        Raises ``NotFiniteError`` where NaN or infinity was among what a stage looked at: the one time that the CPU waits for it.
        """
        self.watch.read()
        if self.segment is None:
            return hidden
        n = self.layer_mask.shape[1]
        valid, columns = self.layer_mask.to(hidden.device), self.columns.to(hidden.device)
        here = torch.zeros(len(valid), self.staging.length, dtype=torch.long, device=hidden.device)
        here = here.scatter_add(1, columns, valid.long())
        slots = (here.cumsum(1) - 1 + (~valid).sum(1, keepdim=True)).clamp(min=0)
        rows = self.rows(slots, hidden)
        return torch.cat([hidden[:, :n].gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1])), hidden[:, n:]], 1)
