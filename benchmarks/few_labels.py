"""What pretraining on video without robot actions buys a tiny policy that has few labelled demonstrations.

Video of many tasks, the tokenizer, and the latent action tokenizer are shared by all arms and know no robot action.
Then each arm learns from 1, 5 or 10 labelled demonstrations of each of a few tasks and drives the same unseen layouts:

- `latent actions`: pretrained on the video and its latent actions, as the paper's first stage
- `video alone`: pretrained on the video; latent actions are zeros and weigh a millionth in the loss
- `none`: not pretrained, as many steps of adaptation
- `none, all steps`: not pretrained, the pretrained arms' steps of both stages all spent on adaptation

    uv run python benchmarks/few_labels.py --out OUT --labels 5 1 10 --seeds 0

A seed chooses the labelled demonstrations (those of fewer labels are among those of more) and every draw of both
stages; with `--pretrained-by` all seeds start from one seed's pretrained models. Action and state statistics are of the
labelled demonstrations alone, and pretraining sees no robot state. A tenth of all episodes is held out of everything;
on those of the adapted tasks planned actions are compared with the recorded ones: 1 is as far off as always saying the
mean of these.

Finished parts are kept in OUT, so an interrupted run goes on, and a later one may ask for more. Prints Markdown, and
keeps it in OUT/table-*.md: a row per policy; each arm over all seeds, with Wilson's 95 % interval; and every two arms
on the same layouts, told the same: how many only one of them solved, and the sign test's p.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from repvitok.data import LatentShards, LeRobotReader
from repvitok.data.shards import write_labels
from repvitok.data.split import format_episodes, split_episodes
from repvitok.runtime.files import write_text_atomic
from repwam_core.cli import main as repwam
from repwam_core.policy import BatchedPolicy, evaluate_open_loop
from repwam_core.quickstart import work
from repwam_core.quickstart.config import QuickstartConfig, Steps, load_config
from repwam_core.quickstart.runner import StageResult, StageRunner
from repwam_core.sim.base import EVALUATION_SEEDS_FROM, evaluation_seeds
from repwam_core.sim.collect import read_plan
from repwam_core.sim.evaluate import evaluate
from repwam_core.sim.results import EpisodeResult, load_results, success_rates, wilson_interval

ADAPTED = ("button-press-topdown", "handle-press-side", "window-open", "drawer-open", "door-lock")
WATCHED = ("button-press", "handle-press", "window-close", "door-unlock", "faucet-open")
"""Further tasks whose video is pretrained on."""
LATENT, VIDEO, NONE, NONE_ALL = "latent actions", "video alone", "none", "none, all steps"
ARMS = (LATENT, VIDEO, NONE, NONE_ALL)
WITHOUT_STATE = "--model.use_state=false"
"""Of pretraining: who has video alone has no robot state either."""


def main() -> None:
    """Make what all arms share, then train, drive and compare every arm."""
    options = _options()
    config, runner = _config(options), StageRunner(options.out)
    bench = Bench(options, config, runner)
    cells = [(labels, seed, arm) for seed in options.seeds for labels in options.labels for arm in options.arms]
    done: list[Cell] = []
    print("\n".join(HEADER))
    for labels, seed, arm in cells:
        done.append(bench.cell(arm, labels, seed))
        print(done[-1].row(), flush=True)
        text = "\n".join([*HEADER, *(cell.row() for cell in done), "", *summary(done), "", *paired(done), ""])
        write_text_atomic(options.out / f"table-{'-'.join(map(str, options.seeds))}.md", text)
    print("\n".join(["", *summary(done), "", *paired(done)]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(ADAPTED), help="that are adapted to and driven")
    parser.add_argument("--watched", nargs="*", default=list(WATCHED), help="further ones whose video is pretrained on")
    parser.add_argument("--demonstrations", type=int, default=44, help="per task, most of them without labels")
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 1, 10], help="labelled ones per adapted task")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pretrained-by", type=int, help="seed of the pretrained models (default: each seed its own)")
    parser.add_argument(
        "--steps", type=int, nargs=4, default=[700, 400, 800, 400],
        metavar=("TOKENIZER", "LAT", "PRETRAIN", "ADAPT"), help="of the four trainings (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=10, help="unseen layouts per task")
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEEDS_FROM, help="the first of their seeds")
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def _config(options: argparse.Namespace) -> QuickstartConfig:
    """The quickstart's, with these tasks, demonstrations and steps."""
    given = argparse.Namespace(
        suite=None, tasks=[*options.tasks, *options.watched], episodes=[str(options.demonstrations)],
        eval_episodes=None, size=None, budget=1.0, dataset=None, preset=None,
    )  # fmt: skip
    return replace(load_config(given), steps=Steps(*options.steps))


