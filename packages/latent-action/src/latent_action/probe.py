"""How much of the robot's actions a small head can read from frozen latent actions (RepWAM Fig. 4, right)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from repvitok.data.contents import without_actions
from repvitok.data.shards import LatentShards
from repvitok.data.split import HeldOut, split_latents
from repvitok.runtime.errors import UserError
from repvitok.runtime.training import warmup_cosine_schedule
from torch import Tensor, nn

from latent_action.config import LatentActionConfig
from latent_action.dynamics import MLP, Grid, InverseDynamics
from latent_action.labelling import require_same_tokenizer
from latent_action.model import LatentActionTokenizer
from latent_action.transfer import TransferLosses, latent_actions, transfer_losses
from latent_action.transitions import TransitionTable, lie_within, load_transitions

Target = Literal["actions", "motion"]
Predict = Callable[[Int[Tensor, " b"]], Float[Tensor, "b c"]]


@dataclass(frozen=True)
class ProbeScore:
    """Held-out error of one way to predict robot actions.

    Attributes:
        loss: mean squared error over channels, in units of each channel's training variance.
        r2: 1 - squared error / squared error of the training mean, per channel: 0 is no better than always predicting
            that mean, 1 is perfect. None where a held-out channel never leaves the training mean.
        mean_r2: mean over the channels that have one. A channel that hardly moves in the held-out episodes can make
            it very negative; then read pooled_r2.
        pooled_r2: the same with both errors summed over the channels, each in its training standard deviation:
            1 - loss / loss of the training mean.
    """

    loss: float
    r2: tuple[float | None, ...]
    mean_r2: float
    pooled_r2: float


@dataclass(frozen=True)
class ProbeReport:
    """Scores on the same held-out episodes.

    Attributes:
        target: what is predicted: "actions" or "motion", see `probe_shards`.
        channels: names of the target's channels.
        train_transitions, held_out_transitions: how many transitions each side has.
        latent_action: head on the frozen latent action l_t.
        untrained: the same head on the latent action of a LAT with random weights.
        mean_action: always predicts the training mean; R^2 0 by definition.
        frames: an IDM trained end to end on (z_t, z_{t+1}); what the latents themselves allow at this budget.
        baselines: the same head on other latent actions of the same transitions.
        transfer: errors of the next latents with the latent actions of other held-out episodes; None where the
            latents hold no robot state or one held-out episode only.
    """

    target: str
    channels: tuple[str, ...]
    train_transitions: int
    held_out_transitions: int
    latent_action: ProbeScore
    untrained: ProbeScore
    mean_action: ProbeScore
    frames: ProbeScore
    baselines: dict[str, ProbeScore]
    transfer: TransferLosses | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ProbeTask:
    """A regression on transitions: standardised targets and who is held out."""

    table: TransitionTable
    targets: Float[Tensor, "transitions c"]
    train: Int[Tensor, " n"]
    held_out: Int[Tensor, " m"]
    grid: Grid
    seed: int


def probe_shards(
    lat: LatentActionTokenizer,
    latents: str | Path,
    *,
    target: Target = "actions",
    held_out: HeldOut = 0.25,
    head_steps: int = 600,
    frames_steps: int = 300,
    seed: int = 0,
    baselines: Mapping[str, Float[Tensor, "transitions _"]] | None = None,
) -> ProbeReport:
    """Train the probe's heads on some episodes and score them on the others.

    The target is standardised per channel on the training episodes. Transitions that start at the latent of a single
    image (the first of each clip) are left out: see docs/decisions/020.

    Args:
        lat: the latent action tokenizer, used as it is.
        latents: folder of latent shards with actions, of the tokenizer the LAT was trained on.
        target: "actions", the mean robot action of a transition, or "motion", the change of the robot's state over it;
            the one to take where actions are absolute positions, which no transition shows.
        held_out: share of the episodes that are scored, or their numbers; of an only one, the last transitions. See
            `repvitok.data.split`.
        head_steps: training steps of the heads on latent actions.
        frames_steps: training steps of the head on latent frames.
        seed: of the untrained LAT and of the heads.
        baselines: other latent actions by name, for every transition of the shards in `load_transitions`' order.
    """
    shards = LatentShards(latents)
    require_same_tokenizer(lat, shards)
    if target == "actions" and "actions" not in shards.mapped(0):
        raise UserError(f"{shards.root}: there are no robot actions to probe for. {without_actions(shards)}")
    step = lat.config.transition_frames
    whole = load_transitions(shards, lat.standardise, step)
    later = whole.place > 0
    for name, values in (baselines or {}).items():
        if len(values) != len(whole):
            raise UserError(
                f"{name}: expected features of all {len(whole)} transitions of the shards, got {len(values)}: make "
                "them from the same shards."
            )
    features = {name: values.float()[later] for name, values in (baselines or {}).items()}
    table = whole.where(later)
    spans = split_latents(shards, held_out, step + 2)
    train, scored = (lie_within(side, shards.infos, table.first, step) for side in spans)
    task = make_task(table, target, train, scored, shards.meta.grid, seed)
    names = shards.meta.action_names if target == "actions" else shards.meta.state_names
    chosen = torch.zeros(len(table), dtype=torch.bool)
    chosen[task.held_out] = True
    held = table.where(chosen)
    carried = held.motion is not None and len(held.episode.unique()) > 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = {
            "latent_action": latent_actions(lat, task.table, task.grid),
            "untrained": latent_actions(LatentActionTokenizer(lat.config), task.table, task.grid),
            **features,
        }
        scores = {name: score_features(task, values, head_steps) for name, values in features.items()}
        return ProbeReport(
            target=target,
            channels=names or tuple(str(i) for i in range(task.targets.shape[1])),
            train_transitions=len(task.train),
            held_out_transitions=len(task.held_out),
            latent_action=scores.pop("latent_action"),
            untrained=scores.pop("untrained"),
            mean_action=_score(task, lambda index: torch.zeros(len(index), task.targets.shape[1])),
            frames=score_frames(task, lat.config, frames_steps),
            baselines=scores,
            transfer=transfer_losses(lat, held, grid=task.grid, seed=task.seed) if carried else None,
        )


def make_task(
    table: TransitionTable,
    target: Target,
    train: Bool[Tensor, " transitions"],
    scored: Bool[Tensor, " transitions"],
    grid: Grid,
    seed: int = 0,
) -> ProbeTask:
    """The regression that every row of a probe is a solution of.

    Args:
        table: transitions.
        target: "actions" or "motion", see `probe_shards`.
        train, scored: which transitions heads train on, and which they are scored on.
        grid: (views, rows, columns) of a latent frame.
        seed: of the batches.
    """
    values = {"actions": table.actions, "motion": table.motion}[target]
    if values is None:
        what = "robot actions" if target == "actions" else "robot state"
        raise UserError(f"Some episodes of these latents have no {what}, so there is nothing to probe for.")
    fitted, held_out = train.nonzero()[:, 0], scored.nonzero()[:, 0]
    if not len(fitted) or not len(held_out):
        raise UserError(
            f"The probe trains on {len(fitted)} transitions and scores {len(held_out)} that its heads have not seen: "
            "it takes two episodes of three latent frames, or one of five, and a share of them held out."
        )
    return ProbeTask(table, _standardised(values, fitted), fitted, held_out, grid, seed)


def score_features(
    task: ProbeTask, features: Float[Tensor, "transitions f"], steps: int = 600, batch_size: int = 512
) -> ProbeScore:
    """Score of a three-layer MLP from one vector per transition to the target, trained for `steps` steps."""
    inputs = _standardised(features, task.train)
    head = MLP(inputs.shape[1], 128, task.targets.shape[1], 3)

    def predict(index: Tensor) -> Tensor:
        return head(inputs[index])

    _regress(head, predict, task, steps, batch_size)
    return _score(task, predict)


def score_frames(task: ProbeTask, config: LatentActionConfig, steps: int = 300) -> ProbeScore:
    """Score of an IDM trained end to end on both latent frames, with the target as its output."""
    channels = task.targets.shape[1]
    idm = InverseDynamics(dataclasses.replace(config, action_dim=channels, hidden=128, pooling="attention"))

    def predict(index: Tensor) -> Tensor:
        return idm(*task.table.pairs(index), task.grid)

    _regress(idm, predict, task, steps, batch_size=128)
    return _score(task, predict)


def _standardised(values: Float[Tensor, "n c"], train: Int[Tensor, " m"]) -> Float[Tensor, "n c"]:
    """Values per channel in units of their training standard deviation; channels constant there keep their own unit."""
    std = values[train].std(dim=0, correction=0)
    return (values - values[train].mean(dim=0)) / torch.where(std > 1e-6, std, 1.0)


def _regress(module: nn.Module, predict: Predict, task: ProbeTask, steps: int, batch_size: int) -> None:
    """Fit `predict` to the targets of the training transitions, in place."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = warmup_cosine_schedule(optimizer, warmup=20, total=steps)
    random = torch.Generator().manual_seed(task.seed)
    for _ in range(steps):
        index = task.train[torch.randint(len(task.train), (batch_size,), generator=random)]
        optimizer.zero_grad()
        (predict(index) - task.targets[index]).square().mean().backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _score(task: ProbeTask, predict: Predict) -> ProbeScore:
    predicted = torch.cat([predict(index) for index in task.held_out.split(512)])
    target = task.targets[task.held_out]
    error = (predicted - target).square().mean(dim=0)
    # Targets are centred on the training mean, so their own square is the error of predicting that mean.
    baseline = target.square().mean(dim=0)
    r2 = [1 - float(e / b) if b > 1e-6 else None for e, b in zip(error, baseline, strict=True)]
    known = [value for value in r2 if value is not None]
    if not known:
        raise UserError("No action channel varies in the held-out episodes, so R^2 is not defined: hold out more.")
    return ProbeScore(
        loss=float(error.mean()),
        r2=tuple(r2),
        mean_r2=sum(known) / len(known),
        pooled_r2=1 - float(error.sum() / baseline.sum()),
    )


def format_report(report: ProbeReport) -> str:
    """The report as a table for the terminal."""
    rows = [
        ("latent action", report.latent_action),
        ("untrained latent action", report.untrained),
        *report.baselines.items(),
        ("mean action", report.mean_action),
        ("(z_t, z_t+1) directly", report.frames),
    ]
    header = f"{'head on, for ' + report.target:<26}{'loss':>9}{'pooled R2':>11}{'mean R2':>9}  " + " ".join(
        f"{c[:12]:>12}" for c in report.channels
    )
    lines = [header]
    for name, score in rows:
        cells = " ".join(f"{'constant' if r is None else f'{r:.3f}':>12}" for r in score.r2)
        lines.append(f"{name:<26}{score.loss:>9.4f}{score.pooled_r2:>11.3f}{score.mean_r2:>9.3f}  {cells}")
    lines.append(f"{report.train_transitions} transitions to train on, {report.held_out_transitions} held out")
    if (losses := report.transfer) is not None:
        lines.append(
            f"error of the next latents with its own latent action {losses.own:.4f}, with that of the most alike "
            f"motion in another episode {losses.paired:.4f}, a random one {losses.shuffled:.4f}, that of a static "
            f"frame {losses.static:.4f}"
        )
    return "\n".join(lines)
