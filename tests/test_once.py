"""What is marked ``once`` is watched: a call of transformers is seen, fails the test, and nothing of the watching stays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from . import once


def test_calls_of_models_tokenizers_and_processors_are_seen(make_llava, make_batch, processor):
    stock = {name: [getattr(getattr(transformers, name), method) for method in methods] for name, methods in once.STOCK.items()}
    model, batch = make_llava(), make_batch("one image")
    for call, seen in (
        (lambda: model(**batch), "PreTrainedModel.__call__"),
        (lambda: model.generate(**batch, max_new_tokens=1), "GenerationMixin.generate"),
        (lambda: processor(text=["what"]), "ProcessorMixin.__call__"),
        (lambda: processor.tokenizer("what"), "PreTrainedTokenizerBase.__call__"),
        (lambda: type(model)(model.config), "PreTrainedModel.__init__"),
    ):
        with once.watched() as calls:
            call()
        assert seen in calls
    with once.watched() as calls:
        model.get_input_embeddings()
    assert calls == []
    assert stock == {name: [getattr(getattr(transformers, name), method) for method in methods] for name, methods in once.STOCK.items()}


@pytest.mark.parametrize("calls", [[], ["GenerationMixin.generate"]])
def test_a_marked_test_that_made_one_fails(calls):
    end = once.pytest_runtest_teardown(SimpleNamespace(stash={once.reached: calls}))
    next(end)
    with pytest.raises(pytest.fail.Exception if calls else StopIteration, match=calls[0] if calls else None):
        end.send(None)


@pytest.mark.parametrize(
    "source, refused",
    [
        ("def test():\n    import lmms_eval\n", True), ("from vllm.config import ModelConfig", True), ("@needs_vllm\ndef test()", True),
        ('pytest.importorskip("torchvision")', True), ("from mllm_efficient.patches.vllm.settings import settings_of", False),
        ("from mllm_efficient.eval.lmms.scores import clustered", False),
    ],
)  # fmt: skip
def test_what_only_one_environment_has_is_found_in_a_source(source, refused):
    assert bool(once.ABSENT.search(source)) == refused