class Bench:
    """The parts of one invocation, each a stage that is made once.

    Attributes:
        dataset, tokenizer, lat: folders that all arms share.
        latents: the labelled latents; `unlabelled`, those with zeros for latent actions.
    """

    def __init__(self, options: argparse.Namespace, config: QuickstartConfig, runner: StageRunner) -> None:
        self.options, self.config, self.runner = options, config, runner
        config, about = self.config, {"seed": 0, "held_out": config.held_out}
        collected = runner.run(
            "collect",
            partial(work.collect_demonstrations, config=config, seed=0, workers=options.workers),
            settings={"tasks": config.tasks, "episodes": config.episodes, "size": config.size, "noise": config.noise},
            inputs={},
        )
        self.dataset, common = collected.folder / "dataset", {"config": config, "seed": 0}
        tokenizer = self._stage(
            "tokenizer", work.train_tokenizer, [collected], {"steps": config.steps.repvitok, **about},
            dataset=self.dataset, **common,
        )  # fmt: skip
        self.tokenizer = tokenizer.folder / "tokenizer"
        encoded = self._stage(
            "encode", work.encode, [tokenizer], {"offsets": config.offsets},
            config=config, dataset=self.dataset, tokenizer=self.tokenizer,
        )  # fmt: skip
        latents = encoded.folder / "latents"
        lat = self._stage(
            "lat", work.train_latent_actions, [encoded], {"steps": config.steps.latent_action, **about},
            latents=latents, **common,
        )  # fmt: skip
        self.lat = lat.folder / "lat"
        self.labelled = self._stage(
            "label", work.label, [encoded, lat], {}, config=config, lat=self.lat, latents=latents
        )
        self.zeros = self._stage("zeros", _zero_labels, [encoded], {}, latents=latents)
        self.latents = self.labelled.folder / "latents"
        task_of = [config.tasks[episode % len(config.tasks)] for episode in range(len(config.tasks) * config.episodes)]
        train, held_out = split_episodes(range(len(task_of)), config.held_out)
        self.of_task = {task: [episode for episode in train if task_of[episode] == task] for task in options.tasks}
        self.measured = [episode for episode in held_out if task_of[episode] in options.tasks]
        if read_plan(self.dataset).tasks != tuple(config.tasks):
            raise SystemExit(f"{self.dataset}: its tasks are in another order than {config.tasks}")

    def _stage(self, name: str, work: Any, before: Sequence[StageResult], about: dict[str, Any], **given: Any) -> Any:
        """Run a part once; its inputs are the parts before it."""
        return self.runner.run(
            name, partial(work, **given), settings=about, inputs={stage.name: stage.digest for stage in before}
        )

    def cell(self, arm: str, labels: int, seed: int) -> Cell:
        """One policy: trained, measured in open loop, driven."""
        options, steps = self.options, self.config.steps
        pretrained = self._pretrained(arm, seed if options.pretrained_by is None else options.pretrained_by)
        chosen = labelled_episodes(self.of_task, labels, seed)
        about = {"labelled": chosen, "seed": seed, "steps": steps.adapt + (steps.pretrain if arm == NONE_ALL else 0)}
        before = [self.labelled, *([pretrained] if pretrained else [])]
        adapted = self._stage(
            f"adapt-{_slug(arm)}", self._adapt, before, about,
            seed=seed, steps=about["steps"], chosen=chosen, pretrained=pretrained,
        )  # fmt: skip
        policy = adapted.folder / "policy"
        opened = self._stage(
            "openloop", self._open_loop, [adapted], {"episodes": self.measured, "of": "mean"}, policy=policy
        )
        layouts = {"tasks": options.tasks, "seeds": [options.first_seed, options.episodes]}
        driven = self._stage("drive", self._drive, [adapted], layouts, policy=policy)
        results = load_results(driven.folder / "results.json")[0]
        return Cell(arm, labels, seed, about["steps"], opened.summary["action_error"], results)

    def _pretrained(self, arm: str, seed: int) -> StageResult | None:
        """Stage one, on latent actions or on video alone."""
        if arm in (NONE, NONE_ALL):
            return None
        made, overrides = (self.labelled, []) if arm == LATENT else (self.zeros, ["--model.loss.action_weight=1e-6"])
        overrides += [WITHOUT_STATE]
        about = {"steps": self.config.steps.pretrain, "seed": seed, "overrides": overrides}
        return self._stage(
            f"pretrain-{_slug(arm)}", work.pretrain, [made], about, repwam=repwam, config=self.config,
            seed=seed, latents=made.folder / "latents", overrides=overrides,
        )  # fmt: skip

    def _adapt(
        self, folder: Path, *, seed: int, steps: int, chosen: Sequence[int], pretrained: StageResult | None
    ) -> dict[str, Any]:
        """Stage two on the labelled demonstrations, the only ones that are trained on or counted in statistics."""
        others = sorted(set(range(len(self.config.tasks) * self.config.episodes)) - set(chosen))
        overrides = [f"--data.held_out={format_episodes(others)}", "--data.val_segments=8"]
        if pretrained is None:
            read = [yaml.safe_load(file.read_text())["model"] for file in self.config.recipe_files("pretrain")]
            overrides += [f"--model.wam={json.dumps(read[0]['wam'])}"]
        return work.adapt(
            folder, repwam=repwam, config=self.config, seed=seed, steps=steps, latents=self.latents,
            pretrained=pretrained.folder / "wam" if pretrained else None, tokenizer=self.tokenizer, lat=self.lat,
            overrides=overrides,
        )  # fmt: skip

    def _open_loop(self, folder: Path, *, policy: Path) -> dict[str, Any]:
        """What planned actions are off by on held-out demonstrations, as a share of what their mean is off by."""
        del folder
        opened = evaluate_open_loop(BatchedPolicy.from_pretrained(policy), LeRobotReader(self.dataset), self.measured)
        real, predicted = (
            np.concatenate([getattr(episode, name) for episode in opened.episodes]) for name in ("real", "predicted")
        )
        of_mean = np.abs(real - real.mean(axis=0)).mean(axis=0)
        moves = of_mean > 0
        channels = np.abs(real - predicted).mean(axis=0)[moves] / of_mean[moves]
        return {"action_error": float(channels.mean()), "channels": channels.tolist(), "episodes": len(opened.episodes)}

    def _drive(self, folder: Path, *, policy: Path) -> dict[str, Any]:
        options = self.options
        seeds = evaluation_seeds(options.episodes, options.first_seed)
        results = evaluate(
            BatchedPolicy.from_pretrained(policy), options.tasks, seeds, settings=work.settings_of(self.config),
            execute=self.config.execute, batch_size=50, workers=options.workers, out=folder,
        )  # fmt: skip
        return {"successes": sum(result.success for result in results), "episodes": len(results)}


