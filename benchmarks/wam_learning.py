"""Which couplings, stages and data make a tiny world action model drive better, at one fixed budget?

Seven questions, each a few arms that differ from the first in one thing; every arm is trained on the same data, for
the same number of world-model steps, and drives the same unseen layouts:

- `coupling`: joint | sequential
- `stages`: two stages | robot actions from the start, without latent actions | joint prediction (the paper's
  Table 4, docs/decisions/033)
- `optimizer`: the paper's Muon at its 1e-2, as the quickstart | AdamW at 1e-3
- `ahead`: nothing | layers that predict the next one and three chunks in training (docs/decisions/081)
- `delay`: nothing | up to half a latent frame of actions given as committed in training (docs/decisions/082)
- `aim`: what lets the same budget hit small objects: noisier or weightier actions, demonstrations pushed aside all the
  way, disturbed by noise instead, or not at all, half the batch for twice the steps
- `tasks`: why drawer-open, door-lock and push fail more often: 64 pixels and one camera, against 128 pixels, a second
  camera on the gripper, twice the demonstrations, four latent frames of history, chunks of two latent frames
- `tokenizers`: RepViTok aligned with a network | ViTok | that network's own features, squeezed to 48 or 96 channels or
  as they are | Wan2.2's VAE; `--network` names the network (timm's name, `--stage` of a convolutional one),
  `--weights` its file; Wan's arm is there with `--wan` FOLDER alone
- `tuning`: stage two with the tokenizer frozen | its last block, or both, trained with the policy

    uv run python benchmarks/wam_learning.py --question coupling stages --run RUN --out OUT --seeds 0 1 2
    uv run python benchmarks/wam_learning.py --question tasks coupling stages --out OUT --seeds 0 1 2

RUN is the folder of a finished `repwam quickstart`, whose tasks, demonstrations, tokenizer and latents are used.
Without it the tasks are the three hard ones, and everything is collected and trained here, seed by seed. Questions
asked together share their first arm. `--steps`, `--demonstrations` and `--episodes` shrink the budget, `--arms`
picks arms. Seed by seed, every arm; finished parts are kept in OUT, so an interrupted run goes on. Prints a row per
training in Markdown, then each arm over all seeds: successes with Wilson's 95 % interval, and with Newcombe's the
difference from the first arm.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tokenizer_quality
import torch
from repvitok.data import LeRobotReader
from repvitok.data.split import split_episodes
from repvitok.model import load_tokenizer
from repvitok.training.teacher import ConvNetTeacher, TimmTeacher
from repwam_core.cli import main as repwam
from repwam_core.policy import BatchedPolicy, evaluate_open_loop
from repwam_core.quickstart import work
from repwam_core.quickstart.config import QuickstartConfig, load_config
from repwam_core.quickstart.runner import StageResult, StageRunner
from repwam_core.sim.base import EVALUATION_SEEDS_FROM, evaluation_seeds
from repwam_core.sim.collect import NOISE_MODES, Perturbation, collect
from repwam_core.sim.evaluate import evaluate
from repwam_core.sim.metaworld import MetaWorldSettings, instruction
from repwam_core.sim.results import difference_interval, success_rates, wilson_interval

HARD_TASKS = ("drawer-open", "door-lock", "push")
PROBED_CLIPS = 200
"""Training clips at most, of the ridge probes."""
MEASURED_EPISODES = 6
"""Held-out episodes for the imagined video's PSNR."""


