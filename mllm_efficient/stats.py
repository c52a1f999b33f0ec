"""How sure a number is: one bootstrap over clusters for every command, exact bounds where it degenerates, bounds for many cells at once.

Whatever belongs together is drawn together: the questions about an image, a request, the arms of a timed repeat. The same number of
clusters, seed and name draw the same resamples, so everything that shares them is paired.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 2000
TAIL = 0.025  # of each end of a 95% interval, and of the lower bound by which a recommendation is made
FEW = 10  # clusters that differ; below that the resamples have too few values to be a distribution
BLOCK, CACHED = 100, 2000  # resamples drawn at a time; clusters up to which they are kept for the next call


# ----------------------------------------------------------------------------------------------------- resamples


def picks(clusters: int, seed: int = 0, name: str = "") -> Iterator[np.ndarray]:
    """(BLOCK, clusters) the clusters of so many resamples, until there are ``RESAMPLES``. name: of what is drawn from.

    Two tasks of as many images, which have other names, draw independently.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    for _ in range(RESAMPLES // BLOCK):
        yield rng.integers(0, clusters, (BLOCK, clusters))


def _counts(clusters: int, seed: int, name: str) -> Iterator[np.ndarray]:
    rows = clusters * np.arange(BLOCK)[:, None]
    for drawn in picks(clusters, seed, name):
        yield np.bincount((drawn + rows).ravel(), minlength=BLOCK * clusters).reshape(BLOCK, clusters).astype(float)


@functools.lru_cache(maxsize=4)
def _kept(clusters: int, seed: int, name: str) -> np.ndarray:
    out = np.concatenate(list(_counts(clusters, seed, name)))
    out.flags.writeable = False
    return out


def draws(clusters: int, seed: int = 0, name: str = "") -> np.ndarray:
    """(RESAMPLES, clusters) how often each cluster is in each resample."""
    return _kept(clusters, seed, name) if clusters <= CACHED else np.concatenate(list(_counts(clusters, seed, name)))


def blocks(clusters: int, seed: int = 0, name: str = "") -> Iterator[np.ndarray]:
    """The rows of ``draws``, a part at a time where they are too many to keep."""
    yield from [_kept(clusters, seed, name)] if clusters <= CACHED else _counts(clusters, seed, name)


def sums(values: np.ndarray, seed: int = 0, name: str = "") -> np.ndarray:
    """(RESAMPLES, columns) the sums of values (clusters, columns) over each resample's clusters."""
    return np.concatenate([block @ values for block in blocks(len(values), seed, name)])


def grouped(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of each key, in the order in which keys appear: the members of every cluster."""
    out: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        out.setdefault(key, []).append(i)
    return list(out.values())


# ------------------------------------------------------------------------------------------------------ intervals


def interval(values: np.ndarray, clusters: int | None = None, tail: float = TAIL) -> tuple[float, float]:
    """The bounds that resampled values leave, ``tail`` on either side; NaN among them, which have no value, are passed over.

    Percentiles, moved outwards for few clusters as Student's t is (Hesterberg, arXiv 1411.5279). clusters: None for so many that it
    does not matter.
    """
    low = 100 * (tail if clusters is None else widened(tail, clusters))
    ends = np.nanpercentile(values, [low, 100 - low])
    return float(ends[0]), float(ends[1])


@functools.lru_cache(maxsize=1024)
def widened(tail: float, clusters: int) -> float:
    """The tail of resamples that stands for a tail of the truth: resamples of n clusters spread too little, by sqrt((n - 1) / n)
    and by what the standard error is unsure of."""
    if clusters < 2:
        return 0.0
    return NormalDist().cdf(-student(tail, clusters - 1) * math.sqrt(clusters / (clusters - 1)))


def student(tail: float, degrees: int) -> float:
    """The value above which Student's t has ``tail`` of its mass (below a half)."""
    x = beta_quantile(2 * tail, degrees / 2, 0.5)
    return math.sqrt(degrees * (1 - x) / x) if x > 0 else math.inf


def proportion(successes: float, n: float, tail: float = TAIL) -> tuple[float, float]:
    """Clopper-Pearson's bounds of a proportion, ``tail`` on either side. Counts may be fractions (weights).

    Sums of independent numbers in [0, 1] spread at most as binomial counts of the same mean do, so the bounds also hold for
    a mean of such numbers.
    """
    low = beta_quantile(tail, successes, n - successes + 1) if successes > 0 else 0.0
    high = beta_quantile(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return low, high


def needed(lost: float, tail: float = TAIL) -> int | None:
    """How many clusters without a single loss prove that at most a share ``lost`` is lost; None where no number does."""
    if lost <= 0:
        return None
    return 1 if lost >= 1 else math.ceil(math.log(tail) / math.log1p(-lost))


@dataclass(frozen=True)
class Estimate:
    """A mean over clusters, as a score or as a difference of two scores, with all that its bounds are made of.

    value: in points. drawn: (RESAMPLES,) of it. clusters: there are. origin: what value would be without gain and loss: 100 for
    a score, 0 for a difference. gain, loss: shares of the whole, value = origin + 100 (gain - loss). weight: clusters of equal
    size that would be as many (Kish). up, down: clusters that gain and that lose; of a score those with something right and those
    with something wrong. counted: whether it is one count of whole clusters, as the share of requests answered alike.
    """

    value: float
    drawn: np.ndarray
    clusters: int
    origin: float
    gain: float
    loss: float
    weight: float
    up: int
    down: int
    counted: bool

    @property
    def exactly(self) -> bool:
        """Whether exact bounds hold: there is one count to bound, or so few clusters differ that resamples do not stand for the truth."""
        return self.counted or (min(self.up, self.down) if self.origin else self.up + self.down) < FEW

    def interval(self, tail: float = TAIL) -> tuple[float, float]:
        """The bounds, ``tail`` on either side: those of the resamples, or the wider of these and exact ones; of a plain count out of
        clusters of one size exact ones alone."""
        exact = self.exact(tail) if self.exactly else None
        if exact is not None and self.counted and self.origin and abs(self.weight - self.clusters) < 1e-6:
            return exact
        low, high = interval(self.drawn, self.clusters, tail)
        if exact is None:
            return low, high
        return min(low, exact[0]), max(high, exact[1])

    def exact(self, tail: float) -> tuple[float, float]:
        """Clopper-Pearson's bounds of a score's losses; of a difference those of the share that differs and, as in McNemar's exact
        test, of the gains among it."""
        fewest, most = proportion(min(self.gain + self.loss, 1.0) * self.weight, self.weight, tail)
        if self.origin:
            return self.origin - 100 * most, self.origin - 100 * fewest
        low, high = (2 * share - 1 for share in proportion(self.up, self.up + self.down, tail)) if self.up + self.down else (-1.0, 1.0)
        return 100 * low * (most if low < 0 else fewest), 100 * high * (most if high > 0 else fewest)


def estimate(value: float, drawn: np.ndarray, shares: np.ndarray, own: np.ndarray, base: np.ndarray | None = None) -> Estimate:
    """A score, or with ``base`` the difference of two.

    value, drawn: in points. shares: (clusters,) how much of the whole each cluster is, 1 in all; own, base: (clusters,) how much
    of the whole each cluster contributes to either score, between 0 and its share.
    """
    change = own - (shares if base is None else base)
    up, down = (int((part > 1e-12).sum()) for part in (own if base is None else change, -change))
    gain, loss = float(change.clip(min=0).sum()), float(-change.clip(max=0).sum())
    whole = bool((np.minimum(np.abs(change), np.abs(np.abs(change) - shares)) < 1e-12).all())
    return Estimate(
        value, drawn, len(shares), 100.0 if base is None else 0.0, gain, loss, float(shares.sum() ** 2 / (shares**2).sum()), up, down,
        whole and not (gain and loss),
    )  # fmt: skip


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of estimates of different things, which were drawn by themselves."""
    n = len(parts)
    value, origin, gain, loss = (sum(getattr(p, name) for p in parts) / n for name in ("value", "origin", "gain", "loss"))
    weight = n * n / sum(1 / p.weight for p in parts)
    return Estimate(
        value, np.mean([p.drawn for p in parts], 0), min(p.clusters for p in parts), origin, gain, loss, weight,
        sum(p.up for p in parts), sum(p.down for p in parts), False,
    )  # fmt: skip


def points(bounds: tuple[float, float]) -> tuple[float, float]:
    """Bounds as rows have them, to two decimals."""
    return round(bounds[0], 2), round(bounds[1], 2)


def lower_bounds(cells: Sequence[Estimate], tail: float = TAIL) -> list[float]:
    """Lower bounds that hold for all cells at once, but for ``tail`` of the runs. The cells must share their resamples.

    The largest of the cells' deviations, each in its own standard errors, is resampled (max-T): cells that go up and down together
    cost little. A cell that has an exact bound has it at an equal share of the tail.
    """
    many = [c for c in cells if not c.exactly]
    each = tail / max(len(cells), 1)
    if many:
        scale = np.array([c.drawn.std() for c in many])
        below = np.stack([c.value - c.drawn for c in many], 1) / np.where(scale > 0, scale, 1.0)
        left = widened(each * len(many), min(c.clusters for c in many))
        most = float(np.quantile(below.max(1), 1 - left))
    return [c.interval(each)[0] if c.exactly else c.value - most * float(c.drawn.std()) for c in cells]


def wider(low: float, value: float, cells: int) -> float:
    """A lower bound at ``TAIL`` as one that holds for so many cells at once, where there are no resamples any more (Bonferroni)."""
    normal = NormalDist()
    return value - (value - low) * normal.inv_cdf(TAIL / max(cells, 1)) / normal.inv_cdf(TAIL)


# ------------------------------------------------------------------------------------------- accuracy by category


class Hits:
    """Correct answers and questions of one method by image and category: two arrays (images, categories)."""

    def __init__(self, rows: Sequence[dict[str, Any]], images: Sequence[Any], tasks: Sequence[str]):
        at_image, at_task = {v: i for i, v in enumerate(images)}, {v: i for i, v in enumerate(tasks)}
        self.right = np.zeros((len(images), len(tasks)))
        self.asked = np.zeros((len(images), len(tasks)))
        for row in rows:
            where = at_image[row["image"]], at_task[row["task"]]
            self.asked[where] += 1
            self.right[where] += row["correct"]

    def contributions(self) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays (images, categories + 2), the last columns macro and micro: each image's part of the whole, and how much of it
        is right. A category without a question is 0."""
        asked = self.asked.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = [np.nan_to_num(part / asked) for part in (self.asked, self.right)]
        have = max(int((asked > 0).sum()), 1)
        macro = [e.sum(1, keepdims=True) / have for e in each]
        micro = [part.sum(1, keepdims=True) / max(asked.sum(), 1) for part in (self.asked, self.right)]
        shares, right = (np.concatenate(parts, 1) for parts in zip(each, macro, micro))
        return shares, right


def accuracy(hits: Hits, weights: np.ndarray) -> np.ndarray:
    """Percent right per resample: (resamples, categories + 2); the last two are macro and micro.

    Macro is the unweighted mean of the categories that have questions. A category without a question is NaN.
    """
    right, asked = weights @ hits.right, weights @ hits.asked
    with np.errstate(invalid="ignore", divide="ignore"):
        each = 100 * right / asked
        micro = 100 * right.sum(1) / asked.sum(1)
    have = hits.asked.sum(0) > 0
    macro = np.nanmean(each[:, have], axis=1) if have.any() else np.full(len(weights), np.nan)
    return np.concatenate([each, macro[:, None], micro[:, None]], 1)


class Scores:
    """Accuracy of several methods on the same questions, all on the same resamples of images."""

    def __init__(self, by_arm: dict[str, Sequence[dict[str, Any]]], images: Sequence[Any], tasks: Sequence[str], seed: int = 0):
        weights = draws(len(images), seed)
        hits = {arm: Hits(rows, images, tasks) for arm, rows in by_arm.items()}
        self.values = {arm: accuracy(h, np.ones((1, len(images))))[0] for arm, h in hits.items()}
        self.drawn = {arm: accuracy(h, weights) for arm, h in hits.items()}
        self.parts = {arm: h.contributions() for arm, h in hits.items()}

    def of(self, arm: str, column: int, base: str | None = None) -> Estimate:
        """A method's score in a category (``Hits``' columns), or its difference to another method's."""
        shares, own = (part[:, column] for part in self.parts[arm])
        asked = shares > 0
        value, drawn = self.values[arm][column], self.drawn[arm][:, column]
        if base is None:
            return estimate(float(value), drawn, shares[asked], own[asked])
        theirs = self.parts[base][1][:, column]
        return estimate(
            float(value - self.values[base][column]), drawn - self.drawn[base][:, column], shares[asked], own[asked], theirs[asked]
        )  # fmt: skip


# ----------------------------------------------------------------------------- the beta distribution, without scipy


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b): the share of a beta distribution below x.

    A continued fraction (DLMF 8.17.22, by Lentz's method), on the side where it converges quickly. scipy has it, and no dependency
    of the package brings scipy along: 113 MB for one function.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / ((1 + term * d) or tiny), (1 + term / c) or tiny
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * value


def beta_quantile(p: float, a: float, b: float) -> float:
    """The x with ``beta_cdf(x, a, b) = p``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
    return (low + high) / 2
