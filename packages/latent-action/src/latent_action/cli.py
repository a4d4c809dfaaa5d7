"""The command `latent-action`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from repvitok.runtime.commands import (
    SEEDS,
    Command,
    RawCommand,
    TrainingStage,
    add_half,
    add_license,
    parse_held_out,
    parse_share,
    path_argument,
    push_command,
    run_commands,
    text_argument,
    training_commands,
    whole_number,
)
from repvitok.runtime.errors import UserError, run_cli, say_next

STAGE = TrainingStage(
    name="latent_action",
    module="latent_action.training:LatentActionTraining",
    data="latent_action.datamodule:LatentActionData",
    recipe="recipes/2_latent_action/tiny.yaml",
    next_words=lambda run: ("latent-action", "export", "--ckpt", run.trainer.default_root_dir, "--out", "LAT"),
)
LAPA_STAGE = TrainingStage(
    name="lapa",
    module="latent_action.baselines.lapa_training:LapaTraining",
    data="latent_action.baselines.lapa_training:FramePairData",
    recipe="recipes/2_latent_action/lapa_tiny.yaml",
    next_words=lambda run: ("latent-action", "lapa", "export", "--ckpt", run.trainer.default_root_dir, "--out", "LAPA"),
)
DESCRIPTION = "Learn latent actions from video latents, label data with them, and test what they hold."


def _label_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lat", type=text_argument, required=True, help="latent action tokenizer: folder or name")
    parser.add_argument(
        "--latents", type=path_argument, required=True, help="folder of latent shards (repvitok encode)"
    )
    parser.add_argument(
        "--out", type=path_argument, help="folder for labelled latents of their own (default: beside the shards)"
    )
    parser.add_argument(
        "--shard",
        type=parse_share,
        metavar="I/N",
        help="label every N-th episode from I only (a job array); a last call without it finishes them",
    )
    parser.add_argument("--device", type=text_argument, default="cpu", help="cpu, cuda, ... (default: %(default)s)")


def _label(arguments: argparse.Namespace) -> int:
    from latent_action.labelling import label_shards
    from latent_action.model import LatentActionTokenizer

    lat = LatentActionTokenizer.from_pretrained(arguments.lat)
    out = arguments.out or arguments.latents
    meta = label_shards(lat, arguments.latents, out, shard=arguments.shard, device=arguments.device)
    if meta is None:
        print(f"labelled share {arguments.shard[0]}/{arguments.shard[1]} into {out}")
        again = ("latent-action", "label", "--lat", arguments.lat, "--latents", arguments.latents)
        say_next(*again, *(() if arguments.out is None else ("--out", out)))
    else:
        print(f"{out}: labelled by LAT {lat.digest()[:16]}, std {meta.latent_action_std}")
        say_next("repwam", "fit", "-c", "RECIPE", "--data.latents", out)
    return 0


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lat", type=text_argument, required=True, help="latent action tokenizer: folder or name")
    parser.add_argument(
        "--latents", type=path_argument, required=True, help="folder of latent shards with robot actions"
    )
    held_out_help = "share of the episodes, or their numbers like 2,5-7 (default: %(default)s)"
    parser.add_argument("--held-out", type=parse_held_out, default=0.25, metavar="SHARE", help=held_out_help)
    parser.add_argument(
        "--target",
        choices=("actions", "motion"),
        default="actions",
        help="robot actions, or the change of the robot's state: for actions that are absolute positions "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--lapa", type=path_argument, help="folder of a LAPA quantiser, for one more row; needs --dataset"
    )
    parser.add_argument("--dataset", type=path_argument, help="the LeRobot data set the latents were made from")
    parser.add_argument("--seed", type=whole_number(0, SEEDS), default=0, help="of the heads (default: %(default)s)")
    parser.add_argument(
        "--head-steps", type=whole_number(1), default=600, help="training steps of the heads (default: 600)"
    )
    parser.add_argument(
        "--frames-steps", type=whole_number(1), default=300, help="training steps of the head on latents (default: 300)"
    )
    parser.add_argument("--out", type=path_argument, help="also write the report to this JSON file")


def _probe(arguments: argparse.Namespace) -> int:
    from repvitok.runtime.files import write_json_atomic

    from latent_action.model import LatentActionTokenizer
    from latent_action.probe import format_report, probe_shards

    lat = LatentActionTokenizer.from_pretrained(arguments.lat)
    report = probe_shards(
        lat,
        arguments.latents,
        target=arguments.target,
        held_out=arguments.held_out,
        head_steps=arguments.head_steps,
        frames_steps=arguments.frames_steps,
        seed=arguments.seed,
        baselines=_lapa_rows(arguments, lat.config.transition_frames),
    )
    print(format_report(report))
    if arguments.out is not None:
        write_json_atomic(arguments.out, report.to_dict())
    return 0


def _lapa_rows(arguments: argparse.Namespace, transition_frames: int) -> dict[str, Any]:
    """LAPA's latent actions of every transition, as they are and before quantisation."""
    if arguments.lapa is None:
        return {}
    if arguments.dataset is None:
        raise UserError("--lapa needs --dataset, the data set the latents were made from: LAPA sees pixels.")
    from latent_action.baselines.lapa import LapaQuantizer, lapa_features, load_frame_table

    lapa = LapaQuantizer.from_pretrained(arguments.lapa)
    lapa.require_transition_frames(transition_frames)
    table = load_frame_table(arguments.latents, arguments.dataset, lapa.config.size, transition_frames)
    return {
        "LAPA": lapa_features(lapa, table),
        "LAPA before quantisation": lapa_features(lapa, table, quantised=False),
    }


