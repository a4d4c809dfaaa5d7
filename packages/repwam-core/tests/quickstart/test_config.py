"""Plans: read from their recipes, overlaid by options, refused where they cannot work."""

import argparse
from dataclasses import replace

import pytest
from repvitok.runtime.errors import UserError
from repwam_core.quickstart.config import RECIPES, STAGES, add_quickstart_arguments, load_config, shaped_like
from repwam_core.quickstart.work import settings_of
from repwam_core.sim.metaworld import TASKS


def _options(**given):
    options = dict.fromkeys(("preset", "suite", "tasks", "episodes", "eval_episodes", "size", "dataset"))
    return argparse.Namespace(**(options | {"budget": "cpu"} | given))


DATASET = {"dataset": "somewhere"}


@pytest.mark.parametrize(
    "given",
    [{}, DATASET, {"preset": "mt50"}, {"preset": "mt50", "budget": "gpu"}, {"preset": "aloha"}],
    ids=["quickstart", "data set", "mt50", "mt50 gpu", "aloha"],
)
def test_recipes_are_plans(given):
    plan = load_config(_options(**given))
    assert plan.size[0] % 16 == plan.size[1] % 16 == 0
    assert 0 < plan.held_out < 1
    assert all(file.is_file() for stage in STAGES for file in plan.recipe_files(stage))


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_mt50_is_fifty_tasks_fifty_demonstrations_ten_episodes_of_400_steps(budget):
    plan = load_config(_options(preset="mt50", budget=budget))
    assert set(plan.tasks) == set(TASKS)
    assert (len(plan.tasks), plan.episodes, plan.eval_episodes) == (50, 50, 10)
    assert settings_of(plan).to_dict()["max_env_steps"] == 400
    assert plan.torch_device == {"cpu": "cpu", "gpu": "cuda"}[budget]


def test_aloha_is_two_arms_and_three_cameras_for_fifty_episodes_of_400_steps():
    plan = load_config(_options(preset="aloha"))
    robot, settings = settings_of(plan).embodiment, settings_of(plan).to_dict()
    assert (plan.tasks, plan.episodes, plan.eval_episodes) == (("transfer-cube",), 50, 50)
    assert (len(robot.action_names), len(robot.cameras), robot.rate_hz) == (14, 3, 25.0)
    assert settings["max_env_steps"] == 400


def test_a_number_multiplies_the_steps_of_the_budget_for_a_cpu():
    whole = load_config(_options(preset="mt50"))
    half = load_config(_options(preset="mt50", budget=0.5))
    assert half == replace(whole, steps=whole.steps.scaled(0.5))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budget": "gpu"}, "--preset mt50"),
        ({"preset": "metaworld", "budget": "gpu"}, "--preset mt50"),
        ({"preset": "mt50", **DATASET}, "with --dataset, drop them"),
        ({"budget": "gpu", **DATASET}, "with --dataset, drop them"),
    ],
)
def test_a_preset_that_is_not_sized_for_what_is_asked(given, told):
    with pytest.raises(UserError, match=told):
        load_config(_options(**given))


@pytest.mark.parametrize("text", ["0", "nan", "-1", "much"])
def test_a_budget_is_a_machine_or_a_factor(text):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_quickstart_arguments(parser)
    assert parser.parse_args(["--budget", "gpu"]).budget == "gpu"
    assert parser.parse_args(["--budget", "0.5"]).budget == 0.5
    with pytest.raises(argparse.ArgumentError, match="expected a number"):
        parser.parse_args(["--budget", text])


def test_recipes_of_a_stage_that_there_is_not_are_an_error():
    plan = load_config(_options())
    with pytest.raises(UserError, match="got pretraining"):
        replace(plan, recipes={"pretraining": ("pretrain.yaml",)})


def test_options_overlay_the_recipe():
    plan = load_config(_options(tasks=["door-open"], episodes=["3"], budget=0.5, size=[32, 48]))
    whole = load_config(_options())
    assert plan.all_tasks == ("door-open",)
    assert (plan.episodes, plan.size) == (3, (32, 48))
    assert plan.steps.adapt == round(whole.steps.adapt / 2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": [60, 64]}, "nearest is 64 64"),
        ({"size": [0, 64]}, "multiples of 16"),
        ({"episodes": ["1"]}, "--episodes"),
        ({"episodes": ["0-9"]}, "--episodes must be one number"),
        ({"episodes": ["3", "4"]}, "--episodes must be one number"),
        ({"eval_episodes": 0}, "--eval-episodes"),
    ],
)
def test_impossible_options_are_errors(given, told):
    with pytest.raises(UserError, match=told):
        load_config(_options(**given))


def test_an_unknown_key_in_a_plan_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "sim.yaml").write_text((RECIPES / "sim.yaml").read_text() + "speed: 11\n")
    monkeypatch.setattr("repwam_core.quickstart.config.RECIPES", tmp_path)
    with pytest.raises(UserError, match="speed"):
        load_config(_options())


@pytest.mark.parametrize(
    ("camera", "size"),
    [((480, 640), (64, 80)), ((640, 480), (80, 64)), ((240, 240), (64, 64)), ((720, 1280), (64, 112))],
)
def test_frames_keep_the_cameras_shape(camera, size):
    assert shaped_like(load_config(_options(**DATASET)), *camera).size == size
