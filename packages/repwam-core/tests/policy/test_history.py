"""What a policy remembers is what it saw and what was carried out: equal to the teacher-forced pass over both."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from repvitok.data import LeRobotReader
from repwam_core.interface import Observation
from repwam_core.model.sequence import WAMInputs, document_inputs, training_layout
from repwam_core.policy import BatchedPolicy
from torch import Tensor

SPANS = ((0, 1), (1, 9), (9, 13))
"""Raw frames of each observation: frame 0, then two latent frames, then one."""
CHUNKS = (2, 1, 2)
"""Latent frames of the later observations, and of the chunk that is asked about."""
T_VIDEO, T_ACTION = 0.3, 0.6


def drive(policy: BatchedPolicy, dataset, carried_out: np.ndarray | None) -> np.ndarray:
    """Show two episodes up to frame 12; return the actions (2, 12, C) that led there as the robot saw them.

    `carried_out` are they, and are recorded; None carries out what the policy returns and records nothing.
    """
    reader = LeRobotReader(dataset)
    policy.reset(["go left", "go up"], [3, 4])
    done, returned = [], np.zeros((2, 0, 3), np.float32)
    for first, last in SPANS:
        done.append(returned[:, : last - first])
        if first and carried_out is not None:
            policy.record(list(carried_out[:, first - 1 : last - 1]))
        chunks = policy.act([_observation(reader, episode, range(first, last)) for episode in range(2)])
        returned = np.stack([chunk.actions for chunk in chunks])
    return carried_out if carried_out is not None else np.concatenate(done, axis=1)


def _observation(reader: LeRobotReader, episode: int, frames: range) -> Observation:
    images = {camera: reader.frames(episode, camera, frames) for camera in reader.camera_keys}
    state = reader.episode(episode)["observation.state"][list(frames)].astype(np.float32)
    return Observation(images=images, state=state)


def _record_and_act(policy: BatchedPolicy, actions_si: Sequence[np.ndarray], seen: list[Observation]) -> None:
    policy.record(list(actions_si))
    policy.act(seen)


def teacher_forced(world, actions_si: np.ndarray, noisy_video: Tensor, noisy_actions: Tensor) -> WAMInputs:
    """Both episodes as training lays them out, from the latents of `repvitok encode`; the last chunk on its path."""
    known = world.store.batch(np.array([0, 1]), np.array([0, 0]), 3)
    scaled = torch.from_numpy(world.store.statistics.actions.normalise(actions_si))
    layout = training_layout(sum(CHUNKS) + 1, CHUNKS, world.store.meta.grid, 4, state=True)
    times = torch.ones(len(layout.levels))
    times[layout.levels.noisy_video[-1]], times[layout.levels.noisy_actions[-1]] = T_VIDEO, T_ACTION
    nothing = torch.zeros_like(known.latents[:, :3]), torch.zeros(2, 3, 4, 3)
    return document_inputs(
        layout,
        latents=torch.cat([known.latents, torch.zeros_like(noisy_video)], dim=1),
        noisy_latents=torch.cat([nothing[0], noisy_video], dim=1),
        actions=torch.cat([scaled.unflatten(1, (3, 4)), torch.zeros_like(noisy_actions)], dim=1),
        noisy_actions=torch.cat([nothing[1], noisy_actions], dim=1),
        states=torch.cat([known.state, torch.zeros(2, 2, 2)], dim=1),
        times=times.expand(2, -1),
        text=known.text,
        text_mask=known.text_mask,
        space="robot",
    )


@pytest.mark.parametrize("recorded", [True, False])
def test_the_cache_holds_what_was_carried_out(world, recorded):
    policy = BatchedPolicy.from_pretrained(world.policy, execute_frames=2, clip=True)
    other = np.random.default_rng(5).normal(size=(2, 12, 3)).astype(np.float32)
    actions_si = drive(policy, world.dataset, other if recorded else None)
    if not recorded:  # the case says nothing unless what was returned is not what was planned
        planned = policy.parts.statistics.actions.denormalise(policy.planned.actions.flatten(1, 2).numpy())
        assert np.abs(planned - policy.parts.statistics.actions.clip(planned)).max() > 1e-2
    generator = torch.Generator().manual_seed(9)
    tokens, dim = policy.parts.manifest.latents.tokens, policy.parts.wam.config.latent_dim
    video = torch.randn(2, 2, tokens, dim, generator=generator)
    actions = torch.randn(2, 2, 4, 3, generator=generator)
    ours = policy._now.rollout.velocities(video, actions, T_VIDEO, T_ACTION)
    with torch.no_grad():
        expected = policy.parts.wam(teacher_forced(world, actions_si, video, actions))
    of_video, of_actions = expected.video.unflatten(1, (-1, tokens)), expected.actions.unflatten(1, (-1, 4))
    torch.testing.assert_close(ours[0], of_video[:, -2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[1], of_actions[:, -2:], atol=1e-4, rtol=1e-4)


def test_recording_what_was_returned_changes_nothing(world):
    policy = BatchedPolicy.from_pretrained(world.policy, execute_frames=2)
    returned = drive(policy, world.dataset, None)
    silent = policy.planned.actions
    drive(policy, world.dataset, returned)
    torch.testing.assert_close(policy.planned.actions, silent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 6, 3)), r"shape \(n, 3\), n = 4 for each latent frame carried out, got \(6, 3\)"),
        (np.zeros((2, 0, 3)), r"got \(0, 3\)"),
        (np.zeros((2, 3)), r"got \(3,\)"),
        (np.full((2, 8, 3), np.nan), "finite"),
        ([np.zeros((4, 3)), np.zeros((8, 3))], "as many executed actions in every episode"),
        (np.zeros((1, 8, 3)), "the actions of 2 episodes, got 1"),
        (np.zeros((2, 8, 2)), r"shape \(n, 3\), n = 4 for each latent frame carried out, got \(8, 2\)"),
        (np.zeros((2, 4, 3)), "for the 2 latent frames seen since the last act, got those of 1"),
    ],
)
def test_actions_that_do_not_fit_what_was_seen_are_refused_and_nothing_is_lost(
    world, actions: Sequence[np.ndarray], message: str
):
    policy = BatchedPolicy.from_pretrained(world.policy, execute_frames=2)
    reader = LeRobotReader(world.dataset)
    policy.reset(["go left", "go up"], [3, 4])
    policy.act([_observation(reader, episode, range(1)) for episode in range(2)])
    later = [_observation(reader, episode, range(1, 9)) for episode in range(2)]
    with pytest.raises(ValueError, match=message):
        _record_and_act(policy, actions, later)
    policy.record([np.zeros((8, 3), np.float32)] * 2)
    policy.act(later)
    assert torch.cat([actions for _, _, actions in policy._now.history[1:]], dim=1).shape == (2, 2, 4, 3)
