"""Intervals that cover what they say, exact bounds where a bootstrap has nothing to draw, and bounds for many cells at once."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from mllm_efficient import stats
from mllm_efficient.eval.calibration import Watched, calibrated, calibration, columns
from mllm_efficient.eval.lmms.scores import clustered
from mllm_efficient.eval.report.recommend import bounded, recommend

pytestmark = pytest.mark.once

# ------------------------------------------------------------------------------------------- against slow references


def test_resamples_are_counts_of_picks_and_depend_on_seed_and_name():
    slow = np.array([[list(row).count(i) for i in range(7)] for block in stats.picks(7, 3) for row in block])
    assert np.array_equal(stats.draws(7, 3), slow) and slow.shape == (stats.RESAMPLES, 7) and (slow.sum(1) == 7).all()
    assert not np.array_equal(stats.draws(7, 4), slow) and not np.array_equal(stats.draws(7, 3, "pope"), slow)
    many = np.random.default_rng(0).random((stats.CACHED + 1, 2))  # drawn in blocks, not kept
    assert np.allclose(stats.sums(many), stats.draws(len(many)) @ many)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Clopper and Pearson's 95% bounds as tables have them
        (0, 10, 0.0, 0.3085), (1, 10, 0.0025, 0.4450), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (8, 8, 0.6306, 1.0),
        (0, 100, 0.0, 0.0362), (5, 100, 0.0164, 0.1128), (368, 368, 0.9900, 1.0),
    ],
)  # fmt: skip
def test_bounds_of_proportions_are_those_of_tables(successes, n, low, high):
    assert stats.proportion(successes, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("n", "tail"), list(product((1, 7, 40), (0.025, 0.025 / 24, 0.2))))
def test_exact_bounds_cover_by_counting_binomial_outcomes(n, tail):
    """The mass of the outcomes whose lower bound is above the truth is at most the tail, whatever the truth."""
    for truth in np.linspace(0.01, 0.99, 13):
        mass = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
        bounds = [stats.proportion(k, n, tail) for k in range(n + 1)]
        assert sum(m for m, b in zip(mass, bounds) if b[0] > truth) <= tail + 1e-9
        assert sum(m for m, b in zip(mass, bounds) if b[1] < truth) <= tail + 1e-9


def test_students_t_is_that_of_tables():
    found = [stats.student(tail, degrees) for tail, degrees in ((0.025, 1), (0.025, 9), (0.05, 30), (0.005, 5), (0.025, 1000))]
    assert found == pytest.approx([12.7062, 2.2622, 1.6973, 4.0321, 1.9623], abs=1e-4)


def test_how_many_agreeing_requests_prove_a_bound():
    assert stats.needed(0.01) == 368 and stats.needed(0.01, stats.TAIL / 24) == 684
    assert stats.proportion(367, 367)[0] < 0.99 <= stats.proportion(368, 368)[0] and stats.needed(0.0) is None


def same(n: int, wrong: int = 0, base_wrong: int | None = None) -> stats.Estimate:
    """n requests of which the last are wrong; with ``base_wrong`` its difference to another of which so many are."""
    of_arm = np.array([1.0] * (n - wrong) + [0.0] * wrong) / n
    base = None if base_wrong is None else np.array([1.0] * (n - base_wrong) + [0.0] * base_wrong) / n
    weights = stats.draws(n)
    drawn = 100 * weights @ (of_arm if base is None else of_arm - base)
    return stats.estimate(100 * (of_arm.sum() if base is None else (of_arm - base).sum()), drawn, np.full(n, 1 / n), of_arm, base)


def test_equal_outcomes_have_exact_bounds_instead_of_no_width():
    assert stats.points(same(8).interval()) == (63.06, 100.0) and stats.points(same(8, 8).interval()) == (0.0, 36.94)
    assert stats.points(same(8, 0, 0).interval()) == (-36.94, 36.94)
    assert stats.points(same(400, 3, 3).interval()) == (-0.92, 0.92)  # the same three are wrong
    low, high = same(400, 4, 3).interval()  # one more
    assert low == pytest.approx(-100 * stats.proportion(1, 400)[1]) and high > 0
    assert same(400, 8, 0).interval()[1] < 0 < same(400, 5, 0).interval()[1]  # eight losses and no gain are no chance, five may be


def test_bounds_never_fall_when_an_answer_more_is_right():
    for n in (30, 368, 1000):
        lows = [same(n, wrong, 0).interval()[0] for wrong in range(20)]
        assert all(a > b for a, b in pairwise(lows))


def test_a_bound_for_many_cells_is_the_exact_one_at_an_equal_share_where_nothing_differs():
    assert stats.lower_bounds([same(8)]) == pytest.approx([63.06], abs=0.01)
    assert stats.lower_bounds([same(8)] * 24) == pytest.approx([42.39] * 24, abs=0.01)


def test_one_cell_has_the_bound_of_its_interval_and_twins_cost_nothing():
    right = np.random.default_rng(0).random((2, 500)) < 0.8
    of_arm, base = right / 500
    one = stats.estimate(100 * (of_arm - base).sum(), 100 * stats.draws(500) @ (of_arm - base), np.full(500, 1 / 500), of_arm, base)
    assert not one.exactly
    assert stats.lower_bounds([one])[0] == pytest.approx(one.interval()[0], abs=0.05)
    assert stats.lower_bounds([one] * 20) == pytest.approx(stats.lower_bounds([one]) * 20)


# ------------------------------------------------------------------------------------------------ coverage, simulated

IMAGES = 100
RUNS = {"fast": 150, "full": 1000}
COVERED = {"fast": (0.90, 0.99), "full": (0.93, 0.97)}  # of 95%; 150 runs have a standard error of 1.8%
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def truth(logit: float, sd: float) -> float:
    """The probability of being right over all images, an image's effect being normal."""
    return float((WEIGHTS / WEIGHTS.sum()) @ logistic(logit + sd * NODES))


