"""The stages in order, from demonstrations (or a data set) to policy and report, each fed by the ones before it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_json_atomic

from repwam_core import __version__
from repwam_core.quickstart import work
from repwam_core.quickstart.config import QuickstartConfig, load_config, shaped_like
from repwam_core.quickstart.runner import StageResult, StageRunner, code_digest, folder_digest

NO_VIDEO = ("--model.loss.video_noise_prob=1.0",)
"""The video is pure noise, and unlearned, in every sample."""
CONTROLS = {
    "without latent actions": "no pretraining; all steps spent on robot actions",
    "without the video objective": "video is noise and unlearned in both stages",
    "untrained visual tokenizer": "random weights; everything after it trained alike",
}
"""What is taken away, and how. Each differs in that alone; steps, data and evaluation seeds are the policy's."""


@dataclass(frozen=True)
class Run:
    """One invocation of the quickstart.

    Attributes:
        code: the `code_digest` of the packages it runs.
        tokenizer: a trained one, as `from_pretrained` takes it; None where the quickstart trains its own.
    """

    config: QuickstartConfig
    seed: int
    workers: int | None
    runner: StageRunner
    command: str
    started_s: float
    repwam: work.Main
    code: str
    tokenizer: str | None = None

    def stage(self, name: str, work: Any, *, inputs: dict[str, StageResult | str], **settings: Any) -> StageResult:
        """Run a stage whose inputs are earlier stages (or digests); the code that makes it counts as a setting."""
        digests = {key: value if isinstance(value, str) else value.digest for key, value in inputs.items()}
        settings = {"version": __version__, "code": self.code, **settings}
        return self.runner.run(name, work, settings=settings, inputs=digests)


@dataclass(frozen=True)
class DataSet:
    """What the stages learn from.

    Attributes:
        folder: a LeRobot data set.
        digest: its identity.
        action_units: of the action channels where they are known; a LeRobot data set does not hold them.
        cameras: those that are used; None for all.
        episodes: numbers of those that are used; None for all.
        depth_range: what becomes black and what white of depth maps; None where none is used.
    """

    folder: Path
    digest: str
    action_units: tuple[str, ...] = ()
    cameras: tuple[str, ...] | None = None
    episodes: tuple[str, ...] | None = None
    depth_range: tuple[float, float] | None = None

    def read(self) -> dict[str, Any]:
        """What the stages that read it are given."""
        return {"dataset": self.folder, **self.chosen()}

    def chosen(self) -> dict[str, Any]:
        """What of it is used, and how."""
        return {"cameras": self.cameras, "episodes": self.episodes, "depth_range": self.depth_range}


@dataclass(frozen=True)
class Prepared:
    """The stages that make the world action model's training data, and where their outputs lie."""

    data: DataSet
    tokenizer: StageResult
    encoded: StageResult
    lat: StageResult
    labelled: StageResult

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer.folder / "tokenizer"

    @property
    def lat_folder(self) -> Path:
        return self.lat.folder / "lat"

    @property
    def latents(self) -> Path:
        return self.labelled.folder / "latents"


@dataclass(frozen=True)
class Trained:
    """All training stages; the last holds the policy."""

    prepared: Prepared
    pretrained: StageResult
    adapted: StageResult

    @property
    def policy(self) -> Path:
        return self.adapted.folder / "policy"


def train(this: Run, data: DataSet) -> Trained:
    """All training stages, the same for simulated and recorded data."""
    config = this.config
    if this.tokenizer is not None:
        return train_on_latents(this, data, given_tokenizer(this, this.tokenizer))
    tokenizer = this.stage(
        "tokenizer",
        partial(work.train_tokenizer, config=config, seed=this.seed, **data.read()),
        inputs={"dataset": data.digest, "recipe": recipe(config, "repvitok")},
        steps=config.steps.repvitok,
        seed=this.seed,
        size=config.size,
        stride=config.stride,
        held_out=config.held_out,
        **data.chosen(),
    )
    return train_on_latents(this, data, tokenizer)