@dataclass(frozen=True)
class Arm:
    """What one arm does otherwise.

    Attributes:
        wam: fields of the model's config.
        fit: overrides of both stages' recipes.
        steps: times as many steps of both.
        pretrain: whether there is a first stage; without one its steps are spent on the second.
        cameras, size: of the data; None is the quickstart's.
        demonstrations: times as many of them.
        noise: how they are disturbed; None is the quickstart's way.
        tokenizer: overrides of the tokenizer's recipe, in which NETWORK is `--network` as a teacher.
        wan: take the VAE of `--wan` in the tokenizer's place.
        tune: blocks of the tokenizer that stage two trains.
    """

    wam: tuple[tuple[str, str], ...] = ()
    fit: tuple[str, ...] = ()
    steps: int = 1
    pretrain: bool = True
    cameras: tuple[str, ...] = ("corner2",)
    size: tuple[int, int] | None = None
    demonstrations: int = 1
    noise: Perturbation | None = None
    tokenizer: tuple[str, ...] = ()
    wan: bool = False
    tune: int = 0


FROZEN = ("--model.features=NETWORK", "--model.weights.align=0", "--model.teacher=null")

QUESTIONS: dict[str, dict[str, Arm]] = {
    "coupling": {"joint": Arm(), "sequential": Arm(wam=(("coupling", "sequential"),))},
    "stages": {
        "two stages": Arm(),
        "without latent actions": Arm(pretrain=False),
        "joint prediction": Arm(wam=(("joint_actions", "4"),)),
    },
    "optimizer": {
        "Muon": Arm(),
        "AdamW": Arm(fit=("--model.optimizer.name=adamw", "--model.optimizer.lr=1e-3")),
    },
    "tasks": {
        "as the quickstart": Arm(),
        "128 pixels": Arm(size=(128, 128)),
        "gripper camera": Arm(cameras=("corner2", "gripper")),
        "twice the demonstrations": Arm(demonstrations=2),
        "history of 4 frames": Arm(wam=(("window", "4"),)),
        "chunks of 2 frames": Arm(fit=("--model.chunk_sizes=[2,2]", "--model.plan.chunk_frames=2")),
    },
    "ahead": {
        "nothing": Arm(),
        "one chunk ahead": Arm(fit=("--model.loss.look_ahead=1",)),
        "three chunks ahead": Arm(fit=("--model.loss.look_ahead=3",)),
    },
    "delay": {"no delay": Arm(), "up to two steps of delay": Arm(fit=("--model.loss.delay=2",))},
    "aim": {
        "as the quickstart": Arm(),
        "noisier actions": Arm(fit=("--model.loss.action_shift=5.0",)),
        "half the batch, twice the steps": Arm(fit=("--data.batch_size=4",), steps=2),
        "undisturbed": Arm(noise=NOISE_MODES["none"]),
        "gaussian noise": Arm(noise=NOISE_MODES["gaussian"]),
        "actions weigh four times": Arm(fit=("--model.loss.action_weight=4.0",)),
        "four pushes all the way, actions weigh four times": Arm(
            fit=("--model.loss.action_weight=4.0",), noise=Perturbation(pushes=4, push_within_steps=64)
        ),
    },
    "tokenizers": {
        "RepViTok": Arm(tokenizer=("--model.teacher=NETWORK",)),
        "ViTok": Arm(tokenizer=("--model.weights.align=0", "--model.teacher=null")),
        "features, 48": Arm(tokenizer=(*FROZEN, "--model.tokenizer.latent_dim=48")),
        "features, 96": Arm(tokenizer=(*FROZEN, "--model.tokenizer.latent_dim=96")),
        "features, 48, learned": Arm(tokenizer=(*FROZEN, "--model.tokenizer.latent_dim=48", "--model.squeeze=learned")),
        "raw features": Arm(tokenizer=(*FROZEN, "--model.squeeze=none")),
        "Wan2.2": Arm(wan=True),
    },
    "tuning": {
        "frozen tokenizer": Arm(),
        "last block tuned": Arm(tune=1),
        "both blocks tuned": Arm(tune=2),
    },
}
BASE_WAM = {"coupling": "joint", "window": "1", "action_history": "false", "state_token": "true"}


