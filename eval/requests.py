"""A user's own requests: the records of a file with what identifies each, and the prompt that each is for a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_efficient.errors import MllmEfficientError
from mllm_efficient.loading.models import Loaded
from mllm_efficient.loading.prompts import without_markers
from mllm_efficient.media.images import load_image
from mllm_efficient.records import MARKER, Record, read

BETWEEN = " line "  # the words between file and line in messages


@dataclass(frozen=True)
class Request:
    """A record that is asked its last question. digest: a hash of all that is asked and right, the contents of the images included.

    image_range: of pictures with more than 8 bits.
    """

    record: Record
    digest: str = ""
    image_range: str = "full"

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def images(self) -> tuple[Any, ...]:
        """Files, or bytes of files, in prompt order."""
        return self.record.images

    @property
    def answers(self) -> tuple[str, ...]:
        """What is right, if known."""
        return self.record.answers

    @property
    def question(self) -> str:
        """What the user asks last, for tables."""
        return self.record.turns[-1][0].replace(MARKER, " ").strip()

    def pictures(self) -> list[Any]:
        return [load_image(image, self.image_range) for image in self.images]


def read_requests(path: Path, limit: int | None = None, image_range: str = "full") -> list[Request]:
    """The first ``limit`` requests of a file. Every record is checked, and every image of these requests is read.

    Raises ``MllmEfficientError`` naming the line of what is wrong (see ``records.read``), an image that cannot be read, an id that
    stands twice.
    """
    seen: dict[str, str] = {}
    found = list[Request]()
    for record in read(path, between=BETWEEN):
        if record.id in seen:
            raise MllmEfficientError(f"{record.name}: the id {record.id!r} stands on{seen[record.id].removeprefix(str(path))} too")
        seen[record.id] = record.name
        if limit is None or len(found) < limit:
            found.append(Request(record, _digest(record, image_range), image_range))
    return found


def _digest(record: Record, image_range: str) -> str:
    digest = hashlib.sha256(json.dumps([record.system, record.turns, record.answers, image_range]).encode())
    for image in record.images:
        try:
            load_image(image, image_range)
            content = image if isinstance(image, bytes) else Path(image).read_bytes() if isinstance(image, Path) else image.tobytes()
            digest.update(hashlib.sha256(content).digest())
        except (MllmEfficientError, OSError) as error:
            raise MllmEfficientError(f"{record.name}: {error}") from None
    return digest.hexdigest()[:16]


def prompts_of(requests: Sequence[Request], loaded: Loaded, path: Path) -> list[str]:
    """Each request in the model's chat template. Raises naming the line where its images and placeholders do not fit."""
    out = []
    for request in requests:
        try:
            out.append(_prompt(request.record, loaded))
        except MllmEfficientError as error:
            raise MllmEfficientError(f"{request.record.name}: {error}") from None
    return out


def _prompt(record: Record, loaded: Loaded) -> str:
    if record.system is None and len(record.turns) == 1:
        images = len(record.images)
        return loaded.prompt(without_markers(loaded.processor, record.turns[0][0], images), images)
    return loaded.conversation(record.asked, len(record.images))
