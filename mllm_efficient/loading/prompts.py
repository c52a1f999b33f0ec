"""The one way to a model's inputs: a conversation to text by the chat template, text and pictures to tensors.

Every command, the training and the adapters of other harnesses make their prompts here, so that the same question about the
same pictures has the same tokens everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MllmEfficientError
from .processor import NEEDS_VIDEO

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

MARKER = "<image>"  # where a picture stands in a question, whatever the model's own placeholder is
TEMPLATE, PLAIN = "chat template", "USER: ... ASSISTANT:"
PROBE = "¶"


def has_template(processor: Any) -> bool:
    """Whether the processor brings a chat template. Without one conversations are written as LLaVA-1.5 was trained on them."""
    return bool(getattr(processor, "chat_template", None))


def note(processor: Any, name: str) -> str | None:
    """What to tell the reader of a model's prompts."""
    return None if has_template(processor) else f"{name} has no chat template: its prompts are written {PLAIN}"


# ------------------------------------------------------------------------------------------------ conversations to text


def rendered(processor: Any, messages: Sequence[Mapping[str, Any]], *, answer: bool = True, name: str | None = None) -> str:
    """Messages as the model's prompt, a placeholder for each image. answer: with what comes before the model's answer.

    messages: roles and contents, a text or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. Raises
    ``MllmEfficientError`` for roles or an order that the template does not know.
    """
    if not has_template(processor):
        return plain(processor, messages, answer=answer)
    try:
        text = processor.apply_chat_template([dict(m) for m in messages], add_generation_prompt=answer)
    except Exception as error:  # whatever a template raises
        whose = name or type(processor).__name__
        raise MllmEfficientError(f"the chat template of {whose} does not take this: {error}") from None
    return _without_start(processor, text)


def plain(processor: Any, messages: Sequence[Mapping[str, Any]], *, system: str = "", answer: bool = True) -> str:
    """Messages as LLaVA-1.5 was trained on them. A system message takes the place of ``system``."""
    tokens, end = _tokens(processor), getattr(getattr(processor, "tokenizer", None), "eos_token", None) or " "
    out = ""
    for message in messages:
        text = "".join(part["text"] if part["type"] == "text" else f"{tokens[part['type']]}\n" for part in _parts(message["content"]))
        if message["role"] == "system":
            system = text
        else:
            out += f"USER: {text} " if message["role"] == "user" else f"ASSISTANT: {text}{end}"
    return f"{system + ' ' if system else ''}{out}{'ASSISTANT:' if answer else ''}"


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _tokens(processor: Any) -> dict[str, str | None]:
    return {"image": processor.image_token, "video": getattr(processor, "video_token", None)}


def _without_start(processor: Any, text: str) -> str:
    """The text without a begin-of-sequence token that the tokenizer is going to put in front of it once more."""
    tokenizer = getattr(processor, "tokenizer", None)
    start = getattr(tokenizer, "bos_token", None)
    if tokenizer is None or not start or not text.startswith(start):
        return text
    return text.removeprefix(start) if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else text


# ------------------------------------------------------------------------------------------------ one question


def content_of(processor: Any, question: str, images: int, videos: int = 0) -> list[dict[str, Any]]:
    """A question's parts: pictures where ``<image>`` or the model's own placeholder stands, else all of them in front.

    Line breaks around a placeholder go, because templates put their own. Raises ``MllmEfficientError`` where the question has
    another number of placeholders than there are pictures.
    """
    content = parts_at(question, _marks(processor, question))
    found = [part["type"] for part in content if part["type"] != "text"]
    if not found:
        return [{"type": kind} for kind in ["image"] * images + ["video"] * videos] + content
    _require_counts({k: found.count(k) for k in ("image", "video")}, images, videos, _tokens(processor))
    return content


def parts_at(question: str, marks: Mapping[str, str]) -> list[dict[str, Any]]:
    """A question's parts. marks: what stands for a picture, and its kind. Without one the question is one text, as it is."""
    pieces = re.split("(" + "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) + ")", question.strip())
    if len(pieces) == 1:
        return [{"type": "text", "text": question}]
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append({"type": marks[piece]})
            continue
        text = piece.strip("\n")
        text = text if any("text" in part for part in parts) else text.lstrip()
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _marks(processor: Any, question: str) -> dict[str, str]:
    """What may stand for pictures in a question, and the kind of each."""
    kinds = {MARKER: "image"}
    for kind, token in _tokens(processor).items():
        if token and token in question:
            kinds |= {token: kind, _framed(processor, kind, token): kind}
    return kinds