@dataclass(frozen=True)
class Data:
    """Where an arm's demonstrations, tokenizers and labelled latents lie, and which stage made them."""

    dataset: Path
    tokenizer: Path
    lat: Path
    latents: Path
    digest: str
    quality: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Bench:
    """One invocation."""

    options: argparse.Namespace
    config: QuickstartConfig
    runner: StageRunner

    def stage(self, name: str, work: Callable[[Path], dict[str, Any]], inputs: dict[str, str], **settings: Any):
        """Run a part once."""
        return self.runner.run(name, work, settings=settings, inputs=inputs)


def main() -> None:
    """Train and evaluate every arm with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", choices=list(QUESTIONS), nargs="+", required=True)
    parser.add_argument("--run", type=Path, help="folder of a finished quickstart (default: the hard tasks)")
    parser.add_argument("--tasks", nargs="+", help="the run's, if they are not the quickstart's own")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="world-model steps in all (default: the quickstart's)")
    parser.add_argument("--demonstrations", type=int, help="per hard task (default: the quickstart's)")
    parser.add_argument("--episodes", type=int, default=20, help="unseen layouts per task")
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEEDS_FROM, help="the first of their seeds")
    parser.add_argument("--arms", nargs="+", help="names of arms (default: all)")
    parser.add_argument("--network", default="tf_efficientnet_lite0", help="timm's name, of --question tokenizers")
    parser.add_argument("--stage", type=int, help="of a convolutional network; none for a vision transformer")
    parser.add_argument("--weights", type=Path, help="the network's weights, .safetensors")
    parser.add_argument("--wan", type=Path, help="folder of Wan2.2's VAE")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    arms = _chosen_arms(options)
    bench = Bench(options, _config(options), StageRunner(options.out))
    print("| arm | seed | val video | val action | imagined PSNR, dB | copied | successes | |")
    print("|---|---|---|---|---|---|---|---|")
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in arms}
    qualities: list[list[object]] = []
    for seed in options.seeds:
        for name, arm in arms.items():
            values = run_arm(bench, name, arm, seed)
            counts[name].append(values["counted"])
            print(_row(name, seed, values), flush=True)
            if "quality" in values:
                qualities.append([name, seed, *(f"{value:.3f}" for value in values["quality"].values())])
    _print_summary(counts)
    if qualities:
        print("\n| arm | seed | " + " | ".join(QUALITIES) + " |\n" + "|---" * (2 + len(QUALITIES)) + "|")
        print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in qualities))


def _chosen_arms(options: argparse.Namespace) -> dict[str, Arm]:
    """The arms of the questions, each training once: the first arms of all questions are one."""
    if options.run is not None and ("tasks" in options.question or options.demonstrations is not None):
        raise SystemExit("--run gives the data; --question tasks and --demonstrations collect their own, without it")
    arms: dict[str, Arm] = {}
    for question in options.question:
        arms |= {name: arm for name, arm in QUESTIONS[question].items() if arm not in arms.values()}
    if "tokenizers" in options.question:
        if options.run is not None or options.weights is None:
            raise SystemExit("--question tokenizers trains its own tokenizers: give --weights, and no --run")
        if options.wan is None:
            arms = {name: arm for name, arm in arms.items() if not arm.wan}
    if unknown := set(options.arms or ()) - set(arms):
        raise SystemExit(f"--arms: expected some of {list(arms)}, got {sorted(unknown)}")
    return {name: arm for name, arm in arms.items() if not options.arms or name in options.arms}


def run_arm(bench: Bench, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, measure it and drive it; returns what the table shows."""
    config = _with_arm(bench.config, arm)
    settings = MetaWorldSettings(cameras=arm.cameras, size=config.size, same_scene=_pair(config))
    data = _given(bench.options.run) if bench.options.run else _made(bench, config, settings, arm, seed)
    about = {"arm": str(arm), "steps": str(config.steps), "seed": seed}
    trained = bench.stage(
        f"train-{_slug(name, arm)}",
        partial(_train, config=config, arm=arm, data=data, seed=seed),
        {"data": data.digest},
        **about,
    )
    about_run = {"config": config, "data": data, "settings": settings, "bench": bench}
    measure = partial(_measure, policy=trained.folder / "policy", **about_run)
    layouts = {"episodes": bench.options.episodes, "first_seed": bench.options.first_seed}
    measured = bench.stage(f"measure-{_slug(name, arm)}", measure, {"policy": trained.digest}, **layouts, **about)
    quality = {"quality": dict(data.quality)} if data.quality else {}
    return {**trained.summary, **measured.summary, **quality}