def pope_like(rng, sd):
    """18 yes-or-no questions an image, the ids in threes."""
    right = rng.random((IMAGES, 18)) < logistic(1.9 + sd * rng.standard_normal((IMAGES, 1)))
    items = [{"question_id": f"{i}/{j // 3}", "score": float(v)} for i, row in enumerate(right) for j, v in enumerate(row)]
    return items, np.repeat(np.arange(IMAGES), 18), truth(1.9, sd)


def gqa_like(rng, sd):
    """32 questions an image, of which the task keeps the score alone."""
    right = rng.random((IMAGES, 32)) < logistic(0.6 + sd * rng.standard_normal((IMAGES, 1)))
    return [float(v) for v in right.ravel()], np.repeat(np.arange(IMAGES), 32), truth(0.6, sd)


def drawn_of(items, clusters) -> stats.Estimate:
    """As rows of public tasks make it."""
    value = float(np.mean([i["score"] if isinstance(i, dict) else i for i in items]))
    parts = clustered(None, items, clusters, value, 1.0)
    right, asked = stats.sums(np.array([parts.right, parts.asked]).T).T
    shares = np.array(parts.asked) / sum(parts.asked)
    return stats.estimate(100 * value, 100 * right / asked, shares, np.array(parts.right) / sum(parts.asked))


def covers(estimate: stats.Estimate, wanted: float) -> bool:
    low, high = estimate.interval()
    return low <= 100 * wanted <= high


def public(shape, sd, runs, clusters=lambda items, images: images) -> float:
    rng = np.random.default_rng(int(10 * sd))
    hits = 0
    for _ in range(runs):
        items, images, wanted = shape(rng, sd)
        hits += covers(drawn_of(items, clusters(items, images)), wanted)
    return hits / runs


