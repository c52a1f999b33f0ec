"""What a running server says of its visual tokens: in the usage of one request, and in its metrics where the vLLM plugin runs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import urllib.request
from typing import Any

FULL, KEPT = "mllm_efficient:visual_tokens_full_total", "mllm_efficient:visual_tokens_kept_total"
TIMEOUT = 600.0  # seconds
KEY = "OPENAI_API_KEY"  # variable of the environment: what a server that asks for a key is given, as by the OpenAI client


def visual_tokens(url: str, model: str, image_size: tuple[int, int], images: int) -> tuple[int | None, int | None]:
    """(full, kept) of a prompt with so many pictures of noise, None where the server does not say; of one that compresses nothing both
    are known from its usage only if it has no counters of the plugin.

    url: without ``/v1``. image_size: (width, height). One request is sent, beside which no other may run.
    """
    before = _counted(url, model)
    usage = _usage(url, model, image_size, images)
    after = _counted(url, model)
    grown = {name: round(after[name] - before.get(name, 0)) for name in after if after[name] > before.get(name, 0)}
    said = ((usage.get("prompt_tokens_details") or {}).get("multimodal_tokens") or {}).get("image")
    kept = said if said is not None else grown.get(KEPT)
    return grown.get(FULL, kept if after == before else None), kept


def answer(url: str, body: Any = None) -> Any:
    """A server's answer, to be closed; to a POST where there is a body. Raises ``OSError`` for one of an error."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT)


def _usage(url: str, model: str, image_size: tuple[int, int], images: int) -> dict[str, Any]:
    """Of a request for one token; empty where the server refuses it."""
    from PIL import Image

    parts = []
    for _ in range(images):
        data = io.BytesIO()
        Image.frombytes("RGB", image_size, os.urandom(3 * image_size[0] * image_size[1])).save(data, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": address}})
    content = [*parts, {"type": "text", "text": "What is it?"}]
    body = {"model": model, "max_tokens": 1, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    with contextlib.suppress(OSError, ValueError), answer(f"{url}/v1/chat/completions", body) as reply:
        return dict(json.load(reply).get("usage") or {})
    return {}


def _counted(url: str, model: str) -> dict[str, float]:
    """The plugin's counters of a model; empty where there are none."""
    with contextlib.suppress(OSError), answer(f"{url}/metrics") as reply:
        text = reply.read().decode(errors="replace")
        found = re.findall(r'^(mllm_efficient:visual_tokens_\w+)\{[^}]*model_name="([^"]*)"[^}]*\} (\S+)$', text, re.MULTILINE)
        return {name: float(value) for name, named, value in found if named == model and name in (FULL, KEPT)}
    return {}
