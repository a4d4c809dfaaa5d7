"""Baselines: the expert succeeds, chance does not, a replay is the demonstration's own actions."""

import numpy as np
import pytest
from repvitok.data import LeRobotWriter
from repvitok.runtime.errors import UserError
from repwam_core.sim.base import evaluation_seeds
from repwam_core.sim.evaluate import demonstrated, run_baseline
from repwam_core.sim.metaworld import MetaWorldSettings, MetaWorldTask
from repwam_core.sim.results import film_key, load_films, load_results, success_rates

TASK = "handle-press-side"
CRASHES = {
    "__init__": RuntimeError("no such model"),
    "start": ValueError("negative mass"),
    "advance": FloatingPointError("NaN in QACC"),
    "close": OSError("it does not even close"),
}
SEEDS = evaluation_seeds(3)

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """The expert's actions at the first evaluation seed, so that a replay must succeed there."""
    actions = []
    with MetaWorldTask(TASK) as task:
        task.start(SEEDS[0])
        while not task.done:
            actions.append(task.expert_action())
            task.advance(actions[-1])
    root = tmp_path_factory.mktemp("demonstrations")
    names = task.embodiment.action_names
    writer = LeRobotWriter(root, fps=40, cameras={}, state_names=(), action_names=names, robot_type="sawyer")
    writer.add_episode(0, frames={}, action=np.stack(actions), task="press", metadata={"task_name": TASK})
    writer.finalize()
    return root


def test_expert_and_chance():
    expert, chance = (run_baseline(who, [TASK, "window-open"], SEEDS, workers=1) for who in ("expert", "random"))
    assert [(r.task, r.seed) for r in expert] == [(task, seed) for seed in SEEDS for task in (TASK, "window-open")]
    assert all(result.success for result in expert)
    assert success_rates(chance)["window-open"].successes == 0


def test_a_filmed_expert_acts_as_an_unfilmed_one(tmp_path):
    settings = MetaWorldSettings(size=(32, 32))
    given = {"settings": settings, "workers": 1}
    plain = run_baseline("expert", [TASK], SEEDS, **given)
    filmed = run_baseline("expert", [TASK], SEEDS, **given, filmed_per_task=1, out=tmp_path)
    assert [r.to_dict() for r in filmed] == [r.to_dict() for r in plain]
    assert [r.frames is not None for r in filmed] == [True, False, False]
    film = load_films(tmp_path / "films.npz")[film_key(filmed[0])]
    assert film.shape == (filmed[0].steps + 1, 32, 32 * len(settings.cameras), 3)


def test_workers_do_not_matter():
    one, two = (run_baseline("random", [TASK], SEEDS, workers=workers) for workers in (1, 2))
    assert [r.to_dict() for r in one] == [r.to_dict() for r in two]


def test_a_replay_succeeds_where_it_was_recorded(demonstrations):
    results = run_baseline("replay", [TASK], SEEDS, demonstrations=demonstrations, workers=1)
    recorded = demonstrated(demonstrations, [TASK], "action")[TASK][0]
    assert (results[0].success, results[0].steps) == (True, len(recorded))


def test_a_replay_needs_demonstrations(demonstrations):
    with pytest.raises(UserError, match="no demonstrations of reach"):
        run_baseline("replay", ["reach"], SEEDS, demonstrations=demonstrations)
    with pytest.raises(UserError, match="needs a data set"):
        run_baseline("replay", ["reach"], SEEDS)


@pytest.mark.parametrize("place", CRASHES)
def test_a_crash_of_the_simulator_is_a_failed_episode(monkeypatch, tmp_path, place):
    """Also a ValueError: only a UserError is the user's to mend."""

    def explode(self, *arguments):
        if place != "close":
            raise CRASHES[place]
        raise CRASHES["advance"] if arguments else CRASHES["close"]

    with monkeypatch.context() as patch:
        for method in ("advance", "close") if place == "close" else (place,):
            patch.setattr(MetaWorldTask, method, explode)
        crashed = run_baseline("random", [TASK], SEEDS[:2], workers=1, out=tmp_path)
    error = CRASHES["advance" if place == "close" else place]
    assert [(r.success, r.steps, r.crashed) for r in crashed] == [(False, 0, f"{type(error).__name__}: {error}")] * 2
    assert all("explode" in (r.traceback or "") for r in crashed)
    assert [r.to_dict() for r in load_results(tmp_path / "results.json")[0]] == [r.to_dict() for r in crashed]
    assert success_rates(crashed)[TASK].crashed == 2


def test_a_mistake_of_the_user_is_no_crash(monkeypatch):
    def refuse(self, seed):
        raise UserError("install a GL library")

    monkeypatch.setattr(MetaWorldTask, "start", refuse)
    with pytest.raises(UserError, match="GL library"):
        run_baseline("random", [TASK], SEEDS[:1], workers=1)