def _visualize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lat", type=text_argument, required=True, help="latent action tokenizer: folder or name")
    parser.add_argument("--latents", type=path_argument, required=True, help="folder of latent shards")
    parser.add_argument("--dataset", type=path_argument, required=True, help="the LeRobot data set they were made from")
    parser.add_argument("--out", type=path_argument, required=True, help="file to write: .png, or .mp4 for a film")
    parser.add_argument(
        "--episode", type=whole_number(), help="its number in the data set (default: the latents' first)"
    )
    parser.add_argument(
        "--transitions", type=whole_number(1, 10_000), default=12, help="most to draw in a PNG (default: %(default)s)"
    )
    parser.add_argument("--lapa", type=path_argument, help="folder of a LAPA quantiser, drawn beside")


def _visualize(arguments: argparse.Namespace) -> int:
    from latent_action.baselines.lapa import LapaQuantizer
    from latent_action.model import LatentActionTokenizer
    from latent_action.visualize import write_episode_picture

    checks = write_episode_picture(
        lat=LatentActionTokenizer.from_pretrained(arguments.lat),
        latents=arguments.latents,
        dataset=arguments.dataset,
        out=arguments.out,
        episode=arguments.episode,
        transitions=arguments.transitions,
        lapa=None if arguments.lapa is None else LapaQuantizer.from_pretrained(arguments.lapa),
    )
    print(f"wrote {arguments.out}")
    for name, check in checks.items():
        print(f"{name}: {check or 'too few transitions in which anything moves to compare the map with it'}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ckpt", type=path_argument, required=True, help="checkpoint written by fit, or a run's folder"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for config.json and model.safetensors")


def _export_lat_arguments(parser: argparse.ArgumentParser) -> None:
    _export_arguments(parser)
    add_half(parser)
    add_license(parser)


def _export(arguments: argparse.Namespace) -> int:
    from repvitok.runtime.checkpointing import resolve_checkpoint

    from latent_action.training import export_checkpoint

    lat = export_checkpoint(resolve_checkpoint(arguments.ckpt), arguments.out, arguments.license, arguments.half)
    print(f"{arguments.out}: LAT {lat.digest()[:16]}")
    say_next("latent-action", "label", "--lat", arguments.out, "--latents", "LATENTS")
    return 0


def _export_lapa(arguments: argparse.Namespace) -> int:
    from repvitok.runtime.checkpointing import resolve_checkpoint

    from latent_action.baselines.lapa_training import export_lapa

    lapa = export_lapa(resolve_checkpoint(arguments.ckpt), arguments.out)
    print(f"{arguments.out}: LAPA {lapa.digest()[:16]}")
    command = ("latent-action", "probe", "--lat", "LAT", "--latents", "LATENTS", "--lapa", arguments.out)
    say_next(*command, "--dataset", "DATASET")
    return 0


LAPA_COMMANDS = (
    *training_commands(LAPA_STAGE),
    Command("export", "from a training checkpoint to a model folder", _export_lapa, _export_arguments),
)


def _lapa(argv: list[str]) -> int:
    """The verbs of the LAPA baseline."""
    description = "LAPA's latent action quantisation, trained on the same transitions in pixels, as a baseline."
    return run_commands("latent-action lapa", "latent-action", description, LAPA_COMMANDS, argv)


COMMANDS = (
    *training_commands(STAGE),
    Command("label", "latent shards in, latent actions beside them out", _label, _label_arguments),
    Command("probe", "how well latent actions predict robot actions", _probe, _probe_arguments),
    Command("visualize", "a picture of where latent actions act", _visualize, _visualize_arguments),
    Command("export", "from a training checkpoint to a model folder", _export, _export_lat_arguments),
    push_command("repvitok.runtime.pretrained:MODEL_FILES"),
    RawCommand("lapa", "a baseline: fit, validate and export LAPA's quantiser on the same transitions", _lapa),
)


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run `latent-action`; returns the exit code."""
    return run_commands("latent-action", "latent-action", DESCRIPTION, COMMANDS, argv)
