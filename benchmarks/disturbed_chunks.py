"""What do disturbed demonstrations teach a policy that plans chunks? With perfect sight, so that nothing else counts.

A demonstration's action is what the expert wanted at that moment, also after a push. A chunk is planned before: its
later actions answer pushes that nobody could see yet. A perceptron reads the simulator's own state (no pictures) and
plans chunks of 4 actions; it is trained on demonstrations of every kind of `repwam collect --noise`, and drives unseen
layouts, also with the places of object and goal told wrong by a constant error. `masked` leaves out of the loss every
action that comes after a push within its chunk. Prints Markdown.

    uv run python benchmarks/disturbed_chunks.py --tasks push door-lock
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from repwam_core.sim.base import EVALUATION_SEEDS_FROM, collection_seed
from repwam_core.sim.collect import NOISE_MODES, Perturbation, Perturber, attempt
from repwam_core.sim.metaworld import MetaWorldSettings, MetaWorldTask
from torch import Tensor, nn

CHUNK, WIDTH, BATCH = 4, 256, 128
ERRORS_CM = (0.0, 0.5, 1.0, 1.5)
Plan = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Print a row for each kind of noise, and for pushes another with the masked loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["push"])
    parser.add_argument("--noise", nargs="+", choices=list(NOISE_MODES), default=list(NOISE_MODES))
    parser.add_argument("--demonstrations", type=int, default=50)
    parser.add_argument("--episodes", type=int, default=30, help="unseen layouts")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"| task | noise | loss | frames | {' | '.join(f'{error} cm off' for error in ERRORS_CM)} |")
    print("|---|---|---|---|" + "---|" * len(ERRORS_CM))
    for name in options.tasks:
        task = MetaWorldTask(name, MetaWorldSettings())
        for noise in options.noise:
            chunks = demonstrated(task, NOISE_MODES[noise], options.demonstrations, options.seed)
            for masked in [False, True] if NOISE_MODES[noise].pushes else [False]:
                plan = train(chunks, masked, options.steps, options.seed)
                solved = [drive(task, plan, options.episodes, error / 100) for error in ERRORS_CM]
                cells = " | ".join(f"{count}/{options.episodes}" for count in solved)
                loss = "masked" if masked else "all"
                print(f"| {name} | {noise} | {loss} | {len(chunks.actions)} | {cells} |", flush=True)


@dataclass(frozen=True)
class Chunks:
    """Every chunk of some demonstrations.

    Attributes:
        state: (n, s), see `seen`.
        actions: (n, 4, c) in shares of full speed.
        told: (n, 4), False for an action that comes after a push within its chunk.
    """

    state: Tensor
    actions: Tensor
    told: Tensor


def seen(task: MetaWorldTask) -> np.ndarray:
    """Hand, fingers, first object and goal, (10,): metres, and a share for the fingers."""
    state = task._obs
    return np.concatenate([state[:7], state[-3:]]).astype(np.float32)


def demonstrated(task: MetaWorldTask, noise: Perturbation, demonstrations: int, seed: int) -> Chunks:
    """The experts' chunks in as many episodes that it solves."""
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    told: list[list[bool]] = []
    number = solved = 0
    while solved < demonstrations:
        episode = collection_seed(seed, number)
        frames: list[np.ndarray] = []
        pushed = Perturber(task, noise, episode).pushes
        found = attempt(task, episode, noise, 4, lambda frames=frames: frames.append(seen(task)))
        number += 1
        if found is None:
            continue
        solved += 1
        for first in range(len(found) - CHUNK + 1):
            steps = range(first, first + CHUNK)
            states.append(frames[first])
            actions.append(np.stack([found[step] for step in steps]) / task.action_limits)
            told.append([not any(before in pushed for before in range(first, step)) for step in steps])
    return Chunks(torch.tensor(np.array(states)), torch.tensor(np.array(actions)).float(), torch.tensor(told))


def train(chunks: Chunks, masked: bool, steps: int, seed: int) -> Plan:
    """AdamW on the mean squared error; returns a state's chunk."""
    torch.manual_seed(seed)
    mean, std = chunks.state.mean(0), chunks.state.std(0) + 1e-4
    hidden = (nn.Linear(len(mean), WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, CHUNK * chunks.actions.shape[-1]), nn.Unflatten(1, (CHUNK, -1)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    weight = (chunks.told if masked else torch.ones_like(chunks.told)).float()
    for _ in range(steps):
        rows = torch.randint(len(chunks.state), (BATCH,))
        error = (model((chunks.state[rows] - mean) / std) - chunks.actions[rows]).square().mean(-1)
        optimizer.zero_grad()
        ((error * weight[rows]).sum() / weight[rows].sum()).backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def plan(state: np.ndarray) -> np.ndarray:
        return model((torch.from_numpy(state)[None] - mean) / std)[0].numpy()

    return plan


def drive(task: MetaWorldTask, plan: Plan, episodes: int, error_m: float) -> int:
    """Solved episodes; the object's and the goal's places are told wrong by Gaussian errors, drawn once an episode."""
    solved, draw = 0, np.random.default_rng(0)
    for seed in range(EVALUATION_SEEDS_FROM + 1_000_000, EVALUATION_SEEDS_FROM + 1_000_000 + episodes):
        wrong = np.zeros(10, np.float32)
        wrong[[4, 5, 7, 8]] = draw.standard_normal(4) * error_m
        task.start(seed)
        while not task.done:
            for action in plan(seen(task) + wrong):
                task.advance(np.clip(action, -1, 1) * task.action_limits)
                if task.done:
                    break
        solved += task.success
    return solved


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
