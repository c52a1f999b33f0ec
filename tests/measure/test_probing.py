"""What is asked of a running server before it is loaded."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from mllm_efficient.cli.serving import _found
from mllm_efficient.measure.probing import visual_tokens


@pytest.fixture
def guarded():
    """The address of a server that answers who gives the key "secret": 36 of a picture's 144 tokens are kept."""
    counted = {"full": 0, "kept": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answered(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != "Bearer secret":
                return 401, ""
            if self.path == "/metrics":
                return 200, "".join(
                    f'mllm_efficient:visual_tokens_{k}_total{{method="m",model_name="tiny"}} {n}\n' for k, n in counted.items()
                )
            if self.path == "/v1/models":
                return 200, json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model", "root": "folder"}]})
            counted.update(full=counted["full"] + 144, kept=counted["kept"] + 36)
            return 200, json.dumps({"usage": {}})

        def do_GET(self):
            status, body = self.answered()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_server_is_given_the_key_of_the_environment(guarded, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert visual_tokens(guarded, "tiny", (8, 8), 1) == (None, None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert visual_tokens(guarded, "tiny", (8, 8), 1) == (144, 36)


def test_bench_finds_servers_with_the_key_of_the_environment(guarded, monkeypatch):
    pytest.importorskip("openai", reason="--server needs the OpenAI client")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    (arm,) = _found([f"{guarded}/v1"], None, None, (8, 8), 1)
    assert (arm.model, arm.tokenizer, arm.full, arm.kept) == ("tiny", "folder", 144, 36)
