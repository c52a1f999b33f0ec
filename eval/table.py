"""Records to rows: one per category and one overall for each method, the baseline beside every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_efficient.compressors.base import Compressor
from mllm_efficient.compressors.resize import Resize
from mllm_efficient.stats import Estimate, Scores, points

from .calibration import calibration
from .runner import NO_IMAGE
from .turns import AFTER

OVERALL = "overall"
MORE = {"hard": "hard", "broken": "broken", "ECE": "ece", "AURC": "aurc"}  # columns of the table after the others
CALIBRATION = ("ECE", "AURC")  # those that second turns have too


def rows_of(
    records: Sequence[dict[str, Any]], methods: Sequence[Compressor], tasks: Sequence[str], *, against: str | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows as docs/evaluate.md describes them: scores and retention in percent, intervals from 2,000 paired resamples of images.

    ``methods`` begins with the baseline. ``against`` adds each row's difference to that method. Questions that were the
    second of a conversation have rows of their own after all others (``turns`` 2): their baseline is the uncompressed
    model in its second turn, and ``first_turn`` is the method's score on the same questions asked alone.
    """
    out, alone = [], {(r["method"], r["id"]): r for r in records if r.get("turns", 1) == 1}
    for turns in sorted({r.get("turns", 1) for r in records}):
        by_arm = _by_arm(records, turns)
        first = {_first(arm): [alone[arm, r["id"].partition(AFTER)[0]] for r in rows] for arm, rows in by_arm.items()} if turns > 1 else {}
        scores = _scores({**by_arm, **first}, records, tasks, seed)
        for method in methods:
            arm = method.spec()
            for i, task in enumerate([*tasks, OVERALL]):
                own = [r for r in by_arm[arm] if task in (OVERALL, r["task"])]
                if not own:
                    continue
                row = _row(method, turns, task, own, scores, i)
                if turns > 1:
                    change = scores.of(arm, i, _first(arm))
                    row |= {"first_turn": _round(scores.values[_first(arm)][i]), "turn_difference": _round(change.value)}
                    row["turn_interval"] = points(change.interval())
                if against is not None:
                    row |= {"against": against, **_against(scores, arm, against, i)}
                if task == OVERALL:
                    row |= calibration(own, seed) | hard_and_broken(method, methods, by_arm)
                out.append(row)
    return out


