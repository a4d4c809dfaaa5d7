"""What the report says of a run follows from the run's numbers."""

from __future__ import annotations

import pytest
from repwam_core.quickstart.results import NOT_SHOWN, findings
from repwam_core.quickstart.stages import CONTROLS
from repwam_core.report import Count, LanguageRow, ReportData, RunInfo, SuccessRow

RUN = RunInfo(title="run", command="repwam quickstart", stages=[])


def _data(policy: int, *others: tuple[str, int], language: tuple[LanguageRow, ...] = ()) -> ReportData:
    rows = [SuccessRow(name, {"reach": Count(n, 60)}) for name, n in (("policy", policy), ("replay", 10), *others)]
    return ReportData(run=RUN, success=rows, language=language)


def test_without_controls_it_says_that_nothing_is_shown():
    assert NOT_SHOWN in findings(_data(54))


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(
    ("successes", "said"),
    [(20, "the whole pipeline is better"), (52, "no measurable difference"), (60, "the whole pipeline is worse")],
)
def test_a_control_is_compared_by_the_interval_of_the_difference(name, successes, said):
    told = findings(_data(50, (name, successes)))
    (sentence,) = [sentence for sentence in told if "one training seed each" in sentence]
    assert said in sentence
    assert f"({successes}/60)" in sentence
    assert "(50/60)" in sentence
    assert NOT_SHOWN not in told


@pytest.mark.parametrize(("other", "follows"), [(1, True), (14, False)])
def test_following_the_instruction_is_claimed_only_where_it_shows(other, follows):
    row = LanguageRow("faucet-open", Count(17, 20), Count(other, 20), Count(8, 20))
    told = " ".join(findings(_data(54, language=(row,))))
    assert ("so it follows the instruction" in told) == follows
