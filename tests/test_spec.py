"""The grammar of specifications: what is written is read again, and what was read before means what it meant."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Optional

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import mllm_efficient as me
from mllm_efficient import registry, spec
from mllm_efficient.compressors.composed import stages_of

pytestmark = pytest.mark.once

ODD = list("aZ09 ,|=:@\"'\\/[]{}#~-.\t\n\0é语😀\x7f\x85\udcff")
WORDS = ["none", "null", "true", "2024", "1e3", "nan", "inf", "~", "01", "2024-01-01", "- a", "a: b", "x.yaml", "x.yml", "none@a", "a="]
odd_text = st.one_of(
    st.sampled_from(WORDS), st.text(alphabet=st.sampled_from(ODD), min_size=1, max_size=12), st.text(min_size=1, max_size=12)
)
fraction = st.floats(min_value=1e-6, max_value=1.0)
shares = st.lists(fraction, min_size=1, max_size=3).map(lambda s: "/".join(f"{v:g}" for v in sorted(s, reverse=True)))

DRAWN: dict[str, st.SearchStrategy] = {
    "positions": st.sampled_from(["renumber", "keep"]), "per": st.sampled_from(["image", "tile", "frame"]), "newline": st.just("keep"),
    "seed": st.integers(-5, 10**12), "raster": st.booleans(), "op": st.sampled_from(["avg", "max", "gem", "ggem"]),
    "p": st.one_of(st.floats(0.1, 9.0), st.integers(1, 9), st.sampled_from(["1/3/5", "2/4"])), "mode": st.sampled_from(["avg", "grid"]),
    "metric": st.sampled_from(["cosine", "l1", "l2"]), "order": st.sampled_from(["raster", "chosen"]),
    "ratio": fraction, "ratios": shares, "layer": st.integers(1, 40), "recycle": st.floats(0, 1), "clusters": st.floats(0.01, 1),
    "pivots": st.integers(1, 8), "text_pivots": st.integers(0, 8), "at": st.sampled_from(["8", "8/16/24", "projector", "tower"]),
    "kernels": st.sampled_from(["1x1/1x2/2x2", "2", "1x1"]), "pool": st.sampled_from(["max", "avg"]), "temperature": st.floats(0.1, 20),
    "scaling": st.booleans(), "router_token": st.integers(0, 99), "routing": st.sampled_from(["learned", "random", "fixed"]),
    "kernel": st.sampled_from(["2x2", "1x1/2x2/2x2"]), "relevance": st.sampled_from(["llm", "clip"]), "clip": odd_text,
    "r": st.one_of(st.integers(1, 20), st.floats(0, 1)), "contextual": st.floats(0, 1), "alpha": st.floats(0, 2),
    "uniform": st.floats(0, 1), "neighbours": st.integers(1, 64), "weights": odd_text, "min_tokens": st.integers(1, 9),
    "max_tokens": st.integers(9, 99),
}  # fmt: skip
BUDGETS = st.one_of(
    st.fixed_dictionaries({"keep": fraction}), st.fixed_dictionaries({"prune": st.floats(0, 0.99)}),
    st.fixed_dictionaries({"tokens": st.integers(1, 30).map(lambda n: n * n)}),
)  # fmt: skip


def takes_none(cls: Any) -> bool:
    """Whether a method is made without a budget."""
    try:
        return bool(cls())
    except (me.MllmEfficientError, TypeError):
        return False


def methods(names: Sequence[str]) -> st.SearchStrategy[Any]:
    """Methods of these names with a few drawn settings; ``none`` on the weights of a trained one, too."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Any:
        name = draw(st.sampled_from(names))
        if name == "none":
            part = draw(st.sampled_from(["tokenflex", "dpn"]))
            return me.NoCompression(on=spec.write(part, {"weights": draw(odd_text)}, {"weights"}))
        cls: Any = me.get_method(name)
        known = [f.name for f in dataclasses.fields(cls) if f.name in DRAWN]
        given = draw(st.sets(st.sampled_from(known), max_size=3)) | ({"weights"} if "weights" in known else set())
        budget = {} if getattr(cls, "routes", False) or takes_none(cls) or given & {"ratio", "ratios"} else draw(BUDGETS)
        try:
            return cls(**budget, **{field: draw(DRAWN[field]) for field in sorted(given)})
        except me.MllmEfficientError:
            assume(False)

    return drawn()


