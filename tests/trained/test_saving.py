"""What a wrapped model saves is loaded as what it was: by ``me.from_pretrained``, by transformers, and by a Trainer that resumes."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

import mllm_efficient as me
from mllm_efficient.apply.wrap import method_of
from mllm_efficient.loading.models import ModelOptions
from mllm_efficient.loading.models import load as load_model

TRAINED = ("tokenflex:tokens=36", "dpn")
SPECS = ("divprune:tokens=36", *TRAINED, "tokenflex:tokens=36 | divprune:tokens=18", "none@dpn")
NEW = dict(max_new_tokens=5)
ASK = """
import json, sys, torch
import mllm_efficient as me
torch.set_num_threads(1)
batch = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model, processor = me.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**batch).logits
        print(json.dumps([model.generate(**batch, max_new_tokens=5).tolist(), logits.double().sum().item(), type(processor).__name__]))
"""


@pytest.fixture(scope="module")
def builtin():
    """The embedded model, for which trained parts ship, and its processor."""
    loaded = load_model(ModelOptions())
    return loaded.model, loaded.processor, loaded


@pytest.fixture(scope="module")
def batch(builtin):
    _, processor, loaded = builtin
    generator = torch.Generator().manual_seed(0)
    images = [Image.fromarray(torch.randint(0, 256, (96, 96, 3), generator=generator, dtype=torch.uint8).numpy()) for _ in range(2)]
    text = [loaded.prompt(question, 1) for question in ("what is left of the red ring ?", "how many ?")]
    return dict(processor(images=images, text=text, return_tensors="pt", padding=True))


@pytest.fixture
def wrapped(builtin):
    """A copy of the embedded model, wrapped."""
    return lambda spec: me.wrap(copy.deepcopy(builtin[0]), spec)


def train(model, batch, steps=3):
    """Steps that move every weight."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model, batch):
    return [model.generate(**batch, **NEW).tolist(), model(**batch).logits.double().sum().item()]


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def plain(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.slow
def test_a_fresh_process_answers_as_the_trained_model_did(wrapped, batch, tmp_path):
    wanted, folders = [], []
    for spec in ("divprune:tokens=36", *TRAINED):
        for steps in (0, 3):
            model = train(wrapped(spec), batch, steps)
            model.save_pretrained(tmp_path / "first")
            folders.append(str(tmp_path / f"moved-{len(folders)}"))
            shutil.move(tmp_path / "first", folders[-1])
            wanted.append([*answers(model, batch), "LlavaProcessor"])
    torch.save(batch, tmp_path / "batch.pt")
    done = subprocess.run([sys.executable, "-c", ASK, str(tmp_path / "batch.pt"), *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == wanted
    assert "UNEXPECTED" not in done.stderr
    assert wanted[2] != wanted[3] and wanted[4] != wanted[5]


@pytest.mark.parametrize("spec", SPECS)
def test_the_folder_is_what_unwrap_leaves_and_what_wrap_put_there(wrapped, batch, tmp_path, spec):
    model = train(wrapped(spec), batch)
    model.save_pretrained(tmp_path / "saved")
    wanted = answers(model, batch)
    again, _ = me.from_pretrained(tmp_path / "saved")
    assert answers(again, batch) == wanted and same(again, model)
    method = method_of(again)
    assert me.load(tmp_path / "saved") == method and type(method) is type(me.build(spec))
    again.save_pretrained(tmp_path / "again")
    assert answers(me.from_pretrained(tmp_path / "again")[0], batch) == wanted
    base = plain(tmp_path / "saved")
    assert same(me.unwrap(model), base) and same(me.unwrap(again), base) and type(again) is type(base)


@pytest.mark.parametrize("spec", TRAINED)
def test_the_trained_part_is_a_folder_of_a_trained_method(wrapped, batch, tmp_path, spec):
    """It can be put into the model that lies beside it at another budget, and into no other."""
    model = train(wrapped(spec), batch)
    model.save_pretrained(tmp_path)
    name = spec.partition(":")[0]
    weights = f"{spec}{',' if ':' in spec else ':'}weights={tmp_path}"
    assert answers(me.wrap(plain(tmp_path), weights), batch) == answers(model, batch)
    if name == "tokenflex":
        assert me.load(tmp_path, tokens=9) == me.TokenFlex(tokens=9, weights=str(tmp_path))
    other = plain(tmp_path)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(me.MllmEfficientError, match="was trained on another model"):
        me.wrap(other, weights)


@pytest.mark.parametrize("spec", TRAINED)
def test_another_precision_is_the_callers(wrapped, batch, tmp_path, spec):
    wrapped(spec).save_pretrained(tmp_path)
    model, _ = me.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(**batch).logits.isfinite().all()


def test_shards_of_a_checkpoint_hold_the_same(wrapped, batch, tmp_path):
    model = train(wrapped("dpn"), batch)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert answers(me.from_pretrained(tmp_path)[0], batch) == answers(model, batch)


def test_a_state_from_elsewhere_can_be_saved_and_part_of_one_cannot(wrapped, batch, tmp_path):
    model = train(wrapped("tokenflex:tokens=36"), batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    wanted = answers(model, batch)
    train(model, batch)
    model.save_pretrained(tmp_path, state_dict=state)
    assert answers(me.from_pretrained(tmp_path)[0], batch) == wanted
    del state["model.multi_modal_projector.down.weight"]
    with pytest.raises(me.MllmEfficientError, match="lacks model.multi_modal_projector.down.weight, which was trained"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_another_method_leaves_nothing_of_the_one_before_it(wrapped, batch, tmp_path):
    wrapped("dpn").save_pretrained(tmp_path)
    assert (tmp_path / "compressor.safetensors").is_file()
    model = wrapped("divprune:tokens=36")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "compressor.safetensors").exists()
    assert answers(me.from_pretrained(tmp_path)[0], batch) == answers(model, batch)


def test_the_length_of_logits_comes_back(builtin, batch, tmp_path):
    model = me.wrap(copy.deepcopy(builtin[0]), "divprune:tokens=9", logits="full")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(me.from_pretrained(tmp_path / "saved")[0](**batch).logits, expected)
        assert me.from_pretrained(tmp_path / "saved", logits="short")[0](**batch).logits.shape[1] < expected.shape[1]


@pytest.mark.parametrize("spec", ["tokenflex:tokens=36", "dpn"])
def test_weights_that_were_offloaded_since_are_not_taken_for_the_models_own(wrapped, batch, spec):
    """accelerate's hooks would bring the trained ones back at the next call."""
    import accelerate

    model = accelerate.cpu_offload(wrapped(spec), execution_device=torch.device("cpu"))
    with pytest.raises(me.UnsupportedModelError, match="were offloaded since: load the model anew"):
        me.unwrap(model)
    assert me.is_wrapped(model)


def test_a_folder_by_a_relative_path_is_found_from_elsewhere_too(wrapped, batch, tmp_path, monkeypatch):
    model = wrapped("dpn")
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    again, _ = me.from_pretrained("saved")
    monkeypatch.chdir("/")
    assert answers(again, batch) == answers(model, batch)
    assert method_of(again).weights == str(tmp_path / "saved")


@pytest.mark.parametrize(
    "spec, name",
    [("none@dpn", "a, b|c=d"), ("none@tokenflex", "it's [one].yaml"), ("tokenflex:tokens=36 | pool:tokens=9", "2024, a|b")],
)
def test_a_folder_may_have_any_name(wrapped, batch, tmp_path, spec, name):
    model = wrapped(spec)
    model.save_pretrained(tmp_path / name)
    again, _ = me.from_pretrained(tmp_path / name)
    method = method_of(again)
    assert answers(again, batch) == answers(model, batch)
    assert method == me.load(tmp_path / name) == me.build(method.spec()) and method.installs.weights == str(tmp_path / name)


def test_a_folder_keeps_the_processor_that_lies_there(wrapped, builtin, tmp_path):
    processor = copy.deepcopy(builtin[1])
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path)
    wrapped("divprune:tokens=36").save_pretrained(tmp_path)
    assert me.from_pretrained(tmp_path)[1].tokenizer.padding_side == "right"


def test_a_model_without_a_known_processor_says_so(tiny_llava, make_batch, tmp_path):
    model, batch = me.wrap(tiny_llava, "divprune:tokens=9"), make_batch("one image")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no processor: processor.save_pretrained puts it there"):
        again, processor = me.from_pretrained(tmp_path)
    assert processor is None and torch.equal(again(**batch).logits, model(**batch).logits)


# ------------------------------------------------------------------------------------------------ Trainer


TIED = "There were missing keys in the checkpoint model loaded: ['lm_head.weight']."  # said of every model with a tied head


class Begun(TrainerCallback):
    """The model as it is when training begins, or goes on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = copy.deepcopy(model)


def trainer_for(model, batch, folder, *callbacks):
    from transformers import Trainer, TrainingArguments

    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, learning_rate=1e-2, optim="sgd", save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments,
        data_collator=lambda rows: {**batch, "labels": labels},
        train_dataset=[{"row": 0}] * 64,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("spec", ["divprune:tokens=36", *TRAINED])
def test_a_trainer_resumes_where_it_was(wrapped, batch, tmp_path, spec, caplog):
    model = wrapped(spec).train().requires_grad_(True)
    start = copy.deepcopy(model)
    trainer_for(model, batch, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert not same(model, start)
    loaded, _ = me.from_pretrained(checkpoint)
    assert same(loaded, model)
    for again in (start, loaded):  # as the script made it, and as the folder gives it
        begun = Begun()
        trainer_for(again, batch, tmp_path, begun).train(resume_from_checkpoint=str(checkpoint))
        assert same(begun.model, model)
        assert same(me.unwrap(begun.model), plain(checkpoint))
    assert {r.getMessage() for r in caplog.records if " keys in the checkpoint" in r.getMessage()} <= {TIED}


def test_a_sharded_checkpoint_is_loaded_file_by_file_in_any_order(wrapped, batch, tmp_path):
    from safetensors.torch import load_file

    model = train(wrapped("tokenflex:tokens=36"), batch)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    for order in (files, files[::-1]):
        again = wrapped("tokenflex:tokens=36")
        for file in order:
            again.load_state_dict(load_file(file), strict=False)
        assert same(again, model)


def test_a_state_of_the_wrapped_model_is_loaded_as_it_is(wrapped, batch):
    model, again = train(wrapped("dpn"), batch), wrapped("dpn")
    again.load_state_dict(model.state_dict())
    assert same(again, model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict({**model.state_dict(), "more": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------ hub


def test_a_repository_of_the_hub_is_a_folder_too(wrapped, batch, tmp_path):
    """In the cache as huggingface_hub lays it out: a test asks no network."""
    model = train(wrapped("tokenflex:tokens=36"), batch)
    repository = tmp_path / "models--someone--model"
    model.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("abc")
    again, processor = me.from_pretrained("someone/model", revision="v1", cache_dir=str(tmp_path), local_files_only=True)
    assert answers(again, batch) == answers(model, batch) and processor is not None


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_is_what_is_saved(wrapped, tmp_path, monkeypatch, how):
    from pathlib import Path
    from types import SimpleNamespace

    from transformers import modeling_utils
    from transformers.utils import hub

    sent = []
    api = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: api, raising=False)
        monkeypatch.setattr(module, "create_repo", api.create_repo, raising=False)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda path: None), raising=False)
    model = wrapped("dpn")
    stock = type(model).__mro__[1]
    monkeypatch.setattr(
        stock,
        "_upload_modified_files",
        lambda self, folder, repo, *_, **__: sent.append((repo, sorted(p.name for p in Path(folder).iterdir()))),
    )
    if how == "push_to_hub":
        model.push_to_hub("someone/model")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/model")
        assert answers_are_there(tmp_path)
    ((repository, files),) = sent
    assert repository == "someone/model"
    assert {"compression.json", "compressor.safetensors", "model.safetensors", "config.json", "processor_config.json"} <= set(files)


def answers_are_there(folder):
    return method_of(me.from_pretrained(folder)[0]).name == "dpn"


# ------------------------------------------------------------------------------------------------ adapters, and what is refused


def test_adapters_are_saved_without_the_method(wrapped, builtin, batch, tmp_path):
    """Of PEFT's own saving nothing changes: the base is wrapped alike before the adapter is put on again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(wrapped("tokenflex:tokens=36"), lora)
    wanted = answers(model, batch)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert answers(PeftModel.from_pretrained(wrapped("tokenflex:tokens=36"), tmp_path), batch) == wanted
    with pytest.raises(me.UnsupportedModelError, match="save the adapter, or merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert answers(me.from_pretrained(tmp_path / "merged")[0], batch) == answers(merged, batch)


def test_adapters_of_the_model_itself_are_saved_as_without_a_wrap(wrapped, tmp_path, monkeypatch):
    """``model.add_adapter`` (transformers 5.24 wants PEFT 0.22 for it): transformers then saves the adapter alone."""
    model, calls = wrapped("tokenflex:tokens=36"), []
    monkeypatch.setattr(type(model).__mro__[1], "save_pretrained", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    model._hf_peft_config_loaded = True
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert calls == [((tmp_path,), {"max_shard_size": "1GB"})] and not list(tmp_path.iterdir())


def test_what_cannot_be_told_apart_is_refused(wrapped, tmp_path):
    model = wrapped("tokenflex:tokens=36")
    model.hf_quantizer = None
    with pytest.raises(me.UnsupportedModelError, match="pass state_dict= with whole weights"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)
    model.hf_quantizer = object()
    with pytest.raises(me.UnsupportedModelError, match="quantized .* mllm-efficient export"):
        model.save_pretrained(tmp_path)
    del model.hf_quantizer
    with pytest.raises(me.UnsupportedModelError, match="offloaded .* mllm-efficient export"):
        model.to("meta").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "was not saved from a wrapped model"),
        ("{", "cannot be read"),
        ("[]", "names no method"),
        ('{"method": {"method": "x"}}', "x"),
    ],
)
def test_a_folder_that_is_none_is_one_line(builtin, tmp_path, content, said):
    builtin[0].save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "compression.json").write_text(content)
    with pytest.raises(me.MllmEfficientError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        me.from_pretrained(tmp_path)


def test_another_family_is_refused_before_its_weights_are_read(builtin, tmp_path):
    builtin[0].config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Florence2ForConditionalGeneration"]}))
    (tmp_path / "compression.json").write_text('{"method": {"method": "divprune", "keep": 0.5}}')
    with pytest.raises(me.UnsupportedModelError, match="Florence2ForConditionalGeneration, which is not supported"):
        me.from_pretrained(tmp_path)