def _zero_labels(folder: Path, *, latents: Path) -> dict[str, Any]:
    """The latents with zeros for latent actions."""
    (folder / "latents").mkdir(exist_ok=True)
    shards = LatentShards(latents, labels=False)
    write_labels(shards, folder / "latents", "zeros", lambda info: np.zeros((info.frames - 1, 4), np.float32))
    return {}


def labelled_episodes(of_task: dict[str, list[int]], labels: int, seed: int) -> list[int]:
    """The episodes that seed `seed` labels: the first ones of each task's in an order of its own, sorted.

    Args:
        of_task: the episodes that may be, by task.
        labels: how many of each task.
        seed: chooses the order.
    """
    chosen: list[int] = []
    for number, (task, episodes) in enumerate(of_task.items()):
        if labels > len(episodes):
            raise SystemExit(f"--labels: {task} has {len(episodes)} demonstrations that are not held out, got {labels}")
        order = np.random.default_rng((seed, number)).permutation(len(episodes))
        chosen += [episodes[place] for place in order[:labels]]
    return sorted(chosen)


class Cell:
    """One policy's numbers."""

    def __init__(
        self, arm: str, labels: int, seed: int, steps: int, error: float, results: Sequence[EpisodeResult]
    ) -> None:
        self.arm, self.labels, self.seed, self.steps, self.error = arm, labels, seed, steps, error
        self.solved = {(labels, seed, result.task, result.seed): result.success for result in results}
        self.rates = success_rates(results)

    def row(self) -> str:
        """A line of the first table."""
        told = ", ".join(f"{task} {rate.successes}" for task, rate in self.rates.items())
        cells = (self.labels, self.seed, self.arm, self.steps, f"{self.error:.3f}", _rate(self.solved), told)
        return _line(cells)


