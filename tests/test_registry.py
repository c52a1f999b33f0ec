"""Names, specifications, dicts, YAML files and installed packages to methods; and the errors on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import mllm_efficient as me
from mllm_efficient import registry

pytestmark = pytest.mark.once

ROOT = Path(me.__file__).parent.parent
BUILTIN = ["none", "random", "uniform", "pool", "resize", "divprune", "tokenflex", "fastv", "pyramiddrop", "sparsevlm", "dart", "dpn"]
BUILTIN += ["cdpruner", "spp", "tome", "fastervlm", "vispruner", "visionzip", "scope", "prumerge_plus"]
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
        ("cdpruner", "CDPruner"),
        ("spp", "SpatialPyramidPooling"),
        ("tome", "ToMe"),
        ("fastervlm", "FasterVLM"),
        ("vispruner", "VisPruner"),
        ("visionzip", "VisionZip"),
        ("scope", "Scope"),
        ("prumerge_plus", "PruMergePlus"),
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


def test_a_class_that_is_no_dataclass_is_refused_with_what_to_type(registered):
    with pytest.raises(me.MllmEfficientError, match="Plain: put @dataclass\\(frozen=True\\) between @register and the class"):

        @registered("plain")
        class Plain:
            pass


def test_a_method_whose_settings_would_be_lost_without_dataclass_is_refused(registered):
    """Its parent is a dataclass, it is not: ``strength`` would be no parameter."""
    with pytest.raises(me.MllmEfficientError, match="Mine: put @dataclass\\(frozen=True\\) between @register and the class"):

        @registered("mine")
        class Mine(me.Selector):
            strength: float = 0.5


def test_a_name_is_registered_once(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class First(me.Selector):
        pass

    with pytest.raises(me.MllmEfficientError, match=r"method 'mine' is already registered by .*First"):

        @registered("mine")
        @dataclasses.dataclass(frozen=True)
        class Second(me.Selector):
            pass

    assert me.get_method("mine") is First


def test_a_file_may_be_loaded_again(registered):
    def load():
        @registered("mine")
        @dataclasses.dataclass(frozen=True)
        class Mine(me.Selector):
            def score(self, v):
                return torch.zeros(len(v))

        return Mine

    assert load() is not load()
    assert "mine" in me.list_methods()


def test_a_registered_method_is_listed_once_and_after_the_builtin(registered):
    @registered("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(me.Selector):
        pass

    assert me.list_methods().count("mine") == 1
    assert me.list_methods().index("mine") >= len(BUILTIN)


# A process of its own: what is imported, and packages of third parties ------------------------------------------------


def python(code: str, *folders: Path):
    """What ``code`` prints, as JSON, in a fresh interpreter that finds ``folders`` and this package."""
    path = os.pathsep.join(str(folder) for folder in (*folders, ROOT))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def installed(folder: Path, package: str, entries: dict[str, str], source: str) -> Path:
    """A site-packages folder where ``package`` is installed: a module, its metadata and entry points {method: object}."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{method} = {target}" for method, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]))
    (folder / f"{package}.py").write_text(textwrap.dedent(source))
    return folder


GOOD = """\
from dataclasses import dataclass
import mllm_efficient as me

@dataclass(frozen=True, kw_only=True)
class Last(me.Selector):
    '''The last tokens.'''
    shift: int = 0

    def select(self, v, k):
        import torch
        return torch.arange(len(v) - k, len(v))
"""
REGISTERS_ITSELF = GOOD.replace("@dataclass", "@me.register('last')\n@dataclass", 1)

LIST = """\
import json, warnings
import mllm_efficient as me
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    names = me.list_methods()
print(json.dumps({"names": names, "warnings": [str(w.message) for w in seen]}))
"""

BUILD = """\
import json
import mllm_efficient as me
try:
    answer = repr(me.build("broken:keep=0.5"))
except me.MllmEfficientError as error:
    answer = str(error)
print(json.dumps({"answer": answer}))
"""


def test_listing_imports_neither_torch_nor_transformers():
    heavy = python(
        """
        import json, sys
        import mllm_efficient as me
        me.list_methods()
        print(json.dumps(sorted({"torch", "transformers", "numpy"} & set(sys.modules))))
        """
    )
    assert heavy == []


def test_a_budget_is_counted_without_torch():
    counted = python(
        """
        import json, sys
        import mllm_efficient as me
        counts = [me.build(spec).count(576, (24, 24)) for spec in ("none", "divprune:keep=0.098", "pool:tokens=64", "resize:tokens=64")]
        print(json.dumps([counts, sorted({"torch", "transformers"} & set(sys.modules))]))
        """
    )
    assert counted == [[576, 56, 64, 64], []]


