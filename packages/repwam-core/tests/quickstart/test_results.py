"""What the report says of a run follows from the run's numbers."""

from __future__ import annotations

import argparse

import pytest
from repvitok import RepViTok, RepViTokConfig
from repvitok.model import load_tokenizer
from repwam_core.cli import main
from repwam_core.quickstart.config import add_quickstart_arguments, load_config
from repwam_core.quickstart.results import NOT_SHOWN, TEACHER, _curves, closing, findings
from repwam_core.quickstart.runner import StageRunner
from repwam_core.quickstart.stages import CONTROLS, DataSet, Prepared, Run, Trained, given_tokenizer
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


def test_the_terminal_ends_with_a_table_and_two_findings_in_eighty_columns():
    rows = [
        SuccessRow("policy", {"reach": Count(9, 10), "button-press-topdown-wall": Count(3, 10)}),
        SuccessRow("replay", {"reach": Count(2, 10)}),
        SuccessRow(next(iter(CONTROLS)), {"reach": Count(1, 10)}),
    ]
    told = closing(ReportData(run=RUN, success=rows, findings=["It works " * 20, "second", "third"]))
    lines = told.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["episodes", "solved", "policy", "replay"]
    assert lines[1].split() == ["reach", "9/10", "2/10"]
    assert lines[2].split() == ["button-press-topdown-wall", "3/10"]
    assert lines[3].split() == ["all", "tasks", "12/20", "2/10"]
    assert "second" in told
    assert "third" not in told


def test_a_given_tokenizer_takes_the_place_of_the_trained_one(tmp_path):
    source = RepViTok(RepViTokConfig(width=32, depth=1, heads=2)).save_pretrained(tmp_path / "given")
    runner = StageRunner(tmp_path / "run", stages=6)
    parser = argparse.ArgumentParser()
    add_quickstart_arguments(parser)
    arguments = parser.parse_args(["--tokenizer", str(source)])
    config = load_config(arguments)
    this = Run(config, 0, None, runner, "repwam quickstart", 0.0, main, "code", arguments.tokenizer)
    for again in (False, True):
        stage = given_tokenizer(this, arguments.tokenizer)
        assert (stage.cached, stage.summary["given"]) == (again, str(source))
        assert load_tokenizer(stage.folder / "tokenizer").digest() == load_tokenizer(source).digest()
    prepared = Prepared(DataSet(tmp_path, "digest"), stage, stage, stage, stage)
    assert _curves(Trained(prepared, stage, stage)) == {}
    assert TEACHER not in findings(ReportData(run=RUN, curves={"adaptation": {}}))
    assert TEACHER in findings(ReportData(run=RUN, curves={"visual tokenizer": {}}))