HEADER = (
    "| labels a task | seed | pretraining | steps of adaptation | action error, open loop | solved | by task |",
    "|---|---|---|---|---|---|---|",
)


def summary(cells: Sequence[Cell]) -> list[str]:
    """Each arm at each number of labels, over all seeds."""
    lines = ["| labels a task | pretraining | seeds | action error | solved |", "|---|---|---|---|---|"]
    for labels, arm in dict.fromkeys((cell.labels, cell.arm) for cell in cells):
        own = [cell for cell in cells if (cell.labels, cell.arm) == (labels, arm)]
        error = np.mean([cell.error for cell in own])
        solved = {key: value for cell in own for key, value in cell.solved.items()}
        lines.append(_line((labels, arm, len(own), f"{error:.3f}", _rate(solved))))
    return lines


def paired(cells: Sequence[Cell]) -> list[str]:
    """Every two arms on the layouts that both have driven, from as many labels by the same seed."""
    lines = ["| labels a task | first | second | layouts | only the first | only the second | sign test p |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for labels in dict.fromkeys(cell.labels for cell in cells):
        arms: dict[str, dict[Any, bool]] = {}
        for cell in cells:
            if cell.labels == labels:
                arms.setdefault(cell.arm, {}).update(cell.solved)
        for first, second in combinations(arms, 2):
            shared = [(solved, arms[second][key]) for key, solved in arms[first].items() if key in arms[second]]
            won, lost = sum(a and not b for a, b in shared), sum(b and not a for a, b in shared)
            lines.append(_line((labels, first, second, len(shared), won, lost, f"{sign_test(won, lost):.3f}")))
    return lines


def sign_test(won: int, lost: int) -> float:
    """Two-sided p of `won` against `lost` under fair coins (exact McNemar); 1 where there are none."""
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _slug(arm: str) -> str:
    return arm.replace(",", "").replace(" ", "-")


def _rate(solved: dict[Any, bool]) -> str:
    low, high = (100 * bound for bound in wilson_interval(sum(solved.values()), len(solved)))
    share = 100 * sum(solved.values()) / len(solved)
    return f"{sum(solved.values())}/{len(solved)}, {share:.0f} % ({low:.0f} to {high:.0f})"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
