"""Trained parts: their modules, their folders, how they are put into a model and out."""

from typing import Any


def __getattr__(name: str) -> Any:
    from ..moved import moved_name

    return moved_name("trained", name)
