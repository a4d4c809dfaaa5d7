"""benchmarks/few_labels.py: who is labelled, what video alone is, and how arms are compared."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from repvitok.data import LatentShards
from repvitok.runtime.documents import load_json
from repwam_core.data.episodes import EpisodeStore
from repwam_core.quickstart.runner import StageRunner
from repwam_core.sim.results import EpisodeResult, save_results

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "few_labels.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("few_labels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["few_labels"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_seed_labels_as_many_of_each_task_and_fewer_are_among_more(script: ModuleType) -> None:
    of_task = {"open": list(range(0, 40, 2)), "close": list(range(1, 40, 2))}
    few, many = (script.labelled_episodes(of_task, labels, 3) for labels in (2, 7))
    assert [sum(episode % 2 == which for episode in many) for which in (0, 1)] == [7, 7]
    assert set(few) < set(many)
    assert many == script.labelled_episodes(of_task, 7, 3) != script.labelled_episodes(of_task, 7, 4)


def test_more_labels_than_there_are_demonstrations_is_one_line(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"--labels: close has 2 demonstrations that are not held out, got 3"):
        script.labelled_episodes({"open": [0, 2, 4], "close": [1, 3]}, 3, 0)


def test_arms_are_compared_on_the_same_layouts_from_the_same_labels(script: ModuleType) -> None:
    def cell(arm: str, labels: int, seed: int, solved: str) -> Any:
        results = [EpisodeResult("push", number, None, mark == "x", 3) for number, mark in enumerate(solved)]
        return script.Cell(arm, labels, seed, 10, 0.25, results)

    cells = [cell("a", 5, 0, "xxx."), cell("b", 5, 0, "x..x"), cell("b", 5, 1, "xxxx"), cell("a", 1, 0, "....")]
    assert script.paired(cells)[2:] == ["| 5 | a | b | 4 | 2 | 1 | 1.000 |"]
    assert script.summary(cells)[3] == "| 5 | b | 2 | 0.250 | 6/8, 75 % (41 to 93) |"


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (1, 8, 0.0390625), (4, 4, 1.0)])
def test_the_sign_test_is_a_fair_coins(script: ModuleType, won: int, lost: int, p: float) -> None:
    assert script.sign_test(won, lost) == script.sign_test(lost, won) == p


def test_video_alone_has_zeros_for_latent_actions(script: ModuleType, noise_latents: Path, tmp_path: Path) -> None:
    """Zeros stay zeros when they are scaled; everything else is as it was."""
    (tmp_path / "made").mkdir()
    script._zero_labels(tmp_path / "made", latents=noise_latents)
    latents = tmp_path / "made" / "latents"
    for name in noise_latents.glob("text-*"):
        shutil.copy(name, latents)
    with_actions, without = (EpisodeStore(folder, "latent") for folder in (noise_latents, latents))
    rows, starts = np.arange(6), np.zeros(6, int)
    shown, told = (store.batch(rows, starts, 5) for store in (with_actions, without))
    assert torch.equal(shown.latents, told.latents)
    assert shown.actions.abs().mean() > 0.5
    assert not told.actions.any()


@pytest.fixture
def bench(
    script: ModuleType, write_squares: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[str]]:
    """One task of ten demonstrations of a moving square, two steps of each training, and no simulator."""
    driven: list[str] = []

    def collected(folder: Path, **_: Any) -> dict[str, Any]:
        write_squares(folder / "dataset", dict.fromkeys(range(10), 30))
        return {}

    def drive(policy: Any, tasks: Any, seeds: Any, *, out: Path, **_: Any) -> list[Any]:
        driven.append(out.name)
        results = [EpisodeResult(task, seed, None, seed % 2 == 0, 3) for task in tasks for seed in seeds]
        save_results(out / "results.json", results)
        return results

    monkeypatch.setattr(script.work, "collect_demonstrations", collected)
    monkeypatch.setattr(script, "evaluate", drive)
    monkeypatch.setattr(script, "read_plan", lambda _: SimpleNamespace(tasks=("push",)))
    arguments = "--tasks push --watched --demonstrations 10 --labels 2 --steps 2 2 2 2 --episodes 3 --out"
    monkeypatch.setattr(sys, "argv", ["few_labels.py", *arguments.split(), str(tmp_path / "out")])
    options = script._options()
    config = replace(script._config(options), size=(32, 32))
    return script.Bench(options, config, StageRunner(options.out)), driven


@pytest.mark.slow
def test_every_arm_learns_from_the_labelled_alone(script: ModuleType, bench: tuple[Any, list[str]]) -> None:
    made, driven = bench
    cells = {arm: made.cell(arm, 2, 0) for arm in script.ARMS}
    assert len(driven) == 4
    chosen = script.labelled_episodes(made.of_task, 2, 0)
    assert not set(chosen) & set(made.measured)
    for arm, cell in cells.items():
        assert list(cell.solved.values()) == [True, False, True], arm
        assert cell.steps == (4 if arm == script.NONE_ALL else 2)
        (folder,) = made.runner.root.glob(f"adapt-{script._slug(arm)}-??????????/policy")
        statistics = load_json(folder / "statistics.json")["actions"]
        shards = LatentShards(made.latents)
        labelled = [np.asarray(episode.actions) for episode in shards if episode.info.episode_index in chosen]
        assert statistics["count"] == sum(actions.shape[0] * actions.shape[1] for actions in labelled), arm
        spaces = load_json(folder / "wam" / "config.json")["config"]["spaces"]
        assert ("latent" in spaces) == (arm in (script.LATENT, script.VIDEO))
        assert spaces.get("latent", {"state_channels": 0})["state_channels"] == 0, "pretraining saw the robot's state"
    errors = {cell.error for cell in cells.values()}
    assert len(errors) == 4, "two arms are one model"
    made.cell(script.LATENT, 2, 0)
    assert len(driven) == 4, "a finished part was made again"