def given_tokenizer(this: Run, source: str) -> StageResult:
    """A trained tokenizer in the place of the one that the quickstart would train, copied into its stage's folder."""
    from repvitok.model import load_tokenizer

    tokenizer = load_tokenizer(source)

    def keep(folder: Path) -> dict[str, Any]:
        (folder / "tokenizer").mkdir(exist_ok=True)
        tokenizer.write_into(folder / "tokenizer")
        return {"given": source, "digest": tokenizer.digest()[:16]}

    return this.stage("tokenizer", keep, inputs={"tokenizer": tokenizer.digest()})


def train_on_latents(
    this: Run, data: DataSet, tokenizer: StageResult, *, prefix: str = "", overrides: Sequence[str] = ()
) -> Trained:
    """The stages after the tokenizer's.

    Args:
        this: the run.
        data: what to learn from.
        tokenizer: a stage whose folder holds `tokenizer`.
        prefix: of the stages' names, for a second chain in one run.
        overrides: laid over both recipes of the world action model.
    """
    config, common = this.config, {"seed": this.seed, "held_out": this.config.held_out}
    encoded = this.stage(
        f"{prefix}encode",
        partial(work.encode, config=config, **data.read(), tokenizer=tokenizer.folder / "tokenizer"),
        inputs={"dataset": data.digest, "tokenizer": tokenizer},
        size=config.size,
        stride=config.stride,
        offsets=config.offsets,
        **data.chosen(),
    )
    latents = encoded.folder / "latents"
    lat = this.stage(
        f"{prefix}latent-actions",
        partial(work.train_latent_actions, config=config, seed=this.seed, latents=latents),
        inputs={"latents": encoded, "recipe": recipe(config, "latent_action")},
        steps=config.steps.latent_action,
        **common,
    )
    labelled = this.stage(
        f"{prefix}label",
        partial(work.label, config=config, lat=lat.folder / "lat", latents=latents),
        inputs={"latents": encoded, "lat": lat},
    )
    prepared = Prepared(data, tokenizer, encoded, lat, labelled)
    return train_world_model(this, prepared, prefix=prefix, overrides=overrides)


def train_world_model(this: Run, given: Prepared, *, prefix: str = "", overrides: Sequence[str] = ()) -> Trained:
    """Both stages of the world action model, on labelled latents; arguments as in `train_on_latents`."""
    pretrained = this.stage(
        f"{prefix}pretrain",
        partial(
            work.pretrain,
            repwam=this.repwam,
            config=this.config,
            seed=this.seed,
            latents=given.latents,
            overrides=overrides,
        ),
        inputs={"latents": given.labelled, "recipe": recipe(this.config, "pretrain")},
        steps=this.config.steps.pretrain,
        **_settings(this, overrides),
    )
    adapted = adapt(this, given, pretrained, steps=this.config.steps.adapt, prefix=prefix, overrides=overrides)
    return Trained(given, pretrained, adapted)


def adapt(
    this: Run,
    given: Prepared,
    pretrained: StageResult | None,
    *,
    steps: int,
    prefix: str = "",
    overrides: Sequence[str] = (),
) -> StageResult:
    """Adaptation to robot actions, from a pretrained model or from scratch."""
    inputs: dict[str, StageResult | str] = {"latents": given.labelled, "recipe": recipe(this.config, "adapt")}
    if pretrained is not None:
        inputs["pretrained"] = pretrained
    return this.stage(
        f"{prefix}adapt",
        partial(
            work.adapt,
            repwam=this.repwam,
            config=this.config,
            seed=this.seed,
            steps=steps,
            latents=given.latents,
            pretrained=None if pretrained is None else pretrained.folder / "wam",
            tokenizer=given.tokenizer_folder,
            lat=given.lat_folder,
            action_units=given.data.action_units,
            overrides=overrides,
        ),
        inputs=inputs,
        steps=steps,
        action_units=list(given.data.action_units),
        **_settings(this, overrides),
    )


def recipe(config: QuickstartConfig, stage: str) -> str:
    """The text of a training stage's recipes: part of its identity."""
    return "\n".join(file.read_text() for file in config.recipe_files(stage))


