"""``vllm serve`` on an exported folder, and what clients see of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_efficient.cli import main
from mllm_efficient.loading.models import builtin_folder

from ..families import noise
from ..vllm_models import ENVIRONMENT, needs_vllm
from .test_vllm import answer_of_transformers, of_transformers, questions  # noqa: F401  (a fixture)


def faulty(folder):
    """The environment in which vLLM finds one more plugin, in this folder: towers that break on white pictures and on black ones."""
    about = folder / "faulty-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nfaulty = tests.vllm_engine:with_faults\n")
    paths = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


@contextlib.contextmanager
def running(folder, log, *more, **environment):
    """``vllm serve`` of a folder; an OpenAI client."""
    import signal
    import socket
    import time

    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", folder, "--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", 16, "--enforce-eager", "--port", port]
    command += ["--enable-prompt-tokens-details", "--served-model-name", "tiny", *more]
    environment = {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("vllm")), *map(str, command)],
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    try:
        for _ in range(900):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except Exception:
                time.sleep(1)
        yield client
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """One that compresses, as ``export`` says to start it but of two ranks of data, each with an engine and an HTTP server of its own; its
    client and its log."""
    folder = tmp_path_factory.mktemp("served") / "model"
    assert main(["export", "--method", "divprune:tokens=36", "--allowed-tokens", "16,36,72", "--output-dir", str(folder)]) == 0
    flags = ["--trust-request-mm-kwargs", "--middleware", "mllm_efficient.patches.vllm.naming.Named", "--data-parallel-size", 2]
    log = folder.with_name("log.txt")
    environment = faulty(folder.parent)
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(running(folder, log, *flags, **environment))
        except AssertionError as error:  # vLLM gives the process between its ranks 120 s to start, which a busy machine exceeds
            if "failed to report ZMQ addresses" not in str(error):
                raise
            client = stack.enter_context(running(folder, log, *flags, **environment))
        yield client, log


def ask(client, sample, tokens=None, picture=None, **more):
    import base64
    import io

    data = io.BytesIO()
    (picture or sample.picture(144)).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question.text}]
    extra = {"add_special_tokens": True}  # as the processor in transformers does; vLLM leaves that to the chat template
    if tokens is not None:
        extra["mm_processor_kwargs"] = tokens if isinstance(tokens, dict) else {"visual_tokens": tokens}
    return client.chat.completions.create(
        **{"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **more}, extra_body=extra
    )


@needs_vllm
@pytest.mark.slow
def test_a_server_says_what_it_kept_and_lives_on_after_a_bad_request(serving, questions):
    from openai import BadRequestError

    client, log = serving
    assert "visual tokens: divprune, 144 -> 36 per image" in log.read_text()
    chosen = [s for s, *_ in questions[1][:5]]
    expected = of_transformers(questions, "divprune:tokens=36", 5)
    for sample, answer in zip(chosen, expected):
        reply = ask(client, sample)
        assert reply.choices[0].message.content.strip() == answer
        assert reply.usage.prompt_tokens_details.multimodal_tokens == {"image": 36}
    assert ask(client, chosen[0], 16).usage.prompt_tokens_details.multimodal_tokens == {"image": 16}
    for wrong in (17, 5000, "abc", -1):
        with pytest.raises(BadRequestError, match="16, 36, 72 are allowed"):
            ask(client, chosen[0], wrong)
    for wrong in ({"visual_token": 36}, {"visual_tokens": 36, "do_resize": False}, {"images_kwargs": {"do_resize": False}}):
        with pytest.raises(BadRequestError, match="mm_processor_kwargs: .* cannot be set by a request on this server: visual_tokens alone"):
            ask(client, chosen[0], wrong)
    assert ask(client, chosen[0]).choices[0].message.content.strip() == expected[0]


@needs_vllm
@pytest.mark.slow
def test_a_picture_that_cannot_be_used_is_an_error_that_says_why(serving, questions):
    """Features of white pictures are NaN in this server, those of black ones a row short; streamed or not, first or again."""
    from openai import APIError, InternalServerError
    from PIL import Image

    client, log = serving
    sample = questions[1][0][0]
    for colour, says in (("white", "NaN or infinity"), ("black", "143 rows")):
        picture = Image.new("RGB", (144, 144), colour)
        for _ in range(2):
            with pytest.raises(InternalServerError, match=f"the picture cannot be used: .*{says}"):
                ask(client, sample, picture=picture)
        with pytest.raises(APIError, match=f"the picture cannot be used: .*{says}"):
            list(ask(client, sample, picture=picture, stream=True))
    assert ask(client, sample).choices[0].message.content.strip() == answer_of_transformers(questions, "divprune:tokens=36", 0)
    assert "its request ends with an error: NotFiniteError" in log.read_text()


@needs_vllm
@pytest.mark.slow
def test_300_requests_of_mixed_budgets_a_third_of_them_wrong_and_clients_that_leave(serving, questions):
    """200 at once. Wrong ones are told so, by 4xx or by the reason of a picture; every other answer is the one that it gets alone.

    What ends between vLLM's two caches of pictures (a client that leaves, a count of tokens that is refused late) has pictures of its own:
    vLLM answers the next request for such a picture with 500, once.
    """
    from concurrent.futures import ThreadPoolExecutor

    from openai import APIStatusError, APITimeoutError
    from PIL import Image

    client, _ = serving
    no_picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    wrong = (
        {"tokens": 17}, {"tokens": {"visual_tokens": None, "size": 3}}, {"picture": Image.new("RGB", (144, 144), "white")},
        {"max_tokens": -1, "picture": noise(7, 144, 144)}, {"messages": [{"role": "user", "content": [no_picture]}]},
        {"temperature": "warm"}, {"model": "other"}, {"picture": Image.new("RGB", (144, 144), "black"), "max_tokens": 1},
    )  # fmt: skip

    def one(i):
        sample, tokens = questions[1][i % 24][0], (16, 36, 72)[i % 7 % 3]
        try:
            if i % 3 == 0:
                return ask(client, sample, **wrong[i // 3 % len(wrong)])
            if i % 10 == 1:
                return ask(client.with_options(timeout=0.02), sample, tokens, noise(i, 144, 144))
            reply = ask(client, sample, tokens)
            return reply.choices[0].message.content.strip(), reply.usage.prompt_tokens_details.multimodal_tokens["image"]
        except (APIStatusError, APITimeoutError) as error:
            return error

    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(one, range(300)))
    for i, reply in enumerate(replies):
        if i % 3 == 0:
            assert 400 <= reply.status_code < 500 or "the picture cannot be used" in str(reply), (i, reply)
        elif i % 10 == 1:
            assert not isinstance(reply, APIStatusError)
        else:
            tokens = (16, 36, 72)[i % 7 % 3]
            assert reply == (answer_of_transformers(questions, f"divprune:tokens={tokens}", i % 24), tokens)


@needs_vllm
@pytest.mark.slow
def test_metrics_count_visual_tokens_and_the_list_of_models_names_the_method(serving, questions):
    import re
    import urllib.request

    client, _ = serving
    root = str(client.base_url).removesuffix("/v1/")

    def counted():
        text = urllib.request.urlopen(f"{root}/metrics").read().decode()
        return {name: float(value) for name, value in re.findall(
            r'^mllm_efficient:(\w+)_total\{method="divprune",model_name="tiny"\} (.+)$', text, re.M)}  # fmt: skip

    before = counted()
    for tokens in (None, 16, 16):
        ask(client, questions[1][0][0], tokens)
    grown = {name: value - before[name] for name, value in counted().items()}
    assert grown == {"visual_tokens_full": 3 * 144, "visual_tokens_kept": 36 + 2 * 16, "images": 3}
    assert client.models.list().data[0].visual_token_compression == "divprune"


@needs_vllm
@pytest.mark.slow
def test_the_server_is_evaluated_by_the_same_tasks(serving, capsys):
    """``eval --server``: the score of the method in transformers, and the tokens that the server says it kept."""
    url = str(serving[0].base_url).rstrip("/")
    assert main(["eval", "--tasks", "me_builtin", "--server", url, "--limit", "28", "--batch-size", "8", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)["rows"][0]
    assert main(["eval", "--tasks", "me_builtin", "--method", "divprune:tokens=36", "--limit", "28", "--json"]) == 0
    here = next(r for r in json.loads(capsys.readouterr().out)["rows"] if r["method"].startswith("divprune"))
    assert (there["metric"], there["score"], there["visual_tokens_kept"]) == (here["metric"], here["score"], 36)


@needs_vllm
@pytest.mark.slow
def test_the_server_is_loaded_by_bench(serving, capsys):
    """``bench --server``: the same server as two arms, one of which is then told to compress nothing more than the other."""
    url = str(serving[0].base_url).rstrip("/")
    arguments = [
        "--image-size",
        "144x144",
        "--concurrency",
        "2",
        "--requests",
        "4",
        "--repeats",
        "2",
        "--warmup",
        "0",
        "--output-tokens",
        "4",
    ]
    assert main(["bench", "--server", f"a={url}", "--server", f"b={url}", *arguments, "--text-tokens", "8", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [(r["method"], r["arm"], r["requests_per_s"]["n"], r["visual_tokens_kept"]) for r in found["rows"]] == [
        ("a", "baseline", 2, 36), ("b", "method", 2, 36)
    ]  # fmt: skip
    assert found["rows"][0]["prompt_tokens"] == found["rows"][1]["prompt_tokens"]
    assert [r["visual_tokens_full"] for r in found["rows"]] == [144, 144]
    assert "b: its prompts are as long as the baseline's, so it compresses nothing" in err
    assert main(["bench", "--server", url]) == 2
    assert "give --image-size" in capsys.readouterr().err


@needs_vllm
@pytest.mark.slow
def test_own_requests_are_held_against_an_uncompressed_server(serving, questions, tmp_path, capsys):
    """``eval --data --server``: answers of both as transformers has them, prompts and visual tokens as the servers count them."""
    chosen = questions[1][:24]
    lines = [{"image": path, "prompt": s.question.text, "answer": s.question.answer} for s, _, path in chosen]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with running(builtin_folder(), tmp_path / "log.txt") as full:
        urls = [f"{name}={str(client.base_url).rstrip('/')}" for name, client in (("full", full), ("pruned", serving[0]))]
        given = ["--server", urls[0], "--server", urls[1], "--max-new-tokens", "8"]
        assert main(["eval", "--data", str(tmp_path / "requests.jsonl"), *given, "--json"]) == 0
    whole, pruned = json.loads(capsys.readouterr().out)["rows"]
    assert (whole["visual_tokens_kept"], pruned["visual_tokens_kept"]) == (144, 36)
    assert whole["prompt_tokens"] - pruned["prompt_tokens"] == pytest.approx(144 - 36)
    assert whole["exact_match"] == 100 and 50 < pruned["exact_match"] <= 100 and pruned["failures"] == 0
    assert whole["accuracy"] > 60 and pruned["latency_p50_s"] > 0
