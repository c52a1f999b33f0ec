"""Clocks, interleaved repeats, and what is said of the samples: medians with quartiles, paired ratios with an interval."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from ..stats import interval, picks

T = TypeVar("T")


class Clock:
    """The monotonic clock of a machine whose work is done when a call returns, which a CPU's is."""

    name = "perf_counter"

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now

    def wait(self) -> None:
        """Returns when the device has nothing left to do."""

    def stamp(self) -> Any:
        """A mark after the work handed to the device so far."""
        return self._now()

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds from one stamp to another; call ``wait`` first."""
        return 1000 * (end - begin)

    def run(self, work: Callable[[], T]) -> tuple[float, T]:
        """Milliseconds that ``work`` takes until the device has finished it, and what it returns."""
        self.wait()
        begin = self.stamp()
        out = work()
        end = self.stamp()
        self.wait()
        return self.between(begin, end), out


class EventClock(Clock):
    """Events on a CUDA device: the work's own time line, read after synchronisation. A stamp makes nothing wait."""

    name = "CUDA events"

    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end)


class SynchronisedClock(Clock):
    """The monotonic clock after synchronising every device, for a model on several of them or on another accelerator."""

    name = "perf_counter after synchronisation"

    def __init__(self, devices: Iterable[torch.device]):
        super().__init__()
        self.devices = tuple(devices)

    def wait(self) -> None:
        for device in self.devices:
            torch.accelerator.synchronize(device)

    def stamp(self) -> Any:
        self.wait()
        return self._now()


def devices_of(model: Any) -> list[torch.device]:
    """Accelerators that a model's parameters lie on; empty for one on the CPU."""
    found = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    return sorted(found, key=str)


def clock_for(devices: Sequence[torch.device]) -> Clock:
    """The clock for work on these accelerators; none of them means the CPU."""
    if not devices:
        return Clock()
    if len(devices) == 1 and devices[0].type == "cuda":
        return EventClock(devices[0])
    return SynchronisedClock(devices)


@dataclass
class Series:
    """Samples of one arm: for each quantity one value per repeat. failed: why the arm was given up, if it was."""

    name: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    failed: str | None = None

    def add(self, sample: dict[str, float]) -> None:
        for name, value in sample.items():
            self.samples.setdefault(name, []).append(value)

    def values(self, name: str) -> list[float]:
        return [] if self.failed else self.samples.get(name, [])


S = TypeVar("S", bound=Series)


ORDER = "in turn in every repeat, each order drawn by the seed and then taken backwards"


def interleave(
    arms: Sequence[S],
    turn: Callable[[S], dict[str, float]],
    *,
    warmup: int,
    repeats: int,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> None:
    """One turn of each arm after the other, again and again; the first ``warmup`` rounds are thrown away.

    A round's order is drawn, and the next round takes it backwards: what becomes slower from turn to turn (a machine that warms up)
    is as often before another as after it. An arm that raises is marked failed and left out from then on; the others go on. Garbage
    is collected between turns and never within one.
    """
    for round_, order in enumerate(orders(len(arms), warmup + repeats, seed)):
        for arm in (arms[i] for i in order):
            if arm.failed is None:
                sample = attempt(arm, partial(turn, arm))
                if sample is not None and round_ >= warmup:
                    arm.add(sample)
            done()


def orders(arms: int, rounds: int, seed: int = 0) -> Iterator[list[int]]:
    """The places of the arms in each round."""
    rng, order = np.random.default_rng(seed), list[int]()
    for round_ in range(rounds):
        order = order[::-1] if round_ % 2 else rng.permutation(arms).tolist()
        yield order


def attempt(arm: Series, work: Callable[[], T]) -> T | None:
    """What ``work`` returns; None, and the arm marked failed, if it raises."""
    try:
        with without_gc():
            return work()
    except Exception as error:
        arm.failed = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    free()
    return None


@contextlib.contextmanager
def quick_gc() -> Iterator[None]:
    """Garbage collection inside does not look at what is there already, which takes longer than a short turn."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """No garbage collection inside."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
        gc.collect()


def free() -> None:
    """Gives back what a failed or finished call left on the devices."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int] | None:
    """``{median, q1, q3, n}`` of samples; None without any."""
    if not values:
        return None
    q1, median, q3 = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
    return {"median": round(float(median), digits), "q1": round(float(q1), digits), "q3": round(float(q3), digits), "n": len(values)}


def paired(over: Sequence[float], under: Sequence[float], seed: int = 0) -> dict[str, float | int] | None:
    """The median of ratios over / under of the same repeat: ``{median, low, high, n}``.

    low, high: 95% over resampled repeats, of their medians. None where a side has no samples.
    """
    if not len(over) or not len(under):
        return None
    if len(over) != len(under):
        raise ValueError(f"{len(over)} and {len(under)} samples are not pairs")
    ratios = np.asarray(over, dtype=float) / np.asarray(under, dtype=float)
    low, high = interval(np.concatenate([np.median(ratios[drawn], axis=1) for drawn in picks(len(ratios), seed)]), len(ratios))
    return {"median": round(float(np.median(ratios)), 5), "low": round(low, 5), "high": round(high, 5), "n": len(ratios)}
