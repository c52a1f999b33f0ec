"""What feeds a training: the collator over records, and what is done about records that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MllmEfficientError
from ..records import Record

SKIPPED = "skipped"  # in a batch: (1,) how many of its records stand in for ones that cannot be used
IN_A_ROW = 1000  # records that cannot be used, after which the data as a whole is at fault
Collate = Callable[[Sequence[Record]], dict[str, Tensor]]


class Skipping:
    """Indices of records to a batch, in which the next record that can be used takes the place of one that cannot.

    The batch's ``skipped`` (1,) counts them. A record is said once by each process. Raises ``MllmEfficientError`` where none of 1,000
    records in a row can be used.
    """

    def __init__(self, collate: Collate, records: Sequence[Record]):
        self.collate, self.records = collate, records
        self.bad: set[int] = set()

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen, skipped = list(indices), 0
        if not self.bad.intersection(chosen):
            try:
                return self.collate([self.records[i] for i in chosen]) | {SKIPPED: torch.tensor([0])}
            except MllmEfficientError:
                pass  # which record it was, each alone will say
        for place, index in enumerate(indices):
            chosen[place] = self._usable(index)
            skipped += chosen[place] != index
        return self.collate([self.records[i] for i in chosen]) | {SKIPPED: torch.tensor([skipped])}

    def _usable(self, start: int) -> int:
        """The first record from ``start`` on that can be encoded; after the last comes the first."""
        for step in range(min(IN_A_ROW, len(self.records))):
            index = (start + step) % len(self.records)
            if index in self.bad:
                continue
            try:
                self.collate([self.records[index]])
            except MllmEfficientError as error:
                self.bad.add(index)
                print(f"skipped: {error}", file=sys.stderr, flush=True)
            else:
                return index
        raise MllmEfficientError("no record can be used: the lines above say why (data.on_bad=stop stops at the first)")


def feed(collate: Collate, records: Sequence[Record], on_bad: str) -> tuple[Sequence[Any], Callable[[Any], dict[str, Tensor]]]:
    """A data set and the collator that makes batches of its items."""
    return (range(len(records)), Skipping(collate, records)) if on_bad == "skip" else (records, collate)
