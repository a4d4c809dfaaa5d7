"""A finished run's folders as the report shows them: pictures, curves, counts, and plain sentences on them."""

from __future__ import annotations

import json
import platform
import resource
import sys
import textwrap
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from repvitok.runtime.documents import read_json
from repvitok.runtime.progress import read_curves

from repwam_core.quickstart import figures, work
from repwam_core.quickstart.stages import CONTROLS
from repwam_core.quickstart.work import FIT
from repwam_core.report import Curve, LanguageRow, ReportData, Rollout, RunInfo, Stage, SuccessRow
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL, evaluation_seeds
from repwam_core.sim.evaluate import demonstrated
from repwam_core.sim.results import (
    ENDINGS,
    EpisodeResult,
    SuccessRate,
    difference_interval,
    ending,
    film_key,
    likeness,
    success_rates,
)
from repwam_core.sim.workers import default_workers

if TYPE_CHECKING:
    from repwam_core.quickstart.runner import StageResult
    from repwam_core.quickstart.stages import Run, Trained

TEACHER = (
    "The alignment teacher here is a stand-in (histograms of oriented gradients), so nothing here tests the paper's "
    "claims about semantic latents."
)
MEASURED_IN_TRAINING = (
    "No whole episode could be held out: reconstructions, planned actions and imagined video are of episodes that were "
    "trained on, and show what was remembered, not what carries over to new ones."
)
NOT_SHOWN = (
    "Not shown by this run: whether latent actions, the video objective or a trained tokenizer help the policy; that "
    "needs runs without them (--controls makes them, in the simulator). Where this project made them is told in "
    "recipes/RESULTS.md."
)
_PHRASES = {
    "without latent actions": "without latent actions",
    "without the video objective": "without the video objective",
    "untrained visual tokenizer": "on the latents of an untrained visual tokenizer",
}
PACKAGES = ("repvitok", "latent-action", "repwam-core", "torch", "lightning", "numpy")


def findings(data: ReportData) -> list[str]:
    """One sentence per claim that the run's own numbers support or refute."""
    rows = {row.method: row.total for row in data.success}
    controls = [_compared(name, rows["policy"], rows[name]) for name in CONTROLS if name in rows]
    told = [_closed_loop(data), *(controls or [NOT_SHOWN]), *_language_findings(data)]
    told += [MEASURED_IN_TRAINING if data.measured == "training" else "", _open_loop(data), _tokenizer(data)]
    told += [*_latent_actions(data), _imagination(data)]
    told += [TEACHER] if "visual tokenizer" in data.curves or not data.curves else []
    return [sentence for sentence in told if sentence]