@pytest.mark.parametrize("source", [GOOD, REGISTERS_ITSELF], ids=["plain class", "class that registers itself"])
def test_an_installed_method_is_listed_and_built_like_any_other(tmp_path, source):
    installed(tmp_path, "nice_package", {"last": "nice_package:Last"}, source)
    listing = python(LIST, tmp_path)
    assert listing == {"names": [*BUILTIN, "last"], "warnings": []}
    built = python(
        """
        import json
        import mllm_efficient as me
        method = me.build("last:tokens=2,shift=3")
        same = me.build(method.to_dict()) == me.build(method.spec()) == method
        print(json.dumps([method.to_dict(), method.count(5, None), same]))
        """,
        tmp_path,
    )
    assert built == [{"method": "last", "tokens": 2, "shift": 3}, 2, True]


def test_an_installed_method_is_suggested_for_a_typo(tmp_path):
    installed(tmp_path, "nice_package", {"last_tokens": "nice_package:Last"}, GOOD)
    message = python(BUILD.replace("broken", "last_token"), tmp_path)["answer"]
    assert message == "unknown method 'last_token' - did you mean 'last_tokens'? (mllm-efficient methods lists all)"


def test_a_package_is_loaded_only_when_its_method_is_asked_for(tmp_path):
    installed(tmp_path, "nice_package", {"last": "nice_package:Last"}, GOOD)
    loaded = python(
        """
        import json, sys
        import mllm_efficient as me
        me.build("divprune:keep=0.1")
        before = "nice_package" in sys.modules
        me.build("last:keep=0.1")
        print(json.dumps([before, "nice_package" in sys.modules]))
        """,
        tmp_path,
    )
    assert loaded == [False, True]


BROKEN = {
    "a missing import": ("rough_package:Last", "import a_module_that_is_nowhere\n" + GOOD),
    "an exception at import": ("rough_package:Last", "raise RuntimeError('two\\nlines')"),
    "a syntax error": ("rough_package:Last", "def broken(:\n"),
    "no such name": ("rough_package:Lost", GOOD),
    "no such module": ("another_package:Last", GOOD),
    "a function": ("rough_package:last", "def last(v, k):\n    return v"),
    "a number": ("rough_package:last", "last = 5"),
    "the module": ("rough_package", GOOD),
    "a plain class": ("rough_package:Last", "class Last:\n    pass"),
    "a dataclass that is no method": (
        "rough_package:Last",
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Last:\n    keep: float",
    ),
    "a method object": ("rough_package:last", GOOD + "\nlast = Last(keep=0.5)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_reported_and_skipped(tmp_path, kind):
    target, source = BROKEN[kind]
    installed(tmp_path / "broken", "rough_package", {"broken": target}, source)
    installed(tmp_path / "good", "nice_package", {"last": "nice_package:Last"}, GOOD)
    listing = python(LIST, tmp_path / "broken", tmp_path / "good")
    assert listing["names"] == [*BUILTIN, "last"]
    (warning,) = listing["warnings"]
    assert "'broken'" in warning and "rough_package" in warning and "\n" not in warning


@pytest.mark.parametrize("kind", BROKEN)
def test_building_a_method_of_a_broken_package_is_one_clear_line(tmp_path, kind):
    """Clear: it names the method and the package to repair or remove."""
    target, source = BROKEN[kind]
    message = python(BUILD, installed(tmp_path, "rough_package", {"broken": target}, source))["answer"]
    assert "'broken'" in message and "rough_package" in message and "\n" not in message
    assert not message.startswith("Last("), "it was built"


def test_a_broken_package_does_not_stand_in_the_way_of_others(tmp_path):
    installed(tmp_path, "rough_package", {"broken": "rough_package:Last"}, "raise RuntimeError")
    built = python("import json, mllm_efficient as me; print(json.dumps(me.build('divprune:keep=0.1').to_dict()))", tmp_path)
    assert built == {"method": "divprune", "keep": 0.1}


def test_an_installed_package_cannot_take_a_builtin_name(tmp_path):
    installed(tmp_path, "nice_package", {"divprune": "nice_package:Last"}, GOOD)
    module = python(
        """
        import json
        import mllm_efficient as me
        print(json.dumps([me.list_methods(), me.build("divprune:keep=0.1").__module__]))
        """,
        tmp_path,
    )
    assert module == [BUILTIN, "mllm_efficient.compressors.divprune"]


@pytest.mark.parametrize("first", ["pass", "me.get_method('divprune')"], ids=["before the builtin is imported", "after"])
def test_a_registered_method_cannot_take_a_builtin_name(first):
    message = python(
        f"""
        import dataclasses, json
        import mllm_efficient as me
        {first}
        try:
            @me.register("divprune")
            @dataclasses.dataclass(frozen=True)
            class Mine(me.Selector):
                pass
        except me.MllmEfficientError as error:
            print(json.dumps(str(error)))
        else:
            print(json.dumps("registered"))
        """
    )
    assert "method 'divprune' is already registered" in message
