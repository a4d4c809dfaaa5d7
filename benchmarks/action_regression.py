"""How well can the next actions be told from what the policy sees? Regression on the world action model's inputs.

The newest latent frame, the robot's state and the mean of the instruction's embeddings in, the chunk of one latent
frame out; mean squared error, AdamW, steps of 8 runs of 6 transitions as `repwam fit` draws them. A multilayer
perceptron over all of it, and a transformer of the world action model's tiny size with learned positions. Prints the
mean absolute error of normalised actions on episodes trained on and held out; held out by channel too. `val/action_mae`
of a run's metrics.csv is the same measure of the world action model's sampled chunks, on what it validates on.

`--scale` says how latents enter: standardised by channel, as the world action model has them; by token and channel; or
as the largest principal components of the whole frame, each scaled to unit deviation. `--places` adds where the hand
will be when it is lowest, and where it first closes the fingers: read by ridge regression, a task at a time, from those
components and the state, with hindsight of the demonstrations as the label (docs/decisions/072); both are the
perceptron's alone. `--cameras` and `--episodes` take the first of them only. With `--drive`, what was trained drives
unseen layouts.

    uv run python benchmarks/action_regression.py --latents LATENTS [--steps 3000] [--seed 0]
    uv run python benchmarks/action_regression.py --latents LATENTS --scale components --places --drive 20 \
        --tokenizer TOKENIZER
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
from repwam_core.sim.results import success_rates
from repwam_core.text import TextEncoder
from torch import Tensor, nn

WIDTH, RUNS, RUN = 128, 8, 6
FOLDS, RIDGE, CLOSED = 5, 300.0, 0.5
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
        places: with hindsight, the hand where it is lowest from now on, and where the fingers first close, (n, 6).
    """

    latents: Tensor
    state: Tensor
    text: Tensor
    actions: Tensor
    task: Tensor
    episode: Tensor
    places: Tensor


def main() -> None:
    """Train, print a row of Markdown for each model, and drive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, required=True, help="folder with recorded actions")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cameras", type=int, help="the first of the latents' cameras (default: all)")
    parser.add_argument("--episodes", type=int, help="the first of the episodes trained on (default: all)")
    parser.add_argument("--scale", choices=("channel", "position", "components"), default="channel")
    parser.add_argument("--components", type=int, default=256, help="of --scale components")
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--models", nargs="+", choices=("perceptron", "transformer"), default=["perceptron"])
    parser.add_argument("--drive", type=int, default=0, help="unseen layouts a task, with --tokenizer")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["drawer-open", "door-lock", "push"])
    parser.add_argument("--first-seed", type=int, default=2_000_000, help="of the layouts")
    options = parser.parse_args()
    if "transformer" in options.models and (options.places or options.scale == "components"):
        raise SystemExit("--places and --scale components are the perceptron's")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    store = EpisodeStore(options.latents, held_out=0.1)
    views = options.cameras or store.meta.grid[0]
    numbers = sorted({store.infos[row].episode_index for row in store.train_episodes})[: options.episodes]
    rows = np.array([row for row in store.train_episodes if store.infos[row].episode_index in numbers])
    train, held_out = (table(store, part, views, options.tasks) for part in (rows, store.val_episodes))
    view = View(train, options.scale, options.components, options.places)
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
        print(f"| {name} | {size:,} | {options.steps} | {spent_s:.0f} | {seen:.4f} | {error.mean():.4f} | {channels} |")
        if options.drive:
            policy = RegressionPolicy(model, view, store, options.tokenizer, views, options.tasks)
            for task in options.tasks:  # each by itself: an interrupted run has shown those before
                results = evaluate(
                    policy, [task], evaluation_seeds(options.drive, options.first_seed), workers=1,
                    settings=MetaWorldSettings(cameras=("corner2", "gripper")[:views]), instruction_of=instruction,
                )  # fmt: skip
                rate = success_rates(results)[task]
                print(f"{task}: {rate.successes} of {rate.episodes}", flush=True)


def table(store: EpisodeStore, rows: np.ndarray, views: int, tasks: Sequence[str]) -> Table:
    """All transitions of some rows of the store, with the first cameras' tokens."""
    tokens, parts = views * store.meta.tokens // store.meta.grid[0], []
    numbers = {sentence: number for number, task in enumerate(tasks) for sentence in paraphrases(task)}
    for row in rows:
        count = int(store.lengths[row]) - 1
        batch = store.batch(np.array([row]), np.array([0]), count)
        assert batch.state is not None
        words, mask, state, actions = batch.text[0], batch.text_mask[0, :, None], batch.state[0], batch.actions[0]
        text = ((words * mask).sum(0) / mask.sum().clamp(min=1)).expand(count, -1)
        lowest = [now + int(state[now:, 2].argmin()) for now in range(count)]
        closed = (actions[:, :, -1].mean(1) > CLOSED).nonzero()
        places = torch.cat([state[lowest, :3], state[[int(closed[0])] * count if len(closed) else lowest, :3]], dim=1)
        task = torch.full((count,), numbers[store.tasks[row]])
        episode = torch.full((count,), store.infos[row].episode_index)
        parts.append((batch.latents[0, :-1, :tokens], state[:-1], text, actions, task, episode, places))
    return Table(*(torch.cat(part) for part in zip(*parts, strict=True)))


