"""Plain sentences of what a run shows at this size, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping

from repwam_core.quickstart.controls import CONTROLS
from repwam_core.report import Count, LanguageRow, ReportData
from repwam_core.sim.intervals import difference_interval


def findings(data: ReportData) -> list[str]:
    """One sentence per claim that the run's own numbers support or refute."""
    told = [_closed_loop(data), *_controls(data), *_language(data)]
    told += [MEASURED_IN_TRAINING if data.measured == "training" else "", _open_loop(data), _tokenizer(data)]
    told += [*_latent_actions(data), _imagination(data), TEACHER]
    return [sentence for sentence in told if sentence]


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


def _closed_loop(data: ReportData) -> str:
    if not data.success:
        return ""
    rows = {row.method: row for row in data.success}
    policy = rows["policy"].total
    others = ", ".join(
        f"{name} {_percent(rows[name].total)}" for name in ("replay", "random", "expert") if name in rows
    )
    verdict = "above" if policy.interval[0] > rows["replay"].total.interval[1] else "not clearly above"
    return (
        f"In closed loop on unseen layouts the policy solves {_percent(policy)} of its episodes (95 % interval "
        f"{_interval(policy)}), against {others}: {verdict} a replayed demonstration."
    )


def _controls(data: ReportData) -> list[str]:
    """One sentence per control: what it reached, and whether that differs measurably from the policy."""
    rows = {row.method: row.total for row in data.success}
    told = [_compared(name, rows["policy"], rows[name]) for name in CONTROLS if name in rows]
    return told or [NOT_SHOWN]


def _compared(name: str, policy: Count, control: Count) -> str:
    low, high = difference_interval((policy.successes, policy.episodes), (control.successes, control.episodes))
    verdict = "better" if low > 0 else "worse" if high < 0 else "no measurable difference"
    if verdict != "no measurable difference":
        verdict = f"the whole pipeline is {verdict}"
    return (
        f"Trained {_PHRASES[name]}, the policy solves {_percent(control)}, against {_percent(policy)}: {verdict} (95 % "
        f"interval of the difference {100 * low:+.0f} to {100 * high:+.0f} points, one training seed each)."
    )


_PHRASES = {
    "without latent actions": "without latent actions",
    "without the video objective": "without the video objective",
    "untrained visual tokenizer": "on the latents of an untrained visual tokenizer",
}


def _language(data: ReportData) -> list[str]:
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
        ours, theirs = _mean(found.probe_r2), _mean(untrained)
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
    return (
        f"Imagined video has {found.psnr_db:.1f} dB PSNR against what really followed, {verdict} repeating the last "
        f"observed frame ({found.copy_psnr_db:.1f} dB)."
    )


def _total(rows: list[LanguageRow], told: str) -> Count:
    counts: list[Count] = [getattr(row, told) for row in rows]
    return Count(sum(count.successes for count in counts), sum(count.episodes for count in counts))


def _percent(count: Count) -> str:
    return f"{100 * count.rate:.0f} % ({count.successes}/{count.episodes})"


def _interval(count: Count) -> str:
    low, high = count.interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