PRE_LLM = [n for n in registry.BUILTIN if me.get_method(n).kind == "pre_llm" and n not in ("none", "native")]
IN_LLM = [n for n in registry.BUILTIN if me.get_method(n).kind == "in_llm"]
some = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


def same(method: Any) -> None:
    text = method.spec()
    assert len(text.splitlines()) == 1 and me.build(text) == method == me.build(method.to_dict()) and me.build(text).spec() == text
    assert me.build(json.loads(json.dumps(method.to_dict()))) == method
    for one, other in zip(stages_of(method), stages_of(me.build(text))):
        assert type(one) is type(other)
        for field in dataclasses.fields(one):
            assert isinstance(getattr(other, field.name), str) == isinstance(getattr(one, field.name), str), field.name


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", registry.BUILTIN)
def test_a_method_is_built_again_of_its_specification(name):
    @some
    @given(methods([name]))
    def check(method):
        same(method)

    check()


@some
@given(methods(["tokenflex", "none"]), methods(PRE_LLM), methods([n for n in IN_LLM if n != "dpn"]))
def test_a_composition_is_built_again_of_its_specification(first, second, third):
    parts = [first, third] if first.name == "none" else [first, second, third]
    same(me.build(parts))
    same(me.build(parts[-2:]))


@settings(max_examples=150, deadline=None)
@given(odd_text)
def test_the_baseline_on_any_folder_is_built_again(folder):
    method = me.TokenFlex(tokens=4, weights=folder)
    baseline = me.build(method.same_weights)
    assert baseline.installs == dataclasses.replace(method, tokens=None, keep=1) and me.build(baseline.spec()) == baseline
    assert me.build({"method": "none", "on": baseline.on}) == baseline


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.one_of(odd_text, st.integers(), st.booleans(), st.none(), st.lists(st.integers()))))
def test_what_is_written_is_read(values):
    text = {"a"}
    written = spec.write("any", {k: v for k, v in values.items() if k != "a" or v is None or isinstance(v, str)}, text)
    for whole in (written, f"{written} | other:a=1"):
        stage = spec.parse(whole)[0]
        for key, value in stage.settings.items():
            assert spec.value_of(value, key in text) == values[key] and type(spec.value_of(value, key in text)) is type(values[key])
        assert stage.name == "any" and len(spec.parse(whole)) == whole.count(" | other:a=1") + 1


# ------------------------------------------------------------------------------------------------ what was read before


def split_at_every_separator(text: str) -> list[tuple[str, dict[str, str]]]:
    """The grammar of specifications without quotes, lists and mappings: every ``|`` and ``,`` separates."""
    out = []
    for stage in text.split("|"):
        name, _, rest = stage.strip().partition(":")
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        pairs = [tuple(half.strip() for half in part.split("=", 1)) for part in parts]
        out.append((name.strip(), dict(pairs)))
    return out


bare = st.text(alphabet=st.characters(exclude_characters="|,=:\"'[]{}@", codec="utf-8"), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(bare, st.dictionaries(bare.filter(str.strip), st.text(alphabet="abc=: @.~1", max_size=6), max_size=3)), min_size=1)
)
def test_without_quotes_every_separator_separates(stages):
    keys = [key.strip() for _, given in stages for key in given]
    assume(len(set(keys)) == len(keys) and "method" not in keys)
    text = "|".join(f"{name}:{','.join(f'{k}={v}' for k, v in given.items())}" for name, given in stages)
    assert [(s.name, s.settings) for s in spec.parse(text)] == split_at_every_separator(text)


@pytest.mark.parametrize("text", ["0.1", "1e-1", ".5", "64", "-3", "nan", "inf", "true", "yes", "null", "", "a lot", "1/3/5", "0x10"])
def test_a_bare_value_of_a_number_is_what_yaml_or_float_make_of_it(text):
    wanted = yaml.safe_load(text)
    if isinstance(wanted, str):
        with contextlib.suppress(ValueError):
            wanted = float(text)
    found = spec.value_of(text, text=False)
    assert type(found) is type(wanted) and (found == wanted or found != found)


# ------------------------------------------------------------------------------------------------ text stays text


