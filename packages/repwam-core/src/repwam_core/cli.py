"""The command `repwam`: collect demonstrations, train the world action model, drive a robot or simulator with it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from repvitok.runtime.commands import (
    DEPTH_RANGE,
    EPISODES,
    SEEDS,
    Command,
    TrainingStage,
    add_license,
    number,
    parse_held_out,
    path_argument,
    push_command,
    run_commands,
    say_loading,
    text_argument,
    training_commands,
    whole_number,
)
from repvitok.runtime.documents import MAX_SIDE, parse, parse_json
from repvitok.runtime.errors import MOST_PROCESSES, UserError, run_cli, say_next

from repwam_core.estimate import (
    DEVICES,
    RunRequest,
    estimate_run,
    format_estimate,
    model_of_recipes,
    training_of_recipes,
)
from repwam_core.model.config import MOST_LOOK_AHEAD, Recompute
from repwam_core.policy.serving.command import add_serve_arguments, serve
from repwam_core.quickstart.config import add_quickstart_arguments
from repwam_core.sampling import add_sampling_arguments, given_sampling

if TYPE_CHECKING:
    from repwam_core.policy.policy import BatchedPolicy
    from repwam_core.rrd import ViewedEpisode
    from repwam_core.sim.base import SimSettings


def _after_fit(run: Any) -> tuple[object, ...]:
    """The command that follows a training: of stage one the model, of stage two a policy."""
    export = ("repwam", "export", "--ckpt", run.trainer.default_root_dir)
    if run.model.space == "latent":
        return (*export, "--wam-only", "--out", "WAM")
    return (
        *export,
        "--tokenizer",
        "TOKENIZER",
        "--lat",
        "LAT",
        "--latents",
        run.data.latents or "LATENTS",
        "--out",
        "POLICY",
    )


STAGE = TrainingStage(
    name="repwam",
    module="repwam_core.training.module:WAMTraining",
    data="repwam_core.data.datamodule:WAMDataModule",
    recipe="recipes/3_repwam/tiny_pretrain.yaml",
    next_words=_after_fit,
    links=(("model.chunk_sizes", "data.chunk_sizes"),),
    parallel_strategy="ddp_find_unused_parameters_true",  # stage two leaves latent actions' projections alone
    test_callbacks={"recorded": "repwam_core.export:RecordedEpisodes"},
)
MOST_TOKENS = 10**18
NOISE_MODES = ("none", "pushes", "gaussian", "pushes+gaussian")
BASELINES = ("expert", "random", "replay")
RERUN: dict[str, Any] = {
    "type": path_argument,
    "metavar": "FILE",
    "help": "an .rrd file for the Rerun viewer (extra rerun)",
}
"""Keyword arguments of `add_argument("--rerun", ...)`."""
EXECUTIONS = ("wait", "naive", "ensemble", "regrounded")


def _quickstart(options: argparse.Namespace) -> int:
    say_loading()
    from repwam_core.quickstart.stages import run

    return run(options, main)


# -- simulator ---------------------------------------------------------------------------------------------------


def _simulator_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suite", type=text_argument, default="metaworld", help="a simulator and its tasks (default: %(default)s)")
    add("--tasks", type=text_argument, nargs="+", required=True, metavar="TASK", help="names of the suite's tasks")
    add(
        "--same-scene",
        type=text_argument,
        nargs="+",
        action="append",
        metavar="TASK",
        help="tasks told apart by the instruction alone: they share layouts and hide their goal markers",
    )
    add("--cameras", type=text_argument, nargs="+", help="camera names (default: the suite's)")
    add("--size", type=whole_number(16, MAX_SIDE), nargs=2, metavar=("H", "W"), help="pixels (default: the suite's)")
    add("--act-repeat", type=whole_number(1, 500), help="simulator's steps per action (default: the suite's)")
    add("--max-env-steps", type=whole_number(1, 500), help="simulator's steps per episode (default: the suite's)")
    add("--settings", type=_json_object, default={}, metavar="JSON", help="any settings of the suite")
    add("--workers", type=whole_number(1, MOST_PROCESSES), help="simulator processes (default: one per core)")


def _json_object(text: str) -> dict[str, Any]:
    """The type of an option that takes a JSON object."""
    try:
        return parse(parse_json(text, "JSON"), dict[str, Any], "JSON")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _settings(options: argparse.Namespace) -> SimSettings:
    """The suite with those settings that were given."""
    from repwam_core.sim.base import find_suite

    named = {name: getattr(options, name) for name in ("same_scene", "cameras", "size", "act_repeat", "max_env_steps")}
    given = options.settings | {name: value for name, value in named.items() if value is not None}
    return find_suite(options.suite).from_dict(given, complete=False)


def _collect_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _simulator_arguments(parser)
    add("--out", type=path_argument, required=True, help="folder of the data set; an interrupted run resumes")
    add("--episodes", type=whole_number(1, 1000), default=30, help="demonstrations per task (default: %(default)s)")
    add("--seed", type=whole_number(0, 99), default=0, help="of the data set, 0 to 99 (default: %(default)s)")
    add("--noise", choices=NOISE_MODES, default="none", help="how the expert is disturbed")
    add("--format", choices=["v2.1", "v3.0"], default="v2.1", help="LeRobot version (default: v2.1)")
    add(
        "--pix-fmt",
        choices=["yuv444p", "yuv420p"],
        default="yuv444p",
        help="video colour: whole (default), or halved, which every player shows",
    )
    add("--crf", type=whole_number(0, 51), default=10, help="video quality, 0 (best) to 51 (default: %(default)s)")


def _collect(options: argparse.Namespace) -> None:
    from repwam_core.sim.collect import NOISE_MODES as MODES
    from repwam_core.sim.collect import collect

    summary = collect(
        options.out,
        options.tasks,
        episodes_per_task=options.episodes,
        seed=options.seed,
        settings=_settings(options),
        noise=MODES[options.noise],
        version=options.format,
        pix_fmt=options.pix_fmt,
        crf=options.crf,
        workers=options.workers,
    )
    failed = sum(summary.failed_attempts.values())
    print(f"{summary.root}: {summary.episodes} episodes, {summary.frames} frames, {failed} failed attempts")
    say_next("repvitok", "fit", "-c", "RECIPE", "--data.folders", f"[{options.out}]")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", type=path_argument, required=True, help="LeRobot data set")
    add("--episodes", **EPISODES)
    add("--cameras", type=text_argument, nargs="+", help="camera keys (default: all)")
    add("--depth-range", **DEPTH_RANGE)
    add("--rerun", **RERUN)


def _show(options: argparse.Namespace) -> None:
    from repvitok.data import LeRobotReader
    from repvitok.data.contents import describe_contents
    from repvitok.encoding_plan import choose_cameras, infos_of
    from repvitok.runtime.progress import progress

    from repwam_core.rrd import import_rerun, recorded

    if options.rerun is not None:
        import_rerun()
    reader = LeRobotReader(options.dataset, depth_range=options.depth_range)
    cameras, infos = choose_cameras(reader, options.cameras), infos_of(reader, options.episodes)
    print(*describe_contents(reader, cameras, infos).lines(), sep="\n")
    if options.rerun is not None:
        shown = progress(infos, desc="rerun", unit="episode")
        _write_rrd(options.rerun, (recorded(reader, cameras, info) for info in shown), str(options.dataset))


def _write_rrd(path: Path, episodes: Iterable[ViewedEpisode], title: str) -> None:
    from repwam_core.rrd import write_rrd

    count = write_rrd(path, episodes, title)
    print(f"{path}: {count} episode{'' if count == 1 else 's'} for the Rerun viewer, `rerun {path}`")


def _rollout_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _simulator_arguments(parser)
    driver = parser.add_mutually_exclusive_group(required=True)
    driver.add_argument(
        "--policy", type=text_argument, help="policy folder, an installed one's name, or hf://owner/name"
    )
    driver.add_argument("--baseline", choices=BASELINES, help="who drives instead of a policy")
    add("--demonstrations", type=path_argument, help="data set of `repwam collect`, for --baseline replay")
    add("--episodes", type=whole_number(1, 100_000), default=20, help="unseen seeds per task (default: %(default)s)")
    add("--instruction", help="what the policy is told in every episode; '' for nothing")
    add(
        "--execute",
        type=whole_number(1, 100_000),
        help="actions carried out before planning again (default: the chunk)",
    )
    add(
        "--delay",
        type=whole_number(0, 1000),
        default=0,
        metavar="STEPS",
        help="control steps that planning a chunk takes, but for the first (default: %(default)s)",
    )
    add(
        "--execution",
        choices=EXECUTIONS,
        default="wait",
        help="what the robot does meanwhile: hold still (default), or carry out the chunk before, and then the new one "
        "as planned, averaged with it, or planned to follow it",
    )
    add("--film", type=whole_number(0, 100_000), default=0, metavar="N", help="film N episodes per task")
    add("--device", type=text_argument, default="cpu", help="of the policy: cpu, cuda, cuda:1 (default: %(default)s)")
    add(
        "--out",
        type=path_argument,
        required=True,
        help="folder for results.json and films (mp4; films.npz for programs); an interrupted run resumes",
    )
    add("--rerun", **{**RERUN, "help": f"{RERUN['help']} of the filmed episodes (default: one per task)"})
    add_sampling_arguments(parser)


def _rollout(options: argparse.Namespace) -> None:
    from repwam_core.sim.base import evaluation_seeds
    from repwam_core.sim.results import mean_rate, mean_rates, success_rates, write_films

    if options.rerun is not None:
        from repwam_core.rrd import driven, import_rerun

        import_rerun()
        options.film = options.film or 1
    seeds, settings = evaluation_seeds(options.episodes), _settings(options)
    results = _drive_without_policy(options, seeds) if options.baseline else _drive(options, seeds)
    rates = success_rates(results)
    for task, rate in rates.items():
        (low, high), crashed = rate.interval, f", {rate.crashed} crashed" if rate.crashed else ""
        print(f"{task}: {rate.successes}/{rate.episodes} (95 % interval {low:.2f} to {high:.2f}){crashed}")
    if len(options.tasks) > 1:
        means = {**mean_rates(rates, settings.groups), "all": mean_rate(rates)}
        print("means over tasks: " + ", ".join(f"{group} {mean:.3f}" for group, mean in means.items()))
    if films := write_films(options.out / "films", results, settings.embodiment.rate_hz):
        print(f"{options.out / 'films'}: {len(films)} films")
    if options.rerun is not None:
        filmed = [result for result in results if result.frames is not None]
        _write_rrd(options.rerun, (driven(result, settings.embodiment) for result in filmed), str(options.out))
    if options.policy is not None:
        say_next("repwam", "serve", "--policy", options.policy)


def _robotwin_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", type=path_argument, required=True, help="RoboTwin's folder eval_result")
    add(
        "--policy-name",
        type=text_argument,
        default="repwam",
        help="folder in RoboTwin's policy/ (default: %(default)s)",
    )
    add("--name", type=text_argument, help="what eval.sh was given as NAME, where there are several")
    add("--test-num", type=whole_number(1, 100_000), default=100, help="episodes of each run (default: %(default)s)")
    add(
        "--repeats",
        choices=("refuse", "pool", "last"),
        default="refuse",
        help="several runs of a task: a mistake (default), added up, or the last one counts",
    )
    add("--horizons", type=path_argument, metavar="FILE", help="YAML, group: [tasks] (default: the paper's 30, 15, 5)")
    add("--out", type=path_argument, metavar="FILE", help="JSON file to write")


def _robotwin(options: argparse.Namespace) -> None:
    from repvitok.runtime.files import write_json_atomic

    from repwam_core.sim.robotwin import format_summary, load_horizons, read_results, summarise, summary_to_dict

    horizons = load_horizons(options.horizons)
    chosen = {"name": options.name, "episodes": options.test_num, "repeats": options.repeats}
    runs = read_results(options.results, options.policy_name, **chosen)
    table = summarise(runs, horizons)
    if options.out is not None:
        write_json_atomic(options.out, summary_to_dict(runs, table, horizons))
    print("\n".join(format_summary(table, horizons)))
    print(f"success in percent, mean over tasks (Wilson's 95 % interval); instructions: {runs[0].instruction_type}")


def _drive_without_policy(options: argparse.Namespace, seeds: list[int]):
    from repwam_core.sim.evaluate import run_baseline

    given = {"instruction": options.instruction, "execute": options.execute}
    given |= {"delay": options.delay or None, "execution": None if options.execution == "wait" else options.execution}
    given = given_sampling(options) | {name: value for name, value in given.items() if value is not None}
    if given:
        raise UserError(f"{_option_names(given)}: how a policy is driven; --baseline {options.baseline} is none")
    return run_baseline(
        options.baseline,
        options.tasks,
        seeds,
        settings=_settings(options),
        demonstrations=options.demonstrations,
        workers=options.workers,
        filmed_per_task=options.film,
        out=options.out,
    )


def _drive(options: argparse.Namespace, seeds: list[int]):
    from repwam_core.policy.policy import BatchedPolicy
    from repwam_core.sim.evaluate import evaluate

    plan = given_sampling(options)
    if options.execution != "wait":
        plan = {"execute_frames": None, **plan}  # what is not executed is carried out while the next chunk is planned
    policy = BatchedPolicy.from_pretrained(options.policy, options.device, **plan)
    given = options.instruction
    return evaluate(
        policy,
        options.tasks,
        seeds,
        settings=_settings(options),
        instruction_of=None if given is None else lambda _task, _seed: given,
        execute=options.execute,
        execution=options.execution,
        delay=options.delay,
        workers=options.workers,
        filmed_per_task=options.film,
        traced=options.rerun is not None,
        out=options.out,
        about=_about(policy, options),
    )


def _about(policy: BatchedPolicy, options: argparse.Namespace) -> dict[str, Any]:
    """What is recorded of a policy beside its results."""
    return {
        "policy": str(options.policy),
        "digests": policy.parts.manifest.digests,
        "device": options.device,
        "plan": asdict(policy.plan),
    }


# -- data and models ---------------------------------------------------------------------------------------------


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--format",
        choices=("lerobot", "robotwin"),
        default="lerobot",
        help="what the data set is: LeRobot v2.0, v2.1 or v3.0 (default), or RoboTwin 2.0's HDF5 episodes",
    )
    add(
        "--dataset",
        type=path_argument,
        required=True,
        help="LeRobot data set; or RoboTwin's folder <task>/<config>, or one that holds several",
    )
    add(
        "--layout", type=text_argument, help="of LeRobot data: agibot, robocoin, ... (docs/datasets.md), or a YAML file"
    )
    add("--out", type=path_argument, required=True, help="folder to write; a LeRobot data set's videos are linked")
    add("--episodes", **EPISODES)
    add(
        "--instructions",
        choices=("seen", "unseen", "task"),
        help="of RoboTwin: which sentences an episode's is drawn from, or the task's name (default: seen)",
    )
    add("--seed", type=whole_number(0, SEEDS), help="of RoboTwin: of that draw (default: 0)")
    add(
        "--rate-hz",
        type=number(0, 10_000, above=True),
        help="of RoboTwin: rows per second (default: 16.667, which is save_freq 15)",
    )


def _prepare(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("instructions", "seed", "rate_hz")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.format == "robotwin":
        from repwam_core.data.robotwin import prepare_robotwin

        if options.layout is not None:
            raise UserError("--layout: RoboTwin's channels are known; it is for LeRobot data sets")
        robot = prepare_robotwin(options.dataset, options.out, episodes=options.episodes, **given)
    else:
        from repwam_core.data.layout import DatasetLayout, prepare

        if given:
            raise UserError(f"{_option_names(given)}: for --format robotwin")
        if options.layout is None:
            raise UserError("--layout: expected agibot, robocoin, ... or a YAML file; or --format robotwin")
        robot = prepare(options.dataset, options.out, DatasetLayout.load(options.layout), options.episodes)
    print(f"{options.out}: {robot.name}, {len(robot.action_channels)} action channels, {robot.rate_hz:g} Hz")
    tokenizer = ("--tokenizer", "TOKENIZER", "--dataset", options.out, "--size", "256", "--out", "LATENTS")
    say_next("repvitok", "encode", *tokenizer)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--latents", type=path_argument, required=True, help="folder of latent shards")
    add("--out", type=path_argument, required=True, help="statistics.json to write")
    held_out_help = "share of the episodes that is left out, or their numbers like 2,5-7 (default: 0)"
    add("--held-out", type=parse_held_out, default=0.0, metavar="SHARE", help=held_out_help)
    add(
        "--kind",
        choices=("absolute", "relative", "from_state"),
        default="absolute",
        help="what recorded actions are, or from_state: targets, learned as changes from the state (default: absolute)",
    )
    add(
        "--chunk-frames",
        type=whole_number(1, 1000),
        default=4,
        help="latent frames of the longest chunk (model.chunk_sizes) that from_state measures over (default: 4)",
    )
    add("--units", type=text_argument, nargs="+", help='unit of each action channel, or one for all (default: "1")')


def _stats(options: argparse.Namespace) -> None:
    from repvitok.data import LatentShards
    from repvitok.data.split import split_latents

    from repwam_core.data.episodes import count_statistics
    from repwam_core.interface import channel_units

    shards = LatentShards(options.latents)
    training, _ = split_latents(shards, options.held_out)
    given = options.units[0] if options.units is not None and len(options.units) == 1 else options.units
    units = channel_units(given, shards.meta.action_names)
    statistics = count_statistics(shards, training, "robot", units, options.kind, chunk_frames=options.chunk_frames)
    statistics.save(options.out)
    actions = statistics.actions
    for name, unit, low, high in zip(actions.channels, actions.units, actions.q01, actions.q99, strict=True):
        print(f"{name}: 1st percentile {low:.4g}, 99th {high:.4g} {unit}")
    print(*statistics.remarks(), sep="\n", end="\n" if statistics.remarks() else "")
    print(f"{options.out}: {actions.kind} actions, digest {statistics.digest[:16]}")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt", type=path_argument, required=True, help="checkpoint written by fit, or a run's folder")
    add("--out", type=path_argument, required=True, help="folder to write")
    add("--wam-only", action="store_true", help="the model alone, for model.init_from")
    add("--tokenizer", type=text_argument, help="tokenizer that made the latents: folder, name, or hf://owner/name")
    add("--lat", type=text_argument, help="latent action tokenizer folder or name, copied along")
    add("--latents", type=path_argument, help="latent shards trained on; their embedded instructions are kept")
    add("--name", type=text_argument, help="the robot's name (default: the data set's)")
    add(
        "--data-set",
        type=whole_number(0, 10_000),
        default=0,
        help="which of the run's data sets the robot is from, from 0",
    )
    add_license(parser)
    add_sampling_arguments(parser, "as the run was validated")


def _export(options: argparse.Namespace) -> None:
    from repvitok.runtime.checkpointing import resolve_checkpoint

    from repwam_core.export import export_policy, export_wam

    plan = given_sampling(options)
    if plan and options.wam_only:
        raise UserError(f"{_option_names(plan)}: how a policy plans; --wam-only exports the model alone")
    checkpoint = resolve_checkpoint(options.ckpt)
    if options.wam_only:
        print(f"{export_wam(checkpoint, options.out, options.license)}: world action model")
        say_next("repwam", "fit", "-c", "RECIPE", "--data.latents", "LATENTS", "--model.init_from", options.out)
        return
    if options.tokenizer is None:
        raise UserError("a policy needs --tokenizer FOLDER (or ask for the model alone with --wam-only)")
    out = export_policy(
        checkpoint,
        options.tokenizer,
        options.out,
        lat=options.lat,
        shards=options.latents,
        name=options.name,
        plan=plan,
        data_set=options.data_set,
        license=options.license,
    )
    print(f"{out}: policy")
    say_next("repwam", "openloop", "--policy", out, "--dataset", "DATASET", "--out", "FILE")


def _openloop_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--policy", type=text_argument, required=True, help="policy folder, a name, or hf://owner/name")
    add("--dataset", type=path_argument, required=True, help="LeRobot data set of the same robot")
    add("--episodes", **EPISODES)
    add(
        "--cameras",
        type=text_argument,
        nargs="+",
        help="the data set's cameras that stand for the policy's, in its order (default: named so)",
    )
    add("--seed", type=whole_number(0, SEEDS), default=0, help="of the policy's draws (default: %(default)s)")
    add(
        "--clip-features",
        type=text_argument,
        nargs="+",
        metavar=("NETWORK", "FILE"),
        help="Frechet distance of imagined clips: 'hog' (a stand-in), or gFVD by I3D: tfhub-kinetics400 FILE, or "
        "pytorch-i3d FILE",
    )
    add("--device", type=text_argument, default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--out", type=path_argument, required=True, help="JSON file to write")
    add("--rerun", **RERUN)
    add_sampling_arguments(parser)


def _openloop(options: argparse.Namespace) -> None:
    from repvitok.data import LeRobotReader
    from repvitok.data.split import format_episodes
    from repvitok.runtime.files import write_json_atomic

    from repwam_core.policy.openloop import evaluate_open_loop, named_clip_features
    from repwam_core.policy.policy import BatchedPolicy

    if options.rerun is not None:
        from repwam_core.rrd import compared, import_rerun

        import_rerun()
    network = named_clip_features(options.clip_features)
    policy = BatchedPolicy.from_pretrained(options.policy, options.device, **given_sampling(options))
    chosen = {"episodes": options.episodes, "cameras": options.cameras, "seed": options.seed}
    reader = LeRobotReader(options.dataset, depth_range=policy.parts.manifest.latents.depth_range)
    result = evaluate_open_loop(policy, reader, **chosen)
    about = {**_about(policy, options), "dataset": str(options.dataset), "seed": options.seed}
    written = {"about": about, **result.to_dict(network)}
    write_json_atomic(options.out, written)
    if result.too_short:
        print(f"left out, without a whole transition: episodes {format_episodes(result.too_short)}")
    for group, numbers in written["groups"].items():
        print(f"{group} tasks, episodes {format_episodes(episode['index'] for episode in numbers['episodes'])}")
        for name, unit in zip(result.channels, result.units, strict=True):
            told = ", ".join(f"{method} {at[name]:.4g}" for method, at in numbers["mean_absolute_error"].items())
            print(f"  {name} ({unit}): mean absolute error {told}")
        for variant, scores in numbers["open_loop_score"].items():
            told = ", ".join(f"{100 * score:.1f} % at {threshold:g}" for threshold, score in scores.items())
            print(f"  open-loop score ({variant}): {told}")
        if video := numbers["imagined_video"]:
            print("  imagined video: " + ", ".join(f"{name} {_short(value)}" for name, value in video.items()))
        print(f"  {_verdict(numbers['mean_absolute_error'])}")
    if options.rerun is not None:
        cameras = options.cameras or policy.embodiment.cameras
        viewed = compared(reader, cameras, result.episodes, result.channels)
        _write_rrd(options.rerun, viewed, f"{options.policy} on {options.dataset}")
    say_next("repwam", "serve", "--policy", options.policy)


def _verdict(errors: Mapping[str, Mapping[str, float]]) -> str:
    """What the errors say of driving: on how many channels the policy is better than both of its controls."""
    policy, *controls = errors.values()
    better = sum(error < min(control[name] for control in controls) for name, error in policy.items())
    counted = f"better than both controls on {better} of {len(policy)} channels"
    return counted if 2 * better > len(policy) else f"{counted}: it is not expected to drive the robot"


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tokens_of(text: str) -> int:
    """The argument type of a number of tokens: 160000, 160k, 0.2m or 100g."""
    factors = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    letter = text[-1:].lower()
    digits = text[:-1] if letter in factors else text
    try:
        value = float(digits) * factors.get(letter, 1.0)
    except ValueError:
        value = math.nan
    if not 1 <= value <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 160k or 100g, got {text!r}")
    return round(value)


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    default = RunRequest()
    count, above_0 = whole_number(1, 10**6), number(0, 10**6, above=True)
    add("--preset", choices=["tiny", "1.3b", "5b"], default=default.preset, help="model size")
    told = "of `repwam fit`, in place of --preset: the model and the tokens of a sequence; several are overlays"
    add("--recipe", type=path_argument, nargs="+", metavar="FILE", help=told)
    add(
        "--look-ahead",
        type=whole_number(0, MOST_LOOK_AHEAD),
        default=default.look_ahead,
        help="look-ahead layers, which training alone has (%(default)s)",
    )
    add("--gpus", type=count, default=default.gpus, help="devices (default: %(default)s)")
    add("--tokens", type=tokens_of, help="of a packed sequence, such as 160k (default: 160k, or the recipe's)")
    add("--gpu", choices=sorted(DEVICES), default=default.gpu, help="device (default: %(default)s)")
    add("--total-tokens", type=tokens_of, default="100g", help="of the run (100g)")
    add("--mfu", type=number(0, 1, above=True), default=default.mfu, help="assumed share of the peak (%(default)s)")
    add("--shard-size", type=count, default=default.shard_size, help="devices per copy (%(default)s)")
    add("--recompute", choices=get_args(Recompute), default=default.recompute)
    add("--grid", type=whole_number(1, 4096), nargs=3, default=default.grid, metavar=("VIEWS", "H", "W"))
    add("--transitions", type=whole_number(1, 100_000), default=default.transitions, help="of an episode (%(default)s)")
    add("--chunk", type=whole_number(1, 1024), default=default.chunk, help="latent frames (%(default)s)")
    add(
        "--actions-per-latent",
        "--vectors",
        dest="vectors",
        type=whole_number(1, 10_000),
        default=default.vectors,
        help="actions per latent frame (%(default)s); --vectors until version 0.3",
    )
    add("--passes", type=above_0, default=default.passes, help="through the data (%(default)s)")


def _estimate(options: argparse.Namespace) -> None:
    values = {name: getattr(options, name) for name in RunRequest.__dataclass_fields__}
    config, tokens = (None, None) if options.recipe is None else model_of_recipes(options.recipe)
    finetuning, muon = (None, True) if options.recipe is None else training_of_recipes(options.recipe)
    values |= {"tokens": options.tokens or tokens or RunRequest().tokens, "grid": tuple(options.grid)}
    if options.recipe is not None:
        values["preset"] = " + ".join(path.stem for path in options.recipe)
    request = RunRequest(**values)
    print("\n".join(format_estimate(request, estimate_run(request, config, finetuning, muon))))


def _plan(options: argparse.Namespace) -> None:
    print("repwam plan is now repwam estimate; the old name goes with the next version", file=sys.stderr)
    _estimate(options)


def _option_names(given: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


COMMANDS = (
    Command("quickstart", "the whole pipeline, to a report", _quickstart, add_quickstart_arguments),
    Command("collect", "expert demonstrations to a LeRobot data set", _collect, _collect_arguments),
    Command(
        "prepare", "a data set's own columns, or RoboTwin's episodes, to named channels", _prepare, _prepare_arguments
    ),
    *training_commands(STAGE),
    Command("stats", "action and state statistics of latent shards", _stats, _stats_arguments),
    Command("export", "a checkpoint to a policy folder, or a model folder", _export, _export_arguments),
    push_command("repvitok.runtime.pretrained:MODEL_FILES", "repwam_core.policy.folder:POLICY_FILES"),
    Command("show", "what a data set holds, and its episodes for the Rerun viewer", _show, _show_arguments),
    Command("rollout", "a policy in closed loop on unseen seeds", _rollout, _rollout_arguments),
    Command("robotwin", "RoboTwin's filed results as the paper's table", _robotwin, _robotwin_arguments),
    Command("estimate", "what training on so many devices would take", _estimate, _estimate_arguments),
    Command("plan", "the old name of estimate", _plan, _estimate_arguments),
    Command("openloop", "a policy against recorded episodes", _openloop, _openloop_arguments),
    Command("serve", "a policy behind a websocket, for robots and openpi's client", serve, add_serve_arguments),
)


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 2 a mistake in what was given, 130 Ctrl-C."""
    return run_commands("repwam", "repwam-core", __doc__ or "", COMMANDS, argv)