def closing(data: ReportData, width: int = 80) -> str:
    """What the terminal says at the end of a run: successes by task, and the first two findings."""
    shown = [row for row in data.success if row.method not in CONTROLS]
    lines = []
    if shown:
        tasks = list(shown[0].counts)
        table = [("episodes solved", [row.method for row in shown])]
        for task in tasks if len(tasks) <= 20 else []:
            table.append((task, [_share(row.counts.get(task)) for row in shown]))
        table.append(("all tasks", [_share(row.total) for row in shown]))
        left = min(max(len(name) for name, _ in table), width - 10 * len(shown))
        lines = [f"{name[:left]:<{left}}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in table]
    for sentence in data.findings[:2]:
        lines += ["", *textwrap.wrap(sentence, width)]
    return "\n".join(lines)


def _share(count: SuccessRate | None) -> str:
    return "" if count is None else f"{count.successes}/{count.episodes}"


def _closed_loop(data: ReportData) -> str:
    if not data.success:
        return ""
    rows = {row.method: row for row in data.success}
    policy = rows["policy"].total
    others = ", ".join(
        f"{name} {_percent(rows[name].total)}" for name in ("replay", "random", "expert") if name in rows
    )
    low, high = policy.interval
    verdict = "above" if low > rows["replay"].total.interval[1] else "not clearly above"
    return (
        f"In closed loop on unseen layouts the policy solves {_percent(policy)} of its episodes (95 % interval "
        f"{100 * low:.0f} to {100 * high:.0f} %), against {others}: {verdict} a replayed demonstration."
    )


def _compared(name: str, policy: SuccessRate, control: SuccessRate) -> str:
    """What a control reached, and whether that differs measurably from the policy."""
    low, high = difference_interval((policy.successes, policy.episodes), (control.successes, control.episodes))
    verdict = "better" if low > 0 else "worse" if high < 0 else "no measurable difference"
    if verdict != "no measurable difference":
        verdict = f"the whole pipeline is {verdict}"
    return (
        f"Trained {_PHRASES[name]}, the policy solves {_percent(control)}, against {_percent(policy)}: {verdict} (95 % "
        f"interval of the difference {100 * low:+.0f} to {100 * high:+.0f} points, one training seed each)."
    )


def _language_findings(data: ReportData) -> list[str]:
    rows = [row for row in data.language if row.right and row.other]
    if not rows:
        return []
    right, other = _total(rows, "right"), _total(rows, "other")
    follows = (
        "so it follows the instruction"
        if right.interval[0] > other.interval[1]
        else ("so this run does not show that it follows the instruction")
    )
    none = _total([row for row in rows if row.none], "none") if any(row.none for row in rows) else None
    untold = f" and {_percent(none)} with none" if none else ""
    return [
        f"On the pair of tasks that share a scene it solves {_percent(right)} with the right instruction, "
        f"{_percent(other)} with the other task's{untold}, {follows}."
    ]


def _open_loop(data: ReportData) -> str:
    if data.open_loop is None:
        return ""
    channels = [c for c in data.open_loop.channels if c.baselines]
    if not channels:
        return ""
    won = sum(c.error < min(c.baselines.values()) for c in channels)
    return (
        f"In open loop on {data.measured} episodes its action error is below both baselines (the mean action, the last "
        f"action repeated) on {won} of {len(channels)} channels."
    )


def _tokenizer(data: ReportData) -> str:
    if data.reconstruction is None:
        return ""
    best = max((values[0], name) for name, values in data.reconstruction.baselines.items())
    return (
        f"The tokenizer reconstructs {data.measured} episodes at {data.reconstruction.psnr_db:.1f} dB PSNR; the best "
        f"trivial baseline ({best[1]}) has {best[0]:.1f} dB."
    )


def _latent_actions(data: ReportData) -> list[str]:
    found = data.latent_actions
    if found is None or found.forward_loss is None or found.copy_loss is None or found.zero_action_loss is None:
        return []
    gain = 1 - found.forward_loss / found.zero_action_loss
    sentences = [
        f"Latent actions lower the error of the next latents to {found.forward_loss:.3f}, from {found.copy_loss:.3f} "
        f"for copying the current ones and {found.zero_action_loss:.3f} for the same forward model without an action: "
        f"{100 * gain:.0f} % of the latter is the action's doing."
    ]
    untrained = found.probe_controls.get("untrained latent action")
    if found.probe_r2 and untrained:
        ours, theirs = fmean(found.probe_r2.values()), fmean(untrained.values())
        verdict = "carry" if ours > max(theirs, 0) + 0.05 else "carry not measurably"
        sentences.append(
            f"A small head reads robot actions from latent actions with R^2 {ours:.2f} on what was held out, "
            f"{theirs:.2f} from those of an untrained model: training makes them {verdict} more of its motion."
        )
    return sentences


def _imagination(data: ReportData) -> str:
    found = data.imagination
    if found is None or found.copy_psnr_db is None:
        return ""
    difference = found.psnr_db - found.copy_psnr_db
    verdict = "better than" if difference > 0.2 else "no better than" if difference > -0.2 else "worse than"
    ceiling = found.reconstructed_psnr_db
    most = "" if ceiling is None else f" The same frames through the tokenizer alone, the ceiling: {ceiling:.1f} dB."
    return (
        f"Imagined video has {found.psnr_db:.1f} dB PSNR against what really followed, {verdict} repeating the last "
        f"observed frame ({found.copy_psnr_db:.1f} dB).{most}"
    )


def _total(rows: list[LanguageRow], told: str) -> SuccessRate:
    counts: list[SuccessRate] = [getattr(row, told) for row in rows]
    return sum(counts[1:], start=counts[0])


def _percent(count: SuccessRate) -> str:
    return f"{100 * count.rate:.0f} % ({count.successes}/{count.episodes})"


def report_data(this: Run, trained: Trained, outcome: dict[str, StageResult]) -> ReportData:
    """Everything the run has to say.

    Args:
        this: the invocation.
        trained: the training stages.
        outcome: the closed-loop stages by name; empty for a data set run, which gets an open-loop evaluation.
    """
    episodes, held_out = figures.measured_episodes(this, trained)
    measured = "held-out" if held_out else "training"
    open_loop = figures.open_loop(this, trained, episodes, measured)
    data = ReportData(
        run=_run_info(this, trained),
        success=_success(this, outcome) if outcome else (),
        **(_failures(this, trained, outcome) if outcome else {}),
        language=_language(outcome) if "language" in outcome else (),
        rollouts=_rollouts(this, outcome) if outcome else (),
        open_loop=open_loop.actions,
        reconstruction=figures.reconstruction(this, trained, episodes),
        latent_actions=figures.latent_actions(this, trained, episodes),
        imagination=open_loop.imagination,
        curves=_curves(trained),
        protocol=_protocol(this) if outcome else {},
        measured=measured,
    )
    return ReportData(**{**vars(data), "findings": findings(data)})


def _run_info(this: Run, trained: Trained) -> RunInfo:
    stages = [Stage(r.name, r.seconds, r.cached, r.digest[:10], _key_result(r.summary)) for r in this.runner.results]
    suite = work.settings_of(this.config) if this.config.all_tasks else None
    what = trained.prepared.data.folder.name if suite is None else suite.title or suite.suite
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *(suite.packages if suite else ())):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return RunInfo(
        title=f"RepWAM quickstart on {what}",
        command=this.command,
        stages=stages,
        summary=(
            "Video to semantic latents, latent actions between them, a causal world action model over both, adapted "
            "to robot actions and run as a policy."
        ),
        # one, whose code made every stage, or all of them where stages of earlier runs were reused
        commit=", ".join(dict.fromkeys(result.commit for result in this.runner.results if result.commit)),
        versions=versions,
        hardware=f"{_processor()}, {default_workers()} cores, {platform.system()} {platform.machine()}",
        seeds=(this.seed,),
        config_yaml=_configuration(this, trained),
        peak_memory_bytes=_peak_memory_bytes(),
        wall_seconds=time.monotonic() - this.started_s,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _key_result(summary: dict[str, Any]) -> str:
    numbers = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in summary.items()}
    return "; ".join(f"{key} {value}" for key, value in numbers.items())


