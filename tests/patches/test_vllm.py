"""The vLLM plugin on a CPU: token counts and hashes in the front end, answers of the engine against transformers, exported folders."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import mllm_efficient as me
from mllm_efficient.cli import main
from mllm_efficient.eval.builtin.suite import samples
from mllm_efficient.loading.models import ModelOptions, builtin_folder, load
from mllm_efficient.patches.vllm import settings as served
from mllm_efficient.patches.vllm.settings import settings_of
from mllm_efficient.patches.vllm.shapes import Shapes

from ..families import ASPECTS, VOCABULARY, noise
from ..vllm_engine import MARK
from ..vllm_forks import forked
from ..vllm_models import ENVIRONMENT, config_of, model_of, needs_vllm, processor_of, saved_processor_of

KEY = served.KEY
BUDGETS = ("divprune:tokens=9", "divprune:keep=0.3", "uniform:keep=0.5", "pool:keep=0.3", "random:tokens=7", "divprune:keep=1")


def settings(given):
    return settings_of(SimpleNamespace(**{KEY: given}))


# ----------------------------------------------------------------------------------------------- settings, without vLLM


def test_settings_are_read_from_a_specification_or_an_object():
    assert settings_of(object()) is None
    one = settings("divprune:tokens=64")
    assert one.method == me.DivPrune(tokens=64) and one.allowed == ()
    other = settings({"method": "divprune", "keep": 0.1, "allowed_tokens": [64, 144]})
    assert (
        other.allowed == (64, 144) and other.of_request(144) == me.DivPrune(tokens=144) and other.of_request(None) == me.DivPrune(keep=0.1)
    )
    prints = {
        s.fingerprint
        for s in (one, other, settings("divprune:tokens=65"), settings({**me.DivPrune(tokens=64).to_dict(), "allowed_tokens": [9]}))
    }
    assert len(prints) == 4


@pytest.mark.parametrize("asked", [65, 0, -1, "64", 64.0, True])
def test_a_request_may_ask_for_what_is_allowed_alone(asked):
    with pytest.raises(me.MllmEfficientError, match=r"visual_tokens=.*: 64, 144 are allowed"):
        settings({"method": "divprune", "keep": 0.1, "allowed_tokens": [64, 144]}).of_request(asked)
    with pytest.raises(me.MllmEfficientError, match="this server allows none"):
        settings("divprune:tokens=64").of_request(64)


@pytest.mark.parametrize(
    "given, says",
    [
        ("fastv:ratio=0.5", "fastv works inside the decoder, and vLLM gives every layer the same tokens; apet, divmerge, divprune"),
        ("dpn", "dpn works inside the decoder"),
        ("resize:tokens=64", "resize makes the picture itself smaller"),
        ("divprune:tokens=64,positions=keep", "leaves gaps between positions"),
        ("divprune:tokens=64,newline=keep", "leaves newline columns"),
        ("cdpruner:tokens=9", "looks at the question"),
        ("none@tokenflex", "is the baseline of trained weights"),
        ("divprune:tokens=64 | fastv:ratio=0.5", "runs several methods one after the other, and vLLM one"),
        ({"method": "divprune", "tokens": 64, "kep": 1}, "no parameter 'kep'"),
        ({"method": "divprune", "tokens": 64, "allowed_tokens": "64"}, "must be a list of counts"),
        (64, "must be a specification such as"),
    ],
)
def test_what_cannot_be_served_says_why(given, says):
    with pytest.raises(me.MllmEfficientError, match=says):
        settings(given)


def test_a_query_aware_method_is_refused_by_name(registered):
    @me.register("asks")
    @dataclasses.dataclass(frozen=True)
    class Asks(me.Selector):
        """Looks at the question."""

        needs = frozenset({"text"})

        def score(self, v):
            return v.features.sum(-1)

    with pytest.raises(me.MllmEfficientError, match="asks looks at the question, and vLLM keeps an image's tokens by the image alone"):
        settings("asks:tokens=4")


def test_the_plugin_costs_nothing_until_vllm_calls_it():
    """Importing it, which every process of vLLM does, and importing the package, loads neither torch, nor vLLM, nor transformers."""
    code = "import sys, mllm_efficient, mllm_efficient.patches.vllm; print(*{'torch', 'vllm', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_what_no_test_has_run_is_named():
    """As vLLM's configuration has it when nothing of that is asked, and when all of it is."""
    none = SimpleNamespace
    plain = none(
        parallel_config=none(pipeline_parallel_size=1, data_parallel_size=1),
        model_config=none(multimodal_config=none(mm_encoder_tp_mode="weights"), quantization=None),
        lora_config=None, kv_transfer_config=None, ec_transfer_config=None, speculative_config=None,
    )  # fmt: skip
    assert served.untested(plain) == []
    every = none(
        parallel_config=none(pipeline_parallel_size=2, data_parallel_size=2),
        model_config=none(multimodal_config=none(mm_encoder_tp_mode="data"), quantization="fp8"),
        lora_config=none(enable_tower_connector_lora=True), kv_transfer_config=1, ec_transfer_config=1, speculative_config=1,
    )  # fmt: skip
    assert len(served.untested(every)) == 8 and "quantization (fp8)" in served.untested(every)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_counts_from_sizes_alone_are_those_of_transformers(name):
    """Every aspect ratio, every budget: what the front end reserves is what ``prepare`` leaves of the same picture."""
    model = transformers.AutoModelForImageTextToText.from_config(config_of(name)).eval()
    shapes, processor = Shapes(model.config), processor_of(name)
    for i, (width, height) in enumerate(ASPECTS.values()):
        inputs = processor(text="user : <image> what ? assistant :", images=[noise(i, width, height)], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        for spec in BUDGETS:
            plan = shapes.plan(me.build(spec), height, width)
            prepared = me.prepare(model, spec, **inputs)
            placeholders = int((prepared.model_kwargs["input_ids"] == VOCABULARY["<image>"]).sum())
            assert plan.kept + plan.separators == placeholders, (spec, width, height)


# ------------------------------------------------------------------------------------------------------------- export


def test_an_exported_folder_is_the_model_in_transformers(tmp_path, capsys):
    assert main(["export", "--method", "divprune:tokens=36", "--allowed-tokens", "16,72", "--output-dir", str(tmp_path / "d")]) == 0
    serve, why, without_a_gpu = capsys.readouterr().out.splitlines()
    assert serve.startswith(f"vllm serve {tmp_path / 'd'} --enable-prompt-tokens-details --middleware mllm_efficient.")
    assert serve.endswith("--trust-request-mm-kwargs") and "without a GPU" in why
    assert without_a_gpu.startswith(f"VLLM_CPU_KVCACHE_SPACE=4 {serve} --dtype bfloat16 ") and "--enforce-eager" in without_a_gpu
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["architectures"] == ["MllmEfficientLlavaForConditionalGeneration"]
    assert config[KEY] == {**me.DivPrune(tokens=36).to_dict(), "allowed_tokens": [16, 72]}
    assert me.load(tmp_path / "d") == me.DivPrune(tokens=36) and me.load(tmp_path / "d", keep=0.5) == me.DivPrune(keep=0.5)
    old, new = load(ModelOptions(device="cpu")), load(ModelOptions(str(tmp_path / "d"), device="cpu"))
    assert all(torch.equal(v, new.model.state_dict()[k]) for k, v in old.model.state_dict().items())
    assert main(["export", "--method", "divprune:tokens=36", "--output-dir", str(tmp_path / "d")]) == 2
    assert "holds something already" in capsys.readouterr().err


def test_an_exported_projector_is_the_trained_one(tmp_path):
    assert main(["export", "--method", "tokenflex:tokens=36", "--output-dir", str(tmp_path / "t")]) == 0
    new, method = load(ModelOptions(str(tmp_path / "t"), device="cpu")), me.load(tmp_path / "t")
    picture = samples("test", 1)[0].picture(144)

    def logits(loaded, method):
        inputs = loaded.inputs([loaded.prompt("What shape is the big object?", 1)], [picture])
        with me.compressed(loaded.model, method), torch.no_grad():
            return loaded.model(**inputs).logits

    assert torch.equal(logits(new, method), logits(load(ModelOptions(device="cpu")), "tokenflex:tokens=36"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--method", "fastv:ratio=0.5"], "inside the decoder"),
        (["--method", "divprune:tokens=36", "--allowed-tokens", "x"], "not a list of counts"),
        (["--method", "divprune:tokens=200"], "tokens=200"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(tmp_path, capsys, arguments, says):
    assert main(["export", *arguments, "--output-dir", str(tmp_path / "x")]) == 2
    assert says in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_towers_weights_are_named_as_vllm_looks_for_them(tmp_path, make_llava, make_processor):
    from safetensors import safe_open

    from mllm_efficient.loading.models import Loaded
    from mllm_efficient.trained.export import export

    model = make_llava()
    export(Loaded(model, make_processor(), ModelOptions(model="tiny")), me.DivPrune(tokens=9), tmp_path / "e")
    with safe_open(tmp_path / "e" / "model.safetensors", "pt") as file:
        names = [k for k in file.keys() if "vision_tower." in k]  # noqa: SIM118
    assert names and all("vision_tower.vision_model." in k for k in names)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "e")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------- the engine


def engine(model, calls, timeout=300, environment=None, asks_again=False, breaks=False, **settings):
    """Answers of a fresh engine to calls. One of several ranks starts processes of its own, and so is none of a fork."""
    job = {"model": str(model), "engine": {"distributed_executor_backend": "uni", **settings}, "calls": calls}
    job |= {"asks_again": asks_again, "breaks": breaks}
    if "tensor_parallel_size" not in settings:
        return forked("engine", job, environment, timeout)
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent.parent / "vllm_engine.py"), *settings], input=json.dumps(job), text=True,
        capture_output=True, env={**ENVIRONMENT, **(environment or {})}, timeout=timeout,
    )  # fmt: skip
    found = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    assert found, run.stderr
    return json.loads(found[0].removeprefix(MARK))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The model that answers, 210 questions of the embedded benchmark with their pictures as files, and what it has answered."""
    loaded, folder, out = load(ModelOptions(device="cpu")), tmp_path_factory.mktemp("pictures"), []
    for sample in samples("test", 210):
        path = folder / f"{sample.image}.png"
        if not path.exists():
            sample.picture(144).save(path)
        out.append((sample, loaded.prompt(sample.question.text, 1), str(path)))
    return loaded, out, {}


def call(questions, tokens=None, n=None, new=8):
    chosen = questions[1][:n]
    return {"prompts": [p for _, p, _ in chosen], "images": [[path] for *_, path in chosen], "tokens": tokens, "new": new}


def of_transformers(questions, spec, n=None):
    """Answers to the first n questions."""
    return [answer_of_transformers(questions, spec, i) for i in range(len(questions[1][:n]))]


def answer_of_transformers(questions, spec, i):
    """The answer to the i-th question, one that is already known not again."""
    loaded, every, known = questions
    sample, prompt, _ = every[i]
    if (spec, i) not in known:
        with me.compressed(loaded.model, spec), torch.no_grad():
            inputs = loaded.inputs([prompt], [sample.picture(144)])
            ids = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            known[spec, i] = loaded.processor.decode(ids, skip_special_tokens=True).strip()
    return known[spec, i]


@needs_vllm
@pytest.mark.slow
def test_greedy_answers_equal_transformers(questions):
    """210 questions at the server's budget, 70 at each of two that requests ask for, again out of the prefix cache; one not allowed."""
    given = {KEY: {"method": "divprune", "tokens": 36, "allowed_tokens": [16, 72]}}
    calls = [call(questions), call(questions, 16, 70), call(questions, 72, 70), call(questions, n=70)]
    calls += [call(questions, 17, 1), call(questions, n=5)]
    found = engine(builtin_folder(), calls, hf_overrides=given, enable_prefix_caching=True)
    length = [len(questions[0].inputs([p], [s.picture(144)])["input_ids"][0]) for s, p, _ in questions[1][:3]]
    for answer, kept in zip(found, (36, 16, 72, 36)):
        assert answer["answers"] == of_transformers(questions, f"divprune:tokens={kept}", len(answer["answers"]))
        assert answer["prompt_tokens"][:3] == [n - 144 + kept for n in length]
    right = sum(a == s.question.answer for a, (s, *_) in zip(found[0]["answers"], questions[1]))
    assert right > 180  # of 210: the answers are not just alike
    assert "visual_tokens=17: 16, 72 are allowed" in found[4]["error"]
    assert len(found[0]["answers"]) == 210 and found[5]["answers"] == found[0]["answers"][:5]  # it lives on


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["pool:tokens=36", "tome:tokens=36", "divmerge:keep=0.25", "visionzip:tokens=36", "scope:tokens=36"])
def test_other_methods_with_prompts_cut_inside_an_image(questions, spec):
    """Chunked prefill of 24 tokens, fewer than an image has. The last two ask the tower for attention, and the first of them for keys."""
    (found,) = engine(builtin_folder(), [call(questions, n=60)], hf_overrides={KEY: spec}, max_num_batched_tokens=24)
    assert found["answers"] == of_transformers(questions, spec, 60)