@pytest.mark.parametrize("folder", ["2024", "1e3", "true", "2024-01-01", "nan", "a: b", "/data #3", "- a", "0x10"])
def test_a_folder_that_looks_like_a_number_is_a_folder(folder):
    assert me.build(f"tokenflex:tokens=4,weights={folder}").weights == folder
    assert me.build(f"none@dpn:weights={folder}").installs.weights == folder


@pytest.mark.parametrize("nothing", ["", "null", "~"])
def test_nothing_is_none_and_its_word_can_be_quoted(nothing):
    assert me.build(f"tokenflex:tokens=4,weights={nothing}").weights is None
    assert me.build(f"tokenflex:tokens=4,weights='{nothing}'").weights == nothing


def test_separators_are_letters_within_quotes():
    method = me.build("""tokenflex: tokens=16, weights = "/a, b|c=d" | none | divprune:metric='l2',keep=0.5""")
    assert method == me.build([me.TokenFlex(tokens=16, weights="/a, b|c=d"), me.DivPrune(keep=0.5, metric="l2")])


@pytest.mark.parametrize("text", ["divprune:keep='0.1", 'divprune:keep=0.1,metric="l2', "divprune:keep=[0.1", 'divprune:keep="a"b'])
def test_a_value_that_is_not_closed_is_one_line(text):
    with pytest.raises(me.BadSettingError, match="is not a value") as caught:
        me.build(text)
    assert "\n" not in str(caught.value)


def test_a_method_of_anybody_says_which_settings_are_text(registered):
    @registered("anybodys")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Anybodys(me.Selector):
        name_of_it: Optional[str] = None  # noqa: UP045
        either: Any = None
        layers: Any = ()

    assert spec.text_fields(Anybodys) >= {"name_of_it"} and not spec.text_fields(Anybodys) & {"either", "layers", "keep"}
    method = me.build('anybodys:keep=0.5,name_of_it=12,either="12",layers=[[1, "a,b|c"], {"d": 2}] | none')
    assert (method.name_of_it, method.either, method.layers) == ("12", "12", [[1, "a,b|c"], {"d": 2}])
    assert me.build(method.spec()) == method


@pytest.mark.parametrize("name", ["a:b", "a|b", "a b ", "none@a", " a", ""])
def test_a_name_that_no_specification_could_hold_is_refused(registered, name):
    with pytest.raises(me.MllmEfficientError, match="cannot be a method's name"):
        registered(name)(dataclasses.dataclass(frozen=True)(type("Odd", (me.Selector,), {})))


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    "what, lacking",
    [
        ("divprune", ["divprune"]), ("divprune:metric=l2,min_tokens=4", ["divprune"]), ("pool:keep=0.5", []), ("none", []),
        ("none@tokenflex", []), ("fastv", ["fastv"]), ("fastv:ratio=0.5", []), ("dpn:routing=random", []),
        ("tokenflex | divprune:keep=0.5", ["tokenflex"]), ("divprune | fastv", ["divprune", "fastv"]),
        ("tokenflex:weights='keep=0.5'", ["tokenflex"]), ({"method": "divprune"}, ["divprune"]),
        (["divprune", "fastv:ratio=0.5"], ["divprune"]),
    ],
)  # fmt: skip
def test_what_lacks_a_budget_is_asked_of_the_methods(what, lacking):
    assert registry.without_budget(what) == lacking
    if len(lacking) == 1:
        assert [s.keep == 0.125 for s in stages_of(registry.with_budget(what, keep=0.125))].count(True) == 1
    else:
        assert lacking or registry.with_budget(what, keep=0.125) == me.build(what)


def test_another_fault_is_no_missing_budget():
    for bad in ("divprun", "divprune:kep=1", "divprune:keep=2", "divprune:keep=0.5,tokens=4"):
        with pytest.raises(me.MllmEfficientError):
            registry.without_budget(bad)


@pytest.mark.parametrize(
    "text, rest",
    [
        ("divprune:tokens=64,metric=l2 | fastv:keep=0.5", "divprune:metric=l2 | fastv"),
        ("""tokenflex:weights="a,keep=1|b",tokens=4""", """tokenflex:weights="a,keep=1|b\""""),
        ("none", "none"),
    ],
)
def test_settings_can_be_left_out(text, rest):
    assert spec.without(text, {"keep", "tokens"}) == rest
