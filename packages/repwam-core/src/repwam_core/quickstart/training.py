"""The training stages of a quickstart: each calls the command line a user would type for that stage alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latent_action.cli import main as latent_action
from repvitok.cli import main as repvitok
from repvitok.runtime.checkpointing import LAST
from repvitok.runtime.curves import read_curves

from repwam_core.quickstart.config import QuickstartConfig

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
    call(
        main,
        "fit",
        *(argument for file in config.recipe_files(stage) for argument in ("-c", file)),
        f"--trainer.accelerator={config.device}",
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        f"--trainer.default_root_dir={folder / FIT}",
        "--ckpt_path=last",
        *overrides,
    )