def _train(folder: Path, *, config: QuickstartConfig, arm: Arm, data: Data, seed: int) -> dict[str, Any]:
    """Both stages, or the second alone for as many steps."""
    common = {"repwam": repwam, "config": config, "seed": seed, "latents": data.latents}
    fields = ", ".join(f"{key}: {value}" for key, value in {**BASE_WAM, **dict(arm.wam)}.items())
    wam = f"--model.wam={{{fields}}}"
    steps, pretrained = config.steps.pretrain + config.steps.adapt, None
    if arm.pretrain:
        (folder / "first").mkdir(exist_ok=True)
        work.pretrain(folder / "first", overrides=(wam, *arm.fit), **common)
        steps, pretrained = config.steps.adapt, folder / "first" / "wam"
    return work.adapt(
        folder, steps=steps, pretrained=pretrained, tokenizer=data.tokenizer, lat=data.lat,
        overrides=(*(arm.fit if arm.pretrain else (wam, *arm.fit)), *_tuning(arm, data)), **common,
    )  # fmt: skip


def _tuning(arm: Arm, data: Data) -> tuple[str, ...]:
    """The overrides of stage two for an arm that tunes the tokenizer."""
    tuned = {"tokenizer": str(data.tokenizer), "dataset": str(data.dataset), "last_k": arm.tune}
    return (f"--model.tune_tokenizer={json.dumps(tuned)}",) if arm.tune else ()


def _measure(
    folder: Path, *, policy: Path, config: QuickstartConfig, data: Data, settings: MetaWorldSettings, bench: Bench
) -> dict[str, Any]:
    """Imagined video on held-out episodes, and closed loop on unseen layouts."""
    reader = LeRobotReader(data.dataset)
    held_out = split_episodes([info.index for info in reader.episodes], config.held_out)[1][:MEASURED_EPISODES]
    imagining = BatchedPolicy.from_pretrained(policy, video="imagine")
    psnr_db = evaluate_open_loop(imagining, reader, held_out).psnr()
    seeds = evaluation_seeds(bench.options.episodes, bench.options.first_seed)
    results = evaluate(
        BatchedPolicy.from_pretrained(policy), config.all_tasks, seeds, settings=settings,
        instruction_of=instruction, execute=config.execute, batch_size=50,
        workers=bench.options.workers, out=folder,
    )  # fmt: skip
    rates = {task: f"{rate.successes}/{rate.episodes}" for task, rate in success_rates(results).items()}
    return {"psnr": psnr_db, "rates": rates, "counted": (sum(result.success for result in results), len(results))}


