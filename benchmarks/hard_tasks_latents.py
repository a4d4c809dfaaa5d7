"""What do a tokenizer's latents know of where the objects are, and has the policy learned to use it?

The places of the object, and of push's goal, are read from the latents of an episode's first frame, as a policy sees
them, by ridge regression and by a small MLP; and from the frame's pixels the same way. Errors are medians on layouts
held out from the reader, beside the error of always saying the mean. With `--dataset`, the demonstrations of the
first policy, also its open-loop errors on episodes that it was trained on and on held-out ones.

    uv run python benchmarks/hard_tasks_latents.py --policy "64 px=POLICY" "128 px=POLICY" --dataset DATASET

    uv run python benchmarks/hard_tasks_latents.py --policy "64 px=POLICY" --suite aloha --tasks transfer-cube

POLICY is a policy folder, such as `train-*/policy` of `benchmarks/wam_learning.py --question tasks`; its tokenizer,
cameras and size are used. Features are reduced to their first 128 principal components, of the training layouts. Both
readers are weak: an error of pixels is no lower bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from repvitok.data import LeRobotReader, prepare_frames
from repvitok.data.split import split_episodes
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy, evaluate_open_loop
from repwam_core.sim.aloha import AlohaSettings, AlohaTask
from repwam_core.sim.base import evaluation_seeds
from repwam_core.sim.metaworld import MetaWorldSettings, MetaWorldTask
from torch import Tensor, nn

HARD_TASKS = ("drawer-open", "door-lock", "push")
TRAINED_ON = (20, 80, 240)
HELD_OUT = 0.2
OPEN_LOOP_EPISODES = 8
COMPONENTS, RIDGES = 128, tuple(10.0**power for power in range(-4, 5))


class PlacedMetaWorld(MetaWorldTask):
    """Meta-World that tells where things are."""

    @property
    def places_m(self) -> dict[str, np.ndarray]:
        """The places (x, y) that vary from layout to layout. Elsewhere the goal follows from the object."""
        goal = {"goal": np.array(self._env._target_pos[:2])} if self.name == "push" else {}
        return {"object": self._require_started()[4:6].copy(), **goal}


class PlacedAloha(AlohaTask):
    """gym-aloha that tells where the cube is."""

    @property
    def places_m(self) -> dict[str, np.ndarray]:
        """The place (x, y) that varies from layout to layout."""
        return {"object": self._cube_m()[:2].copy()}


SUITES = {"metaworld": (PlacedMetaWorld, MetaWorldSettings), "aloha": (PlacedAloha, AlohaSettings)}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--suite", choices=SUITES, default="metaworld")
    parser.add_argument("--tasks", nargs="+", default=list(HARD_TASKS))
    parser.add_argument("--layouts", type=int, default=300, help="a fifth of them is held out")
    parser.add_argument("--dataset", type=Path, help="demonstrations of the first policy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policies = {
        name: BatchedPolicy.from_pretrained(folder)
        for name, folder in (entry.split("=", 1) for entry in options.policy)
    }
    sizes = [size for size in TRAINED_ON if size <= (1 - HELD_OUT) * options.layouts]
    readers = " | ".join(f"{reader}, {size}" for size in sizes for reader in ("ridge", "MLP"))
    print(f"| read from | task | place of | mean, {sizes[0]} | {readers} |")
    print("|---" * (4 + 2 * len(sizes)) + "|")
    for task in options.tasks:
        for name, policy in policies.items():
            print_task(name, policy, (options.suite, task), options.layouts, sizes)
    if options.dataset is not None:
        print_open_loop(next(iter(policies.values())), LeRobotReader(options.dataset), options.tasks)


def print_task(name: str, policy: BatchedPolicy, of: tuple[str, str], layouts: int, sizes: Sequence[int]) -> None:
    """Print median errors in cm, a row per place and per what it is read from; `of` is a suite and its task."""
    frames, places = first_frames(*of, policy, layouts)
    for source, features in (("latents", encoded(policy, frames)), ("pixels", as_pixels(frames))):
        for what, place in places.items():
            read = [reading_errors(features, place, size) for size in sizes]
            errors = [read[0][0], *(error for each in read for error in each[1:])]
            cells = " | ".join(f"{100 * error:.1f}" for error in errors)
            print(f"| {name}, {source} | {of[1]} | {what} | {cells} |", flush=True)


def first_frames(
    suite: str, task: str, policy: BatchedPolicy, layouts: int
) -> tuple[list[Observation], dict[str, Tensor]]:
    """The first observations of unseen layouts, and the places (layouts, 2) of what varies, in metres."""
    cameras = tuple(key.removeprefix("observation.images.") for key in policy.embodiment.cameras)
    height, width = policy.parts.manifest.size
    frames, places = [], []
    make_task, make_settings = SUITES[suite]
    with closing(make_task(task, make_settings(cameras=cameras, size=(height, width)))) as simulator:
        for seed in evaluation_seeds(layouts):
            frames.append(simulator.reset(seed))
            places.append(simulator.places_m)
    return frames, {what: torch.tensor(np.stack([each[what] for each in places])) for what in places[0]}


def print_open_loop(policy: BatchedPolicy, reader: LeRobotReader, tasks: Sequence[str]) -> None:
    """Print mean absolute errors of planned motion in mm a control step, policy / mean action."""
    print("\n| task | episodes | x | y | z |\n|---|---|---|---|---|")
    parts = split_episodes([info.index for info in reader.episodes], 0.1)
    tasks_of = {info.index: info.metadata["task_name"] for info in reader.episodes}
    for task in tasks:
        for what, part in zip(("trained on", "held out"), parts, strict=True):
            chosen = [index for index in part if tasks_of[index] == task][:OPEN_LOOP_EPISODES]
            errors = evaluate_open_loop(policy, reader, chosen).errors() if chosen else {}
            rows = [list(errors[method].values())[:3] for method in ("policy", "mean action") if errors]
            cells = " | ".join(f"{1e3 * ours:.1f} / {1e3 * mean:.1f}" for ours, mean in zip(*rows, strict=True))
            if chosen:
                print(f"| {task} | {len(chosen)} {what} | {cells} |", flush=True)


@torch.no_grad()
def encoded(policy: BatchedPolicy, frames: Sequence[Observation]) -> Tensor:
    """Standardised latents of single frames as the policy reads them, (layouts, views * tokens * d)."""
    manifest = policy.parts.manifest
    mean, std = torch.from_numpy(manifest.latents.mean), torch.from_numpy(manifest.latents.std)
    rows = []
    for seen in frames:
        clips = torch.stack([prepare_frames(seen.frames(key), manifest.size) for key in policy.embodiment.cameras])
        z = policy.parts.tokenizer.stream(len(clips), window=manifest.latents.window).encode(clips)
        rows.append(rearrange((z - mean) / std, "views one tokens d -> (views one tokens d)"))
    return torch.stack(rows).double()


def as_pixels(frames: Sequence[Observation]) -> Tensor:
    """Pixels in [0, 1], (layouts, views * H * W * 3)."""
    rows = [np.concatenate([seen.frames(key).reshape(-1) for key in seen.cameras]) for seen in frames]
    return torch.from_numpy(np.stack(rows)).double() / 255


def reading_errors(features: Tensor, places: Tensor, number: int) -> list[float]:
    """Median errors in metres on the last layouts: of the mean, ridge regression and an MLP, trained on `number`."""
    held_out = round(HELD_OUT * len(features))
    train, test = slice(0, number), slice(-held_out, None)
    centre, scale = features[train].mean(0), places[train].std(0).clamp_min(1e-6)
    x = features - centre
    basis = torch.linalg.svd(x[train], full_matrices=False)[2][:COMPONENTS]
    x = x @ basis.T
    x = x / x[train].std()
    y = (places - places[train].mean(0)) / scale
    predicted = (torch.zeros_like(y[test]), ridge(x[train], y[train], x[test]), mlp(x[train], y[train], x[test]))
    return [float(((each - y[test]) * scale).norm(dim=1).median()) for each in predicted]


def ridge(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Ridge regression without intercept; its strength has the least leave-one-out error."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best, weights = np.inf, torch.zeros(0)
    for strength in RIDGES:
        shrunk = s**2 / (s**2 + strength * len(x))
        leverage = (u**2 @ shrunk).clamp_max(1 - 1e-9)
        error = float((((y - (u * shrunk) @ (u.T @ y)) / (1 - leverage)[:, None]) ** 2).mean())
        if error < best:
            best, weights = error, v.T @ ((shrunk / s.clamp_min(1e-9))[:, None] * (u.T @ y))
    return x_test @ weights


def mlp(x: Tensor, y: Tensor, x_test: Tensor, steps: int = 400) -> Tensor:
    """A hidden layer of 64, full batches, one seed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, y.shape[1])).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return net(x_test)


if __name__ == "__main__":
    main()
