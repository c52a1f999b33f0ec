"""What an HTTP client is told beyond vLLM's own: why a picture of its request could not be used, and by which method a model is served.

``vllm serve ... --middleware mllm_efficient.patches.vllm.naming.Named``. Without it such a request is vLLM's plain internal error, and
the reason stands in the server's log.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from . import failures, metrics

PLAIN = "Internal server error"  # of vLLM, for a request that ended with an error
HEADER = b"x-request-id"
MODELS = "/v1/models"
METHOD = "visual_token_compression"


class Named:
    """An ASGI middleware."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "POST"):
            await self.app(scope, receive, send)
        elif scope["path"] == MODELS:
            await self.app(scope, receive, Whole(send, _with_method))
        elif scope["method"] == "POST":
            scope, request_id = _identified(scope)
            await self.app(scope, receive, OfFailed(send, request_id))
        else:
            await self.app(scope, receive, send)


class Whole:
    """``send`` of an answer that is held back until it is there, and changed by ``change``."""

    def __init__(self, send: Any, change: Any):
        self.send, self.change = send, change
        self.start: Any = None
        self.body = b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        self.body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = self.change(self.body)
        headers = [(k, v) for k, v in self.start["headers"] if k.lower() != b"content-length"]
        await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self.send({**message, "body": body})


class OfFailed:
    """``send`` of an answer in which vLLM's plain error becomes the reason, where one was noted; also in the last event of a stream."""

    def __init__(self, send: Any, request_id: str):
        self.send, self.request_id = send, request_id
        self.to: Any = send

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 500:
            self.to = Whole(self.send, self._reason)
        elif self.to is self.send and PLAIN.encode() in message.get("body", b""):
            message = {**message, "body": self._reason(message["body"])}
        await self.to(message)

    def _reason(self, body: bytes) -> bytes:
        why = failures.of_request(self.request_id)
        return body if why is None else body.replace(PLAIN.encode(), json.dumps(why)[1:-1].encode())


def _identified(scope: Any) -> tuple[Any, str]:
    """The request with an id, by which vLLM then calls it, and the id."""
    given = next((value for name, value in scope["headers"] if name.lower() == HEADER), None)
    if given:
        return scope, given.decode("latin-1")  # as vLLM reads it
    made = uuid.uuid4().hex
    return {**scope, "headers": [*scope["headers"], (HEADER, made.encode())]}, made


def _with_method(body: bytes) -> bytes:
    """The list of models, with the method of those that are served compressed."""
    try:
        listed = json.loads(body)
        for model in listed["data"]:
            method = metrics.SERVED.get(model["id"]) or metrics.SERVED.get(model.get("parent"))
            if method is not None:
                model[METHOD] = method
    except (ValueError, KeyError, TypeError):
        return body
    return json.dumps(listed).encode()