class View:
    """What a model is shown of transitions, fitted to those that are trained on; see the module's docstring."""

    def __init__(self, train: Table, scale: str, components: int, places: bool) -> None:
        self._scale, flat = scale, train.latents.flatten(1)
        self._mean, self._std = flat.mean(0), flat.std(0).clip(1e-3)
        _, values, directions = torch.svd_lowrank(flat - self._mean, q=components + 16, niter=3)
        self._whiten = (directions / values * len(flat) ** 0.5)[:, :components]
        self._readers: Tensor | None = None
        if places:  # of each fold a reader that has not seen it, and one that has seen all: (tasks, folds + 1, f, 6)
            features, numbers = self._features(train.latents, train.state), range(int(train.task.max()) + 1)
            folds = [train.episode % FOLDS != fold for fold in range(FOLDS)] + [train.episode >= 0]
            of_tasks = [[(train.task == number) & fold for fold in folds] for number in numbers]
            fitted = [[_ridge(features[kept], train.places[kept]) for kept in of_task] for of_task in of_tasks]
            self._readers = torch.stack([torch.stack(of_task) for of_task in fitted])

    def of_table(self, rows: Table, *, crossed: bool = False) -> Inputs:
        """A model's inputs; `crossed` reads every place by the reader that has not seen its episode."""
        fold = rows.episode % FOLDS if crossed else torch.full_like(rows.episode, FOLDS)
        return self(rows.latents, rows.state, rows.text, rows.task, fold)

    def __call__(self, latents: Tensor, state: Tensor, text: Tensor, task: Tensor, fold: Tensor) -> Inputs:
        flat = latents.flatten(1)
        if self._scale == "components":
            shown = (flat - self._mean) @ self._whiten
        else:
            shown = latents if self._scale == "channel" else ((flat - self._mean) / self._std).view_as(latents)
        if self._readers is None:
            return shown, state, text
        features, places = self._features(latents, state), latents.new_zeros(len(latents), self._readers.shape[-1])
        for number in task.unique():
            for part in fold.unique():
                at = (task == number) & (fold == part)
                places[at] = features[at] @ self._readers[number, part]
        way = places - state[:, :3].repeat(1, places.shape[1] // 3)
        return shown, torch.cat([state, places, 3 * way], dim=1), text

    def _features(self, latents: Tensor, state: Tensor) -> Tensor:
        components = (latents.flatten(1) - self._mean) @ self._whiten
        return torch.cat([components, state, torch.ones(len(state), 1)], dim=1)


def _ridge(features: Tensor, targets: Tensor) -> Tensor:
    features, targets = features.double(), targets.double()
    gram = features.T @ features + RIDGE * torch.eye(features.shape[1], dtype=torch.float64)
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
    """Drives with a regression's chunks; the newest latent frame is all that it knows of the past."""

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

    @torch.no_grad()
    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """See `BatchedBasePolicy`."""
        clips = [prepare_frames(seen.frames(name), (64, 64)) for seen in observations for name in self._cameras]
        latents = self._tokens(self._standardizer(self._stream.encode(torch.stack(clips))[:, -1]))
        scaling, states_si = self._statistics.state, [seen.states() for seen in observations]
        assert scaling is not None
        rows = [scaling.standardise(state_si)[-1] for state_si in states_si if state_si is not None]
        state, fold = torch.from_numpy(np.stack(rows)).float(), torch.full_like(self._task, FOLDS)
        chunks = self._model(*self._view(latents, state, self._text, self._task, fold)).numpy()
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
