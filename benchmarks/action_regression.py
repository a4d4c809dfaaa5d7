"""How well can the next actions be told from what the policy sees? Regression on the world action model's inputs.

The newest latent frame, the robot's state and the mean of the instruction's embeddings in, the chunk of one latent
frame out; mean squared error, AdamW, steps of 8 runs of 6 transitions as `repwam fit` draws them. A multilayer
perceptron over all of it, and a transformer of the world action model's tiny size with learned positions. Prints the
mean absolute error of normalised actions on episodes trained on and held out; held out by channel too. `val/action_mae`
of a run's metrics.csv is the same measure of the world action model's sampled chunks, on what it validates on.

`--scale` says how latents enter: standardised by channel, as the world action model has them; by token and channel; or
as the largest principal components of the whole frame, each scaled to unit deviation. `--places` adds places of the
hand, read by ridge regression, a task at a time, with hindsight of the demonstrations as the label
(docs/decisions/072): `newest` where it is lowest from now on and where it first closes the fingers, from those
components and the state; `first` where it first closes them and where it ends, in x and y, from the latents of the
episode's first frame. `--without-latents` shows places in place of latents. Components and places are the perceptron's
alone. `--cameras` and `--episodes` take the first of them only. With `--drive`, what was trained drives unseen layouts,
a task at a time.

    uv run python benchmarks/action_regression.py --latents LATENTS [--steps 3000] [--seed 0]
    uv run python benchmarks/action_regression.py --latents LATENTS --steps 2500 --components 512 \
        --places newest first --without-latents --drive 20 --tokenizer TOKENIZER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from repvitok.data.transforms import prepare_frames
from repvitok.model import load_tokenizer
from repwam_core.data.episodes import EpisodeStore
from repwam_core.interface import ActionChunk, BatchedBasePolicy, Observation
from repwam_core.sim.base import evaluation_seeds
from repwam_core.sim.evaluate import evaluate
from repwam_core.sim.metaworld import MetaWorldSettings, instruction, paraphrases
from repwam_core.sim.results import success_rates, wilson_interval
from repwam_core.text import TextEncoder
from torch import Tensor, nn

WIDTH, RUNS, RUN = 128, 8, 6
FOLDS, CLOSED = 5, 0.5
PLACES = {"newest": ([0, 1, 2, 3, 4, 5], 300.0), "first": ([3, 4, 6, 7], 0.3)}
"""Which of `Table.places` are read from which frame, and the ridge penalty."""
Inputs = tuple[Tensor, Tensor, Tensor]
"""What a model reads: latents or what stands for them, state, text."""


@dataclass(frozen=True)
class Table:
    """Transitions of some episodes, one after the other.

    Attributes:
        latents: standardised, (n, tokens, d).
        state: standardised, (n, S).
        text: mean embedding of the instruction, (n, D).
        actions: normalised, (n, a, c).
        task: which of the tasks, (n,).
        episode: its number in the data set, (n,).
        places: with hindsight, the hand where it is lowest from now on, where the fingers first close, and at the end
            of the episode, (n, 9).
        first: the row of the episode's first transition, (n,).
    """

    latents: Tensor
    state: Tensor
    text: Tensor
    actions: Tensor
    task: Tensor
    episode: Tensor
    places: Tensor
    first: Tensor


def main() -> None:
    """Train, print a row of Markdown for each model, and drive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True, help="folder with recorded actions")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cameras", type=int, help="the first of the latents' cameras (default: all)")
    parser.add_argument("--episodes", type=int, help="the first of the episodes trained on (default: all)")
    parser.add_argument("--scale", choices=("channel", "position", "components"), default="channel")
    parser.add_argument(
        "--components", type=int, default=256, help="of --scale components, and that newest places read"
    )
    parser.add_argument("--places", nargs="+", choices=tuple(PLACES), default=[])
    parser.add_argument("--without-latents", action="store_true", help="places in their stead")
    parser.add_argument("--models", nargs="+", choices=("perceptron", "transformer"), default=["perceptron"])
    parser.add_argument("--drive", type=int, default=0, help="unseen layouts a task, with --tokenizer")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["drawer-open", "door-lock", "push"])
    parser.add_argument("--first-seed", type=int, default=2_000_000, help="of the layouts")
    options = parser.parse_args()
    if "transformer" in options.models and (options.places or options.scale == "components"):
        raise SystemExit("--places and --scale components are the perceptron's")
    if options.without_latents and not options.places:
        raise SystemExit("--without-latents needs --places")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    store = EpisodeStore(options.latents, held_out=0.1)
    views = options.cameras or store.meta.grid[0]
    numbers = sorted({store.infos[row].episode_index for row in store.train_episodes})[: options.episodes]
    rows = np.array([row for row in store.train_episodes if store.infos[row].episode_index in numbers])
    train, held_out = (table(store, part, views, options.tasks) for part in (rows, store.val_episodes))
    scale = "none" if options.without_latents else options.scale
    view = View(train, scale, options.components, options.places)
    print("| model | parameters | steps | process s | trained on | held out | by channel |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        begun_s = time.process_time()
        inputs, targets = view.of_table(train, crossed=True), held_out.actions
        if name == "perceptron":
            model: nn.Module = Perceptron(sum(part[0].numel() for part in inputs), targets[0].shape)
        else:
            model = Transformer(inputs[0].shape[1:], inputs[1].shape[1], inputs[2].shape[1], targets[0].shape)
        seen = fit(model, inputs, train.actions, options.steps, options.seed)
        with torch.no_grad():
            error = (model.eval()(*view.of_table(held_out)) - targets).abs()
        channels = ", ".join(f"{value:.3f}" for value in error.mean((0, 1)))
        size, spent_s = sum(parameter.numel() for parameter in model.parameters()), time.process_time() - begun_s
        row = f"| {name} | {size:,} | {options.steps} | {spent_s:.0f} | {seen:.4f} | {error.mean():.4f} | {channels} |"
        print(row, flush=True)
        if options.drive:
            policy = RegressionPolicy(model, view, store, options.tokenizer, views, options.tasks)
            for task in options.tasks:  # each by itself: an interrupted run has shown those before
                results = evaluate(
                    policy, [task], evaluation_seeds(options.drive, options.first_seed), workers=1,
                    settings=MetaWorldSettings(cameras=("corner2", "gripper")[:views]), instruction_of=instruction,
                )  # fmt: skip
                rate = success_rates(results)[task]
                low, high = wilson_interval(rate.successes, rate.episodes)
                print(f"{task}: {rate.successes} of {rate.episodes}, {low:.0%} to {high:.0%}", flush=True)


def table(store: EpisodeStore, rows: np.ndarray, views: int, tasks: Sequence[str]) -> Table:
    """All transitions of some rows of the store, with the first cameras' tokens."""
    tokens, parts, begin = views * store.meta.tokens // store.meta.grid[0], [], 0
    numbers = {sentence: number for number, task in enumerate(tasks) for sentence in paraphrases(task)}
    for row in rows:
        count = int(store.lengths[row]) - 1
        batch = store.batch(np.array([row]), np.array([0]), count)
        assert batch.state is not None
        words, mask, state, actions = batch.text[0], batch.text_mask[0, :, None], batch.state[0], batch.actions[0]
        text = ((words * mask).sum(0) / mask.sum().clamp(min=1)).expand(count, -1)
        lowest = [now + int(state[now:, 2].argmin()) for now in range(count)]
        closed = (actions[:, :, -1].mean(1) > CLOSED).nonzero()
        closing = [int(closed[0])] * count if len(closed) else lowest
        places = torch.cat([state[lowest, :3], state[closing, :3], state[[-1] * count, :3]], dim=1)
        task = torch.full((count,), numbers[store.tasks[row]])
        episode = torch.full((count,), store.infos[row].episode_index)
        first = torch.full((count,), begin)
        parts.append((batch.latents[0, :-1, :tokens], state[:-1], text, actions, task, episode, places, first))
        begin += count
    return Table(*(torch.cat(part) for part in zip(*parts, strict=True)))


class View:
    """What a model is shown of transitions, fitted to those that are trained on; see the module's docstring."""

    def __init__(self, train: Table, scale: str, components: int, places: Sequence[str]) -> None:
        self._scale, flat = scale, train.latents.flatten(1)
        self._mean, self._std = flat.mean(0), flat.std(0).clip(1e-3)
        _, values, directions = torch.svd_lowrank(flat - self._mean, q=components + 16, niter=3)
        self._whiten = (directions / values * len(flat) ** 0.5)[:, :components]
        folds = [train.episode % FOLDS != fold for fold in range(FOLDS)] + [train.episode >= 0]
        self._readers: dict[str, Tensor] = {}
        for frame in places:  # of each fold a reader that has not seen it, and one that has seen all
            features = self._features(frame, train.latents, train.state)
            columns, penalty = PLACES[frame]
            once = train.first == torch.arange(len(train.first)) if frame == "first" else train.first >= 0
            of_tasks = [once & (train.task == number) for number in range(int(train.task.max()) + 1)]
            kept = [[of_task & fold for fold in folds] for of_task in of_tasks]
            fitted = [[_ridge(features[at], train.places[at][:, columns], penalty) for at in part] for part in kept]
            self._readers[frame] = torch.stack([torch.stack(part) for part in fitted])  # (tasks, folds + 1, f, places)

    def of_table(self, rows: Table, *, crossed: bool = False) -> Inputs:
        """A model's inputs; `crossed` reads every place by the reader that has not seen its episode."""
        fold = rows.episode % FOLDS if crossed else torch.full_like(rows.episode, FOLDS)
        return self(rows.latents, rows.latents[rows.first], rows.state, rows.text, rows.task, fold)

    def __call__(
        self, latents: Tensor, first: Tensor, state: Tensor, text: Tensor, task: Tensor, fold: Tensor
    ) -> Inputs:
        flat = latents.flatten(1)
        if self._scale == "none":
            shown = flat[:, :0]
        elif self._scale == "components":
            shown = (flat - self._mean) @ self._whiten
        else:
            shown = latents if self._scale == "channel" else ((flat - self._mean) / self._std).view_as(latents)
        told = [state]
        for frame, readers in self._readers.items():
            features = self._features(frame, first if frame == "first" else latents, state)
            columns, places = PLACES[frame][0], state.new_zeros(len(state), readers.shape[-1])
            for number in task.unique():
                for part in fold.unique():
                    at = (task == number) & (fold == part)
                    places[at] = features[at] @ readers[number, part]
            told += [places, 3 * (places - state[:, [column % 3 for column in columns]])]
        return shown, torch.cat(told, dim=1), text

    def _features(self, frame: str, latents: Tensor, state: Tensor) -> Tensor:
        one, flat = torch.ones(len(state), 1), latents.flatten(1)
        read = [flat] if frame == "first" else [(flat - self._mean) @ self._whiten, state]
        return torch.cat([*read, one], dim=1)


def _ridge(features: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Coefficients (f, k); in the dual form where there are fewer rows than features."""
    features, targets = features.double(), targets.double()
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    gram.diagonal().add_(penalty)
    if len(features) < features.shape[1]:
        return (features.T @ torch.linalg.solve(gram, targets)).float()
    return torch.linalg.solve(gram, features.T @ targets).float()


def fit(model: nn.Module, inputs: Inputs, actions: Tensor, steps: int, seed: int) -> float:
    """AdamW, warmed up and brought to zero; returns the mean absolute error over the last 50 batches."""
    optimizer, draw = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05), np.random.default_rng(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    errors = []
    for _ in range(steps):
        rows = (draw.integers(len(actions) - RUN + 1, size=RUNS)[:, None] + np.arange(RUN)).ravel()
        error = model(*(part[rows] for part in inputs)) - actions[rows]
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach().abs().mean()))
    return sum(errors[-50:]) / len(errors[-50:])


class RegressionPolicy(BatchedBasePolicy):
    """Drives with a regression's chunks; of the past it knows the newest latent frame and the episode's first."""

    def __init__(
        self, model: nn.Module, view: View, store: EpisodeStore, tokenizer: Path, views: int, tasks: Sequence[str]
    ) -> None:
        self._model, self._view, self._statistics, self._meta = model.eval(), view, store.statistics, store.meta
        self._tokenizer, self._words = load_tokenizer(tokenizer), TextEncoder(store.text_encoder)
        self._standardizer, self._cameras = store.meta.standardizer.like(torch.empty(0)), store.meta.cameras[:views]
        self._numbers = {sentence: number for number, task in enumerate(tasks) for sentence in paraphrases(task)}
        self._tokens: Callable[[Tensor], Tensor] = lambda z: rearrange(z, "(n v) t d -> n (v t) d", v=views)

    def reset(self, instructions: Sequence[str | None], seeds: Sequence[int]) -> None:
        """See `BatchedBasePolicy`."""
        self._stream = self._tokenizer.stream(len(seeds) * len(self._cameras), window=self._meta.window)
        words, mask = self._words.encode([told or "" for told in instructions])
        self._text = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        self._task = torch.tensor([self._numbers[told or ""] for told in instructions])
        self._first: Tensor | None = None

    @torch.no_grad()
    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """See `BatchedBasePolicy`."""
        clips = [prepare_frames(seen.frames(name), (64, 64)) for seen in observations for name in self._cameras]
        latents = self._tokens(self._standardizer(self._stream.encode(torch.stack(clips))[:, -1]))
        self._first = latents if self._first is None else self._first
        scaling, states_si = self._statistics.state, [seen.states() for seen in observations]
        assert scaling is not None
        rows = [scaling.standardise(state_si)[-1] for state_si in states_si if state_si is not None]
        state, fold = torch.from_numpy(np.stack(rows)).float(), torch.full_like(self._task, FOLDS)
        chunks = self._model(*self._view(latents, self._first, state, self._text, self._task, fold)).numpy()
        actions_si = self._statistics.targets.clip(self._statistics.actions.denormalise(chunks))
        return [ActionChunk(rows, self._statistics.targets.channels, 10.0) for rows in actions_si]


class Perceptron(nn.Module):
    """All inputs side by side through two hidden layers."""

    def __init__(self, inputs: int, chunk: torch.Size, hidden: int = 512) -> None:
        super().__init__()
        hidden_layers = (nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.layers = nn.Sequential(*hidden_layers, nn.Linear(hidden, chunk.numel()), nn.Unflatten(1, tuple(chunk)))

    def forward(self, latents: Tensor, state: Tensor, text: Tensor) -> Tensor:
        """Actions (n, a, c)."""
        return self.layers(torch.cat([latents.flatten(1), state, text], dim=1))


class Transformer(nn.Module):
    """Latent tokens with learned positions, a state and a text token, and a query for each action vector."""

    def __init__(self, latents: torch.Size, state: int, text: int, chunk: torch.Size) -> None:
        super().__init__()
        tokens, latent_dim = latents
        self.latents, self.state, self.text = (nn.Linear(size, WIDTH) for size in (latent_dim, state, text))
        self.positions = nn.Parameter(0.3 * torch.randn(tokens, WIDTH))
        self.queries = nn.Parameter(0.3 * torch.randn(chunk[0], WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.actions = nn.Linear(WIDTH, chunk[1])

    def forward(self, latents: Tensor, state: Tensor, text: Tensor) -> Tensor:
        """Actions (n, a, c)."""
        queries = self.queries.expand(len(latents), -1, -1)
        tokens = [queries, self.latents(latents) + self.positions, self.state(state)[:, None], self.text(text)[:, None]]
        return self.actions(self.layers(torch.cat(tokens, dim=1))[:, : queries.shape[1]])


if __name__ == "__main__":
    main()
