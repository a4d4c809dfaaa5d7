"""What makes a latent action an action: pooling, size, losses and antisymmetry against baselines, on held-out episodes.

    python benchmarks/latent_actions.py --latents LATENTS --variants base plain mean --seeds 0 --out results.jsonl
    python benchmarks/latent_actions.py --latents LATENTS --dataset DATASET --variants lapa --out results.jsonl

LATENTS is a folder of `repvitok encode` with robot states, DATASET the LeRobot data set it was made from (LAPA sees
pixels). Every variant is trained for the same steps on the same batches and scored on the same held-out episodes; its
line of JSON goes to --out as soon as it is done. --episodes-per-task N makes N episodes in a row one task, so that
borrowed latent actions come from another task; without it they come from another episode. The variants are in VARIANTS
below; "frames" and "control" are the probe's upper bound and the zero-action control, one each for all variants,
"difference" the whole difference of the latents under the probe's head, "random" a random projection of it to as many
numbers as a latent action has.

    python benchmarks/latent_actions.py --latents LATENTS --variants base composition random difference --seeds 0 1 2 \
        --target actions --labels 1 5 10 50 --draws 3 --out results.jsonl
    python benchmarks/latent_actions.py --table results.jsonl

--labels gives the head that many training episodes with labels, drawn --draws times (the same for all variants);
--table prints the means of a file's lines with 95 % intervals. --transition-frames 2 makes transitions of two latent
frames.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from latent_action.baselines.lapa import (
    LapaConfig,
    LapaQuantizer,
    PairBatches,
    code_usage,
    lapa_composed,
    lapa_features,
    load_frame_table,
)
from latent_action.config import LatentActionConfig
from latent_action.datamodule import TrainingBatches, TransitionBatch
from latent_action.dynamics import MLP, ForwardDynamics, InverseDynamics
from latent_action.model import LatentActionTokenizer, composition_error, copy_loss, transition_losses
from latent_action.probe import ProbeTask, make_task, score_features, score_frames
from latent_action.training import composition_loss
from latent_action.transfer import (
    composed,
    cycle_loss,
    effective_dimensions,
    latent_actions,
    read_again,
    reading_r2,
    transfer_losses,
)
from latent_action.transitions import TransitionTable, load_transitions
from repvitok.data.shards import LatentShards
from repvitok.data.split import split_episodes
from repvitok.runtime.training import ExponentialMovingAverage, OptimizerSettings
from torch import Tensor, nn

# What differs from `base`: settings of the model, weights of Eq. 4's losses, transitions trained on.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "plain": {"antisymmetric": False},
    "first": {"first_transitions": True},
    "plain_first": {"antisymmetric": False, "first_transitions": True},
    "mean": {"pooling": "mean"},
    "flatten": {"flatten": True},
    "d2": {"action_dim": 2},
    "d8": {"action_dim": 8},
    "d16": {"action_dim": 16},
    "no_consistency": {"consistency_weight": 0.0},
    "no_forward": {"forward_weight": 0.0},
    "plain_no_consistency": {"antisymmetric": False, "consistency_weight": 0.0},
    "rank0": {"transport_rank": 0},
    "rank16": {"transport_rank": 16},
    "composition": {"composition_weight": 1.0},
    "composition_tenth": {"composition_weight": 0.1},
}
# Student's t, two-sided 95 %, by degrees of freedom
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 11: 2.20, 14: 2.14, 17: 2.11}
OTHERS = ("frames", "control", "lapa", "lapa_residual", "random", "difference")


class FlattenedInverseDynamics(InverseDynamics):
    """An IDM that reads all tokens at once: the flattened pair through one MLP; works at one number of tokens only."""

    def __init__(self, config: LatentActionConfig, tokens: int) -> None:
        super().__init__(config)
        self.mlp = MLP(2 * tokens * config.latent_dim, config.hidden, config.action_dim, config.layers)

    def _pooled(self, z_t: Tensor, z_next: Tensor, grid: Any) -> Tensor:  # noqa: ARG002 - the place is in the order
        return self.mlp(rearrange(torch.stack([z_t, z_next - z_t]), "two b tokens d -> b (two tokens d)"))


class Bench:
    """The data, how long to train, and what is measured of every variant."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shards = LatentShards(options.latents)
        meta = self.shards.meta
        mean, std = torch.from_numpy(meta.mean), torch.from_numpy(meta.std)
        self.whole = load_transitions(self.shards, lambda raw: (raw - mean) / std, options.transition_frames)
        self.later = self.whole.place > 0
        held_out = options.held_out_episodes or options.held_out
        self.train, self.scored = split_episodes(self.whole.episode.tolist(), held_out)
        self.grid = meta.grid
        table = self.whole.where(self.later)
        sides = (torch.isin(table.episode, torch.tensor(side)) for side in (self.train, self.scored))
        self.task = make_task(table, options.target, *sides, meta.grid)
        self.test = table.of_episodes(self.scored)
        self.config = LatentActionConfig(
            latent_dim=meta.latent_dim, hidden=options.hidden, antisymmetric=True, max_views=max(4, meta.grid[0])
        )

    def batches(self, table: TransitionTable, seed: int, triplets: bool = False) -> Iterable[TransitionBatch]:
        batches = TrainingBatches(table.of_episodes(self.train), self.options.batch_size, seed, triplets=triplets)
        return (batches.batch(number) for number in range(self.options.steps))

    def fit(self, module: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> float:
        """Train with the recipe's optimizer and average; returns process seconds."""
        settings = OptimizerSettings(name="adamw", lr=self.options.lr, weight_decay=0.01, warmup_steps=50)
        optimizer, schedule = settings.build(module, self.options.steps)
        average = ExponentialMovingAverage(module, 0.99)
        start_s = time.process_time()
        for batch in batches:
            optimizer.zero_grad()
            loss(batch).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update(module)
        average.copy_to(module.eval())
        return time.process_time() - start_s


def lat_variant(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """Train one LAT and measure it."""
    changes = dict(VARIANTS[name])
    weights = [changes.pop(key, 1.0) for key in ("forward_weight", "consistency_weight")]
    first, flatten = changes.pop("first_transitions", False), changes.pop("flatten", False)
    composition = changes.pop("composition_weight", 0.0)
    config = replace(bench.config, **changes)
    torch.manual_seed(seed)
    lat = _new_lat(config, bench.whole.frames.shape[1], flatten)

    def loss(batch: TransitionBatch) -> Tensor:
        losses = transition_losses(lat, batch.z_t, batch.z_next, bench.grid)
        total = weights[0] * losses.forward + weights[1] * losses.consistency
        if composition:
            found = composition_loss(lat, batch, losses.latent_actions, bench.grid)
            total = total + composition * found
        return total

    table = bench.whole if first else bench.whole.where(bench.later)
    seconds = bench.fit(lat, loss, bench.batches(table, seed, triplets=composition > 0))
    found = _held_out(bench, lat)
    torch.manual_seed(1000 + seed)
    untrained = _new_lat(config, bench.whole.frames.shape[1], flatten)
    for key, model in (("", lat), ("untrained_", untrained)):
        score = _probe(bench.task, latent_actions(model, bench.task.table, bench.grid), bench.options.head_steps)
        found |= {f"{key}probe_r2": score[0], f"{key}probe_channels": score[1]}
        found[f"{key}curve"] = _curve(bench, latent_actions(model, bench.task.table, bench.grid))
        found |= _composition(composed(model, *_triplets(bench), bench.grid), key)
    found["first_action_rms"] = _first_action_scale(bench, lat)
    if bench.options.save_lat:
        lat.config = config.fitted_to(bench.shards.meta, bench.options.transition_frames)
        lat.save_pretrained(bench.options.save_lat / f"{name}-{seed}")
    parameters = sum(p.numel() for p in lat.parameters())
    return found | {"parameters": parameters, "train_process_s": seconds}


def _new_lat(config: LatentActionConfig, tokens: int, flatten: bool) -> LatentActionTokenizer:
    lat = LatentActionTokenizer(config)
    if flatten:
        lat.inverse_dynamics = FlattenedInverseDynamics(config, tokens)
    return lat


@torch.no_grad()
def _held_out(bench: Bench, lat: LatentActionTokenizer) -> dict[str, Any]:
    z_t, z_next = bench.test.pairs(torch.arange(len(bench.test)))
    losses = transition_losses(lat, z_t, z_next, bench.grid)
    given, half = losses.latent_actions, len(z_t) // 2
    read = read_again(lat, z_t.roll(half, dims=0), given, bench.grid)
    per_task = bench.options.episodes_per_task
    group = bench.test.episode // per_task if per_task else bench.test.episode
    return {
        "forward": float(losses.forward),
        "consistency": float(losses.consistency),
        "copy": float(copy_loss(z_t, z_next)),
        "cycle": float(cycle_loss(lat, z_t, given, losses.reversed_actions, bench.grid)),
        "transfer_r2": reading_r2(read, given),
        "transfer_shuffled_r2": reading_r2(read, given.roll(half, dims=0)),
        "dimensions": effective_dimensions(given),
        "borrowed": asdict(transfer_losses(lat, bench.test, group, bench.grid)),
    }


@torch.no_grad()
def _first_action_scale(bench: Bench, lat: LatentActionTokenizer) -> float:
    """Root mean square of the first transitions' latent actions, in deviations of the later ones."""
    actions = latent_actions(lat, bench.whole, bench.grid)
    first, later = actions[~bench.later], actions[bench.later]
    return float(((first - later.mean(0)) / later.std(0).clamp(min=1e-9)).square().mean().sqrt())


def _probe(task: ProbeTask, features: Tensor, steps: int) -> tuple[float, list[float | None]]:
    """Pooled R^2, and that of each channel, of a head with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        score = score_features(task, features, steps)
    return score.pooled_r2, list(score.r2)


def _triplets(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    """The frames a, b, c of all held-out triplets."""
    index = bench.test.continued.nonzero()[:, 0]
    return *bench.test.pairs(index), bench.test.after(index)


def _composition(found: Tensor, key: str = "") -> dict[str, float]:
    """Errors of what `composed` gave: by way of b, and by way of another triplet's."""
    whole, parts, elsewhere = found
    return {
        f"{key}composition": float(composition_error(whole, parts)),
        f"{key}composition_shuffled": float(composition_error(whole, elsewhere)),
    }


def _curve(bench: Bench, features: Tensor) -> dict[str, list[float]]:
    """Held-out R^2 of the head with labels of few training episodes, by their number: one value for each draw."""
    found: dict[str, list[float]] = {}
    task, episodes = bench.task, bench.task.table.episode
    for count in bench.options.labels:
        for draw in range(bench.options.draws):
            order = np.random.default_rng([draw, 7]).permutation(bench.train)
            labelled = task.train[torch.isin(episodes[task.train], torch.tensor(sorted(order[:count])))]
            # targets in the units of all training labels, so that every count is scored alike
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(draw)
                few = replace(task, train=labelled, seed=draw)
                score = score_features(few, features, bench.options.head_steps, batch_size=128)
            found.setdefault(str(count), []).append(score.pooled_r2)
    return found


def plain_features(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """The head on the difference of the latents, whole or under a random projection to a latent action's size."""
    table = bench.task.table
    z_t, z_next = table.pairs(torch.arange(len(table)))
    features = rearrange(z_next - z_t, "n tokens d -> n (tokens d)")
    if name == "random":
        random = torch.Generator().manual_seed(seed)
        size = bench.config.action_dim
        features = features @ torch.randn(features.shape[1], size, generator=random) / features.shape[1] ** 0.5
    score = _probe(bench.task, features, bench.options.head_steps)
    return {"probe_r2": score[0], "probe_channels": score[1], "curve": _curve(bench, features)}


def control(bench: Bench, seed: int) -> dict[str, Any]:
    """The same FDM with the action held at zero."""
    torch.manual_seed(seed)
    fdm = ForwardDynamics(bench.config)

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        z_t, z_next = batch[:2]
        transport, residual = fdm(z_t, z_t.new_zeros(len(z_t), bench.config.action_dim), bench.grid)
        return (transport.apply(z_t) + residual - z_next).square().mean()

    seconds = bench.fit(fdm, loss, bench.batches(bench.whole.where(bench.later), seed))
    with torch.no_grad():
        pair = bench.test.pairs(torch.arange(len(bench.test)))
        return {"forward": float(loss(pair)), "copy": float(copy_loss(*pair)), "train_process_s": seconds}


def frames(bench: Bench, seed: int) -> dict[str, Any]:
    """The probe's upper bound: an IDM trained on both latents with the target as its output."""
    torch.manual_seed(seed)
    score = score_frames(bench.task, bench.config, bench.options.frames_steps)
    return {"probe_r2": score.pooled_r2, "probe_channels": list(score.r2)}


def lapa(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """LAPA's quantiser on the same transitions in pixels."""
    options = bench.options
    if options.dataset is None:
        raise SystemExit("lapa needs --dataset")
    table = load_frame_table(options.latents, options.dataset, tuple(options.size), options.transition_frames)
    later = table.where(bench.later)
    config = LapaConfig(
        size=tuple(options.size),
        patch=8,
        width=options.lapa_width,
        depth=1,
        residual=name == "lapa_residual",
    )
    torch.manual_seed(seed)
    model = LapaQuantizer(config)
    used, seen = torch.zeros(config.codes, dtype=torch.long), [0]

    def loss(batch: Any) -> Tensor:
        value, index = model(*batch)
        used.add_(code_usage(index, config.codes))
        seen[0] += 1
        if seen[0] % 20 == 0:
            if seen[0] <= options.steps // 2:
                model.quantize.replace_unused(used)
            used.zero_()
        return value

    batches = PairBatches(later.of_episodes(bench.train), options.batch_size, seed)
    seconds = bench.fit(model, loss, (batches.batch(number) for number in range(options.steps)))
    found: dict[str, Any] = {}
    for key, quantised in (("", True), ("unquantised_", False)):
        features = lapa_features(model, later, quantised=quantised)
        score = _probe(bench.task, features, options.head_steps)
        found |= {f"{key}curve": _curve(bench, features)}
        found |= _composition(lapa_composed(model, later.of_episodes(bench.scored), quantised=quantised), key)
        found |= {f"{key}probe_r2": score[0], f"{key}probe_channels": score[1]}
    with torch.no_grad():
        held_out = list(PairBatches(later.of_episodes(bench.scored), 256, 0, in_order=True))
        sizes = [len(pair.x_t) for pair in held_out]
        results = [model(*pair) for pair in held_out]
        found["forward"] = float(np.average([float(r[0]) for r in results], weights=sizes))
        copies = [float((pair.x_t - pair.x_next).square().mean()) for pair in held_out]
        found["copy"] = float(np.average(copies, weights=sizes))
        found["codes_used"] = int((code_usage(torch.cat([r[1] for r in results]), config.codes) > 0).sum())
        found["sequences_used"] = len(torch.cat([r[1] for r in results]).unique(dim=0))
    if options.save_lapa:
        model.save_pretrained(options.save_lapa)
    return found | {"parameters": sum(p.numel() for p in model.parameters()), "train_process_s": seconds}


def table_of(path: Path) -> None:
    """Print the means of a file's lines over seeds and draws, with 95 % t-intervals, and differences to `base`."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    values: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for line in lines:
        for key in ("", "untrained_", "unquantised_"):
            name = f"{line['tag']} {key}{line['variant']}".strip()
            for column in ("composition", "composition_shuffled", "probe_r2", "forward", "consistency"):
                if key + column in line:
                    values.setdefault((name, column), {})[line["seed"], 0] = line[key + column]
            for count, scores in line.get(f"{key}curve", {}).items():
                for draw, score in enumerate(scores):
                    values.setdefault((name, f"labels {count}"), {})[line["seed"], draw] = score
    for (name, column), found in values.items():
        base = values.get((f"{name.rsplit(' ', 1)[0]} base".strip() if " " in name else "base", column), {})
        pairs = [found[run] - base[run] for run in found if run in base]
        told = f", minus base {_interval(pairs)}" if pairs and not name.endswith("base") else ""
        print(f"{name:<28} {column:<22} {_interval(list(found.values()))}{told}")


def _interval(values: list[float]) -> str:
    """Mean [95 % t-interval] (n)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.4f} (1 run)"
    half = T_95.get(n - 1, 1.96) * float(np.std(values, ddof=1)) / n**0.5
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}] ({n})"


def main() -> None:
    """Run the variants one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print what this file holds, and do nothing else")
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *OTHERS), default=["control", "frames", "base"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--head-steps", type=int, default=400)
    parser.add_argument("--frames-steps", type=int, default=300)
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--held-out-episodes", type=int, nargs="+")
    parser.add_argument("--episodes-per-task", type=int, default=0)
    parser.add_argument("--target", choices=("actions", "motion"), default="motion")
    parser.add_argument("--size", type=int, nargs=2, default=[64, 64], help="LAPA's frames")
    parser.add_argument("--lapa-width", type=int, default=64)
    parser.add_argument("--save-lapa", type=Path, help="folder for LAPA's quantiser")
    parser.add_argument("--save-lat", type=Path, help="folder with one folder per variant")
    parser.add_argument("--tag", default="", help="kept in every line, for example the tokenizer's name")
    parser.add_argument("--labels", type=int, nargs="+", default=[], help="training episodes with labels")
    parser.add_argument("--draws", type=int, default=3, help="of them")
    parser.add_argument("--transition-frames", type=int, default=1, help="latent frames a transition spans")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.table is not None:
        table_of(options.table)
        return
    if options.latents is None or options.out is None:
        parser.error("--latents and --out are needed")
    torch.set_num_threads(1)
    bench = Bench(options)
    for seed in options.seeds:
        for name in options.variants:
            if name in VARIANTS:
                found = lat_variant(bench, name, seed)
            elif name in ("random", "difference"):
                found = plain_features(bench, name, seed)
            else:
                found = (
                    {"control": control, "frames": frames}[name](bench, seed)
                    if name in OTHERS[:2]
                    else lapa(bench, name, seed)
                )
            line = {
                "tag": options.tag,
                "variant": name,
                "seed": seed,
                "steps": options.steps,
                "transition_frames": options.transition_frames,
            }
            line |= found
            print(json.dumps(line), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
