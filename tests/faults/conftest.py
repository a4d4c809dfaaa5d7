"""How many faults of each kind were tried, and how many held."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table by kind and verb: tried, held."""
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, kind_and_verb in report.user_properties:
                if name == "fault" and report.when == "call":
                    kind, _, verb = kind_and_verb.partition("\t")
                    for key in (f"{kind}, {verb}", f"{kind}, all"):
                        tried[key] += 1
                        held[key] += outcome == "passed"
    if tried:
        terminalreporter.section("faults tried and held")
        for key in sorted(tried, key=lambda key: (key.endswith(", all"), key)):
            terminalreporter.write_line(f"{key:<40}{held[key]:>5} of {tried[key]}")
