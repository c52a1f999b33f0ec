"""The vLLM plugin on a CPU: token counts and hashes in the front end, answers of the engine against transformers, exported folders."""

from __future__ import annotations

import dataclasses
import json
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
from ..vllm_models import ENVIRONMENT, config_of, model_of, needs_vllm, processor_of, quantized, saved_processor_of

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
        ("vscan:tokens=9", "vscan needs early_attention, which is read in none of vLLM's towers; apet, divmerge"),
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
        parallel_config=none(pipeline_parallel_size=1),
        model_config=none(multimodal_config=none(mm_encoder_tp_mode="weights"), quantization=None, hf_config=none()),
        lora_config=None, kv_transfer_config=None, ec_transfer_config=None, speculative_config=None,
    )  # fmt: skip
    assert served.untested(plain) == []
    every = none(
        parallel_config=none(pipeline_parallel_size=2),
        model_config=none(multimodal_config=none(mm_encoder_tp_mode="data"), quantization="fp8", hf_config=none(quantization_config={})),
        lora_config=none(enable_tower_connector_lora=True), kv_transfer_config=1, ec_transfer_config=1, speculative_config=1,
    )  # fmt: skip
    assert len(served.untested(every)) == 7 and "quantization (fp8)" in served.untested(every)
    for scheme, unknown in (("int-quantized", False), ("pack-quantized", True)):
        plain.model_config.quantization, plain.model_config.hf_config.quantization_config = "compressed-tensors", {"format": scheme}
        assert served.untested(plain) == ["quantization (compressed-tensors)"] * unknown


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
    """Chunked prefill of 24 tokens, fewer than an image has. The last two ask the tower for attention, and the first of them for keys.

    The last is decoded speculatively, by what its prompt and answer repeat.
    """
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    more = {"speculative_config": ngram} if spec == "scope:tokens=36" else {}
    (found,) = engine(builtin_folder(), [call(questions, n=60)], hf_overrides={KEY: spec}, max_num_batched_tokens=24, **more)
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


@needs_vllm
@pytest.mark.slow
def test_weights_and_activations_of_eight_bits(questions, tmp_path):
    """The decoder's layers quantized by hand (compressed-tensors W8A8), in bfloat16 as vLLM's kernel for CPUs asks, against transformers
    with the same rounding."""
    loaded = load(ModelOptions(device="cpu", dtype="bfloat16"))
    quantized(loaded.model, tmp_path / "w8a8", builtin_folder())
    (found,) = engine(tmp_path / "w8a8", [call(questions, n=40)], hf_overrides={KEY: "divprune:tokens=36"}, dtype="bfloat16")
    assert found["answers"] == of_transformers((loaded, questions[1], {}), "divprune:tokens=36", 40)
