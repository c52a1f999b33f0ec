"""The commands: one clear line and exit code 2 on bad input, one JSON object on stdout with --json."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from mllm_efficient.cli import main
from mllm_efficient.eval.builtin.scenes import make_scene


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(make_scene("val", 3).draw()).save(path)
    return path


def fails(capsys, *argv: object) -> str:
    """Runs a command that must end with exit code 2 and one line on stderr, nothing on stdout; returns the line."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("mllm-efficient: "), (out, err)
    assert "Traceback" not in err
    return lines[0]


ASK = ("--prompt", "What colour is the big object?")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("divprun", "did you mean 'divprune'"),
        ("divprune", "give exactly one of"),
        ("divprune:keep=0", "outside (0, 1]"),
        ("divprune:keep=1.5", "outside (0, 1]"),
        ("divprune:keep=nan", "not a fraction"),
        ("divprune:tokens=0", "below 1"),
        ("divprune:tokens=2.5", "not a whole number"),
        ("divprune:tokens=145", "more than the 144"),
        ("divprune:keep=0.5,tokens=3", "together"),
        ("divprune:kep=0.5", "did you mean 'keep'"),
        ("divprune:keep=0.5,metric=cos", "metric"),
        ("no_such.yaml", "cannot read"),
        ("random:keep=0.5|divprune:keep=0.5", "one kind"),
    ],
)
def test_a_bad_method_is_one_line(capsys, scene, method, says):
    assert says in fails(capsys, "generate", "--image", scene, *ASK, "--method", method)


def test_a_bad_image_is_one_line(capsys, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (7, 30)).save(tmp_path / "thin.png")
    Image.new("RGB", (2000, 10)).save(tmp_path / "long.png")
    Image.new("1", (9500, 9500)).save(tmp_path / "huge.png")
    for name, says in [("absent", "no image"), ("text", "not an image"), ("thin", "8"), ("long", "100:1"), ("huge", "megapixels")]:
        assert says in fails(capsys, "generate", "--image", tmp_path / f"{name}.png", *ASK)


def test_no_image_no_prompt_no_command(capsys, scene):
    assert "no image" in fails(capsys, "generate", *ASK)
    assert "--prompt" in fails(capsys, "generate", "--image", scene)
    assert "evl" in fails(capsys, "evl")


def test_a_missing_model_is_one_line(capsys, scene, tmp_path):
    assert "no model folder" in fails(capsys, "generate", "--model", tmp_path / "absent", "--image", scene, *ASK)
    (tmp_path / "empty").mkdir()
    assert "cannot load" in fails(capsys, "generate", "--model", tmp_path / "empty", "--image", scene, *ASK)
    assert "cannot load" in fails(capsys, "generate", "--model", "nobody/nothing-7b", "--image", scene, *ASK)


