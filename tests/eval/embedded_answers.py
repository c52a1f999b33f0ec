"""What an embedded model answers to validation questions, for tests of those that ship."""

from __future__ import annotations

from mllm_efficient.eval.builtin.suites import embedded_suite
from mllm_efficient.eval.runner import Run
from mllm_efficient.registry import build


def answered(loaded, specs, limit, suite="builtin", categories=None, **settings):
    """The records of every method, by method."""
    chosen = embedded_suite(suite)
    asked = chosen.samples("val", limit, categories or chosen.categories)
    records = Run(loaded, asked, [build(s) for s in specs], suite=chosen, **settings).answer_all()
    assert not [r["error"] for r in records if r["error"]]
    return {name: [r for r in records if r["method"] == name] for name in dict.fromkeys(r["method"] for r in records)}


def share(records):
    """Of right answers."""
    return sum(r["correct"] for r in records) / len(records)