def _configuration(this: Run, trained: Trained) -> str:
    """The config and its data, then the resolved configuration of every training stage."""
    config = json.loads(json.dumps({**this.config.to_dict(), "data": trained.prepared.data.read()}, default=str))
    parts = [f"# config\n{yaml.safe_dump(config, sort_keys=False)}"]
    for stage in (trained.prepared.tokenizer, trained.prepared.lat, trained.pretrained, trained.adapted):
        if (stage.folder / FIT).exists():  # a tokenizer may be given
            parts.append(f"# {stage.name}\n{(stage.folder / FIT / 'config.yaml').read_text()}")
    return "\n".join(parts)


def _curves(trained: Trained) -> dict[str, dict[str, Curve]]:
    stages = {
        "visual tokenizer": trained.prepared.tokenizer,
        "latent actions": trained.prepared.lat,
        "pretraining": trained.pretrained,
        "adaptation": trained.adapted,
    }
    shown = {}
    for name, stage in stages.items():
        if not (stage.folder / FIT).exists():  # a tokenizer may be given
            continue
        curves = read_curves(stage.folder / FIT)
        beside = {f"val/{key.removeprefix('train/')}" for key in curves if key.startswith("train/")}
        beside |= {"val/psnr", "val/ssim"}
        kept = {key: rows for key, rows in curves.items() if key.startswith("train/") and len(rows) > 1}
        kept |= {key: rows for key, rows in curves.items() if key in beside}
        kept = {key: rows for key, rows in kept.items() if not key.endswith(("/lr", "/gradient_norm"))}
        shown[name] = {key: Curve(rows[:, 0], rows[:, 1]) for key, rows in kept.items()}
    return shown


