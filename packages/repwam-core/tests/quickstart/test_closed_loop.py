"""The quickstart's stages in closed loop run on any suite; here on the documentation's toy."""

import importlib
from dataclasses import replace
from pathlib import Path

from repvitok.runtime.documents import load_yaml, parse
from repwam_core.quickstart import work
from repwam_core.quickstart.config import RECIPES, QuickstartConfig

TASKS = ("go-left", "go-right")


def test_demonstrations_and_baselines_of_another_suite(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "sim")
    importlib.import_module("toy_simulator")  # its suite is there once it is imported
    chosen = {"suite": "toy", "tasks": TASKS, "same_scene": (), "episodes": 2, "eval_episodes": 2, "size": (32, 32)}
    config = replace(parse(load_yaml(RECIPES / "sim.yaml"), QuickstartConfig, "plan"), **chosen)
    work.collect_demonstrations(tmp_path, config=config, seed=0, workers=1)
    told = work.run_baselines(tmp_path, config=config, dataset=tmp_path / "dataset", workers=1)
    assert told["expert"] == "go-left 2/2, go-right 2/2"
    assert len(work.read_results(tmp_path, "replay")) == 4
