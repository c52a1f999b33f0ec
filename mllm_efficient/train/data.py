"""Training conversations: a user's own records, all with answers, or the embedded benchmark's scenes, a record each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from ..errors import MllmEfficientError
from ..records import MARKER, Record
from ..records import read as read_records


def read(path: Path, image_folder: Path | None = None) -> list[Record]:
    """The conversations of a file (see ``records.read``). Raises also where one ends with a question."""
    return read_records(path, image_folder, learned=True)


class BuiltinRecords(Sequence[Record]):
    """Scenes of the embedded benchmark's generator, a record each, made when asked for. See ``builtin_records``."""

    def __init__(self, split: str, scenes: int, questions: int, images: Any, natural: bool, seed: int):
        self.split, self.scenes, self.questions = split, scenes, questions
        self.images, self.natural, self.seed = images, natural, seed

    def __len__(self) -> int:
        return self.scenes

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        import numpy as np
        from PIL import Image

        from ..eval.builtin.recipe.data import training_questions
        from ..eval.builtin.scenes import make_scene

        scene = make_scene(self.split, index)
        pixels = scene.draw() if self.images is None else np.array(self.images[index])
        pool = training_questions(scene)
        chosen = [pool[i] for i in np.random.default_rng([self.seed, index]).choice(len(pool), self.questions, replace=False)]
        turns = [(q.natural if self.natural else q.text, q.answer) for q in chosen]
        turns[0] = (f"{MARKER}\n{turns[0][0]}", turns[0][1])
        return Record((Image.fromarray(pixels),), tuple(turns), f"builtin/{self.split}/{index}")


def builtin_records(
    split: str, scenes: int, questions: int, folder: Path | None = None, natural: bool = False, seed: int = 0
) -> BuiltinRecords:
    """The first scenes of a split ("train" or "val"), each with ``questions`` of the 24 drawn for it, the same ones every time.

    folder: where the pictures are kept once drawn (about 3 ms each); None draws them whenever asked for. natural: the
    form for other models, which asks for one word; the embedded model is asked the short form.
    """
    from ..eval.builtin.recipe.data import POOL, build

    if split not in ("train", "val"):
        raise MllmEfficientError(f"split {split!r} is not train or val")
    if scenes < 1 or not 1 <= questions <= POOL:
        raise MllmEfficientError(f"{scenes} scenes with {questions} questions each: at least 1 scene, and 1 to {POOL} questions")
    images = None if folder is None else build(split, scenes, folder)["images"]
    return BuiltinRecords(split, scenes, questions, images, natural, seed)
