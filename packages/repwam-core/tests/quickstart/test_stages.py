"""Stages run once and are found again, run on any suite, and what the report says of a run follows from its numbers."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import textwrap
import time
from contextvars import Context
from dataclasses import replace
from pathlib import Path

import pytest
from repvitok import RepViTok, RepViTokConfig
from repvitok.baselines.wan import WanVae
from repvitok.model import load_tokenizer
from repvitok.runtime.documents import load_yaml, parse
from repvitok.runtime.errors import UserError
from repwam_core.cli import main
from repwam_core.quickstart import runner as stages
from repwam_core.quickstart import work
from repwam_core.quickstart.config import RECIPES, QuickstartConfig, add_quickstart_arguments, load_config
from repwam_core.quickstart.results import NOT_SHOWN, TEACHER, _curves, closing, findings
from repwam_core.quickstart.runner import StageRunner, code_commit, code_digest, folder_digest, stage_digest
from repwam_core.quickstart.stages import CONTROLS, DataSet, Prepared, Run, Trained, given_tokenizer
from repwam_core.report import Count, LanguageRow, ReportData, RunInfo, SuccessRow


def _count(folder, calls):
    calls.append(folder)
    (folder / "out.txt").write_text("x")
    return {"calls": len(calls)}


def test_a_finished_stage_is_not_run_again(tmp_path):
    calls = []
    for _ in range(2):
        runner = StageRunner(tmp_path / "run")
        result = runner.run("a", lambda f: _count(f, calls), settings={"x": 1}, inputs={})
    assert len(calls) == 1
    assert result.cached
    assert result.summary == {"calls": 1}


@pytest.mark.parametrize(("settings", "inputs"), [({"x": 2}, {"d": "1"}), ({"x": 1}, {"d": "2"})])
def test_settings_and_inputs_decide_the_folder(tmp_path, settings, inputs):
    calls = []
    runner = StageRunner(tmp_path / "run")
    first = runner.run("a", lambda f: _count(f, calls), settings={"x": 1}, inputs={"d": "1"})
    second = runner.run("a", lambda f: _count(f, calls), settings=settings, inputs=inputs)
    assert len(calls) == 2
    assert first.folder != second.folder


def test_an_interrupted_stage_finds_its_partial_work(tmp_path):
    seen = []

    def work(folder):
        part = folder / "part.txt"
        seen.append(part.exists())
        part.write_text("half")
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    runner = StageRunner(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        runner.run("a", work, settings={}, inputs={})
    result = StageRunner(tmp_path / "run").run("a", work, settings={}, inputs={})
    assert seen == [False, True]
    assert not result.cached


def test_fresh_removes_stages_and_nothing_else(tmp_path):
    root = tmp_path / "run"
    StageRunner(root).run("a", lambda f: {}, settings={}, inputs={})
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("keep")
    StageRunner(root, fresh=True)
    assert (root / "notes" / "mine.txt").exists()
    assert not list(root.glob("a-*"))


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no run of repwam quickstart but thesis\.tex; name another folder"):
        StageRunner(tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_no_disk_space_is_one_clear_error_and_loses_nothing(tmp_path):
    runner = StageRunner(tmp_path / "run")
    runner.run("a", lambda f: {}, settings={}, inputs={})
    with pytest.raises(UserError, match="stage b"):
        runner.run("b", lambda f: {}, settings={}, inputs={}, needs_bytes=10**18)
    assert runner.run("a", lambda f: {}, settings={}, inputs={}).cached


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    runner = StageRunner(tmp_path / "run")
    with runner.lock(), pytest.raises(UserError, match="another quickstart is running"):
        Context().run(StageRunner, tmp_path / "run")  # as another process would


def test_kill_in_the_middle_leaves_the_stage_undone_and_resumable(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time, pathlib
        from repwam_core.quickstart.runner import StageRunner
        def work(folder):
            (folder / "part.txt").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
            return {}
        StageRunner(pathlib.Path(sys.argv[1])).run("a", work, settings={}, inputs={})
        """
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == b"ready"
    child.kill()
    child.wait()
    found = []

    def work(folder):
        found.append((folder / "part.txt").read_text())
        return {"ok": 1}

    result = StageRunner(tmp_path / "run").run("a", work, settings={}, inputs={})
    assert found == ["half"]
    assert json.loads((result.folder / "stage.json").read_text())["summary"] == {"ok": 1}