def _made(bench: Bench, config: QuickstartConfig, settings: MetaWorldSettings, arm: Arm, seed: int) -> Data:
    """Demonstrations, tokenizer, latents and latent actions of one data setting, shared by the arms that use it."""
    about = {"tasks": config.tasks, "size": config.size, "cameras": settings.cameras, "episodes": config.episodes}
    noise = NOISE_MODES[config.noise] if arm.noise is None else arm.noise
    about |= {"noise": noise.to_dict(), "seed": seed, "steps": [config.steps.repvitok, config.steps.latent_action]}

    def part(name: str, work: Callable[..., dict[str, Any]], *before: StageResult, **given: Any) -> StageResult:
        return bench.stage(name, partial(work, **given), {stage.name: stage.digest for stage in before}, **about)

    collected = part(
        "collect", _collect, config=config, settings=settings, noise=noise, seed=seed, workers=bench.options.workers
    )
    dataset, common = collected.folder / "dataset", {"config": config, "seed": seed}
    compared = bool(arm.tokenizer) or arm.wan
    if compared:
        about["tokenizer"] = str(bench.options.wan) if arm.wan else _overrides(bench.options, arm)
    if arm.wan:
        tokenizer = part("tokenizer", _copied, collected, source=bench.options.wan)
    else:
        overrides = _overrides(bench.options, arm)
        tokenizer = part("tokenizer", work.train_tokenizer, collected, dataset=dataset, overrides=overrides, **common)
    folder = tokenizer.folder / "tokenizer"
    encoded = part("encode", work.encode, tokenizer, config=config, dataset=dataset, tokenizer=folder)
    lat = part("lat", work.train_latent_actions, encoded, latents=encoded.folder / "latents", **common)
    labelled = part(
        "label", work.label, encoded, lat, config=config, lat=lat.folder / "lat", latents=encoded.folder / "latents"
    )
    data = Data(dataset, folder, lat.folder / "lat", labelled.folder / "latents", labelled.digest)
    if not compared:
        return data
    measured = part("quality", _quality, labelled, data=data, config=config, options=bench.options)
    return replace(data, quality=tuple(measured.summary.items()))


def _overrides(options: argparse.Namespace, arm: Arm) -> tuple[str, ...]:
    """An arm's overrides of the tokenizer's recipe, with the network in them."""
    kind = "TimmTeacher" if options.stage is None else "ConvNetTeacher"
    arguments = {"name": options.network, "weights_path": str(options.weights)}
    arguments |= {} if options.stage is None else {"stage": options.stage}
    network = json.dumps({"class_path": f"repvitok.training.teacher.{kind}", "init_args": arguments})
    return tuple(override.replace("NETWORK", network) for override in arm.tokenizer)


def _copied(folder: Path, *, source: Path) -> dict[str, Any]:
    shutil.copytree(source, folder / "tokenizer")
    return {}


QUALITIES = ("PSNR, dB", "SSIM", "R^2 of the network's features", "pooled R^2 of actions from latent actions")