def hard_and_broken(method: Compressor, methods: Sequence[Compressor], by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a method does beside the smaller picture of its budget, in percent (VTC-Bench, its groups A and B).

    ``hard``: right, of the ``hard_n`` questions that the baseline gets right and ``resize`` wrong. ``broken``: wrong, of the
    ``broken_n`` that both get right. None without such a ``resize`` among the methods.
    """
    nothing = dict.fromkeys(("hard", "hard_n", "broken", "broken_n"))
    rival = next((m.spec() for m in methods if m.name == Resize.name and budget_of(m) == budget_of(method)), None)
    if rival is None or budget_of(method) is None or method.name == Resize.name:
        return nothing
    right = {arm: {r["id"]: bool(r["correct"]) for r in by_arm[arm]} for arm in (methods[0].spec(), rival, method.spec())}
    base, small, own = right.values()
    return shares(
        {i: float(v) for i, v in own.items()}, {i for i in base if base[i] and not small[i]}, {i for i in base if base[i] and small[i]}
    )


def shares(scores: dict[str, float], hard: set[str], easy: set[str]) -> dict[str, Any]:
    """``hard``, ``hard_n``, ``broken`` and ``broken_n`` of scores in [0, 1] by sample."""
    hard, easy = hard & set(scores), easy & set(scores)
    lost = 100 * (1 - sum(scores[i] for i in easy) / len(easy)) if easy else None
    return {
        "hard": _round(100 * sum(scores[i] for i in hard) / len(hard)) if hard else None, "hard_n": len(hard),
        "broken": None if lost is None else _round(lost), "broken_n": len(easy),
    }  # fmt: skip


def budget_of(method: Compressor) -> tuple[Any, ...] | None:
    """What two methods have alike that keep as many tokens; None where the budget is no count or share of all tokens."""
    if method.name == "none" or (method.tokens is None and method.fraction is None):
        return None
    return method.fraction, method.tokens, method.min_tokens, method.max_tokens


def differences(
    records: Sequence[dict[str, Any]], methods: Sequence[Compressor], tasks: Sequence[str], *, seed: int = 0
) -> dict[str, Estimate]:
    """Of each method the macro mean less the baseline's, on the questions asked alone. ``methods`` begins with the baseline."""
    scores = _scores(_by_arm(records, 1), records, tasks, seed)
    return {m.spec(): scores.of(m.spec(), len(tasks), "none") for m in methods}


def _by_arm(records: Sequence[dict[str, Any]], turns: int) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("turns", 1) == turns:
            out.setdefault(record["method"], []).append(record)
    return out


def _first(arm: str) -> str:
    return f"{arm} in the first turn"


def _scores(by_arm: dict[str, Any], records: Sequence[dict[str, Any]], tasks: Sequence[str], seed: int) -> Scores:
    return Scores(by_arm, sorted({r["image"] for r in records}), tasks, seed)


def _against(scores: Scores, arm: str, other: str, i: int) -> dict[str, Any]:
    change = scores.of(arm, i, other)
    return {"against_difference": _round(change.value), "against_interval": (0.0, 0.0) if arm == other else points(change.interval())}


def _row(method: Compressor, turns: int, task: str, own: Sequence[dict[str, Any]], scores: Scores, i: int) -> dict[str, Any]:
    """One row. i: the column of the task in the scores."""
    arm = method.spec()
    score, base, change = scores.of(arm, i), scores.of("none", i), scores.of(arm, i, "none")
    row = {
        "method": arm, "keep": method.fraction, "tokens": method.tokens, "turns": turns, "task": task, "metric": "exact_match",
        "score": _round(score.value), "score_interval": points(score.interval()),
        "baseline": _round(base.value), "difference": _round(change.value),
        "difference_interval": (0.0, 0.0) if arm == "none" else points(change.interval()),
        "retention": _round(100 * score.value / base.value) if base.value else None,
        "n": len(own), "clusters": score.clusters, "failures": sum(r["error"] is not None for r in own),
        "floor": _round(scores.values[NO_IMAGE][i]) if NO_IMAGE in scores.values else None,
        "visual_tokens_full": _mean(own, "visual_tokens_full"), "visual_tokens_kept": _mean(own, "visual_tokens_kept"),
        "positions": next((r["positions"] for r in own if r.get("positions")), method.positions or "renumber"),
        "region_share": _mean(own, "region_share", 3), "region_kept": _mean(own, "region_kept", 3),
    }  # fmt: skip
    return row | ({"micro": _round(scores.values[arm][-1])} if task == OVERALL else {})


def _round(value: float, digits: int = 2) -> float:
    return round(float(value), digits)


def _mean(rows: Sequence[dict[str, Any]], key: str, digits: int = 2) -> float | None:
    values = [r[key] for r in rows if r.get(key) is not None]
    return _round(sum(values) / len(values), digits) if values else None


def text_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a line per method with its categories, the floor as the first line, second turns as last columns."""
    tasks = [t for t in tasks if any(r["task"] == t for r in rows)]
    against = any("against" in r for r in rows)
    header = ["method", "tokens", *tasks, "macro", "vs none [95%]", "retention", "in region"]
    header += [f"vs {rows[0]['against']} [95%]"] if against else []
    more = [n for n in MORE if any(r.get(MORE[n]) is not None for r in rows)]
    header += more
    by_method: dict[str, dict[str, dict[str, Any]]] = {}
    second: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("turns", 1) == 1:
            by_method.setdefault(row["method"], {})[row["task"]] = row
        elif row["task"] == OVERALL:
            second[row["method"]] = row
    header += ["2nd turn", "vs none in it [95%]", *(f"{n} in it" for n in CALIBRATION)] if second else []
    first = next(iter(by_method.values()))
    lines = []
    if first[OVERALL]["floor"] is not None:
        lines.append([NO_IMAGE, "0", *(_one(first[t]["floor"]) for t in [*tasks, OVERALL]), "", "", ""] + [""] * (against + len(more)))
        lines[0] += [_one(second["none"]["floor"]), "", *[""] * len(CALIBRATION)] if second else []
    for method, by_task in by_method.items():
        total = by_task[OVERALL]
        share = "" if total["region_share"] is None else f"{100 * total['region_share']:.0f}%"
        kept = "" if total["visual_tokens_kept"] is None else f"{total['visual_tokens_kept']:g}"
        line = [method, kept, *(_one(by_task[t]["score"]) for t in [*tasks, OVERALL]), _change(total)]
        line += [_one(total["retention"]) + "%" if total["retention"] is not None else "", share]
        if against:
            line.append("" if method == total["against"] else _signed(total["against_difference"], total["against_interval"]))
        line += [_one(total[MORE[n]]) for n in more]
        if second:
            line += [_one(second[method]["score"]), _change(second[method]), *(_one(second[method][MORE[n]]) for n in CALIBRATION)]
        lines.append(line)
    return header, lines


def _change(row: dict[str, Any]) -> str:
    return "" if row["method"] == "none" else _signed(row["difference"], row["difference_interval"])


def _signed(value: float, between: Sequence[float]) -> str:
    low, high = between
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _one(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
