"""What a long run says while it works: lines for the reader, and how far it has come."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

EVERY = 30.0  # seconds between two lines where no terminal shows a bar


@dataclass
class Progress:
    """Lines and bars on stderr. quiet: neither, but for what ``warn`` says. A log file gets a line now and then instead of a bar."""

    quiet: bool = False
    clock: Callable[[], float] = time.monotonic

    def say(self, text: str) -> None:
        """A line about what is being done."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line that has to be read: what failed, what numbers do not mean."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, total: int, unit: str) -> Iterator[Bar]:
        """Shows how far a run of ``total`` steps is. unit: what is counted, such as "answer"."""
        if self.quiet:
            yield Bar(total)
        elif not sys.stderr.isatty():
            yield Lines(total, unit, self.say, self.clock)
        else:
            from tqdm import tqdm

            with tqdm(total=total, unit=unit, mininterval=1) as shown:
                yield Drawn(total, shown)


@dataclass
class Bar:
    """Counts, and shows nothing."""

    total: int
    done: int = field(default=0, init=False)

    def update(self, steps: int = 1) -> None:
        self.done += steps

    def longer(self, steps: int) -> Callable[..., None]:
        """Adds steps to the total; what is called after each of them."""
        self.total += steps
        return self.update


@dataclass
class Drawn(Bar):
    """tqdm's bar."""

    shown: object

    def update(self, steps: int = 1) -> None:
        super().update(steps)
        self.shown.update(steps)  # type: ignore[attr-defined]

    def longer(self, steps: int) -> Callable[..., None]:
        super().longer(steps)
        self.shown.total = self.total  # type: ignore[attr-defined]
        self.shown.refresh()  # type: ignore[attr-defined]
        return self.update


@dataclass
class Lines(Bar):
    """A line every ``EVERY`` seconds, for log files."""

    unit: str
    say: Callable[[str], None]
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.began = self.last = self.clock()

    def update(self, steps: int = 1) -> None:
        super().update(steps)
        now = self.clock()
        if now - self.last >= EVERY and self.done < self.total:
            self.last, gone = now, now - self.began
            left = gone * (self.total - self.done) / self.done if self.done else 0.0
            share = 100 * self.done / self.total
            self.say(f"{self.done:,} of {self.total:,} {self.unit}s ({share:.0f}%), {_minutes(gone)} so far, about {_minutes(left)} to go")


def _minutes(seconds: float) -> str:
    """``1:05``, ``2:00:09``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Silent(Progress):
    """Nothing at all, as in the processes of a launcher that are not the first."""

    def warn(self, text: str) -> None:
        pass


SILENT = Silent(quiet=True)