def _framed(processor: Any, kind: str, token: str) -> str:
    """A placeholder with what the template puts around it, such as Qwen's vision_start and vision_end."""
    if not has_template(processor):
        return token
    content = [{"type": "text", "text": PROBE}, {"type": kind}, {"type": "text", "text": PROBE}]
    try:
        text = rendered(processor, [{"role": "user", "content": content}])
    except MllmEfficientError:
        return token
    inside = text.split(PROBE)[1].strip() if text.count(PROBE) == 2 else ""
    return inside if token in inside else token


def without_markers(processor: Any, question: str, images: int) -> str:
    """A question without the ``<image>`` that a reader of records put in front of it for each image, where the model's own placeholders
    are in it already."""
    own, added = processor.image_token, f"{MARKER}\n" * images
    return question.removeprefix(added) if images and own != MARKER and question.count(own) == images else question


def question_prompt(processor: Any, question: str, images: int, videos: int = 0, name: str | None = None) -> str:
    """The prompt of a question about images, then videos. One that is a whole prompt already, up to its answer, stays as it is.

    Raises ``MllmEfficientError`` as ``rendered`` and ``require_pictures`` do.
    """
    if is_prompt(processor, question, images + videos):
        text = _without_start(processor, question)
    else:
        text = rendered(processor, [{"role": "user", "content": content_of(processor, question, images, videos)}], name=name)
    require_pictures(processor, text, images, videos)
    return text


def is_prompt(processor: Any, question: str, pictures: int) -> bool:
    """Whether a text is a whole prompt: it ends in what the template puts before an answer, and has placeholders if there are pictures."""
    if pictures and not any(token and token in question for token in _tokens(processor).values()):
        return False
    try:
        ending = answer_sign(processor)
    except MllmEfficientError:  # which rendering the question itself will say
        return False
    return bool(ending) and question.rstrip().endswith(ending)


def answer_sign(processor: Any) -> str:
    """What the template puts before an answer."""
    return rendered(processor, [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]).partition(PROBE)[2].strip()


def require_pictures(processor: Any, text: str, images: int, videos: int = 0) -> None:
    """Raises where a prompt does not have a placeholder for each image and video, and no others."""
    tokens = _tokens(processor)
    counts = {kind: text.count(token) if token else 0 for kind, token in tokens.items()}
    if MARKER in text and counts["image"] != images and tokens["image"] != MARKER:
        raise MllmEfficientError(f"{MARKER} is only text to this model: leave it out, or write {tokens['image']}")
    _require_counts(counts, images, videos, tokens)


def _require_counts(counts: Mapping[str, int], images: int, videos: int, tokens: Mapping[str, str | None]) -> None:
    for kind, wanted in (("image", images), ("video", videos)):
        if counts[kind] != wanted:
            raise MllmEfficientError(f"the prompt has {counts[kind]} {tokens[kind]} and {wanted} {kind}(s) are given")


# ------------------------------------------------------------------------------------------------ text and pictures to tensors


COUNT_BY_PROMPT = ("Gemma3Processor", "Gemma4Processor")  # which want an empty list for a prompt without pictures


def model_inputs(
    processor: Any, prompts: Sequence[str], pictures: Sequence[Any] = (), videos: Sequence[Sequence[Picture]] | None = None,
    *, padding_side: str = "left",
) -> dict[str, Any]:  # fmt: skip
    """A padded batch as the model's own processor makes it, on the CPU.

    pictures: of all prompts, in their order, flat or a list for each prompt. They are handed on as the chat template's own call
    hands them on, a list for each prompt: LLaVA-OneVision tiles a picture that is alone in its prompt and no others. videos: the
    frames of each, all of which the model is to see.
    """
    call: dict[str, Any] = {"text": list(prompts), "images": nested(processor, prompts, pictures) or None}
    if videos:
        if getattr(processor, "video_processor", None) is None:
            raise MllmEfficientError(NEEDS_VIDEO)
        import numpy as np

        call |= {"videos": [np.stack([np.asarray(frame) for frame in video]) for video in videos], "do_sample_frames": False}
    return dict(processor(**call, return_tensors="pt", padding=True, padding_side=padding_side))


def nested(processor: Any, prompts: Sequence[str], pictures: Sequence[Any]) -> list[list[Picture]]:
    """The pictures of each prompt that has some, or of every one where the processor counts them prompt by prompt.

    Raises ``MllmEfficientError`` where they are not as many as the placeholders.
    """
    flat = [p for one in pictures for p in (one if isinstance(one, (list, tuple)) else [one])]
    counts = [prompt.count(processor.image_token) for prompt in prompts]
    if sum(counts) != len(flat):
        raise MllmEfficientError(f"the prompts have {sum(counts)} {processor.image_token} and {len(flat)} image(s) are given")
    left = iter(flat)
    every = bool(flat) and (type(processor).__name__ in COUNT_BY_PROMPT or hasattr(processor, "fake_image_token"))  # Idefics3, SmolVLM
    return [[next(left) for _ in range(n)] for n in counts if n or every]
