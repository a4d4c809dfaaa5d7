"""Suites by name, seeds of two ranges, and a whole simulator in sixty lines."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from repvitok.data import LeRobotReader
from repvitok.runtime.errors import UserError
from repwam_core.cli import main
from repwam_core.interface import ActionChunk, BasePolicy
from repwam_core.report import Count, ReportData, RunInfo, SuccessRow, render_report
from repwam_core.sim.base import (
    EVALUATION_SEEDS_FROM,
    MAX_ATTEMPTS,
    MAX_DATASET_SEED,
    MAX_EPISODES_PER_TASK,
    SimSettings,
    collection_seed,
    evaluation_seeds,
    find_suite,
    require_evaluation_seeds,
)
from repwam_core.sim.collect import CollectionConfig, collect, read_plan
from repwam_core.sim.evaluate import demonstrated, evaluate, run_baseline
from repwam_core.sim.metaworld import MetaWorldSettings
from repwam_core.sim.results import load_results, success_rates

TASKS = ("go-left", "go-right")
SEEDS = evaluation_seeds(3)


@pytest.fixture
def toy(monkeypatch):
    """The toy's module, on the path as a user's would be: worker processes import it by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("toy_simulator")


class Obedient(BasePolicy):
    """Goes where it is told to, and nowhere if it is told nothing."""

    def reset(self, instruction, seed=0):
        self.move = {"left": -0.1, "right": 0.1}.get((instruction or "").rpartition(" ")[2], 0.0)

    def act(self, observation):
        return ActionChunk(np.full((4, 1), self.move, np.float32), ("move",), 10.0)


def test_demonstrations_by_any_number_of_workers_and_in_two_goes(toy, tmp_path):
    small = toy.ToySettings(size=(32, 48))
    collect(tmp_path / "one", TASKS, episodes_per_task=1, settings=small, workers=1)
    one = collect(tmp_path / "one", TASKS, episodes_per_task=2, settings=small, workers=1)
    two = collect(tmp_path / "two", TASKS, episodes_per_task=2, settings=small, workers=2)
    assert (one.episodes, one.recorded, two.episodes, two.recorded) == (4, 2, 4, 4)
    readers = [LeRobotReader(tmp_path / name) for name in ("one", "two")]
    for index in range(4):
        first, second = (reader.episode(index) for reader in readers)
        np.testing.assert_array_equal(first["action"], second["action"])
        assert readers[0].episodes[index].task.endswith(("left", "right")[index % 2])
    assert (readers[0].fps, readers[0].frame_size("observation.images.top")) == (10, (32, 48))
    assert read_plan(tmp_path / "one").settings == small
    with pytest.raises(UserError, match="suite 'toy', not 'metaworld'"):
        collect(tmp_path / "one", ["reach", "push"], episodes_per_task=2, workers=1)


def test_success_rates_reach_the_report_s_table(toy, tmp_path):
    settings = toy.ToySettings()
    collect(tmp_path / "data", TASKS, episodes_per_task=1, settings=settings, workers=1)
    given = {"settings": settings, "out": tmp_path / "policy", "workers": 2}
    results = {"policy": evaluate(Obedient, TASKS, SEEDS, **given)}
    other = {"go-left": "right", "go-right": "left"}
    results["told the other"] = evaluate(
        Obedient, TASKS, SEEDS, settings=settings, instruction_of=lambda task, _: other[task], workers=1
    )
    demonstrations = {"settings": settings, "demonstrations": tmp_path / "data"}
    for baseline, workers in {"random": 1, "replay": 1, "expert": 2}.items():
        results[baseline] = run_baseline(baseline, TASKS, SEEDS, workers=workers, **demonstrations)
    assert not any(result.crashed for episodes in results.values() for result in episodes)
    counts = {
        who: {task: Count(rate.successes, rate.episodes) for task, rate in success_rates(episodes).items()}
        for who, episodes in results.items()
    }
    assert counts["policy"] == counts["expert"] == dict.fromkeys(TASKS, Count(3, 3))
    assert counts["random"] == counts["told the other"] == dict.fromkeys(TASKS, Count(0, 3))
    rows = [SuccessRow(who, per_task) for who, per_task in counts.items()]
    table = render_report(ReportData(RunInfo("toy", "repwam"), success=rows))
    assert all(said in table for said in (*TASKS, "told the other", "6/6"))
    _, about = load_results(tmp_path / "policy/results.json")
    assert (about["suite"], toy.ToySettings.from_dict(about["settings"])) == ("toy", settings)
    with pytest.raises(UserError, match='suite "toy", not "metaworld"'):
        evaluate(Obedient, TASKS, SEEDS, **given, about={"suite": "metaworld"})


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_a_replay_that_has_ended_holds_still(toy, tmp_path, monkeypatch, kind):
    """By zero where actions are changes, by the last target where they are targets."""
    collect(tmp_path / "data", TASKS, episodes_per_task=1, settings=toy.ToySettings(), extra_steps=0, workers=1)
    recorded = demonstrated(tmp_path / "data", ["go-right"], "action")["go-right"][0][:, 0]
    seen: list[float] = []
    advance = toy.ToyTask.advance
    monkeypatch.setattr(toy.ToySettings, "action_kind", kind)
    never = property(lambda _: False, lambda *_: None)
    monkeypatch.setattr(toy.ToyTask, "success", never)
    monkeypatch.setattr(toy.ToyTask, "advance", lambda self, a: (seen.append(float(a[0])), advance(self, a)))
    given = {"settings": toy.ToySettings(max_steps=40), "demonstrations": tmp_path / "data", "workers": 1}
    run_baseline("replay", ["go-right"], SEEDS[:1], **given)
    assert len(seen) == 40
    left = np.full(40 - len(recorded), recorded[-1] if kind == "absolute" else 0.0)
    assert recorded[-1] > 0.001
    np.testing.assert_allclose(seen, [*recorded, *left])


