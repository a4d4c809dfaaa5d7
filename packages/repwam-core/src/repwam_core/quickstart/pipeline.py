"""The quickstart's stages in order, from demonstrations (or a data set) to the report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from repvitok.errors import UserError

from repwam_core import __version__
from repwam_core.quickstart import closed_loop, training
from repwam_core.quickstart.plan import RECIPES, Plan, load_plan, shaped_like
from repwam_core.quickstart.stages import StageResult, StageRunner, folder_digest


@dataclass(frozen=True)
class Run:
    """One invocation of the quickstart."""

    plan: Plan
    seed: int
    workers: int
    runner: StageRunner
    command: str
    started_s: float
    repwam: training.Main

    def stage(self, name: str, work: Any, *, inputs: dict[str, StageResult | str], **settings: Any) -> StageResult:
        """Run a stage whose inputs are earlier stages (or digests); recipes and version count as settings."""
        digests = {key: value if isinstance(value, str) else value.digest for key, value in inputs.items()}
        settings = {"version": __version__, **settings}
        return self.runner.run(name, work, settings=settings, inputs=digests)


@dataclass(frozen=True)
class Trained:
    """The stages that lead to a policy, and where their outputs lie."""

    dataset: Path
    tokenizer: StageResult
    encoded: StageResult
    lat: StageResult
    labelled: StageResult
    pretrained: StageResult
    adapted: StageResult

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer.folder / "tokenizer"

    @property
    def lat_folder(self) -> Path:
        return self.lat.folder / "lat"

    @property
    def latents(self) -> Path:
        return self.labelled.folder / "latents"

    @property
    def policy(self) -> Path:
        return self.adapted.folder / "policy"


def run(arguments: argparse.Namespace, repwam: training.Main) -> int:
    """Run the quickstart; returns the exit code. ``repwam`` is the command that trains its later stages."""
    from repwam_core.quickstart.gather import report_data
    from repwam_core.report import write_report

    started_s = time.monotonic()
    recipe = "sim.yaml" if arguments.dataset is None else "dataset.yaml"
    plan = load_plan(RECIPES / recipe, arguments)
    plan = _checked(arguments, plan)
    runner = StageRunner(arguments.out, fresh=arguments.fresh)
    command = "repwam " + " ".join(sys.argv[1:])
    this = Run(plan, arguments.seed, arguments.workers, runner, command, started_s, repwam)
    with runner.lock():
        trained, outcome = _from_dataset(this, arguments.dataset) if arguments.dataset else _from_simulator(this)
        report = arguments.out / "report.html"
        write_report(report_data(this, trained, outcome), report)
    print(f"report: {report.resolve()}")
    return 0


def _checked(arguments: argparse.Namespace, plan: Plan) -> Plan:
    """Find what would stop a later stage before the first one starts; fit the frame size to a data set's camera."""
    if arguments.dataset is None:
        from repwam_core.sim.metaworld import canonical_names
        from repwam_core.sim.rendering import import_mujoco

        canonical_names(plan.all_tasks)
        import_mujoco()
        return plan
    from repvitok.data import LeRobotReader

    reader = LeRobotReader(arguments.dataset)
    if not reader.camera_keys:
        raise UserError(
            f"{arguments.dataset}: the data set has no camera stored as video, and video is what we learn from"
        )
    if "action" not in reader.features:
        raise UserError(f"{arguments.dataset}: the data set has no actions to adapt to")
    if arguments.size is not None:
        return plan
    height, width = reader.features[reader.camera_keys[0]]["shape"][:2]
    return shaped_like(plan, height, width)