def test_time_adds_up_over_interrupted_runs(tmp_path):
    def slow(folder):
        time.sleep(0.2)
        if not (folder / "once").exists():
            (folder / "once").touch()
            raise RuntimeError("first try fails")
        return {}

    with pytest.raises(RuntimeError):
        StageRunner(tmp_path / "run").run("a", slow, settings={}, inputs={})
    result = StageRunner(tmp_path / "run").run("a", slow, settings={}, inputs={})
    assert result.seconds >= 0.4


@pytest.mark.parametrize("content", ["", "1.", "nan?", "\0\0\0"])
@pytest.mark.parametrize("name", [".seconds", "stage.json"])
def test_a_small_file_that_a_full_disk_cut_does_not_end_the_run(tmp_path, name, content):
    calls = []
    first = StageRunner(tmp_path / "run").run("a", lambda f: _count(f, calls), settings={}, inputs={})
    (first.folder / "stage.json").unlink()
    (first.folder / name).write_text(content)
    again = StageRunner(tmp_path / "run").run("a", lambda f: _count(f, calls), settings={}, inputs={})
    assert len(calls) == 2
    assert again.summary == {"calls": 2}
    assert StageRunner(tmp_path / "run").run("a", lambda f: _count(f, calls), settings={}, inputs={}).cached


def test_digests(tmp_path):
    assert stage_digest("a", {"x": 1, "y": 2}, {}) == stage_digest("a", {"y": 2, "x": 1}, {})
    assert stage_digest("a", {}, {}) != stage_digest("b", {}, {})
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "meta" / "info.json").write_text("[]")
    assert folder_digest(tmp_path) != before


def test_the_code_is_known_by_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "files", lambda name: tmp_path / name)
    source = tmp_path / "repwam_core/model.py"
    source.parent.mkdir()
    source.write_text("width = 1")
    first = code_digest()
    assert code_digest() == first
    (tmp_path / "repwam_core/notes.txt").write_text("not code")
    assert code_digest() == first
    source.write_text("width = 2")
    assert code_digest() != first


def test_a_finished_stage_names_the_commit_that_made_it(tmp_path, monkeypatch):
    made = StageRunner(tmp_path / "run").run("a", lambda f: {}, settings={}, inputs={})
    assert made.commit == code_commit()
    monkeypatch.setattr(stages, "code_commit", lambda: "another")
    assert StageRunner(tmp_path / "run").run("a", lambda f: {}, settings={}, inputs={}).commit == made.commit


TASKS = ("go-left", "go-right")


def test_demonstrations_and_baselines_of_another_suite(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "sim")
    importlib.import_module("toy_simulator")  # its suite is there once it is imported
    chosen = {"suite": "toy", "tasks": TASKS, "same_scene": (), "episodes": 2, "eval_episodes": 2, "size": (32, 32)}
    config = replace(parse(load_yaml(RECIPES / "sim.yaml"), QuickstartConfig, "plan"), **chosen)
    work.collect_demonstrations(tmp_path, config=config, seed=0, workers=1)
    told = work.run_baselines(tmp_path, config=config, dataset=tmp_path / "dataset", workers=1)
    assert told["expert"] == "go-left 2/2, go-right 2/2"
    assert len(work.read_results(tmp_path, "replay")) == 4
    filmed = {who: sorted(work.read_films(tmp_path, who)) for who in ("random", "replay", "expert")}
    assert filmed["random"] == []
    for who in ("expert", "replay"):
        assert [key.split("/")[0] for key in filmed[who]] == list(TASKS)


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


@pytest.mark.parametrize("kind", ["repvitok", "wan"])
def test_a_given_tokenizer_takes_the_place_of_the_trained_one(tmp_path, kind):
    source = tmp_path / "given"
    source.mkdir()
    if kind == "wan":
        pytest.importorskip("diffusers", reason="the baselines need repvitok[baselines]")
        sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
        WanVae.from_config(sizes | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}).write_into(source)
    else:
        RepViTok(RepViTokConfig(width=32, depth=1, heads=2)).write_into(source)
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
