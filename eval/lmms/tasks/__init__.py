"""Tasks of our own for lmms-eval, as YAML beside their functions. Their names begin with ``me_``: among equal names lmms-eval's win."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
