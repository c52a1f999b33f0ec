"""Names, specifications, dicts, YAML files and installed packages to methods; and the errors on the way."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import pytest

import mllm_efficient as me

pytestmark = pytest.mark.once

ROOT = Path(me.__file__).parent.parent
BUILTIN = ["none", "random", "uniform", "pool", "resize", "native", "divprune", "divmerge", "tokenflex"]
BUILTIN += ["fastv", "pyramiddrop", "sparsevlm", "dart", "dpn", "proportional"]
BUILTIN += ["cdpruner", "spp", "tome", "fastervlm", "vispruner", "visionzip", "scope", "prumerge_plus", "flowcut", "pixelprune"]
BUILTIN += ["mmtok", "apet", "prunesid", "otprune", "hawk", "vscan", "evs", "vidcom2", "vcast", "fastvid"]
for name in BUILTIN:
    me.get_method(name)  # a builtin registers itself once per process, at import


def refusal(what) -> str:
    """The one line that building ``what`` raises."""
    with pytest.raises(me.MllmEfficientError) as caught:
        me.build(what)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Names ---------------------------------------------------------------------------------------------------------------


def test_the_builtin_methods_are_listed_baseline_first():
    assert me.list_methods()[: len(BUILTIN)] == BUILTIN
    assert len(set(me.list_methods())) == len(me.list_methods())


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("none", "NoCompression"),
        ("random", "Random"),
        ("uniform", "Uniform"),
        ("pool", "Pool"),
        ("resize", "Resize"),
        ("divprune", "DivPrune"),
        ("divmerge", "DivMerge"),
        ("cdpruner", "CDPruner"),
        ("spp", "SpatialPyramidPooling"),
        ("tome", "ToMe"),
        ("fastervlm", "FasterVLM"),
        ("vispruner", "VisPruner"),
        ("visionzip", "VisionZip"),
        ("scope", "Scope"),
        ("prumerge_plus", "PruMergePlus"),
        ("mmtok", "MMTok"),
        ("apet", "ApET"),
        ("prunesid", "PruneSID"),
        ("otprune", "OTPrune"),
        ("hawk", "Hawk"),
        ("vscan", "VScan"),
        ("evs", "EVS"),
        ("vidcom2", "VidCom2"),
        ("vcast", "VCast"),
        ("fastvid", "FastVID"),
    ],
)
def test_a_builtin_name_is_the_public_class(name, cls):
    assert me.get_method(name) is getattr(me, cls)
    assert getattr(me, cls).name == name


@pytest.mark.parametrize(
    ("typo", "meant"), [("divprun", "divprune"), ("unifrom", "uniform"), ("rezise", "resize"), ("DivPrune", "divprune")]
)
def test_an_unknown_method_names_the_nearest(typo, meant):
    message = refusal(f"{typo}:keep=0.1")
    assert message.startswith(f"unknown method {typo!r} - did you mean ") and repr(meant) in message
    assert "mllm-efficient methods lists all" in message
    with pytest.raises(me.UnknownMethodError):
        me.get_method(typo)


def test_an_unknown_method_that_is_near_nothing_gets_no_guess():
    assert refusal("qqqqqqqq:keep=0.1") == "unknown method 'qqqqqqqq' (mllm-efficient methods lists all)"


def test_registered_methods_are_suggested_too(registered):
    @registered("sharpest")
    @dataclasses.dataclass(frozen=True)
    class Sharpest(me.Selector):
        pass

    assert "did you mean 'sharpest'" in refusal("sharpset:keep=0.1")


@pytest.mark.parametrize(
    ("spec", "typo", "meant"),
    [("divprune:kep=0.1", "kep", "keep"), ("divprune:token=64", "token", "tokens"), ("random:keep=0.1,sed=1", "sed", "seed")],
)
def test_an_unknown_parameter_names_the_nearest_and_all(spec, typo, meant):
    message = refusal(spec)
    method = spec.split(":")[0]
    assert message.startswith(f"{method} has no parameter {typo!r} - did you mean ") and repr(meant) in message
    for known in ("keep", "tokens", "prune", "min_tokens", "max_tokens", "positions"):
        assert known in message.split("it takes ")[1]


def test_a_parameter_of_another_method_is_unknown():
    assert refusal("uniform:keep=0.1,metric=l2").startswith("uniform has no parameter 'metric'")
    assert refusal({"method": "pool", "keep": 0.5, "seed": 1}).startswith("pool has no parameter 'seed'")
    assert refusal({"method": "pool", "keep": 0.5, 5: 1}).startswith("pool has no parameter 5")


@pytest.mark.parametrize(
    "error",
    ["UnknownMethodError", "BadBudgetError", "UnsupportedModelError", "CountMismatchError", "AlreadyWrappedError"],
)
def test_every_error_is_the_packages_and_a_value_error(error):
    assert issubclass(getattr(me, error), me.MllmEfficientError) and issubclass(me.MllmEfficientError, ValueError)


def test_the_public_names_exist_and_others_do_not():
    for name in me.__all__:
        assert getattr(me, name) is not None
    assert set(dir(me)) == set(me.__all__)
    with pytest.raises(AttributeError, match="no attribute 'DivPrun'"):
        me.DivPrun  # noqa: B018


# Specifications ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("divprune:keep=0.1", me.DivPrune(keep=0.1)),
        ("  divprune : keep = 0.1 , metric = l2 ", me.DivPrune(keep=0.1, metric="l2")),
        ("divprune:keep=1", me.DivPrune(keep=1)),
        ("divprune:keep=.5", me.DivPrune(keep=0.5)),
        ("divprune:keep=1e-1", me.DivPrune(keep=0.1)),
        ("divprune:tokens=64", me.DivPrune(tokens=64)),
        ("divprune:prune=0.9", me.DivPrune(prune=0.9)),
        ("divprune:keep=0.1,min_tokens=8,max_tokens=64", me.DivPrune(keep=0.1, min_tokens=8, max_tokens=64)),
        ("divprune:tokens=64,positions=keep", me.DivPrune(tokens=64, positions="keep")),
        ("random:tokens=64,seed=-3", me.Random(tokens=64, seed=-3)),
        ("none", me.NoCompression()),
        ("none:", me.NoCompression()),
    ],
)
def test_a_specification_is_the_method(spec, method):
    assert me.build(spec) == method
    assert type(me.build(spec)) is type(method)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "no method named"),
        ("   ", "no method named"),
        (":keep=0.1", "no method named"),
        ("divprune", "exactly one of keep=0.1, tokens=64 or prune=0.9"),
        ("divprune:", "exactly one"),
        ("divprune:keep", "'keep' is not name=value"),
        ("divprune:0.1", "'0.1' is not name=value"),
        ("divprune:keep=", "exactly one"),
        ("divprune:keep=0.1,keep=0.2", "keep is given twice"),
        ("divprune:method=random", "method is given twice"),
        ("divprune:keep=[0.1", "is not a value"),
        ("divprune:keep=a lot", "keep='a lot' is not a fraction"),
        ("divprune:keep=10%", "keep='10%' is not a fraction"),
        ("divprune:keep=0", "keep=0 is outside (0, 1]"),
        ("divprune:keep=1.5", "keep=1.5 is outside (0, 1]"),
        ("divprune:keep=-0.5", "keep=-0.5 is outside (0, 1]"),
        ("divprune:keep=nan", "keep=nan is not a fraction"),
        ("divprune:keep=.nan", "keep=nan is not a fraction"),
        ("divprune:keep=inf", "keep=inf is not a fraction"),
        ("divprune:keep=true", "keep=True is not a fraction"),
        ("divprune:tokens=0", "tokens=0 is below 1"),
        ("divprune:tokens=-4", "tokens=-4 is below 1"),
        ("divprune:tokens=2.5", "tokens=2.5 is not a whole number"),
        ("divprune:tokens=1e2", "tokens=100.0 is not a whole number"),
        ("divprune:tokens=true", "tokens=True is not a whole number"),
        ("divprune:tokens=yes", "tokens=True is not a whole number"),
        ("divprune:keep=0.1,tokens=64", "keep and tokens together"),
        ("divprune:keep=0.1,prune=0.9", "keep and prune together"),
        ("divprune:prune=1", "prune=1 is outside [0, 1)"),
        ("divprune:tokens=64,min_tokens=8", "no effect with tokens="),
        ("divprune:keep=0.1,min_tokens=9,max_tokens=8", "min_tokens=9 is above max_tokens=8"),
        ("pool:keep=0.1,positions=keep", "pool merges tokens"),
        ("divprune:keep=0.1,positions=absolute", "positions='absolute' is not one of"),
        ("none:keep=0.5", "none keeps every token"),
    ],
)
def test_a_wrong_specification_is_refused_in_one_line(spec, says):
    assert says in refusal(spec)


@pytest.mark.parametrize("what", [None, 5, 0.1, me.DivPrune, object()], ids=lambda what: type(what).__name__)
def test_what_is_no_specification_is_refused(what):
    assert "cannot build a method from" in refusal(what)


def test_a_method_builds_itself():
    method = me.DivPrune(keep=0.1)
    assert me.build(method) is method


# Dicts ---------------------------------------------------------------------------------------------------------------


def test_a_dict_is_the_method():
    assert me.build({"method": "divprune", "keep": 0.1, "metric": "l1"}) == me.DivPrune(keep=0.1, metric="l1")
    assert me.build({"stages": [{"method": "divprune", "keep": 0.1}]}) == me.DivPrune(keep=0.1)


def test_building_leaves_the_dict_as_it_was():
    what = {"method": "divprune", "keep": 0.1}
    me.build(what)
    assert what == {"method": "divprune", "keep": 0.1}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({}, "no method named"),
        ({"keep": 0.1}, "no method named"),
        ({"method": None, "keep": 0.1}, "no method named"),
        ({"method": 5}, "no method named"),
        ({"method": "divprune"}, "exactly one"),
        ({"method": "divprune", "keep": "0.1"}, "keep='0.1' is not a fraction"),
        ({"method": "divprune", "tokens": "64"}, "tokens='64' is not a whole number"),
        ({"stages": ["divprune:keep=0.1"], "keep": 0.1}, "a dict with 'stages' has nothing else: ['keep']"),
        ({"stages": []}, "no method given"),
        ({"stages": None}, "cannot build a method from None"),
        ([], "no method given"),
        ([None], "cannot build a method from None"),
    ],
    ids=str,
)
def test_a_wrong_dict_or_list_is_refused(what, says):
    assert says in refusal(what)


# YAML files ----------------------------------------------------------------------------------------------------------


def yaml_file(folder: Path, text: str, name: str = "method.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize("name", ["method.yaml", "method.yml"])
def test_a_yaml_file_is_the_method_by_path_or_name(tmp_path, name):
    path = yaml_file(tmp_path, "method: divprune\nkeep: 0.098\nmetric: l2\n", name)
    assert me.build(path) == me.build(str(path)) == me.DivPrune(keep=0.098, metric="l2")


def test_a_path_is_a_file_whatever_its_ending(tmp_path):
    assert me.build(yaml_file(tmp_path, "{method: pool, tokens: 64}", "recipe.txt")) == me.Pool(tokens=64)


def test_a_dumped_dict_is_read_back(tmp_path):
    import yaml

    for method in (
        me.DivPrune(keep=1e-05, metric="l1"),
        me.Random(prune=0.75, seed=3),
        me.NoCompression(),
        me.Pool(keep=0.3, min_tokens=4),
    ):
        assert me.build(yaml_file(tmp_path, yaml.safe_dump(method.to_dict()))) == method


def test_a_yaml_list_composes(tmp_path, other_families):
    path = yaml_file(
        tmp_path,
        """\
        - {method: in_decoder, keep: 0.5}
        - divprune:tokens=64
        """,
    )
    assert me.build(path).stages == (me.DivPrune(tokens=64), me.build("in_decoder:keep=0.5"))
    assert me.build(yaml_file(tmp_path, "stages: [{method: divprune, tokens: 64}, 'in_decoder:keep=0.5']")) == me.build(path)
    assert me.build(yaml_file(tmp_path, "- method: divprune\n  tokens: 64")) == me.DivPrune(tokens=64)


def test_a_missing_yaml_file_is_one_line_with_its_name(tmp_path):
    assert refusal(str(tmp_path / "gone.yaml")) == f"cannot read the method file {tmp_path / 'gone.yaml'}: No such file or directory"
    assert "cannot read the method file" in refusal(tmp_path / "gone")
    assert "cannot read the method file" in refusal(tmp_path), "a folder"


@pytest.mark.parametrize("text", ["method: [divprune", "method: divprune\n\tkeep: 0.1", "{", "a: b: c", "!!python/object:os.system {}"])
def test_a_file_that_is_no_yaml_is_one_line_with_its_name(tmp_path, text):
    path = yaml_file(tmp_path, text)
    assert refusal(path).startswith(f"{path} is not YAML: ")


def test_a_binary_file_is_no_yaml(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80" * 10)
    assert refusal(path).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize("text", ["divprune:keep=0.1", "", "5", "true", "# only a comment"])
def test_a_yaml_file_of_another_type_says_what_was_expected(tmp_path, text):
    path = yaml_file(tmp_path, text)
    assert refusal(path) == f"{path}: expected 'method: divprune' and its settings, or a list of such"


def test_settings_in_a_yaml_file_are_checked_like_any(tmp_path):
    assert "did you mean 'keep'" in refusal(yaml_file(tmp_path, "method: divprune\nkep: 0.1"))
    assert "tokens=2.5 is not a whole number" in refusal(yaml_file(tmp_path, "method: divprune\ntokens: 2.5"))
    assert "tokens=True is not a whole number" in refusal(yaml_file(tmp_path, "method: divprune\ntokens: yes"))


# Composition ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_families(registered):
    """Methods of the kinds projector and in_llm."""

    @registered("projector")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Projector(me.Compressor):
        kind = "projector"

    @registered("in_decoder")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class InDecoder(me.Compressor):
        kind = "in_llm"


@pytest.mark.parametrize(
    "what",
    [
        "in_decoder:keep=0.5 | divprune:tokens=64 | projector:tokens=144",
        "projector:tokens=144|in_decoder:keep=0.5|divprune:tokens=64",
        ["divprune:tokens=64", {"method": "projector", "tokens": 144}, "in_decoder:keep=0.5"],
        ("in_decoder:keep=0.5 | divprune:tokens=64", "projector:tokens=144"),
        {"stages": ["in_decoder:keep=0.5", "projector:tokens=144", me.DivPrune(tokens=64)]},
    ],
    ids=str,
)
def test_composed_methods_run_projector_then_pre_llm_then_decoder(other_families, what):
    method = me.build(what)
    stages = method.stages
    assert [stage.name for stage in stages] == ["projector", "divprune", "in_decoder"]
    assert stages[0].tokens == 144 and stages[1] == me.DivPrune(tokens=64) and stages[2].keep == 0.5
    assert me.build(method) == me.build(stages) == method


@pytest.mark.parametrize(
    "what",
    [
        "divprune:tokens=64 | pool:keep=0.5",
        ["divprune:tokens=64", me.Pool(keep=0.5)],
        ["divprune:tokens=64", ["pool:keep=0.5"]],
        "divprune:tokens=64 | in_decoder:keep=0.5 | pool:keep=0.5",
        "divprune:tokens=64 | none | pool:keep=0.5",
    ],
    ids=str,
)
def test_two_of_one_family_are_refused_by_name(other_families, what):
    message = refusal(what)
    assert "divprune and pool are of one kind (pre_llm)" in message and "at most one of each" in message


def test_the_same_method_twice_is_two_of_one_family():
    assert "divprune and divprune are of one kind (pre_llm)" in refusal("divprune:tokens=64 | divprune:tokens=32")


@pytest.mark.parametrize("what", ["none | divprune:keep=0.1", "divprune:keep=0.1 | none", ["none", "none", "divprune:keep=0.1"]], ids=str)
def test_the_baseline_is_dropped_from_a_composition(what):
    assert me.build(what) == me.DivPrune(keep=0.1)


def test_the_baseline_alone_stays(other_families):
    assert me.build("none | none") == me.build(["none"]) == me.NoCompression()
    assert me.build("none | in_decoder:keep=0.5") == me.build("in_decoder:keep=0.5")


@pytest.mark.parametrize("spec", ["divprune:keep=0.1 |", "| divprune:keep=0.1", "divprune:keep=0.1 || in_decoder:keep=0.5", "|"])
def test_an_empty_stage_is_refused(other_families, spec):
    assert "no method named" in refusal(spec)


# Registration --------------------------------------------------------------------------------------------------------


# A process of its own: what is imported, and packages of third parties ------------------------------------------------