def _settings(this: Run, overrides: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": this.seed, "held_out": this.config.held_out}
    return settings | ({"overrides": list(overrides)} if overrides else {})


def run_controls(this: Run, trained: Trained) -> dict[str, StageResult]:
    """Train every control and drive the evaluation's unseen seeds with it.

    Returns:
        control -> its closed-loop stage, whose folder holds `policy.json`.
    """
    given, steps = trained.prepared, this.config.steps.pretrain + this.config.steps.adapt
    read = [yaml.safe_load(file.read_text()).get("model", {}) for file in this.config.recipe_files("pretrain")]
    architecture = [model["wam"] for model in read if "wam" in model][-1]  # otherwise the pretrained model's
    untrained = partial(_untrained_like, trained=given.tokenizer_folder, seed=this.seed)
    wam = (f"--model.wam={json.dumps(architecture)}",)
    adapted = {
        "without latent actions": adapt(this, given, None, steps=steps, prefix="no-latent-actions-", overrides=wam),
        "without the video objective": train_world_model(this, given, prefix="no-video-", overrides=NO_VIDEO).adapted,
    }
    tokenizer = this.stage("untrained-tokenizer", untrained, inputs={"tokenizer": given.tokenizer}, seed=this.seed)
    latest = train_on_latents(this, given.data, tokenizer, prefix="untrained-")
    adapted["untrained visual tokenizer"] = latest.adapted
    return {name: _driven(this, name, stage) for name, stage in adapted.items()}


def _untrained_like(folder: Path, *, trained: Path, seed: int) -> dict[str, Any]:
    """A tokenizer of the trained one's architecture with random weights, in `folder/tokenizer`."""
    import torch
    from repvitok import RepViTok

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        RepViTok(RepViTok.from_pretrained(trained).config).save_pretrained(folder / "tokenizer")
    return {}


def _driven(this: Run, name: str, adapted: StageResult) -> StageResult:
    config = this.config
    return this.stage(
        f"{name.replace(' ', '-')}-rollouts",
        partial(
            work.run_policy,
            config=config,
            policy=adapted.folder / "policy",
            workers=this.workers,
            tasks=config.tasks,
            filmed=0,
        ),
        inputs={"policy": adapted},
        suite=config.suite,
        tasks=config.tasks,
        same_scene=config.same_scene,
        size=config.size,
        simulator=config.simulator,
        eval_episodes=config.eval_episodes,
        execute=config.execute,
    )


def run(arguments: argparse.Namespace, repwam: work.Main) -> int:
    """Run the quickstart; returns the exit code. `repwam` is the command that trains its later stages."""
    from repwam_core.quickstart.results import closing, report_data
    from repwam_core.report import closed_loop, write_report

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
        if outcome:  # that section of report.json under the name it had before
            write_json_atomic(out / "results.json", closed_loop(told))
    print(closing(told))
    print(f"\nreport, for a browser: {report.resolve()}")
    print(f"its numbers, for programs: {report.with_suffix('.json').resolve()}")
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
        settings = work.settings_of(config)
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
        partial(work.collect_demonstrations, config=config, seed=this.seed, workers=this.workers),
        inputs={},
        **sim,
        episodes=config.episodes,
        noise=config.noise,
        seed=this.seed,
    )
    dataset = collected.folder / "dataset"
    units = work.settings_of(config).embodiment.action_units
    trained = train(this, DataSet(dataset, collected.digest, units))
    sim |= {"eval_episodes": config.eval_episodes}
    baselines = this.stage(
        "baselines",
        partial(work.run_baselines, config=config, dataset=dataset, workers=this.workers),
        inputs={"dataset": collected},
        **sim,
    )
    drive = {"config": config, "policy": trained.policy, "workers": this.workers}
    sim |= {"execute": config.execute}
    rollouts = this.stage(
        "rollouts",
        partial(work.run_policy, **drive, tasks=config.all_tasks, filmed=config.filmed),
        inputs={"policy": trained.adapted},
        filmed=config.filmed,
        **sim,
    )
    outcome = {"baselines": baselines, "rollouts": rollouts}
    if config.same_scene:
        outcome["language"] = this.stage(
            "language",
            partial(work.run_language, **drive),
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