def _success(this: Run, outcome: dict[str, StageResult]) -> list[SuccessRow]:
    """The tasks that the success rate is about; the pair that shares a scene has a table of its own."""
    suite = work.settings_of(this.config)
    tasks = {suite.task_name(task) for task in this.config.tasks}

    def rates(stage: str, name: str) -> dict[str, SuccessRate]:
        counted = success_rates(work.read_results(outcome[stage].folder, name))
        return {task: rate for task, rate in counted.items() if task in tasks}

    rows = [SuccessRow("policy", rates("rollouts", "policy"))]
    notes = {
        "random": "uniform actions",
        "replay": "a demonstration of the task, carried out blindly",
        "expert": f"{suite.title or suite.suite}'s scripted policy",
    }
    rows += [SuccessRow(baseline, rates("baselines", baseline), notes[baseline]) for baseline in work.BASELINES]
    controls = ((control, note) for control, note in CONTROLS.items() if control in outcome)
    return rows + [SuccessRow(control, rates(control, "policy"), note) for control, note in controls]


def _failures(this: Run, trained: Trained, outcome: dict[str, StageResult]) -> dict[str, Any]:
    """The groups of the tasks, where failed episodes ended, and which other tasks they move like."""
    settings = work.settings_of(this.config)
    results = work.read_results(outcome["rollouts"].folder, "policy")
    ran = {result.task for result in results}
    groups = {name: [task for task in tasks if task in ran] for name, tasks in settings.groups.items()}
    ended = {task: Counter(ending(r) for r in results if r.task == task and not r.success) for task in sorted(ran)}
    channels = settings.embodiment.state_channels
    demonstrations = demonstrated(trained.prepared.data.folder, sorted(ran), "observation.state") if channels else {}
    return {
        "groups": {name: tasks for name, tasks in groups.items() if tasks},
        "endings": {task: {name: counts[name] for name in ENDINGS if counts[name]} for task, counts in ended.items()},
        "likeness": likeness(results, demonstrations, channels) if channels else None,
    }


def _protocol(this: Run) -> dict[str, Any]:
    """Under which success was counted."""
    settings = work.settings_of(this.config)
    return {
        "suite": settings.suite,
        "settings": settings.to_dict(),
        "seeds": evaluation_seeds(this.config.eval_episodes),
        "execute": this.config.execute,
        "success": "at any step of an episode",
        "pretrained": "the text encoder alone (model.text_encoder in the policy)",
    }


def _language(outcome: dict[str, StageResult]) -> list[LanguageRow]:
    folder = outcome["language"].folder
    kept = {"right": (outcome["rollouts"].folder, "policy"), "other": (folder, "other"), "none": (folder, "none")}
    told = {name: success_rates(work.read_results(*place)) for name, place in kept.items()}
    pair = read_json(folder / "pair.json", list[str])
    return [LanguageRow(task, *(told[name].get(task) for name in work.LANGUAGE)) for task in pair]


def _rollouts(this: Run, outcome: dict[str, StageResult]) -> list[Rollout]:
    """What was filmed of each task: the expert, the policy's first success and first failure, and a replay."""
    places = {name: (outcome["baselines"].folder, name) for name in ("expert", "replay")}
    places["policy"] = (outcome["rollouts"].folder, "policy")
    results = {method: work.read_results(*place) for method, place in places.items()}
    films = {method: work.read_films(*place) for method, place in places.items()}
    rate_hz = work.settings_of(this.config).embodiment.rate_hz
    shown: list[Rollout] = []
    for task in dict.fromkeys(result.task for result in results["policy"]):
        for method, succeeded in (("expert", None), ("policy", True), ("policy", False), ("replay", None)):
            filmed = (r for r in results[method] if r.task == task and film_key(r) in films[method])
            r = next((r for r in filmed if succeeded in (None, r.success)), None)
            if r is not None:
                frames = films[method][film_key(r)][::2]
                distances = {} if r.success else _distances(r, rate_hz)
                told = r.instruction or ""
                shown.append(Rollout(task, r.seed, r.success, frames, told, rate_hz / 2, method, distances))
    return shown


def _distances(result: EpisodeResult, rate_hz: float) -> dict[str, Curve]:
    """How far hand, object and goal were apart."""
    trace = result.trace or {}
    names = [name for name in (HAND_TO_OBJECT, OBJECT_TO_GOAL) if name in trace]
    return {name: Curve(np.arange(len(trace[name])) / rate_hz, 100 * np.array(trace[name]), "cm") for name in names}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def _peak_memory_bytes() -> int:
    """Peak resident memory of this process plus that of its largest child; an upper bound is not measured."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + children) * unit
