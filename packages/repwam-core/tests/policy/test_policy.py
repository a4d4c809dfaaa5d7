"""The policy sees what training saw, plans by seed alone, alone as in a batch, and refuses what does not fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from repvitok.data import LatentShards, LeRobotReader
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy, Policy
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.statistics import Statistics


@pytest.fixture(scope="module")
def observe(world) -> Callable[..., Observation]:
    """Frames `first` .. `last` - 1 of an episode, with their states."""
    reader = LeRobotReader(world.dataset)

    def observation(episode: int, first: int, last: int, **changes) -> Observation:
        images = {camera: reader.frames(episode, camera, range(first, last)) for camera in reader.camera_keys}
        state = reader.episode(episode)["observation.state"][first:last].astype(np.float32)
        return Observation(**{"images": images, "state": state, **changes})

    return observation


def test_latents_of_the_policy_are_those_of_encode(world, observe):
    policy = BatchedPolicy.from_pretrained(world.policy, chunk_frames=2, execute_frames=2)
    shards = LatentShards(world.shards)
    policy.reset(["go left", "go up"], [0, 1])
    seen = []
    for first, last in ((0, 1), (1, 9), (9, 13)):
        policy.act([observe(0, first, last), observe(1, first, last)])
        seen.append(policy.observed_latents())
    latents = torch.cat(seen, dim=1)
    for episode in range(2):
        expected = torch.from_numpy(shards[episode].latents[:4])
        torch.testing.assert_close(latents[episode], expected, atol=1e-5, rtol=1e-5)


def test_states_are_standardised_as_in_training(world, observe):
    policy = BatchedPolicy.from_pretrained(world.policy)
    policy.reset(["go left"], [0])
    policy.act([observe(0, 0, 1)])
    policy.act([observe(0, 1, 5)])
    batch = world.store.batch(np.array([0]), np.array([0]), 1)
    states = torch.cat([states for _, states, _ in policy._now.history], dim=1)
    torch.testing.assert_close(states, batch.state)


def test_an_episode_is_the_same_alone_and_in_a_batch(world, observe):
    batched = BatchedPolicy.from_pretrained(world.policy)
    alone = Policy.from_pretrained(world.policy)
    batched.reset(["go left", "go up", None], [3, 4, 5])
    alone.reset("go up", 4)
    for first, last in ((0, 1), (1, 5), (5, 9)):
        chunks = batched.act([observe(0, first, last), observe(1, first, last), observe(0, first, last)])
        chunk = alone.act(observe(1, first, last))
        np.testing.assert_allclose(chunk.actions, chunks[1].actions, atol=1e-4)


def test_actions_depend_on_seed_observation_and_instruction(world, observe):
    policy = Policy.from_pretrained(world.policy, clip=False)

    def first_actions(instruction: str | None, seed: int, episode: int = 0) -> np.ndarray:
        policy.reset(instruction, seed)
        return policy.act(observe(episode, 0, 1)).actions

    again = first_actions("go left", 0)
    np.testing.assert_array_equal(again, first_actions("go left", 0))
    for other in (first_actions("go left", 1), first_actions("go up", 0), first_actions("go left", 0, episode=1)):
        assert np.abs(other - again).max() > 1e-4
    np.testing.assert_array_equal(first_actions(None, 0), first_actions("", 0))


def test_a_chunk_names_its_channels_rate_and_stays_in_the_recorded_range(world, observe):
    policy = Policy.from_pretrained(world.policy)
    policy.reset("go left")
    chunk = policy.act(observe(0, 0, 1))
    assert chunk.channels == ("x", "y", "z")
    assert chunk.rate_hz == 20
    assert chunk.actions.shape == (4, 3)
    statistics = world.store.statistics.actions
    np.testing.assert_array_equal(statistics.clip(chunk.actions), chunk.actions)


def test_a_new_instruction_in_mid_episode_is_followed(world, observe):
    policy = Policy.from_pretrained(world.policy, clip=False)
    chunks = []
    for instruction in (None, "go left", "go up"):
        policy.reset("go left", 0)
        policy.act(observe(0, 0, 1))
        chunks.append(policy.act(observe(0, 1, 5, instruction=instruction)).actions)
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert np.abs(chunks[2] - chunks[0]).max() > 1e-4


def test_recorded_actions_replace_the_returned_ones(world, observe):
    policy = Policy.from_pretrained(world.policy, clip=False)
    chunks = []
    for executed in (None, np.full((4, 3), 2.0, np.float32)):
        policy.reset("go left", 0)
        policy.act(observe(0, 0, 1))
        if executed is not None:
            policy.record(executed)
        chunks.append(policy.act(observe(0, 1, 5)).actions)
    assert np.abs(chunks[1] - chunks[0]).max() > 1e-4


def test_changes_from_the_state_become_targets_and_recorded_targets_changes(world, observe):
    parts = LoadedPolicy.load(world.policy)
    old = parts.statistics
    statistics = Statistics(
        replace(old.actions, kind="from_state"), replace(old.state, channels=("y", "z")), old.actions
    )
    policy = Policy(replace(parts, statistics=statistics), clip=False)
    chunks = []
    for told in (False, True):
        policy.reset("go left", 0)
        first = observe(0, 0, 1)
        returned = policy.act(first).actions
        changes = old.actions.denormalise(policy.batched.planned.actions[0, :1].flatten(0, 1).numpy())
        np.testing.assert_allclose(returned - changes, np.tile([0.0, *first.states()[-1]], (4, 1)), atol=1e-5)
        if told:
            policy.record(returned)
        chunks.append(policy.act(observe(0, 1, 5)).actions)
    np.testing.assert_allclose(chunks[0], chunks[1], atol=1e-4)


@pytest.mark.parametrize(
    ("span", "changes", "message"),
    [
        ((0, 5), {}, "expected one frame per camera"),
        ((0, 1), {"state": None}, r"expected a state of 2 numbers \(px, py\), got none"),
        ((0, 1), {"state": np.zeros(5, np.float32)}, r"expected a state of 2 numbers \(px, py\)"),
        ((0, 1), {"images": {"front": np.zeros((32, 16, 3), np.uint8)}}, "'observation.images.left' is missing"),
    ],
)
def test_a_first_observation_that_does_not_fit_is_refused(world, observe, span, changes, message):
    policy = Policy.from_pretrained(world.policy)
    policy.reset("go left")
    with pytest.raises(ValueError, match=message):
        policy.act(observe(0, *span, **changes))


def test_a_wrong_number_of_frames_or_size_is_refused_and_nothing_is_lost(world, observe):
    policy, fresh = Policy.from_pretrained(world.policy), Policy.from_pretrained(world.policy)
    for each in (policy, fresh):
        each.reset("go left")
        each.act(observe(0, 0, 1))
    with pytest.raises(ValueError, match="4 per latent frame carried out, at most 8; got 3"):
        policy.act(observe(0, 1, 4))
    big = {camera: np.zeros((4, 48, 48, 3), np.uint8) for camera in policy.embodiment.cameras}
    with pytest.raises(ValueError, match="call reset first"):
        policy.act(observe(0, 1, 5, images=big))
    np.testing.assert_array_equal(policy.act(observe(0, 1, 5)).actions, fresh.act(observe(0, 1, 5)).actions)


def test_act_before_reset_and_a_folder_that_is_no_policy_are_refused(world, observe, tmp_path):
    with pytest.raises(ValueError, match="call reset"):
        Policy.from_pretrained(world.policy).act(observe(0, 0, 1))
    with pytest.raises(FileNotFoundError, match=r"no policy\.json"):
        Policy.from_pretrained(tmp_path)


def test_an_exchanged_part_is_noticed(world, tmp_path):
    folder = shutil.copytree(world.policy, tmp_path / "policy")
    values = json.loads((folder / "policy.json").read_text())
    values["digests"]["tokenizer"] = "0" * 64
    (folder / "policy.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="a part was exchanged"):
        Policy.from_pretrained(folder)


def test_known_instructions_need_no_text_model(world, observe, monkeypatch):
    monkeypatch.setattr("repwam_core.text._load", lambda *_: pytest.fail("the text model was loaded"))
    policy = BatchedPolicy.from_pretrained(world.policy)
    policy.reset(["go left", None], [0, 0])
    policy.act([observe(0, 0, 1), observe(0, 0, 1)])
