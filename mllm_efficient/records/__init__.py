"""Records: a user's conversations about images, read in one place for ``eval --data``, ``sweep --data`` and ``train``."""

from __future__ import annotations

from .files import Bad, read, read_all
from .record import MARKER, Record

__all__ = ["MARKER", "Bad", "Record", "read", "read_all"]
