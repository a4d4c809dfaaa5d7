"""Recipes and programs of version 0.1 name modules by the places they had."""

import sys
from importlib import import_module

import pytest
from repvitok.runtime.moved import MOVED


@pytest.mark.parametrize("old", [name for name in MOVED if name.startswith("repvitok.")])
def test_an_old_name_is_the_new_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)  # another test may have met it
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        assert import_module(old) is import_module(MOVED[old])


@pytest.mark.parametrize(
    "path", ["repvitok.training:RepViTokTraining", "repvitok.baselines:WanVae", "repvitok.data.lerobot:LeRobotReader"]
)
def test_a_module_that_became_a_package_still_has_its_class(path):
    module, _, name = path.partition(":")
    assert getattr(import_module(module), name).__name__ == name


def test_a_module_that_never_was_is_missing():
    with pytest.raises(ModuleNotFoundError, match=r"repvitok\.nowhere"):
        import_module("repvitok.nowhere")
