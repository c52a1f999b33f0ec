"""``eval --data --server``: a user's own requests to servers that run."""

from __future__ import annotations

import importlib.util
import json

import pytest

from mllm_efficient.cli import main

from ..families import noise
from .test_tasks_servers import server

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the OpenAI client: make test-integration")


@pytest.fixture
def requests(tmp_path):
    """Four requests with a picture, of which two say what is right, and one without."""
    lines = []
    for i in range(4):
        noise(i, 20, 20).save(tmp_path / f"{i}.png")
        right = {"answer": "circle"} if i < 2 else {}
        lines.append({"id": str(i), "image": f"{i}.png", "prompt": "What is it?", **right})
    lines.append({"id": "text", "prompt": "What is a circle?"})
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_servers_are_held_against_the_first(requests, tmp_path, capsys):
    with server("A circle.") as (full, got), server("circle") as (same, _), server("two rings") as (other, _):
        given = ["--server", f"full={full}", "--server", f"same={same}", "--server", f"other={other}"]
        assert main(["eval", "--data", str(requests), *given, "--output-dir", str(tmp_path / "run"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["eval", "--data", str(requests), *given, "--output-dir", str(tmp_path / "run")]) == 2
        assert "a server may have changed" in capsys.readouterr().err
        assert main(["eval", "--data", str(requests), *given, "--limit", "2"]) == 0
        assert "same words" in capsys.readouterr().out
    for command in (["report", str(tmp_path / "run")], ["choose", "--data", str(requests), "--run", str(tmp_path / "run")]):
        assert main(command) == 2
        said = capsys.readouterr().err.strip()
        assert "has answers of running servers" in said and len(said.splitlines()) == 1
    rows = {r["method"]: r for r in found["rows"]}
    assert list(rows) == ["full", "same", "other"] and [r["role"] for r in rows.values()] == ["baseline", "method", "method"]
    assert [r["exact_match"] for r in rows.values()] == [100, 0, 0] and [r["normalised_match"] for r in rows.values()] == [100, 100, 0]
    assert [r["accuracy"] for r in rows.values()] == [100, 100, 0]
    assert all((r["n"], r["failures"], r["visual_tokens_kept"], r["prompt_tokens"]) == (5, 0, 64, 90) for r in rows.values())
    assert all(r["latency_p99_s"] >= r["latency_p50_s"] > 0 for r in rows.values())
    assert rows["full"]["exact_match_interval"] is None and rows["same"]["exact_match_interval"][0] == 0
    assert {w["method"] for w in found["meta"]["worst"]} == {"other"} and found["meta"]["worst"][0]["baseline_answer"] == "A circle."
    kept = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(kept["records"]) == 15 and kept["rows"] == found["rows"]
    kinds = sorted([p["type"] for p in body["messages"][0]["content"]] for body in got[:5])
    assert kinds == [["image_url", "text"]] * 4 + [["text"]] and got[0]["temperature"] == 0


def test_a_request_that_fails_agrees_with_nothing(requests, capsys):
    with server("circle") as (full, _), server("circle", fails=(1,)) as (pruned, _):
        assert main(["eval", "--data", str(requests), "--server", full, "--server", pruned, "--batch-size", "1", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [(r["failures"], r["exact_match"]) for r in json.loads(out)["rows"]] == [(0, 100), (1, 75)]
    assert "server2 on 0: " in err and "overloaded" in err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--method", "divprune:keep=0.5"], "--method has no effect with --data and --server: the server decides"),
        (["--against", "divprune:keep=0.5"], "--against has no effect"),
        (["--model", "builtin", "--dtype", "float16"], "--model and how it is loaded has no effect"),
        (["--turns", "2"], "--turns has no effect"),
    ],
)
def test_what_the_server_decides_cannot_be_asked_for(requests, capsys, arguments, says):
    assert main(["eval", "--data", str(requests), "--server", "http://127.0.0.1:9/v1", *arguments]) == 2
    assert says in capsys.readouterr().err