def embedded(sd, runs) -> float:
    """Seven categories, most of which every image has; macro accuracy of a method less the baseline's."""
    rng, tasks, logits = np.random.default_rng(int(10 * sd) + 1), [str(i) for i in range(7)], np.linspace(0.2, 2.0, 7)
    wanted = float(np.mean([truth(x, sd) for x in logits])) - float(np.mean([truth(x + 1, sd) for x in logits]))
    hits = 0
    for _ in range(runs):
        effect = sd * rng.standard_normal((IMAGES, 1, 2))  # what is hard for the one is not for the other
        right = rng.random((IMAGES, 7, 2)) < logistic(logits[None, :, None] + [0, 1] + effect)
        there = rng.random((IMAGES, 7)) < 0.95
        rows = {
            arm: [{"image": i, "task": t, "correct": right[i, j, k]} for i in range(IMAGES) for j, t in enumerate(tasks) if there[i, j]]
            for k, arm in enumerate(("method", "none"))
        }
        hits += covers(stats.Scores(rows, range(IMAGES), tasks).of("method", len(tasks), "none"), wanted)
    return hits / runs


SIZES = [pytest.param("fast"), pytest.param("full", marks=pytest.mark.slow)]


@pytest.mark.parametrize("sd", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [pope_like, gqa_like], ids=lambda s: s.__name__)
def test_intervals_of_public_tasks_cover(shape, sd, size):
    low, high = COVERED[size]
    assert low <= public(shape, sd, RUNS[size]) <= high


