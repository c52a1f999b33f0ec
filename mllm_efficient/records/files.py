"""Files of records: a JSON list, or JSONL with a record a line. Every problem is told with its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import MllmEfficientError
from ..parsing import after_space, json_value, parse_json
from .forms import record_of
from .record import UNANSWERED, Record

SHOWN = 5  # problems that an error names; it counts the others


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used. said: with the place."""

    said: str


def read(path: Path, image_folder: Path | None = None, between: str = ":", learned: bool = False) -> list[Record]:
    """The records of a file. Images are looked for, but not opened.

    image_folder: where the paths of images begin; the folder of the file if None. between: what stands between file and line in
    messages. learned: whether the last question must have an answer. Raises ``MllmEfficientError`` in one line with the places of the
    first five problems and the number of all.
    """
    records, bad = read_all(path, image_folder, between, learned)
    if bad:
        fail(bad)
    return records


def fail(bad: Sequence[Bad]) -> NoReturn:
    """Raises what is wrong, the first five problems and the number of all."""
    shown = f"the first {SHOWN}: " if len(bad) > SHOWN else ""
    told = "; ".join(b.said for b in bad[:SHOWN])
    raise MllmEfficientError(told if len(bad) == 1 else f"{len(bad)} problems in the data, {shown}{told}")


def read_all(
    path: Path, image_folder: Path | None = None, between: str = ":", learned: bool = False, look: bool = True
) -> tuple[list[Record], list[Bad]]:
    """The records of a file that can be used, and what is wrong with the others. look: whether images must be there.

    Raises ``MllmEfficientError`` for a file that cannot be read or holds nothing.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MllmEfficientError(f"cannot read the data {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MllmEfficientError(f"{path} is not UTF-8 text: {error}") from None
    folder = path.parent if image_folder is None else image_folder
    records, bad = list[Record](), list[Bad]()
    for place, usual, entry in _list_entries(text) if text.lstrip().startswith("[") else _line_entries(text):
        name = f"{path}{between}{place}"
        try:
            if isinstance(entry, MllmEfficientError):
                raise entry
            record = record_of(entry, folder.expanduser(), name, usual, look)
            if learned and record.turns[-1][1] is None:
                raise MllmEfficientError(UNANSWERED)
            records.append(record)
        except MllmEfficientError as error:
            bad.append(Bad(f"{name}: {error}"))
    if not records and not bad:
        raise MllmEfficientError(f"{path} holds no record")
    return records, bad


def _line_entries(text: str) -> Iterator[tuple[str, str, Any]]:
    """(line number, usual id, object or error) of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield str(number), f"line {number}", parse_json(line)
            except MllmEfficientError as error:
                yield str(number), "", error


def _list_entries(text: str) -> Iterator[tuple[str, str, Any]]:
    """(line and record number, usual id, object or error) of the elements of a JSON list, up to where it is no JSON."""
    at, line, counted, number = after_space(text, text.index("[") + 1), 1, 0, 0
    while number or text[at : at + 1] != "]":
        number += 1
        line, counted = line + text.count("\n", counted, at), at
        place = f"{line} (record {number})"
        try:
            entry, at = json_value(text, at)
        except MllmEfficientError as error:
            yield place, "", error
            return
        yield place, f"record {number}", entry
        at = after_space(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            yield place, "", MllmEfficientError("not JSON: no ',' or ']' after the record")
            return
        at = after_space(text, at + 1)
    if text[at + 1 :].strip():
        yield str(text.count("\n", 0, at) + 1), "", MllmEfficientError("not JSON: the list ends here, and more follows")
