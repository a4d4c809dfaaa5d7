"""Observations, chunks, and the named channels of robots."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from repwam_core.interface import (
    ActionChunk,
    Embodiment,
    Observation,
    channel_units,
    shared_channels,
    stack_observations,
)


def picture(*leading: int, height: int = 4, width: int = 6, value: int = 0) -> np.ndarray:
    return np.full((*leading, height, width, 3), value, np.uint8)


def test_a_single_frame_is_one_frame_with_its_state():
    seen = Observation({"top": picture()}, np.zeros(3, np.float32), "press", 0.5)
    assert seen.cameras == ("top",)
    assert seen.num_frames == 1
    assert seen.frames("top").shape == (1, 4, 6, 3)
    states = seen.states()
    assert states is not None
    assert states.shape == (1, 3)


def test_cameras_may_differ_in_size_but_not_in_frames():
    Observation({"top": picture(2), "wrist": picture(2, height=8)}, np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=re.escape("{'top': 2, 'wrist': 3}")):
        Observation({"top": picture(2), "wrist": picture(3)})


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (picture().astype(np.float32), "uint8 numpy array, got float32 of shape (4, 6, 3)"),
        (picture()[..., 0], "got (4, 6)"),
        (picture()[..., :1], "got (4, 6, 1)"),
        (picture(0), "got (0, 4, 6, 3)"),
    ],
)
def test_a_wrong_image_is_refused_with_what_it_is(image, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Observation({"top": image})


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (np.zeros(3), "float32 numpy array or None, got float64"),
        (np.zeros((3, 3), np.float32), "there are 2 frames and the state has shape (3, 3)"),
        (np.zeros(3, np.float32), "there are 2 frames and the state has shape (3,)"),
        (np.full((2, 1), np.nan, np.float32), "finite, got nan"),
    ],
)
def test_a_wrong_state_is_refused_with_what_it_is(state, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Observation({"top": picture(2)}, state)


def test_no_camera_and_unknown_camera_are_refused():
    with pytest.raises(ValueError, match="at least one camera"):
        Observation({})
    with pytest.raises(ValueError, match=re.escape("no camera 'wrist' in this observation; it has ['top']")):
        Observation({"top": picture()}).frames("wrist")


def test_stacking_keeps_the_order_and_the_newest_words():
    first = Observation({"top": picture(value=1)}, np.full(2, 1, np.float32), "old", 0.0)
    rest = Observation({"top": picture(2, value=2)}, np.full((2, 2), 2, np.float32), "new", 0.2)
    joined = stack_observations([first, rest])
    assert joined.frames("top")[:, 0, 0, 0].tolist() == [1, 2, 2]
    states = joined.states()
    assert states is not None
    assert states[:, 0].tolist() == [1, 2, 2]
    assert (joined.instruction, joined.time_s) == ("new", 0.2)


def test_stacking_refuses_nothing_and_strangers():
    with pytest.raises(ValueError, match="at least one"):
        stack_observations([])
    with pytest.raises(ValueError, match="agree in cameras"):
        stack_observations([Observation({"top": picture()}), Observation({"wrist": picture()})])
    with pytest.raises(ValueError, match="whether they hold a state"):
        stack_observations([Observation({"top": picture()}, np.zeros(1, np.float32)), Observation({"top": picture()})])


def test_a_chunk_has_a_length():
    assert len(ActionChunk(np.zeros((3, 2), np.float32), ("x", "y"), 40.0)) == 3


@pytest.mark.parametrize(
    ("actions", "rate_hz", "words"),
    [
        (np.zeros((3, 2)), 40.0, "float32 numpy array, got float64 of shape (3, 2)"),
        (np.zeros((3, 4), np.float32), 40.0, "shape (n >= 1, 2) for the channels ('x', 'y'), got (3, 4)"),
        (np.zeros((0, 2), np.float32), 40.0, "got (0, 2)"),
        (np.zeros(2, np.float32), 40.0, "got (2,)"),
        (np.array([[0, 1], [0, np.inf]], np.float32), 40.0, "got inf in row 1, 'y'"),
        (np.zeros((3, 2), np.float32), 0.0, "rate_hz must be positive, got 0.0"),
    ],
)
def test_a_wrong_chunk_is_refused_with_what_it_is(actions, rate_hz, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        ActionChunk(actions, ("x", "y"), rate_hz)


ARM = Embodiment.from_names("arm", ["x", "y", "gripper"], ["px"], ["top"], 20.0, units=["m", "m", "1"])
HAND = Embodiment.from_names("hand", ["gripper", "thumb"], units=["1", "rad"])


def test_embodiment_json_round_trip():
    assert Embodiment.from_dict(json.loads(json.dumps(ARM.to_dict()))) == ARM
    with pytest.raises(ValueError, match="cameras"):
        Embodiment.from_dict({key: value for key, value in ARM.to_dict().items() if key != "cameras"})


def test_one_layout_serves_several_embodiments():
    assert shared_channels([ARM, HAND]) == ("x", "y", "gripper", "thumb")


def test_one_name_with_two_units_is_refused():
    with pytest.raises(ValueError, match="'gripper' has unit 'm'"):
        shared_channels([ARM, Embodiment.from_names("other", ["gripper"], units=["m"])])


def test_units_are_a_list_a_word_or_patterns_of_names():
    names = ["left_elbow", "left_grip", "right_elbow"]
    assert channel_units(None, names) == ["1", "1", "1"]
    assert channel_units("rad", names) == ["rad"] * 3
    assert channel_units(["rad", "1", "rad"], names) == ["rad", "1", "rad"]
    assert channel_units({"*_grip": "m", "left_*": "rad"}, names) == ["rad", "m", "1"]
    assert channel_units({"left_*": "rad", "*_grip": "m"}, names) == ["rad", "rad", "1"]  # the first that fits
    with pytest.raises(ValueError, match=r"'\*_knee' fits no channel; the channels are left_elbow, left_grip"):
        channel_units({"*_knee": "rad"}, names)
    with pytest.raises(ValueError, match=r"one unit per action channel \(3: left_elbow.*got 2; a word"):
        channel_units(["rad", "1"], names)


def test_no_torch_is_imported():
    code = "import sys; sys.modules['torch'] = None; import repwam_core.interface, repwam_core.statistics"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["interface", "policy.execution", "policy.serving.protocol", "policy.serving.client"])
def test_the_old_names_are_the_clients_package(name):
    old = importlib.import_module(f"repwam_core.{name}")
    new = importlib.import_module(f"repwam_client.{name.rpartition('.')[2]}")
    own = {key for key, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__}
    own = {key for key in own if not key.startswith("_")}
    assert own - {"Latency", "resize"} <= set(old.__all__)  # these two are newer than the old names
    assert [key for key in old.__all__ if getattr(old, key) is not getattr(new, key)] == []
