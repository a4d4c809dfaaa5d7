"""docs/newcomers-walk.md is true: its stops are there, are few, and are called; tools/measures.py knows its changes."""

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from repvitok.cli import main as repvitok
from repwam_core.cli import main as repwam
from repwam_core.interface import Observation
from repwam_core.policy import Policy
from repwam_core.policy.execution import ChunkedPolicy

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/newcomers-walk.md"
FRAME, ACTION = "A video frame to the tokenizer's loss", "An action from a LeRobot file to a robot"
MOST_FILES = {FRAME: 8, ACTION: 14}


def _stops(walk: str) -> list[tuple[str, str]]:
    """(file, function) of a walk's stops, in order."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {walk}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \| ", section, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    return [(file, name) for _, file, name in rows]


def _defined(file: str) -> set[str]:
    """Functions, methods and classes of a source file."""
    tree = ast.parse(next(ROOT.glob(f"packages/*/src/{file}")).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    outer = [node for node in tree.body if isinstance(node, kinds)]
    inner = {f"{node.name}.{part.name}" for node in outer for part in node.body if isinstance(part, kinds)}
    return {node.name for node in outer} | inner


@pytest.mark.parametrize("walk", [FRAME, ACTION])
def test_every_stop_is_there_and_they_are_few(walk):
    stops = _stops(walk)
    assert 0 < len({file for file, _ in stops}) == len(stops) <= MOST_FILES[walk]
    assert [(file, name) for file, name in stops if name not in _defined(file)] == []


def test_everything_else_that_the_page_names_is_there():
    text = PAGE.read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:repvitok|latent_action|repwam_client|repwam_core)/[\w/]+(?:\.py|/))`", text))
    assert [file for file in files if not list(ROOT.glob(f"packages/*/src/{file}"))] == []
    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert name in _defined(file)
    stops = {number: _stops(walk)[number - 1][0] for walk, number in ((ACTION, 7), (ACTION, 8))}
    for name, number in re.findall(r"`(\w+)`, in the file of stop (\d+)", text):
        assert name in _defined(stops[int(number)])


@pytest.fixture
def called(monkeypatch) -> Callable[[str], set[tuple[str, str]]]:
    """Have the stops of a walk note their calls; a class notes that one was made."""

    def note(walk: str) -> set[tuple[str, str]]:
        calls: set[tuple[str, str]] = set()
        for stop in _stops(walk):
            module = importlib.import_module(stop[0].removesuffix(".py").replace("/", "."))
            found = [module]
            for part in stop[1].split("."):
                found.append(getattr(found[-1], part))
            if isinstance(found[-1], type):
                found.append(found[-1].__post_init__)
            *_, owner, function = found

            @functools.wraps(function)
            def noted(*arguments, stop=stop, function=function, **options):
                calls.add(stop)
                return function(*arguments, **options)

            ours = [m for name, m in sys.modules.items() if name.startswith(("repvitok", "repwam_core")) and m]
            for holder in (owner, *ours):  # a function is also where others imported it
                if vars(holder).get(function.__name__) is function:
                    monkeypatch.setattr(holder, function.__name__, noted)
        return calls

    return note


def test_fit_calls_every_stop_of_a_frame(copied_files_of_0_1, called):
    calls = called(FRAME)
    run = ["fit", "--config", "tokenizer_run/config.yaml", "--trainer.default_root_dir=new", "--model.weights.gan=0"]
    assert repvitok([*run, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.held_out=0"]) == 0
    assert calls == set(_stops(FRAME))


def test_four_commands_call_every_stop_of_an_action(copied_files_of_0_1, called):
    calls = called(ACTION)
    encode = ["encode", "--tokenizer", "tokenizer", "--dataset", "dataset", "--out", "encoded", "--size", "8x8"]
    run = ["fit", "--config", "adapt_run/config.yaml", "--trainer.default_root_dir=new", "--trainer.max_steps=1"]
    export = ["export", "--ckpt", "new/last.ckpt", "--tokenizer", "tokenizer", "--out", "driven"]
    assert repvitok(encode) == 0
    assert repwam([*run, "--trainer.val_check_interval=1", "--data.held_out=0"]) == 0
    assert repwam([*export, "--latents", "labelled"]) == 0
    policy = ChunkedPolicy(Policy.from_pretrained("driven"))
    policy.reset("go up")
    images = {"observation.images.top": np.zeros((16, 16, 3), np.uint8)}
    policy.step(Observation(images=images, state=np.zeros(2, np.float32)))
    assert calls == set(_stops(ACTION))


def test_measures_know_where_every_change_begins_and_what_stands_behind_an_import():
    spec = importlib.util.spec_from_file_location("measures", ROOT / "tools/measures.py")
    measures = importlib.util.module_from_spec(spec)
    sys.modules["measures"] = measures
    spec.loader.exec_module(measures)
    paths = sorted(ROOT.glob("packages/*/src/**/*.py"))
    house = measures.House.of(paths)
    known = {name for names in house.defined.values() for name in names}
    read = {what: house.to_read(change) for what, change in measures.CHANGES.items()}
    assert {begin.partition(".")[0] for change in measures.CHANGES.values() for begin in change.begins} <= known
    assert read["another simulator"] == {"repwam_core.sim.base"}  # nothing else has to be edited
    assert read["another optimizer"] == {"repvitok.runtime.training"}
    assert {"repvitok.training.losses", "repvitok.training.module"} <= read["another loss of the tokenizer"]
    assert max(map(len, read.values())) <= 8
    assert measures.behind("repwam_core.training.module")[0] <= 30
    assert measures.behind("repwam_core.policy.policy")[0] <= 37
