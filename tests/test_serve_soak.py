"""A few seconds of benchmarks/serve_soak.py: robots, vandals and sleepers at one server, each answered as it should."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from repwam_core.policy import Policy
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.policy.serving import PolicyServer, ServeSettings
from repwam_core.policy.serving.command import metadata_of

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serve_soak.py"

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")


def test_robots_are_served_among_vandals_and_sleepers(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("serve_soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_soak", script)
    spec.loader.exec_module(script)

    script.write_small_policy(tmp_path / "policy")
    parts = LoadedPolicy.load(tmp_path / "policy")
    parts.text.encode(["open the window"])  # loads the text model, which takes seconds
    settings = ServeSettings(port=0, idle_timeout_s=1.0, ping_timeout_s=2.0, max_sessions=8)
    with PolicyServer(lambda: Policy(parts), metadata_of(Policy(parts)), settings).running() as port:
        outcome = script.soak(
            port, os.getpid(), seconds=4.0, robots=1, vandals=2, sleepers=1, idle_timeout_s=settings.idle_timeout_s
        )
    assert outcome.faults == []
    assert outcome.episodes
    assert outcome.acts_of_vandals
    assert outcome.sleepers_closed
    assert outcome.health_s
