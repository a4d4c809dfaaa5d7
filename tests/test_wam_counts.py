"""What the world action model asks of a device does not grow with the number of documents, and waits for nothing."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from repwam_core.model.config import ActionSpace, WAMConfig

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "wam_counts.py"


@pytest.fixture(scope="module")
def counts() -> ModuleType:
    spec = spec_from_file_location("wam_counts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["wam_counts"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config() -> WAMConfig:
    """MT50's shape but for its width and depth."""
    space = ActionSpace(channels=4, vectors_per_transition=4)
    sizes = {"width": 32, "heads": 2, "ffn": 64, "action_width": 16, "action_ffn": 32, "depth": 2, "window": 4}
    return WAMConfig.preset("tiny", **sizes, spaces={"robot": space})


@pytest.mark.parametrize("attention", ["one", "blocked"])
def test_short_episodes_packed_are_as_many_operations_as_a_batch(
    counts: ModuleType, config: WAMConfig, attention: str
) -> None:
    batch, packed = (counts.step_work(config, 73, 12, packed=packed, attention=attention) for packed in (False, True))
    assert packed.total <= 1.1 * batch.total, (packed.operations - batch.operations).most_common(5)
    assert packed.bytes <= 1.1 * batch.bytes
    few = counts.step_work(config, 3, 12, packed=True, attention=attention)
    assert few.operations == packed.operations


def test_passes_of_a_rollout_wait_for_nothing(counts: ModuleType, config: WAMConfig) -> None:
    """On the meta device there are no numbers to wait for: reading one would fail."""
    assert all(work.total for work in counts.rollout_work(config).values())
