"""The quickstart's stages in order, from demonstrations (or a data set) to the report."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_json_atomic

from repwam_core.quickstart import closed_loop, training
from repwam_core.quickstart.config import QuickstartConfig, load_config, shaped_like
from repwam_core.quickstart.runner import StageResult, StageRunner, code_digest, folder_digest
from repwam_core.quickstart.stages import DataSet, Run, Trained, run_controls, train


def run(arguments: argparse.Namespace, repwam: training.Main) -> int:
    """Run the quickstart; returns the exit code. `repwam` is the command that trains its later stages."""
    from repwam_core.quickstart.results import closing, report_data, summary
    from repwam_core.report import write_report

    started_s = time.monotonic()
    config = _checked(arguments, load_config(arguments))
    data = None if arguments.dataset is None else _chosen(arguments)
    out = arguments.out or Path("runs") / (arguments.preset or "quickstart")
    stages = 6 if data is not None else 9 + bool(config.same_scene)
    runner = StageRunner(out, fresh=arguments.fresh, stages=None if arguments.controls else stages)
    command = "repwam " + " ".join(sys.argv[1:])
    this = Run(
        config,
        arguments.seed,
        arguments.workers,
        runner,
        command,
        started_s,
        repwam,
        code_digest(),
        arguments.tokenizer,
    )
    with runner.lock():
        trained, outcome = (train(this, data), {}) if data is not None else _from_simulator(this)
        if arguments.controls:
            outcome |= run_controls(this, trained)
        report = out / "report.html"
        told = report_data(this, trained, outcome)
        write_report(told, report)
        if outcome:
            write_json_atomic(out / "results.json", summary(this, told))
    print(closing(told))
    print(f"\nreport, for a browser: {report.resolve()}")
    return 0


def _checked(arguments: argparse.Namespace, config: QuickstartConfig) -> QuickstartConfig:
    """Find what would stop a later stage before the first one starts; fit the frame size to a data set's camera."""
    if config.device == "gpu":
        from torch import cuda

        if not cuda.is_available():
            raise UserError("--budget gpu trains on a CUDA device, and there is none here; --budget cpu needs none")
    if arguments.dataset is None:
        if arguments.cameras or arguments.depth_range:
            raise UserError("--cameras and --depth-range are of a data set, so they need --dataset")
        settings = closed_loop.settings_of(config)
        settings.make_task(settings.task_names(config.all_tasks)[0]).close()  # is it installed, does it start?
        return config
    if arguments.controls:
        raise UserError("--controls compares success in closed loop, which a recorded data set cannot give; drop it")
    from repvitok import RepViTokConfig
    from repvitok.data import LeRobotReader
    from repvitok.data.contents import describe_contents
    from repvitok.encoding_plan import choose_cameras, infos_of

    reader = LeRobotReader(arguments.dataset, depth_range=arguments.depth_range)
    cameras, infos = choose_cameras(reader, arguments.cameras), infos_of(reader, arguments.episodes)
    describe_contents(reader, cameras, infos).announce(needs_actions=True)
    per_latent = RepViTokConfig().tubelet_frames * config.stride
    needed, longest = min(config.offsets) + 2 * per_latent + 1, max(info.length for info in infos)
    if longest < needed:
        raise UserError(
            f"{arguments.dataset}: latent actions are learned from episodes of {needed} frames or more, the longest "
            f"has {longest}"
        )
    return config if arguments.size is not None else shaped_like(config, *reader.frame_size(cameras[0]))


def _from_simulator(this: Run) -> tuple[Trained, dict[str, StageResult]]:
    config = this.config
    sim = {
        "suite": config.suite,
        "tasks": config.all_tasks,
        "same_scene": config.same_scene,
        "size": config.size,
        "simulator": config.simulator,
    }
    collected = this.stage(
        "collect",
        partial(closed_loop.collect_demonstrations, config=config, seed=this.seed, workers=this.workers),
        inputs={},
        **sim,
        episodes=config.episodes,
        noise=config.noise,
        seed=this.seed,
    )
    dataset = collected.folder / "dataset"
    units = closed_loop.settings_of(config).embodiment.action_units
    trained = train(this, DataSet(dataset, collected.digest, units))
    sim |= {"eval_episodes": config.eval_episodes}
    baselines = this.stage(
        "baselines",
        partial(closed_loop.run_baselines, config=config, dataset=dataset, workers=this.workers),
        inputs={"dataset": collected},
        **sim,
    )
    drive = {"config": config, "policy": trained.policy, "workers": this.workers}
    sim |= {"execute": config.execute}
    rollouts = this.stage(
        "rollouts",
        partial(closed_loop.run_policy, **drive, tasks=config.all_tasks, filmed=config.filmed),
        inputs={"policy": trained.adapted},
        filmed=config.filmed,
        **sim,
    )
    outcome = {"baselines": baselines, "rollouts": rollouts}
    if config.same_scene:
        outcome["language"] = this.stage(
            "language",
            partial(closed_loop.run_language, **drive),
            inputs={"policy": trained.adapted},
            language_episodes=config.language_episodes,
            **sim,
        )
    return trained, outcome


def _chosen(arguments: argparse.Namespace) -> DataSet:
    """The data set of the command line, and what of it."""
    names = ("cameras", "episodes", "depth_range")
    chosen = {name: tuple(values) for name in names if (values := getattr(arguments, name))}
    return DataSet(arguments.dataset, folder_digest(arguments.dataset), **chosen)
