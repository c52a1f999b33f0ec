"""Old import paths: the same objects, with a warning that says the new one."""

import importlib
import pickle
import sys
import warnings

import pytest

import mllm_efficient
from mllm_efficient.moved import MODULES, NAMES


@pytest.mark.parametrize("old", sorted(set(MODULES)))
def test_an_old_module_is_the_new_one_and_says_so(old):
    sys.modules.pop(f"mllm_efficient.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"mllm_efficient\.{MODULES[old]}"):
        module = importlib.import_module(f"mllm_efficient.{old}")
    assert module is importlib.import_module(f"mllm_efficient.{MODULES[old]}")
    assert module.__spec__.name == module.__name__ == f"mllm_efficient.{MODULES[old]}"


@pytest.mark.parametrize("module, name", [(module, name) for module, names in NAMES.items() for name in names])
def test_an_old_name_is_the_new_one_and_says_so(module, name):
    with pytest.warns(DeprecationWarning, match=NAMES[module][name]):
        value = getattr(importlib.import_module(f"mllm_efficient.{module}"), name)
    assert value is getattr(importlib.import_module(f"mllm_efficient.{NAMES[module][name]}"), name)


def test_the_warning_points_at_the_line_that_imports():
    sys.modules.pop("mllm_efficient.wrapper", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from mllm_efficient.wrapper import wrap
    assert [w.filename for w in caught] == [__file__]
    assert wrap is mllm_efficient.wrap


def test_a_name_that_was_nowhere_is_still_an_error():
    with pytest.raises(ImportError):
        importlib.import_module("mllm_efficient.nothing")
    with pytest.raises(AttributeError, match="no attribute"):
        importlib.import_module("mllm_efficient.compressors.base").Nothing  # noqa: B018


def test_a_model_that_an_older_version_pickled_finds_its_hooks():
    from mllm_efficient.apply.outputs import mark_output

    sys.modules.pop("mllm_efficient.outputs", None)
    with pytest.warns(DeprecationWarning):
        assert pickle.loads(b"cmllm_efficient.outputs\nmark_output\n.") is mark_output
