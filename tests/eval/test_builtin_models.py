"""The embedded models that came after the first, as they are shipped: small, safe, stock, loaded by name, with a log of their training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import mllm_efficient as me
from mllm_efficient.embedded import FOLDERS, embedded
from mllm_efficient.loading.models import ModelOptions, load
from mllm_efficient.measure.shapes import load_shape
from mllm_efficient.trained.export import name_for_vllm

KINDS = {"qwen": ("qwen3_vl", "Qwen3VL"), "video": ("llava_onevision", "LlavaOnevision")}


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def test_they_are_all_here():
    assert {f"builtin-{name}" for name in KINDS} == set(FOLDERS) - {"builtin"}


def test_it_is_small_safe_and_stock(name):
    folder = embedded(FOLDERS[f"builtin-{name}"])
    assert not [f for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    assert (folder / "model.safetensors").stat().st_size <= 5e6
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    model, family = load(ModelOptions(model=f"builtin-{name}", device="cpu")).model, KINDS[name][0]
    assert type(model).__module__ == f"transformers.models.{family}.modeling_{family}"
    assert sum(p.numel() for p in model.parameters()) <= 2.5e6 and model.dtype == torch.float32


@pytest.mark.parametrize("folder", sorted(FOLDERS.values()))
def test_vllm_finds_the_towers_weights_without_an_export(folder):
    with safe_open(embedded(folder) / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names == [name_for_vllm(name) for name in names]


def test_it_is_had_in_python_and_its_shape_without_weights(name):
    family, prefix = KINDS[name]
    model, processor = me.builtin(name, device="cpu")
    assert type(model).__name__ == f"{prefix}ForConditionalGeneration" and type(processor).__name__ == f"{prefix}Processor"
    shape = load_shape(f"builtin-{name}")
    assert (shape.family, shape.decoder.layers) == (family, model.config.text_config.num_hidden_layers)


def test_the_log_tells_what_was_spent_and_found(name):
    log = embedded(FOLDERS[f"builtin-{name}"]) / "training_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["cpu_seconds"] <= 7200 and any("val" in line for line in lines)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
