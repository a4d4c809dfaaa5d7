"""What each stage does in its folder: training by the command line a user would type for it alone, then closed loop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latent_action.cli import main as latent_action
from repvitok.cli import main as repvitok
from repvitok.runtime.checkpointing import LAST
from repvitok.runtime.files import write_json_atomic
from repvitok.runtime.progress import read_curves

from repwam_core.policy.policy import BatchedPolicy
from repwam_core.quickstart.config import QuickstartConfig
from repwam_core.sim.base import SimSettings, evaluation_seeds, find_suite
from repwam_core.sim.collect import NOISE_MODES, collect
from repwam_core.sim.evaluate import FILMS_FILE, RESULTS_FILE, Baseline, FilmedOutcomes, evaluate, run_baseline
from repwam_core.sim.results import EpisodeResult, load_films, load_results, success_rates

Main = Callable[[Sequence[str] | None], int]
FIT = "fit"
"""Folder of a training run inside its stage's folder: loss curves, config.yaml, last.ckpt."""


class StageFailed(SystemExit):
    """A command ended with a non-zero exit code; it has printed why."""


def call(main: Main, *arguments: object) -> None:
    """Run a command in this process.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it.
        StageFailed: it failed, with its exit code.
    """
    code = main([str(argument) for argument in arguments])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise StageFailed(code)