def _from_simulator(this: Run) -> tuple[Trained, dict[str, StageResult]]:
    plan = this.plan
    sim = {"tasks": plan.all_tasks, "same_scene": plan.same_scene, "size": plan.size}
    collected = this.stage(
        "collect",
        partial(closed_loop.collect_demonstrations, plan=plan, seed=this.seed, workers=this.workers),
        inputs={},
        **sim,
        episodes=plan.episodes,
        noise=plan.noise,
        seed=this.seed,
    )
    dataset = collected.folder / "dataset"
    units = closed_loop.settings_of(plan).embodiment.action_units
    trained = _train(this, dataset, collected.digest, units)
    sim |= {"eval_episodes": plan.eval_episodes}
    baselines = this.stage(
        "baselines",
        partial(closed_loop.run_baselines, plan=plan, dataset=dataset, workers=this.workers),
        inputs={"dataset": collected},
        **sim,
    )
    drive = {"plan": plan, "policy": trained.policy, "workers": this.workers}
    sim |= {"execute": plan.execute}
    rollouts = this.stage(
        "rollouts",
        partial(closed_loop.run_policy, **drive, tasks=plan.all_tasks),
        inputs={"policy": trained.adapted},
        **sim,
    )
    outcome = {"baselines": baselines, "rollouts": rollouts}
    if plan.same_scene:
        outcome["language"] = this.stage(
            "language",
            partial(closed_loop.run_language, **drive),
            inputs={"policy": trained.adapted},
            language_episodes=plan.language_episodes,
            **sim,
        )
    return trained, outcome


def _from_dataset(this: Run, dataset: Path) -> tuple[Trained, dict[str, StageResult]]:
    return _train(this, dataset, folder_digest(dataset)), {}


def _train(this: Run, dataset: Path, digest: str, action_units: Sequence[str] = ()) -> Trained:
    """The training stages, the same for simulated and recorded data."""
    plan, seed, steps = this.plan, this.seed, this.plan.steps
    tokenizer = this.stage(
        "tokenizer",
        partial(training.train_tokenizer, plan=plan, seed=seed, dataset=dataset),
        inputs={"dataset": digest, "recipe": _recipe("repvitok.yaml")},
        steps=steps.repvitok,
        seed=seed,
        size=plan.size,
        stride=plan.stride,
        held_out=plan.held_out,
    )
    encoded = this.stage(
        "encode",
        partial(training.encode, plan=plan, dataset=dataset, tokenizer=tokenizer.folder / "tokenizer"),
        inputs={"dataset": digest, "tokenizer": tokenizer},
        size=plan.size,
        stride=plan.stride,
        offsets=plan.offsets,
    )
    latents = encoded.folder / "latents"
    common = {"seed": seed, "held_out": plan.held_out}
    lat = this.stage(
        "latent-actions",
        partial(training.train_latent_actions, plan=plan, seed=seed, latents=latents),
        inputs={"latents": encoded, "recipe": _recipe("latent_action.yaml")},
        steps=steps.latent_action,
        **common,
    )
    labelled = this.stage(
        "label",
        partial(training.label, lat=lat.folder / "lat", latents=latents),
        inputs={"latents": encoded, "lat": lat},
    )
    labelled_latents = labelled.folder / "latents"
    pretrained = this.stage(
        "pretrain",
        partial(training.pretrain, repwam=this.repwam, plan=plan, seed=seed, latents=labelled_latents),
        inputs={"latents": labelled, "recipe": _recipe("pretrain.yaml")},
        steps=steps.pretrain,
        **common,
    )
    adapted = this.stage(
        "adapt",
        partial(
            training.adapt,
            repwam=this.repwam,
            plan=plan,
            seed=seed,
            latents=labelled_latents,
            pretrained=pretrained.folder / "wam",
            tokenizer=tokenizer.folder / "tokenizer",
            lat=lat.folder / "lat",
            action_units=action_units,
        ),
        inputs={"latents": labelled, "pretrained": pretrained, "recipe": _recipe("adapt.yaml")},
        steps=steps.adapt,
        action_units=list(action_units),
        **common,
    )
    return Trained(dataset, tokenizer, encoded, lat, labelled, pretrained, adapted)


def _recipe(name: str) -> str:
    return (RECIPES / name).read_text()