def test_an_unsupported_model_names_the_supported_families(capsys, scene, tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    from mllm_efficient.loading.models import builtin_folder

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BlipTextConfig(**small, vocab_size=100, encoder_hidden_size=16)
    config = BlipConfig(text_config=text.to_dict(), vision_config=BlipVisionConfig(**small).to_dict())
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (tmp_path / "blip" / name).write_bytes((builtin_folder() / name).read_bytes())
    capsys.readouterr()
    assert main(["generate", "--model", str(tmp_path / "blip"), "--image", str(scene), *ASK]) == 2
    assert "LlavaForConditionalGeneration" in capsys.readouterr().err


def test_a_model_without_vision_is_one_line_before_its_weights_are_read(capsys, scene, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    says = fails(capsys, "generate", "--model", tmp_path / "llama", "--image", scene, *ASK)
    assert "is a LlamaForCausalLM" in says and "takes no images" in says and "Qwen3VLForConditionalGeneration" in says


def test_an_image_count_that_does_not_match_the_prompt_is_one_line(capsys, scene):
    assert "2 <image> and 1 image(s)" in fails(capsys, "generate", "--image", scene, "--prompt", "<image><image> what colour ?")
    assert "1 <image> and 2 image(s)" in fails(capsys, "generate", "--image", scene, "--image", scene, "--prompt", "<image> what ?")


@pytest.mark.parametrize("option", [("--device", "cuda:9"), ("--dtype", "float8"), ("--quantization", "int3"), ("--import", "absent.py")])
def test_a_bad_option_is_one_line(capsys, scene, option):
    fails(capsys, "generate", "--image", scene, *ASK, *option)


def test_eval_refuses_unknown_suites_splits_and_references(capsys):
    assert "suite" in fails(capsys, "eval", "--suite", "builtn")
    assert "split" in fails(capsys, "eval", "--split", "train")
    assert "--against" in fails(capsys, "eval", "--against", "random:keep=0.5")


def test_generate_answers_and_says_what_it_kept(capsys, scene):
    assert main(["generate", "--image", str(scene), *ASK, "--method", "divprune:keep=0.25"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == make_scene("val", 3).big.colour
    assert "divprune keeps 36 of 144 tokens per image (removes 75.0%)" in err


def test_generate_json_is_one_object(capsys, scene):
    argv = ["generate", "--image", str(scene), "--image", str(scene), *ASK, "--method", "random:tokens=9", "--json"]
    assert main(argv) == 0
    out, _ = capsys.readouterr()
    (row,) = json.loads(out)["rows"]
    assert (row["images"], row["visual_tokens_full"], row["visual_tokens_kept"]) == (2, 288, 18)
    meta = json.loads(out)["meta"]
    assert meta["methods"] == [{"method": "random", "tokens": 9}]
    assert {"versions", "device", "dtype", "attention", "image_processor", "seed", "weights"} <= set(meta)


def test_generate_takes_every_model_option(capsys, scene):
    options = ["--device", "cpu", "--dtype", "bfloat16", "--attn-implementation", "eager", "--seed", "3", "--max-new-tokens", "2"]
    assert main(["generate", "--image", str(scene), *ASK, "--json", *options]) == 0
    meta = json.loads(capsys.readouterr().out)["meta"]
    assert (meta["dtype"], meta["attention"], meta["seed"]) == ("bfloat16", "eager", 3)


def test_int8_weights_on_a_cpu(capsys, scene):
    argv = ["generate", "--image", str(scene), *ASK, "--method", "divprune:keep=0.25", "--quantization", "int8", "--device", "cpu"]
    assert main(argv) == 0
    assert capsys.readouterr().out.strip() == make_scene("val", 3).big.colour


def test_methods_json_lists_parameters(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["divprune"]["paper"] == "arXiv 2503.02175" and rows["divprune"]["parameters"]["metric"] == "cosine"
    assert rows["pool"]["needs"] == ["grid"] and not rows["random"]["query_aware"]


def test_a_users_file_brings_a_method(capsys, scene, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport mllm_efficient as me\n"
        "@me.register('norm_cli')\n@dataclass(frozen=True, kw_only=True)\nclass Norm(me.Selector):\n"
        "    def score(self, v):\n        return v.features.norm(dim=-1)\n"
    )
    argv = ["generate", "--image", str(scene), *ASK, "--import", str(tmp_path / "mine.py"), "--method", "norm_cli:tokens=20"]
    assert main(argv) == 0
    assert "norm_cli keeps 20 of 144" in capsys.readouterr().err


def test_help_methods_and_refusals_import_no_torch():
    code = (
        "import sys\nfrom mllm_efficient.cli import main\n"
        "for argv in (['methods'], ['--help'], ['eval', '--help'], ['generate', '--help']):\n"
        "    assert main(argv) == 0\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), argv\n"
        "for argv in (['choose'], ['choose', '--labelled', 'x', '--seed', '0']):\n"
        "    assert main(argv) == 2\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), argv"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
