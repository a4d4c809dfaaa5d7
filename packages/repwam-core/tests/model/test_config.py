"""Settings survive the way through JSON and are refused where they cannot work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repwam_core.model.config import ActionSpace, WAMConfig


def test_json_round_trip() -> None:
    config = WAMConfig.preset("tiny", spaces={"robot": ActionSpace(channels=7, vectors_per_transition=4)})
    assert WAMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_differ_in_size_only() -> None:
    small, large = WAMConfig.preset("1.3b"), WAMConfig.preset("5b")
    assert (small.width, large.width) == (1536, 3072)
    assert small.depth == large.depth == 30
    assert small.head_dim == large.head_dim == 128
    assert small == WAMConfig()


def test_a_new_space_makes_a_new_config() -> None:
    config, space = WAMConfig.preset("tiny"), ActionSpace(channels=7)
    more = config.with_space("robot", space)
    assert set(config.spaces) == {"latent"}
    assert set(more.spaces) == {"latent", "robot"}
    assert more.with_space("robot", space) == more
    with pytest.raises(ValueError, match="already"):
        more.with_space("robot", ActionSpace(channels=8))


def test_state_needs_the_token_and_channels() -> None:
    spaces = {"latent": ActionSpace(channels=4), "robot": ActionSpace(channels=4, state_channels=3)}
    on, off = (WAMConfig.preset("tiny", spaces=spaces, state_token=value) for value in (True, False))
    assert on.has_state("robot")
    assert not on.has_state("latent")
    assert not off.has_state("robot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100, "heads": 3}, "multiple of heads"),
        ({"width": 36, "heads": 6}, "even head size"),
        ({"action_width": 100}, "multiple of the head size 32"),
        ({"coupling": "both"}, "coupling: expected one of"),
        ({"attention": "none"}, "attention: expected one of"),
        ({"depth": 0}, "depth: expected int >= 1"),
        ({"window": 0}, "window"),
        ({"rope_base": 1.0}, "rope_base"),
        ({"spaces": {}}, "at least one action space"),
        ({"spaces": {"a.b": ActionSpace(channels=1)}}, "names like"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WAMConfig.preset("tiny", **changes)


def test_unknown_and_missing_keys_are_refused() -> None:
    values = WAMConfig.preset("tiny").to_dict()
    with pytest.raises(ValueError, match="unknown"):
        WAMConfig.from_dict({**values, "layers": 3})
    with pytest.raises(ValueError, match="missing"):
        WAMConfig.from_dict({key: value for key, value in values.items() if key != "depth"})
    with pytest.raises(ValueError, match="unknown"):
        WAMConfig.from_dict({**values, "spaces": {"latent": {**values["spaces"]["latent"], "units": "m"}}})
    with pytest.raises(ValueError, match="preset: expected one of"):
        WAMConfig.preset("7b")