def test_the_command_line_takes_it_by_name(toy, tmp_path, capsys):
    suite = ["--suite", "toy", "--tasks", *TASKS, "--workers", "1", "--episodes", "2"]
    assert main(["collect", *suite, "--out", str(tmp_path / "data"), "--size", "32", "48"]) == 0
    assert read_plan(tmp_path / "data").settings == toy.ToySettings(size=(32, 48))
    rollout = ["rollout", *suite, "--baseline", "expert", "--out"]
    assert main([*rollout, str(tmp_path / "long")]) == 0
    assert "go-left: 2/2" in capsys.readouterr().out
    assert main([*rollout, str(tmp_path / "short"), "--settings", '{"max_steps": 3}']) == 0
    assert "go-left: 0/2" in capsys.readouterr().out
    for wrong, told in (
        (["--act-repeat", "2"], "toy settings: unknown fields ['act_repeat']"),
        (["--settings", '{"max_steps": "3"}'], "field 'max_steps': expected int"),
        (["--settings", "3"], "--settings"),
        (["--suite", "libero"], "unknown simulator suite 'libero'; there are "),
        (["--tasks", "go-up"], "unknown toy task 'go-up'; did you mean"),
    ):
        assert main([*rollout, str(tmp_path / "wrong"), *wrong]) == 2
        error = capsys.readouterr().err
        assert (told in error, error.count("\n")) == (True, 1), error


def _install(folder: Path, points: str) -> None:
    """A package's metadata with entry points, as an installer writes them."""
    metadata = folder / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[repwam.simulators]\n{points}\n")


def test_a_package_brings_suites_by_entry_points(toy, tmp_path, monkeypatch):
    _install(tmp_path, "theirs = theirs:Settings\nbroken = theirs_broken:Settings\nother = toy_simulator:ToySettings")
    source = "from toy_simulator import ToySettings\nclass Settings(ToySettings):\n    suite = 'theirs'\n"
    (tmp_path / "theirs.py").write_text(source)
    (tmp_path / "theirs_broken.py").write_text("import a_simulator_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_suite("theirs")().make_task("go-left").name == "go-left"
    with pytest.raises(UserError, match=r"'broken' \(theirs_broken:Settings\) does not load: .*a_simulator_that_is"):
        find_suite("broken")
    with pytest.raises(UserError, match="SimSettings with suite = 'other'"):
        find_suite("other")


def test_what_workers_cannot_import_is_said_and_no_crash(toy):
    class Here(toy.ToySettings):
        suite = "here"

    for run in (lambda: evaluate(Obedient, TASKS, SEEDS, settings=Here()),
                lambda: run_baseline("expert", TASKS, SEEDS, settings=Here(), workers=2)):  # fmt: skip
        with pytest.raises(UserError, match="worker processes cannot import"):
            run()


def test_a_suite_without_an_expert_can_be_evaluated_but_not_collected(toy, tmp_path, monkeypatch):
    monkeypatch.delattr(toy.ToyTask, "expert_action")
    with pytest.raises(UserError, match="'go-left' has no scripted expert"):
        collect(tmp_path / "data", TASKS, episodes_per_task=1, settings=toy.ToySettings(), workers=1)
    chance = run_baseline("random", TASKS, SEEDS, settings=toy.ToySettings(), workers=1)
    assert len(chance) == 6


def test_what_version_0_1_wrote_is_meta_world_s(toy, tmp_path):
    """Neither its collection.json nor its results.json names a suite."""
    plan = CollectionConfig.from_dict(json.loads(PLAN_OF_0_1))
    assert plan.settings == MetaWorldSettings(size=(32, 32))
    assert plan.to_dict() == {**json.loads(PLAN_OF_0_1), "suite": "metaworld"}
    assert issubclass(find_suite("metaworld"), SimSettings)


PLAN_OF_0_1 = """{
"format": "repwam-collection", "format_version": 1, "tasks": ["reach"], "episodes_per_task": 3, "seed": 7,
"settings": {"cameras": ["corner2"], "size": [32, 32], "act_repeat": 2, "max_env_steps": 200, "same_scene": []},
"noise": {"pushes": 0, "push_steps": 4, "push_within_steps": 24, "action_std": 0.0, "share": 1.0},
"extra_steps": 4, "version": "v2.1", "pix_fmt": "yuv444p", "crf": 10}"""


def test_the_largest_collection_seed_lies_below_every_evaluation_seed():
    largest = collection_seed(MAX_DATASET_SEED, MAX_EPISODES_PER_TASK - 1, MAX_ATTEMPTS - 1)
    assert largest < EVALUATION_SEEDS_FROM == evaluation_seeds(1)[0]


def test_collection_seeds_are_distinct():
    triples = [(s, e, a) for s in (0, 1, 99) for e in (0, 1, 500, 999) for a in range(MAX_ATTEMPTS)]
    assert len({collection_seed(*triple) for triple in triples}) == len(triples)


@pytest.mark.parametrize("arguments", [(100, 0, 0), (0, 1000, 0), (0, 0, 10), (-1, 0, 0)])
def test_out_of_range_is_refused(arguments):
    with pytest.raises(UserError, match="must lie in 0"):
        collection_seed(*arguments)


def test_seen_or_repeated_seeds_are_refused_for_evaluation():
    with pytest.raises(UserError, match="no demonstration shows them, got 7"):
        require_evaluation_seeds([EVALUATION_SEEDS_FROM, 7])
    with pytest.raises(UserError, match="once only"):
        require_evaluation_seeds([EVALUATION_SEEDS_FROM] * 2)