@needs_vllm
@pytest.mark.slow
def test_a_trained_projector_out_of_its_folder(questions, tmp_path):
    assert main(["export", "--method", "tokenflex:tokens=36", "--allowed-tokens", "16", "--output-dir", str(tmp_path / "t")]) == 0
    found = engine(tmp_path / "t", [call(questions, n=60), call(questions, 16, 60)])
    assert found[0]["answers"] == of_transformers(questions, "tokenflex:tokens=36", 60)
    assert found[1]["answers"] == of_transformers(questions, "tokenflex:tokens=16", 60)


@needs_vllm
@pytest.mark.slow
def test_without_settings_nothing_changes(questions):
    """Answers and prompt lengths of vLLM with the plugin and with the plugin off."""
    on, off = (engine(builtin_folder(), [call(questions, n=70)], environment={"MLLM_EFFICIENT_VLLM": v}) for v in ("1", "0"))
    assert on == off and on[0]["answers"] == of_transformers(questions, "none", 70)


@needs_vllm
@pytest.mark.slow
def test_a_vllm_without_the_plugin_refuses_an_exported_folder(questions, tmp_path):
    assert main(["export", "--method", "divprune:tokens=36", "--output-dir", str(tmp_path / "d")]) == 0
    with pytest.raises(AssertionError, match="MllmEfficientLlavaForConditionalGeneration"):
        engine(tmp_path / "d", [call(questions, n=1)], environment={"MLLM_EFFICIENT_VLLM": "0"})


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_families_with_tiles_and_two_images(name, tmp_path):
    """A random model's greedy answers to pictures of different shapes, alone and in pairs."""
    model, processor, folder = model_of(name), saved_processor_of(name), tmp_path / "model"
    from mllm_efficient.loading.models import Loaded
    from mllm_efficient.trained.export import export

    method = me.DivPrune(keep=0.4)
    loaded = Loaded(model, processor, ModelOptions(model="tiny"))
    export(loaded, method, folder)
    pictures = []
    for i, (width, height) in enumerate(ASPECTS.values()):
        pictures.append(tmp_path / f"{i}.png")
        noise(i, width, height).save(pictures[-1])
    pairs = [[p] for p in pictures] + [[pictures[0], pictures[1]]]
    prompts = ["user : " + "<image> " * len(p) + "what is the big ring ? assistant :" for p in pairs]
    (found,) = engine(folder, [{"prompts": prompts, "images": [[str(x) for x in p] for p in pairs], "tokens": None, "new": 6}])
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(folder)  # with the backend that is installed, as vLLM loads it
    with me.compressed(model, method), torch.no_grad():
        for prompt, paths, answer in zip(prompts, pairs, found["answers"]):
            images = [Image.open(p).convert("RGB") for p in paths]
            inputs = processor(text=[prompt], images=images, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(ids, skip_special_tokens=True).strip() == answer


# ----------------------------------------------------------------------------------------------------------- the server


def faulty(folder):
    """The environment in which vLLM finds one more plugin, in this folder: towers that break on white pictures and on black ones."""
    about = folder / "faulty-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nfaulty = tests.vllm_engine:with_faults\n")
    paths = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """``vllm serve`` on an exported folder; an OpenAI client."""
    import socket
    import time

    from openai import OpenAI

    folder = tmp_path_factory.mktemp("served") / "model"
    assert main(["export", "--method", "divprune:tokens=36", "--allowed-tokens", "16,36,72", "--output-dir", str(folder)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", folder, "--dtype", "float32", "--max-model-len", 1024, "--max-num-seqs", 16, "--enforce-eager", "--port", port]
    command += ["--enable-prompt-tokens-details", "--trust-request-mm-kwargs", "--served-model-name", "tiny"]
    command += ["--middleware", "mllm_efficient.patches.vllm.naming.Named"]
    log = folder.with_name("log.txt")
    environment = {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **faulty(folder.parent)}
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
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except Exception:
                time.sleep(1)
        yield client, log
    finally:
        import signal

        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


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
def test_300_requests_a_third_of_them_wrong_and_clients_that_leave(serving, questions):
    """Wrong ones are told so, by 4xx or by the reason of a picture; every other answer is the one that it gets alone.

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
        sample, tokens = questions[1][i % 200][0], (16, 36, 72)[i % 7 % 3]
        try:
            if i % 3 == 0:
                return ask(client, sample, **wrong[i // 3 % len(wrong)])
            if i % 10 == 1:
                return ask(client.with_options(timeout=0.02), sample, tokens, noise(i, 144, 144))
            return ask(client, sample, tokens).choices[0].message.content.strip()
        except (APIStatusError, APITimeoutError) as error:
            return error

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(one, range(300)))
    for i, reply in enumerate(replies):
        if i % 3 == 0:
            assert 400 <= reply.status_code < 500 or "the picture cannot be used" in str(reply), (i, reply)
        elif i % 10 == 1:
            assert not isinstance(reply, APIStatusError)
        else:
            assert reply == answer_of_transformers(questions, f"divprune:tokens={(16, 36, 72)[i % 7 % 3]}", i % 200)


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
def test_200_requests_at_once_with_mixed_budgets_are_not_mixed_up(serving, questions):
    from concurrent.futures import ThreadPoolExecutor

    client, _ = serving
    jobs = [(s, (16, 36, 72)[i % 3]) for i, (s, *_) in enumerate(questions[1][:200])]
    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(lambda job: ask(client, *job), jobs))
    said = [r.choices[0].message.content.strip() for r in replies]
    assert said == [answer_of_transformers(questions, f"divprune:tokens={k}", i) for i, (_, k) in enumerate(jobs)]
    assert [r.usage.prompt_tokens_details.multimodal_tokens["image"] for r in replies] == [k for _, k in jobs]


@needs_vllm
@pytest.mark.slow
def test_the_server_is_evaluated_by_the_same_tasks(serving, capsys):
    """``eval --server``: the score of the method in transformers, and the tokens that the server says it kept."""
    url = str(serving[0].base_url).rstrip("/")
    assert main(["eval", "--tasks", "me_builtin", "--server", url, "--limit", "70", "--batch-size", "8", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)["rows"][0]
    assert main(["eval", "--tasks", "me_builtin", "--method", "divprune:tokens=36", "--limit", "70", "--json"]) == 0
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
def test_a_lora_of_the_language_model(questions, tmp_path):
    import peft

    loaded = load(ModelOptions(device="cpu"))
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False)
    model = peft.get_peft_model(loaded.model, settings)
    model.save_pretrained(tmp_path / "adapter")
    calls = [{**call(questions, n=40), "adapter": str(tmp_path / "adapter")}, call(questions, n=40)]
    found = engine(builtin_folder(), calls, hf_overrides={KEY: "divprune:tokens=36"}, enable_lora=True, max_lora_rank=8)
    adapted = of_transformers((loaded, questions[1], {}), "divprune:tokens=36", 40)
    assert found[0]["answers"] == adapted and found[1]["answers"] == of_transformers(questions, "divprune:tokens=36", 40)
    assert found[0]["answers"] != found[1]["answers"]


@needs_vllm
@pytest.mark.slow
def test_two_ranks_pick_the_same_tokens(questions):
    (found,) = engine(
        builtin_folder(), [call(questions, n=40)], hf_overrides={KEY: "divprune:tokens=36"}, tensor_parallel_size=2,
        distributed_executor_backend="mp", environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )  # fmt: skip
    assert found["answers"] == of_transformers(questions, "divprune:tokens=36", 40)
