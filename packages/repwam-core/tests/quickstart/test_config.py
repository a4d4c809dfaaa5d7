"""Plans: read from their recipes, overlaid by options, refused where they cannot work."""

import argparse

import pytest
from repvitok.runtime.errors import UserError
from repwam_core.quickstart.config import RECIPES, load_config, shaped_like


def _options(**given):
    options = dict.fromkeys(("suite", "tasks", "episodes", "eval_episodes", "size", "dataset"))
    return argparse.Namespace(**(options | {"budget": 1.0} | given))


@pytest.mark.parametrize("recipe", ["sim.yaml", "dataset.yaml"])
def test_recipes_are_plans(recipe):
    plan = load_config(RECIPES / recipe, _options())
    assert plan.size[0] % 16 == plan.size[1] % 16 == 0
    assert 0 < plan.held_out < 1


def test_options_overlay_the_recipe():
    plan = load_config(RECIPES / "sim.yaml", _options(tasks=["door-open"], episodes=["3"], budget=0.5, size=[32, 48]))
    whole = load_config(RECIPES / "sim.yaml", _options())
    assert plan.all_tasks == ("door-open",)
    assert (plan.episodes, plan.size) == (3, (32, 48))
    assert plan.steps.adapt == round(whole.steps.adapt / 2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": [60, 64]}, "nearest is 64 64"),
        ({"size": [0, 64]}, "multiples of 16"),
        ({"budget": 0.0}, "--budget"),
        ({"budget": float("nan")}, "--budget"),
        ({"episodes": ["1"]}, "--episodes"),
        ({"episodes": ["0-9"]}, "--episodes must be one number"),
        ({"episodes": ["3", "4"]}, "--episodes must be one number"),
        ({"eval_episodes": 0}, "--eval-episodes"),
    ],
)
def test_impossible_options_are_errors(given, told):
    with pytest.raises(UserError, match=told):
        load_config(RECIPES / "sim.yaml", _options(**given))


def test_an_unknown_key_in_a_plan_is_an_error(tmp_path):
    (tmp_path / "plan.yaml").write_text((RECIPES / "sim.yaml").read_text() + "speed: 11\n")
    with pytest.raises(UserError, match="speed"):
        load_config(tmp_path / "plan.yaml", _options())


@pytest.mark.parametrize(
    ("camera", "size"),
    [((480, 640), (64, 80)), ((640, 480), (80, 64)), ((240, 240), (64, 64)), ((720, 1280), (64, 112))],
)
def test_frames_keep_the_cameras_shape(camera, size):
    assert shaped_like(load_config(RECIPES / "dataset.yaml", _options()), *camera).size == size