def _quality(folder: Path, *, data: Data, config: QuickstartConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What the latents hold: pixels, the network's features by a ridge probe, and actions through latent actions."""
    del folder
    asked = argparse.Namespace(dataset=data.dataset, size=config.size, held_out=config.held_out, clips=PROBED_CLIPS)
    train, held_out = tokenizer_quality.load_splits(asked)
    arguments = {"name": options.network, "weights_path": str(options.weights)}
    network = TimmTeacher(**arguments) if options.stage is None else ConvNetTeacher(**arguments, stage=options.stage)
    tokenizer = load_tokenizer(data.tokenizer)
    with torch.no_grad():
        found = [tokenizer.decode(tokenizer.encode(clips), config.size) for clips in held_out.clips.split(8)]
        quality = tokenizer_quality.quality(torch.cat(found), held_out.clips)
        codes = [tokenizer_quality.later_codes(tokenizer, split.clips) for split in (train, held_out)]
        grid = tokenizer.grid(*config.size)
        targets = [tokenizer_quality.later_features(network, split.clips, grid) for split in (train, held_out)]
        r2 = tokenizer_quality.probe(*codes, *targets, train.episode)
    path = data.latents.parent / "probe.json"
    actions = json.loads(path.read_text())["latent_action"]["pooled_r2"] if path.is_file() else float("nan")
    return dict(zip(QUALITIES, (*quality, r2, actions), strict=True))


def _collect(
    folder: Path, *, config: QuickstartConfig, settings: MetaWorldSettings, noise: Perturbation, seed: int, workers: int
) -> dict[str, Any]:
    collect(
        folder / "dataset", config.tasks, episodes_per_task=config.episodes, seed=seed, settings=settings, noise=noise,
        workers=workers,
    )  # fmt: skip
    return {}


def _given(run: Path) -> Data:
    """The data of a finished quickstart."""
    latents = _one(run, "label-*/latents")
    folders = [_one(run, pattern) for pattern in ("collect-*/dataset", "tokenizer-*/tokenizer", "latent-actions-*/lat")]
    return Data(*folders, latents, latents.parent.name)


def _one(root: Path, pattern: str) -> Path:
    finished = [path for path in root.glob(pattern) if (path.parent / "stage.json").exists()]
    if len(finished) != 1:
        raise SystemExit(f"{root}: expected one finished {pattern}, found {len(finished)}; run the quickstart first")
    return finished[0]


def _config(options: argparse.Namespace) -> QuickstartConfig:
    """The quickstart's config, on the hard tasks unless a run gives others, with the asked number of steps."""
    tasks = options.tasks or (None if options.run else list(HARD_TASKS))
    demonstrations = None if options.demonstrations is None else [str(options.demonstrations)]
    given = argparse.Namespace(
        suite=None, tasks=tasks, episodes=demonstrations, eval_episodes=None, size=None, budget=1.0, dataset=None,
        preset=None,
    )  # fmt: skip
    config = load_config(given)
    if options.steps is None:
        return config
    share = options.steps / (config.steps.pretrain + config.steps.adapt)
    pretrain = round(share * config.steps.pretrain)
    return replace(config, steps=replace(config.steps, pretrain=pretrain, adapt=options.steps - pretrain))


def _with_arm(config: QuickstartConfig, arm: Arm) -> QuickstartConfig:
    steps = replace(config.steps, pretrain=arm.steps * config.steps.pretrain, adapt=arm.steps * config.steps.adapt)
    return replace(config, size=arm.size or config.size, episodes=arm.demonstrations * config.episodes, steps=steps)


def _pair(config: QuickstartConfig) -> tuple[tuple[str, ...], ...]:
    return (config.same_scene,) if config.same_scene else ()


def _slug(name: str, arm: Arm) -> str:
    return "base" if arm == Arm() else name.replace(" ", "-")


def _row(name: str, seed: int, values: dict[str, Any]) -> str:
    psnr, counted = values["psnr"], values["counted"]
    told = ", ".join(f"{task} {rate}" for task, rate in values["rates"].items())
    numbers: Sequence[str] = [f"{values[key]:.4f}" for key in ("val/video", "val/action")]
    video = [f"{psnr[key]:.2f}" for key in ("imagined", "copied")] if psnr else ["", ""]
    return "| " + " | ".join([name, str(seed), *numbers, *video, f"{counted[0]}/{counted[1]}", told]) + " |"


def _print_summary(counts: dict[str, list[tuple[int, int]]]) -> None:
    """Successes of each arm over all its seeds, and their difference from the first arm's."""
    print("\n| arm | seeds | successes | 95 %, points | from the first arm, points |\n|---|---|---|---|---|")
    pooled = {name: (sum(s for s, _ in each), sum(n for _, n in each)) for name, each in counts.items()}
    first, *_ = pooled.values()
    for name, (successes, episodes) in pooled.items():
        low, high = (100 * bound for bound in wilson_interval(successes, episodes))
        apart = 100 * (successes / episodes - first[0] / first[1])
        down, up = (100 * bound for bound in difference_interval((successes, episodes), first))
        cells = (name, len(counts[name]), f"{successes}/{episodes}", f"{low:.0f} to {high:.0f}")
        last = "" if name == next(iter(pooled)) else f"{apart:+.0f} ({down:+.0f} to {up:+.0f})"
        print("| " + " | ".join(map(str, (*cells, last))) + " |")


if __name__ == "__main__":
    main()
