"""The client against a server of a few lines, on every Python that it runs on: nothing else of ours is imported."""

import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from websockets.sync.server import serve

from repwam_client import (
    ActionChunk,
    ChunkedPolicy,
    Embodiment,
    Observation,
    PolicyClient,
    PolicyServerError,
    UserError,
)
from repwam_client.client import Latency, resize
from repwam_client.protocol import Request, ServerMetadata, chunk_to_message, pack, unpack

ARM = Embodiment.from_names("arm", ["x", "grip"], ["px"], ["top"], 20.0, ["m", "1"])
METADATA = ServerMetadata(ARM, (4, 6), frames_per_latent=2, max_frames=4, policy="0" * 64, action_kind="absolute")


@contextmanager
def serving(port=0, metadata=METADATA, delay_s=0.0, answers=None, seen=None):
    """A server that answers `answers` chunks per connection, whose rows count up, and then is gone; its port."""

    def converse(connection):
        connection.send(pack(metadata.to_message()))
        count = 0
        for data in connection:
            request = Request.from_message(unpack(data))
            if request.images is None:
                connection.send(pack({"reset": True}))
                continue
            if answers is not None and count == answers:
                return
            if seen is not None:
                seen.append(request)
            time.sleep(delay_s)
            rows = np.arange(2 * count, 2 * count + 2, dtype=np.float32)
            chunk = ActionChunk(np.stack([rows, rows], 1), ARM.action_names, ARM.rate_hz)
            connection.send(pack(chunk_to_message(chunk, {"infer_ms": 1.0, "total_ms": 2.0})))
            count += 1

    with serve(converse, "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def connect():
    with ExitStack() as stack:
        yield lambda port, **given: stack.enter_context(PolicyClient(port=port, timeout_s=10.0, **given))


def seen_now(value=0, size=(4, 6)):
    return Observation({"top": np.full((*size, 3), value, np.uint8)}, np.zeros(1, np.float32))


def test_a_robot_is_driven_step_by_step(connect):
    seen = []
    with serving(seen=seen) as port:
        policy = connect(port)
        assert policy.embodiment == ARM
        driver = ChunkedPolicy(policy)
        driver.reset("go", seed=3)
        assert [driver.step(seen_now(n))[0] for n in range(5)] == [0, 1, 2, 3, 4]
    assert [len(request.images["top"]) for request in seen] == [1, 2, 2]
    assert seen[1].images["top"][:, 0, 0, 0].tolist() == [1, 2]


def test_pictures_are_sent_in_the_policys_size_if_asked(connect):
    seen = []
    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), np.uint8)
    with serving(seen=seen) as port:
        for given in ({}, {"resize": True}):
            policy = connect(port, **given)
            policy.reset("go")
            policy.act(Observation({"top": picture}, np.zeros((1, 1), np.float32)))
    as_it_is, small = (request.images["top"] for request in seen)
    np.testing.assert_array_equal(as_it_is, picture)
    np.testing.assert_array_equal(small, resize(picture, (4, 6)))
    assert small.shape == (1, 4, 6, 3)


def test_resizing_keeps_one_colour_and_the_mean_and_is_off_at_the_same_size():
    grey = np.full((31, 45, 3), 77, np.uint8)
    assert (resize(grey, (8, 90)) == 77).all()
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (2, 32, 48, 3), np.uint8)
    halves = picture.reshape(2, 8, 4, 12, 4, 3).mean((2, 4))
    assert abs(resize(picture, (8, 12)).mean() - halves.mean()) < 0.5
    assert resize(picture, (32, 48)) is picture
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[:, None], 3, 1)[None]  # brighter to the right
    assert (np.diff(resize(ramp, (1, 15))[0, :, 0].astype(int)) == 16)[1:-1].all()


def test_a_client_waits_for_a_server_that_comes_later(connect):
    with serving() as port:
        pass
    with pytest.raises(OSError):  # noqa: PT011 refused, or gone
        PolicyClient(port=port)
    found = []
    thread = threading.Thread(target=lambda: found.append(connect(port, reconnect_s=20.0)))
    thread.start()
    time.sleep(0.5)
    with serving(port):
        thread.join()
        assert found[0].embodiment == ARM


def test_a_lost_episode_is_an_error_and_reset_begins_again(connect):
    with serving(answers=1) as port:
        patient, plain = connect(port, reconnect_s=5.0), connect(port)
        for policy, said in ((patient, "gone|call reset"), (plain, "gone|make a new client")):
            policy.reset("go")
            policy.act(seen_now())
            with pytest.raises(PolicyServerError, match=said):
                policy.act(seen_now())
            with pytest.raises(PolicyServerError):  # never another episode's actions, as if nothing had happened
                policy.act(seen_now())
        patient.reset("go")
        assert patient.act(seen_now()).actions[0, 0] == 0
        with pytest.raises(PolicyServerError, match="make a new client"):
            plain.reset("go")


def test_another_robots_policy_is_not_taken_up_again(connect):
    other = ServerMetadata(Embodiment.from_names("hand", ["a"]), (4, 6), 2, 4, "0" * 64)
    with serving(answers=0) as port:
        policy = connect(port, reconnect_s=5.0)
        policy.reset("go")
        with pytest.raises(PolicyServerError):
            policy.act(seen_now())
    with serving(port, other), pytest.raises(PolicyServerError, match="another robot's policy now"):
        policy.reset("go")


def test_time_is_measured_and_what_is_over_budget_is_told(connect, caplog):
    with serving(delay_s=0.05) as port:
        policy = connect(port, budget_ms=20.0)
        for _ in range(2):
            policy.reset("go")
            for _ in range(3):
                policy.act(seen_now())
    assert len(policy.latency.total_ms) == policy.latency.over_budget == 4  # not the first of each episode
    told = policy.latency.percentiles()
    assert 50 <= told["p50"] <= told["p90"] <= told["p99"] < 5000
    assert policy.latency.server_ms[0] == 2.0
    assert "the budget is 20 ms" in caplog.text


def test_percentiles_and_a_budget_that_is_none():
    latency = Latency(100.0)
    assert latency.percentiles() == {}
    for ms in range(1, 101):
        latency.add(float(ms), 0.0)
    assert latency.percentiles(50, 99.9)["p50"] == 50.5
    assert latency.over_budget == 0
    with pytest.raises(UserError, match="budget_ms: expected milliseconds above 0, or None, got 0"):
        Latency(0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cameras": None}, "field 'cameras': expected a list, got NoneType"),
        ({"cameras": [3]}, "field 'cameras': expected text"),
        ({"rate_hz": "20"}, "field 'rate_hz': expected a number, got '20'"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"action_channels": [{"unit": "m"}]}, r"action_channels\[0\]: missing 'name'"),
        ({"action_channels": [{"name": 3}]}, "expected text"),
        ({"action_channels": ["x"]}, "expected a map, got str"),
    ],
)
def test_an_embodiment_is_read_strictly(changed, message):
    assert Embodiment.from_dict(ARM.to_dict()) == ARM
    with pytest.raises(UserError, match=message):
        Embodiment.from_dict({**ARM.to_dict(), **changed})
