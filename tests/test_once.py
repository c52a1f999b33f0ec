"""What is marked ``once`` is watched: a call of transformers is seen and fails the test. Which families and pairs are tested."""

from __future__ import annotations

import inspect
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import transformers

from . import families, once
from .pairs import for_all, pairwise, two_by_two


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


def test_families_that_run_everywhere_are_of_every_kind():
    chosen = once.representatives(families.FAMILIES)
    assert len(set(chosen)) == len(chosen) < len(families.FAMILIES)
    every = [once.kinds(family) for family in families.FAMILIES.values()]
    assert set().union(*(once.kinds(families.FAMILIES[name]) for name in chosen)) == set().union(*every) > {"mrope", "video", "newlines"}


class Item:
    """A collected test, as far as marks are concerned."""

    def __init__(self, module, *marks, **params):
        self.module, self.marks, self.callspec = module, list(marks), SimpleNamespace(params=params)
        self.path, self.nodeid = module.__file__, f"test[{params}]"

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, name):
        self.marks.append(name)


def test_what_another_family_stands_for_is_left_out_of_the_second_environment():
    from .patches import test_families, test_vllm

    chosen = once.representatives(families.FAMILIES)
    left = next(name for name in families.FAMILIES if name not in chosen)
    items = [
        Item(test_families, name=left), Item(test_families, name=chosen[0]), Item(test_families, row="one image"),
        Item(test_families, "every_family", name=left), Item(test_vllm, name=left),
    ]  # fmt: skip
    once.spare(items)
    assert ["spared" in item.marks for item in items] == [True, False, False, False, False]


def test_each_value_of_a_parameter_is_left_in_one_case():
    from .patches import test_families, test_vllm

    products = [Item(test_families, spec=spec, family=family) for spec, family in product("abc", "xyzw")]
    listed = [Item(test_families, value=value, right=value > 2) for value in range(5)]
    whole = [Item(test_vllm, spec=spec, family=family) for spec, family in product("ab", "xy")]
    for cases in (products, listed, whole):
        once.thin(cases)
    kept = [item.callspec.params for item in products if "spared" not in item.marks]
    assert len(kept) == 4 and {k["spec"] for k in kept} == set("abc") and {k["family"] for k in kept} == set("xyzw")
    assert not any("spared" in item.marks for item in listed + whole)


def test_every_two_values_that_meet_anywhere_meet_in_the_pairs():
    cases = [case for case in product("abc", range(5), (1, 2)) if case != ("a", 0, 2)]
    found = pairwise(cases)

    def pairs(some):
        return {pair for case in some for pair in combinations(enumerate(case), 2)}

    assert pairs(found) == pairs(cases) and len(found) == 15 and set(found) <= set(cases)


def test_a_case_of_many_that_fails_is_named(request):
    seen = []

    @for_all("seed", range(5))
    def both(seed, request):
        seen.append((seed, request))
        assert seed < 3

    with pytest.raises(AssertionError) as caught:
        both(request=request)
    assert caught.value.__notes__ == ["seed=3"] and seen == [(seed, request) for seed in range(4)]
    assert list(inspect.signature(both).parameters) == ["request"]


def test_stacked_parametrizations_meet_two_by_two():
    @two_by_two
    @pytest.mark.slow
    @pytest.mark.parametrize("a", ["x", pytest.param("y", marks=pytest.mark.once, id="why")])
    @pytest.mark.parametrize("b, c", [(1, {}), (2, [])], ids=["one", "two"])
    @pytest.mark.parametrize("d", [None, 0.5, list])
    def test(a, b, c, d): ...

    (slow, mark) = sorted(test.pytestmark, key=lambda mark: mark.name, reverse=True)
    assert slow.name == "slow" and mark.args[0] == "d, b, c, a" and len(mark.args[1]) == 6
    assert {case.id.split("-")[0] for case in mark.args[1]} == {"None", "0.5", "case2"}
    assert all(case.id.split("-")[1] == {1: "one", 2: "two"}[case.values[1]] for case in mark.args[1])
    assert all(bool(case.marks) == (case.values[3] == "y") == case.id.endswith("why") for case in mark.args[1])
    pairs = {pair for case in mark.args[1] for pair in combinations(case.id.split("-"), 2)}
    assert len(pairs) == 3 * 2 + 3 * 2 + 2 * 2