def train_tokenizer(
    folder: Path,
    *,
    config: QuickstartConfig,
    seed: int,
    dataset: Path,
    cameras: Sequence[str] | None = None,
    episodes: Sequence[str] | None = None,
    depth_range: Sequence[float] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train RepViTok on the data set's video and export it to `folder/tokenizer`; `overrides` are of its recipe."""
    _fit(
        repvitok,
        config,
        "repvitok",
        folder,
        config.steps.repvitok,
        seed,
        f"--data.folders={json.dumps([str(dataset)])}",
        f"--data.size=[{config.size[0]},{config.size[1]}]",
        f"--data.stride={config.stride}",
        f"--data.held_out={config.held_out}",
        *((f"--data.cameras={json.dumps(list(cameras))}",) if cameras else ()),
        *((f"--data.episodes={','.join(episodes)}",) if episodes else ()),
        *((f"--data.depth_range={json.dumps(list(depth_range))}",) if depth_range else ()),
        *overrides,
    )
    call(repvitok, "export", "--ckpt", folder / FIT / LAST, "--out", folder / "tokenizer")
    return last_values(folder / FIT, "val/psnr", "val/ssim")


def encode(
    folder: Path,
    *,
    config: QuickstartConfig,
    dataset: Path,
    tokenizer: Path,
    cameras: Sequence[str] | None = None,
    episodes: Sequence[str] | None = None,
    depth_range: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Encode the data set's video into latent shards."""
    call(
        repvitok,
        "encode",
        *("--tokenizer", tokenizer, "--dataset", dataset, "--out", folder / "latents"),
        *("--size", f"{config.size[0]}x{config.size[1]}", "--stride", config.stride, "--offsets", *config.offsets),
        *("--device", config.torch_device),
        *(("--cameras", *cameras) if cameras else ()),
        *(("--episodes", *episodes) if episodes else ()),
        *(("--depth-range", *depth_range) if depth_range else ()),
    )
    return {}


def train_latent_actions(folder: Path, *, config: QuickstartConfig, seed: int, latents: Path) -> dict[str, Any]:
    """Train the latent action tokenizer on the latents and export it to `folder/lat`."""
    _fit(
        latent_action,
        config,
        "latent_action",
        folder,
        config.steps.latent_action,
        seed,
        f"--data.latents={latents}",
        f"--data.held_out={config.held_out}",
    )
    call(latent_action, "export", "--ckpt", folder / FIT / LAST, "--out", folder / "lat")
    return last_values(folder / FIT, "val/forward_loss", "val/copy_loss", "val/zero_action_loss")


def label(folder: Path, *, config: QuickstartConfig, lat: Path, latents: Path) -> dict[str, Any]:
    """Label the latents with latent actions, and probe what these hold of the robot's actions.

    No later stage needs the probe, so data that allow of none (too little of it, or still) do not end the run.
    """
    call(
        latent_action,
        "label",
        "--lat",
        lat,
        "--latents",
        latents,
        "--out",
        folder / "latents",
        "--device",
        config.torch_device,
    )
    try:
        call(latent_action, "probe", "--lat", lat, "--latents", latents, "--out", folder / "probe.json")
    except StageFailed as failed:
        if failed.code != 2:
            raise
        print("the run goes on without the probe", file=sys.stderr)
        return {"probe": "none"}
    return {}


def pretrain(
    folder: Path, *, repwam: Main, config: QuickstartConfig, seed: int, latents: Path, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Stage one: video latents and latent actions."""
    _fit(
        repwam,
        config,
        "pretrain",
        folder,
        config.steps.pretrain,
        seed,
        f"--data.latents={latents}",
        f"--data.held_out={config.held_out}",
        *overrides,
    )
    call(repwam, "export", "--ckpt", folder / FIT / LAST, "--out", folder / "wam", "--wam-only")
    return last_values(folder / FIT, "val/video", "val/action")


def adapt(
    folder: Path,
    *,
    repwam: Main,
    config: QuickstartConfig,
    seed: int,
    steps: int,
    latents: Path,
    pretrained: Path | None,
    tokenizer: Path,
    lat: Path | None,
    action_units: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Stage two: robot actions, starting from the pretrained model; exports the policy to `folder/policy`.

    `action_units` are the action channels' units where they are known; a LeRobot data set does not hold them. Targets
    close to the robot's state are learned as changes from it.
    """
    _fit(
        repwam,
        config,
        "adapt",
        folder,
        steps,
        seed,
        f"--data.latents={latents}",
        f"--data.held_out={config.held_out}",
        f"--model.init_from={'null' if pretrained is None else pretrained}",
        f"--data.action_kind={_action_kind(latents)}",
        *((f"--data.action_units=[{','.join(map(repr, action_units))}]",) if action_units else ()),
        *overrides,
    )
    call(
        repwam,
        "export",
        *("--ckpt", folder / FIT / LAST, "--tokenizer", tokenizer, "--latents", latents, "--out", folder / "policy"),
        *(() if lat is None else ("--lat", lat)),
    )
    return last_values(folder / FIT, "val/video", "val/action")


def last_values(folder: Path, *names: str) -> dict[str, float]:
    """The last logged value of each metric that the run has logged."""
    curves = read_curves(folder)
    return {name: float(curves[name][-1, 1]) for name in names if name in curves}


def _action_kind(latents: Path) -> str:
    from repvitok.data import LatentShards
    from repvitok.data.split import split_latents

    from repwam_core.data.episodes import suggested_kind

    shards = LatentShards(latents)
    return suggested_kind(shards, split_latents(shards, 0.0)[0])


def _fit(
    main: Main, config: QuickstartConfig, stage: str, folder: Path, steps: int, seed: int, *overrides: str
) -> None:
    """Train by a stage's recipes, going on from its last checkpoint if it was interrupted."""
    validations = next(count for count in range(MOST_VALIDATIONS, 0, -1) if steps % count == 0)
    call(
        main,
        "fit",
        *(argument for file in config.recipe_files(stage) for argument in ("-c", file)),
        f"--trainer.accelerator={config.device}",
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps // validations}",
        f"--trainer.default_root_dir={folder / FIT}",
        "--ckpt_path=last",
        *overrides,
    )


BASELINES: tuple[Baseline, ...] = ("random", "replay", "expert")
LANGUAGE = ("right", "other", "none")
MOST_TASKS_TOLD = 8
"""Tasks whose successes fit a line of the terminal, and whose baselines are filmed."""
MOST_VALIDATIONS = 5
"""Points of a validation curve, the last of them at the last step."""


def settings_of(config: QuickstartConfig) -> SimSettings:
    """How the run's simulator is driven and seen, in collection and evaluation alike."""
    pair = {"same_scene": [config.same_scene]} if config.same_scene else {}
    return find_suite(config.suite).from_dict({"size": config.size, **pair, **config.simulator}, complete=False)


def collect_demonstrations(folder: Path, *, config: QuickstartConfig, seed: int, workers: int | None) -> dict[str, Any]:
    """Record the experts into `folder/dataset`."""
    summary = collect(
        folder / "dataset",
        config.all_tasks,
        episodes_per_task=config.episodes,
        seed=seed,
        settings=settings_of(config),
        noise=NOISE_MODES[config.noise],
        workers=workers,
    )
    return {"episodes": summary.episodes, "frames": summary.frames}


def run_baselines(folder: Path, *, config: QuickstartConfig, dataset: Path, workers: int | None) -> dict[str, Any]:
    """Random actions, a replayed demonstration and the expert on the evaluation seeds; films the latter two's first."""
    counts: dict[str, Any] = {}
    few = len(config.all_tasks) <= MOST_TASKS_TOLD
    for baseline in BASELINES:
        results = run_baseline(
            baseline,
            config.all_tasks,
            evaluation_seeds(config.eval_episodes),
            settings=settings_of(config),
            demonstrations=dataset if baseline == "replay" else None,
            workers=workers,
            filmed_per_task=int(few and baseline != "random"),
            out=folder / baseline,
        )
        counts[baseline] = told(results)
    return counts


def run_policy(
    folder: Path,
    *,
    config: QuickstartConfig,
    policy: Path,
    workers: int | None,
    tasks: Sequence[str],
    filmed: int | FilmedOutcomes,
) -> dict[str, Any]:
    """The policy on the evaluation seeds of `tasks`, under the right instruction; films some episodes of each."""
    results = _drive(config, policy, tasks, None, workers, filmed, config.eval_episodes, folder / "policy")
    return {"policy": told(results)}


def run_language(folder: Path, *, config: QuickstartConfig, policy: Path, workers: int | None) -> dict[str, Any]:
    """The same-scene pair told the other task's instruction, and told nothing."""
    first, second = config.same_scene
    instruction = settings_of(config).instruction
    other = {first: second, second: first}
    told_what: dict[str, Callable[[str, int], str | None]] = {
        "other": lambda task, seed: instruction(other[task], seed),
        "none": lambda _task, _seed: None,
    }
    episodes = min(config.eval_episodes, config.language_episodes)
    counts: dict[str, Any] = {}
    for name, instruction_of in told_what.items():
        results = _drive(config, policy, config.same_scene, instruction_of, workers, 0, episodes, folder / name)
        counts[name] = told(results)
    write_json_atomic(folder / "pair.json", list(config.same_scene))
    return counts


def read_results(folder: Path, name: str) -> list[EpisodeResult]:
    """The episodes that a stage above kept under `name`."""
    return load_results(folder / name / RESULTS_FILE)[0]


def read_films(folder: Path, name: str) -> Mapping[str, np.ndarray]:
    """Their frames by `film_key`, where any were filmed."""
    films = folder / name / FILMS_FILE
    return load_films(films) if films.exists() else {}


def told(results: Sequence[EpisodeResult]) -> str:
    """Successes in a few words: "button-press-topdown 19/20, window-open 17/20"; of many tasks all together."""
    if len({result.task for result in results}) > MOST_TASKS_TOLD:
        return f"{sum(result.success for result in results)}/{len(results)}"
    return ", ".join(f"{task} {rate.successes}/{rate.episodes}" for task, rate in success_rates(results).items())


def _drive(
    config: QuickstartConfig,
    policy: Path,
    tasks: Sequence[str],
    instruction_of: Callable[[str, int], str | None] | None,
    workers: int | None,
    filmed: int | FilmedOutcomes,
    episodes: int,
    out: Path,
) -> list[EpisodeResult]:
    driver = BatchedPolicy.from_pretrained(policy, config.torch_device)
    return evaluate(
        driver,
        tasks,
        evaluation_seeds(episodes),
        settings=settings_of(config),
        instruction_of=instruction_of,
        execute=config.execute,
        batch_size=50,
        workers=workers,
        filmed_per_task=filmed,
        traced=True,
        out=out,
        about={"digests": driver.parts.manifest.digests},
    )
