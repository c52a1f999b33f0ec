"""The embedded models and benchmarks: test instruments that run offline, not evidence about large models."""

from __future__ import annotations

from collections.abc import Sequence

EMBEDDED = ("builtin", "builtin-hard")  # the names of ``suites.SUITES``, here so that they are known without importing those


def is_public(tasks: str | Sequence[str] | None, suite: str | None) -> bool:
    """Whether public benchmarks are asked for, and not an embedded one or a user's own requests."""
    return tasks is not None or suite not in (None, *EMBEDDED)
