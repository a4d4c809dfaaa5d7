"""Requests, answers and metadata survive the trip; a value of the wrong kind is named."""

from dataclasses import replace

import numpy as np
import pytest
from repwam_core.interface import ActionChunk
from repwam_core.policy.serving.protocol import (
    Request,
    ServerMetadata,
    chunk_from_message,
    chunk_to_message,
    pack,
    unpack,
)

IMAGES = {"top": np.zeros((8, 6, 3), np.uint8)}


def _trip(message):
    return unpack(pack(message))


def test_metadata_comes_back(metadata):
    assert ServerMetadata.from_message(_trip(metadata.to_message())) == metadata


def test_metadata_says_what_a_server_refuses_and_an_older_server_says_less(metadata):
    limited = replace(metadata, max_message_bytes=1000, idle_timeout_s=5.0)
    message = _trip(limited.to_message())
    assert ServerMetadata.from_message(message) == limited
    assert (message["max_prompt_bytes"], message["max_image_side"]) == (4096, 4096)
    for name in ("max_prompt_bytes", "max_image_side", "max_message_bytes", "idle_timeout_s"):
        del message[name]
    assert ServerMetadata.from_message(message) == metadata


def test_the_largest_picture_and_prompt_are_taken(metadata):
    images = {"top": np.zeros((metadata.max_image_side, 2, 3), np.uint8)}
    prompt = "ü" * (metadata.max_prompt_bytes // 2)
    observation = Request.from_message(_trip({"images": images, "prompt": prompt})).observation()
    assert observation.instruction == prompt
    assert observation.num_frames == 1


def test_metadata_of_another_server_is_refused():
    with pytest.raises(ValueError, match="expected the metadata of repwam-serve version 1, got None None"):
        ServerMetadata.from_message({"action_horizon": 10})


def test_a_request_comes_back(frame):
    request = Request(
        frame(7, count=4), np.zeros((4, 2), np.float32), "push", 1.5, True, 3, np.ones((4, 4), np.float32)
    )
    back = Request.from_message(_trip(request.to_message()))
    for name in ("prompt", "time_s", "reset", "seed"):
        assert getattr(back, name) == getattr(request, name)
    np.testing.assert_array_equal(back.images["top"], request.images["top"])
    np.testing.assert_array_equal(back.state, request.state)
    np.testing.assert_array_equal(back.executed, request.executed)


def test_defaults_are_not_sent():
    assert Request(prompt="push").to_message() == {"prompt": "push"}


def test_numbers_of_a_client_with_numpy_scalars_and_doubles_are_taken():
    message = _trip({"images": IMAGES, "state": np.zeros(2), "time_s": np.float64(2), "reset": np.bool_(True)})
    observation = Request.from_message(message).observation()
    assert observation.state.dtype == np.float32
    assert observation.time_s == 2.0


def test_a_chunk_comes_back():
    chunk = ActionChunk(np.arange(6, dtype=np.float32).reshape(3, 2), ("x", "y"), 20.0)
    message = _trip(chunk_to_message(chunk, {"infer_ms": 1.0}))
    back = chunk_from_message(message)
    np.testing.assert_array_equal(back.actions, chunk.actions)
    assert (back.channels, back.rate_hz, message["server_timing"]) == (chunk.channels, 20.0, {"infer_ms": 1.0})
    with pytest.raises(ValueError, match=r"without \['actions', 'channels', 'rate_hz'\]"):
        chunk_from_message({"reset": True})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"image": 1}, "expected the keys"),
        ({"images": [1]}, "images: expected a map"),
        ({"images": {"top": "x"}}, "expected an array for camera 'top', got str"),
        ({"images": {"top": np.zeros((8, 6, 3), np.float32)}}, "got float32 of shape"),
        ({"images": {"top": np.zeros((8, 6), np.uint8)}}, "must have shape"),
        ({"images": {}}, "at least one camera"),
        ({"images": IMAGES, "state": [0.0]}, "state: expected an array of floats, got list"),
        ({"images": IMAGES, "state": np.zeros(2, np.int32)}, "state: expected an array of floats, got int32"),
        ({"images": IMAGES, "state": np.full(2, np.nan)}, "finite"),
        ({"images": IMAGES, "state": np.full(2, 1e300)}, "finite"),
        ({"images": IMAGES, "state": np.zeros((3, 2))}, "1 frames"),
        ({"images": IMAGES, "time_s": "now"}, "time_s"),
        ({"images": IMAGES, "time_s": float("inf")}, "time_s must be finite"),
        ({"prompt": 3}, "prompt: expected the instruction as a string"),
        ({"reset": 1}, "reset: expected true or false"),
        ({"reset": True, "seed": -1}, "seed: expected a whole number"),
        ({"reset": True, "seed": 1.0}, "seed: expected a whole number"),
        ({"executed": np.zeros(4)}, r"executed: expected one or more finite actions .* got shape \(4,\)"),
        ({"executed": np.full((1, 4), np.inf)}, "executed: expected one or more finite actions"),
        ({"executed": np.zeros((0, 4))}, r"executed: expected one or more finite actions .* got shape \(0, 4\)"),
        ({"executed": np.zeros((4, 0))}, "executed: expected one or more finite actions"),
        ({}, "expected images, or reset: true"),
        ({"prompt": "push"}, "expected images, or reset: true"),
        ({"reset": True, "state": np.zeros(2)}, "only begins a new episode, got state as well"),
        ({"reset": True, "executed": np.zeros((4, 4))}, "only begins a new episode, got executed as well"),
        (
            {"images": {"top": np.zeros((4097, 1, 3), np.uint8)}},
            r"at most 4096 pixels a side, got shape \(4097, 1, 3\)",
        ),
        ({"images": {"top": np.zeros((2, 1, 4097, 3), np.uint8)}}, "at most 4096 pixels a side"),
        ({"images": IMAGES | {"extra": np.zeros((1, 5000, 3), np.uint8)}}, "from camera 'extra'"),
        ({"images": {"top": np.zeros((5000, 3), np.uint8)}}, "must have shape|at most 4096"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(message, said):
    with pytest.raises(ValueError, match=said):
        Request.from_message(message).observation()
