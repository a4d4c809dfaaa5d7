"""What `repwam serve` does for a robot: warm before it listens, weights as asked, one frame held for many."""

import numpy as np
import pytest
import torch
from repvitok.data.transforms import resize_frames
from repwam_client.client import resize
from repwam_core.interface import ActionChunk, Observation
from repwam_core.policy import Policy, folder
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.policy.serving.command import warm_up
from repwam_core.policy.serving.protocol import Request, pack
from repwam_core.policy.serving.server import Session


class Noting:
    """Returns four actions a time, and notes the frames and states that it was given."""

    def __init__(self):
        self.frames, self.states = [], []

    def reset(self, instruction, seed=0):
        pass

    def record(self, actions_si):
        pass

    def act(self, observation):
        self.frames.append(observation.frames("top")[:, 0, 0, 0].tolist())
        self.states.append(observation.states()[:, 0].tolist())
        return ActionChunk(np.zeros((4, 1), np.float32), ("x",), 20.0)


def ask(session, number, **given):
    images = {"top": np.full((4, 4, 3), number, np.uint8)}
    session.answer(pack(Request(images=images, state=np.array([number], np.float32), **given).to_message()))


@pytest.mark.parametrize(("held", "second"), [(False, [2]), (True, [2, 2, 2, 2])])
def test_the_newest_frame_stands_for_all_since_the_last_answer_if_asked(held, second):
    policy = Noting()
    session = Session(policy, held)
    ask(session, 1)
    ask(session, 2)
    ask(session, 3, executed=np.zeros((2, 1), np.float32))  # of the four, two were carried out
    ask(session, 4, reset=True)
    assert policy.frames == policy.states == [[1], second, [3, 3] if held else [3], [4]]


def observe(policy, count):
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (count, 32, 16, 3), np.uint8) for camera in policy.embodiment.cameras}
    return Observation(images, rng.normal(size=(count, 2)).astype(np.float32))


def two_chunks(policy):
    policy.reset("go left", seed=3)
    return np.concatenate([policy.act(observe(policy, count)).actions for count in (1, 4)])


def test_a_policy_that_was_warmed_up_acts_as_before(world):
    warm = Policy.from_pretrained(world.policy)
    warm_up(warm)
    np.testing.assert_array_equal(two_chunks(warm), two_chunks(Policy.from_pretrained(world.policy)))


def test_weights_in_bfloat16_are_asked_for(world):
    full, half = (LoadedPolicy.load(world.policy, dtype=dtype) for dtype in (None, torch.bfloat16))
    assert {p.dtype for p in full.wam.parameters()} == {torch.float32}
    assert {p.dtype for p in half.wam.parameters()} == {torch.bfloat16}
    exact, near = two_chunks(Policy(full)), two_chunks(Policy(half))
    assert not np.array_equal(exact, near)
    assert np.abs(exact - near).max() < 0.1 * np.ptp(exact)


def test_layers_are_compiled_once_for_all_sessions(world, monkeypatch):
    compiled = []
    monkeypatch.setattr(folder, "compiled_run", lambda wam: compiled.append(wam) or wam.run)
    parts = LoadedPolicy.load(world.policy)
    Policy(parts)
    assert compiled == []
    for _ in range(2):
        Policy(parts, compile_passes=True)
    assert compiled == [parts.wam]


@pytest.mark.parametrize("size", [(16, 24), (33, 20), (90, 120)])
def test_the_client_resizes_as_the_policy_does_within_1_of_255(size):
    frames = np.random.default_rng(1).integers(0, 256, (2, 60, 80, 3), np.uint8)
    theirs = resize_frames(frames, size).astype(int)
    assert np.abs(resize(frames, size).astype(int) - theirs).max() <= 1