@pytest.mark.parametrize("sd", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_intervals_of_the_embedded_benchmark_cover(sd, size):
    low, high = COVERED[size]
    assert low <= embedded(sd, RUNS[size]) <= high


@pytest.mark.parametrize(("shape", "most"), [(pope_like, 0.88), (gqa_like, 0.75)], ids=["pope_like", "gqa_like"])
def test_resampling_questions_instead_of_images_would_not_cover(shape, most):
    """What the test above is able to see."""

    def questions(items, images):
        return [item["question_id"] if isinstance(item, dict) else i for i, item in enumerate(items)]

    assert public(shape, 1.0, 100, questions) < most


# ------------------------------------------------------------------------------------------------ recommendations


def cell(method: str, **more) -> dict:
    """A row of a sweep."""
    row = {"method": method, "role": "method", "failed": None, "flops_ratio": 0.5, "ttft_ratio": None, "tasks": {}, "floor": None}
    return row | {"visual_tokens_full": 576.0, "visual_tokens_kept": 64.0} | more


def measured(estimate: stats.Estimate, base: float = 100.0) -> dict:
    low, high = stats.points(estimate.interval())
    score = {"score": base + estimate.value, "score_interval": (base + low, min(base + high, 100.0)), "baseline": base}
    return score | {"difference": estimate.value, "difference_interval": (low, high), "n": estimate.clusters, "clusters": estimate.clusters}


NONE = cell("none", flops_ratio=1.0, **measured(same(1000, 0, 0)) | {"difference_interval": (0.0, 0.0)})


def null_sweeps(runs: int, n: int, cells: int = 24) -> tuple[float, float]:
    """How often a cell is recommended for at most one point lost where all lose exactly one: by bounds for all cells at once, and if
    each went by its own interval."""
    rng, weights, shares = np.random.default_rng(7), stats.draws(n), np.full(n, 1 / n)
    admitted, alone = 0, 0
    for _ in range(runs):
        one = rng.random((n, cells))
        change = ((one < 0.04).astype(float) - (one > 0.95)) / n
        drawn = 100 * weights @ change
        found = {
            f"m{j}": stats.estimate(
                100 * change[:, j].sum(), drawn[:, j], shares, shares / 2 + change[:, j] / 2, shares / 2 - change[:, j] / 2
            )
            for j in range(cells)
        }
        rows = [NONE, *(cell(name, **measured(e)) for name, e in found.items())]
        bounded(rows, found)
        admitted += recommend(rows, 1.0)["method"] != "none"
        alone += any(row["difference_interval"][0] >= -1 for row in rows[1:])
    return admitted / runs, alone / runs


# A share of 5% has a standard error of 1.1% in 400 runs; what is found there is 1.8%.
@pytest.mark.parametrize(("runs", "n", "most"), [(80, 500, 0.08), pytest.param(400, 1000, 0.05, marks=pytest.mark.slow)])
def test_a_sweep_in_which_all_cells_lose_too_much_recommends_none(runs, n, most):
    admitted, alone = null_sweeps(runs, n)
    assert admitted <= most and alone > 0.2


def own(method: str, wrong: int, n: int, labelled: int, wrong_labelled: int, right: int | None = None) -> tuple[dict, stats.Estimate]:
    """A cell of n requests, of which ``wrong`` are answered in other words; ``labelled`` have an answer."""
    agree, base = same(n, wrong, 0), 100.0 * (labelled if right is None else right) / max(labelled, 1)
    metrics = {name: measured(agree) for name in ("exact_match", "normalised_match")}
    if labelled:
        metrics["accuracy"] = measured(same(labelled, wrong_labelled, 0), base)
    return cell(method, **metrics["normalised_match"], metric="normalised_match", agreement=metrics), agree


def sweep_of(*cells, **more) -> dict:
    rows = [{**r, **({"flops_ratio": 1.0} if i == 0 else {"flops_ratio": 0.5 + i / 1000})} for i, (r, _) in enumerate(cells)]
    bounded(rows, {r["method"]: e for r, e in cells})
    return recommend(rows, 1.0)


def test_one_labelled_request_of_four_recommends_nothing():
    chosen = sweep_of(own("none", 0, 4, 1, 0), own("changes one", 1, 4, 1, 0), own("changes none", 0, 4, 1, 0))
    assert chosen["method"] == "none" and "no method and budget here is sure of that" in chosen["line"]
    assert chosen["warnings"] == [
        "measured on only 4 requests",
        "4 requests cannot prove it: it takes at least 437 without a single loss where 2 cells could be picked",
    ]


@pytest.mark.parametrize(("cells", "sure", "least"), [(1, "63.1%", 368), (24, "42.4% with 24 cells to pick from", 684)])
def test_eight_of_eight_prove_little(cells, sure, least):
    chosen = sweep_of(own("none", 0, 8, 0, 0), *(own(f"m{i}", 0, 8, 0, 0) for i in range(cells)))
    assert chosen["method"] == "none" and f"answered in its words, surely {sure}" in chosen["line"]
    assert f"8 requests cannot prove it: it takes at least {least} without a single loss" in chosen["line"]


@pytest.mark.parametrize(("n", "recommended"), [(367, False), (368, True)])
def test_as_many_as_it_takes_are_enough(n, recommended):
    chosen = sweep_of(own("none", 0, n, 0, 0), own("m", 0, n, 0, 0))
    assert (chosen["method"] == "m") == recommended and bool(chosen["warnings"]) != recommended


def test_a_baseline_that_is_never_right_is_no_measure():
    chosen = sweep_of(own("none", 0, 40, 40, 0, right=0), own("m", 30, 40, 40, 0, right=0))
    assert chosen["method"] == "none" and chosen["line"].endswith("nothing that could be lost: check the answers")


def test_the_card_of_the_report_has_the_warning(tmp_path):
    from mllm_efficient.eval.report.merge import Finished
    from mllm_efficient.eval.report.page import page

    from .test_report import finish, own_meta, own_rows

    rows = own_rows()
    for row in rows:
        row["agreement"]["normalised_match"] |= {"n": 60, "clusters": 60}
    text = page(Finished.read(finish(tmp_path / "run", rows, **own_meta())))
    card = text[text.index('id="recommendation"') :]
    assert "Measured on only 60 requests" in card[: card.index("</section>")]


# ---------------------------------------------------------------------------------------------------- calibration


def answers(n: int, sure, right, per_image: int = 3) -> list[dict]:
    return [{"image": i // per_image, "confidence": float(c), "correct": bool(r)} for i, (c, r) in enumerate(zip(sure, right)) if i < n]


def test_calibration_equals_a_slow_count():
    rng = np.random.default_rng(3)
    sure = rng.random(60)
    rows = answers(60, sure, rng.random(60) < sure)
    found = calibration(rows, seed=5)
    bags = [[r for i in drawn for r in rows[3 * i : 3 * i + 3]] for block in stats.picks(20, 5) for drawn in block]

    def ece(bag):
        bins = {}
        for r in bag:
            bins.setdefault(min(int(10 * r["confidence"]), 9), []).append(r)
        gaps = [abs(np.mean([r["confidence"] for r in b]) - np.mean([r["correct"] for r in b])) * len(b) for b in bins.values()]
        return 100 * sum(gaps) / len(bag)

    def aurc(bag):
        ranked = [not r["correct"] for r in sorted(bag, key=lambda r: -r["confidence"])]
        return 100 * np.mean([np.mean(ranked[: k + 1]) for k in range(len(ranked))])

    for name, slow in (("ece", ece), ("aurc", aurc)):
        assert found[name] == pytest.approx(slow(rows), abs=0.006)
        tail = 100 * stats.widened(0.025, 20)
        some = [slow(bag) for bag in bags]
        assert found[f"{name}_interval"] == pytest.approx(np.percentile(some, [tail, 100 - tail]), abs=0.3)


def test_who_knows_when_it_is_wrong_is_better_calibrated():
    right = [True] * 80 + [False] * 20
    knows, boasts = (calibration(answers(100, sure, right)) for sure in ([1.0] * 80 + [0.0] * 20, [1.0] * 100))
    assert knows["ece"] == 0 and boasts["ece"] == 20 and knows["aurc"] < boasts["aurc"]
    assert calibration([{"image": 0, "correct": True}])["ece"] is None


def test_confidence_is_the_geometric_mean_up_to_the_end():
    steps = [torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])), torch.log(torch.tensor([[0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]))]
    ids, watched = torch.tensor([[7, 0, 1], [7, 2, 0]]), Watched()  # behind a prompt of one token; 2 ends the second answer
    assert all(watched(ids[:, : t + 1], step) is step for t, step in enumerate(steps))
    assert watched.confidences([ids[0, 1:], ids[1, 1:2]], ids[:, -1]) == pytest.approx([math.sqrt(0.5 * 0.8), 0.8], abs=1e-6)


def test_what_failed_has_no_confidence_and_takes_it_from_no_other():
    rng = np.random.default_rng(4)
    rows = answers(30, rng.random(30), rng.random(30) < 0.5)
    assert calibration([*rows, {"image": 9, "error": "it broke", "correct": False}]) == calibration(rows)
    assert calibration([{"image": 9, "error": "it broke", "correct": False}])["ece"] is None


def test_calibration_over_tasks_is_the_mean_and_lacks_nothing():
    rng = np.random.default_rng(5)
    parts = [calibrated(answers(60, rng.random(60), rng.random(60) < 0.5), name=name) for name in ("a", "b")]
    both, each = columns(parts), [columns([p]) for p in parts]
    assert both["ece"] == pytest.approx(np.mean([c["ece"] for c in each]), abs=0.011)
    low, high = both["aurc_interval"]
    assert high - low < max(c["aurc_interval"][1] - c["aurc_interval"][0] for c in each)  # drawn by themselves
    assert columns([*parts, None])["ece"] is None and columns([])["ece"] is None
    many = answers(stats.CACHED + 1, rng.random(stats.CACHED + 1), rng.random(stats.CACHED + 1) < 0.5, per_image=1)  # drawn in parts
    low, high = calibration(many)["aurc_interval"]
    assert low < calibration(many)["aurc"] < high
