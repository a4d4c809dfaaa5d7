"""The command `repvitok`: train a video tokenizer, encode data sets with it, decode latents, export it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from repvitok.commands import Command, TrainingStage, run_commands, training_commands
from repvitok.errors import run_cli

STAGE = TrainingStage(
    name="repvitok",
    module="repvitok.training:RepViTokTraining",
    data="repvitok.data.datamodule:ClipDataModule",
)


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0 done, 2 a mistake in what was given, 130 Ctrl-C."""
    commands = [
        *training_commands(STAGE),
        Command("encode", "a data set to latent shards", _encode, _encode_arguments),
        Command("decode", "latent shards back to video files", _decode, _decode_arguments),
        Command("export", "a checkpoint to the folder that from_pretrained loads", _export, _export_arguments),
    ]
    return run_commands("repvitok", "repvitok", __doc__ or "", commands, argv)


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="exported tokenizer, or a hub id")
    parser.add_argument("--dataset", required=True, metavar="FOLDER", help="LeRobot data set (v2.1 or v3.0)")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the shards go; an interrupted run resumes"
    )
    parser.add_argument("--size", type=_size, required=True, metavar="H[xW]", help="pixels frames are resized to")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th frame (default 1)")
    parser.add_argument(
        "--offsets", type=int, nargs="+", default=[0], help="first raw frames to start from (default 0)"
    )
    parser.add_argument("--cameras", nargs="+", default=None, help="camera keys (default: all)")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="type on disk")


def _encode(options: argparse.Namespace) -> None:
    from repvitok.data.lerobot import LeRobotReader
    from repvitok.encoding import encode_dataset
    from repvitok.model import RepViTok

    encode_dataset(
        RepViTok.from_pretrained(options.tokenizer),
        LeRobotReader(options.dataset),
        options.out,
        size=options.size,
        stride=options.stride,
        offsets=tuple(options.offsets),
        cameras=options.cameras,
        dtype=options.dtype,
    )


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="the tokenizer that made the latents")
    parser.add_argument("--latents", required=True, metavar="FOLDER", help="latent shards written by encode")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the .mp4 files go")
    parser.add_argument("--episodes", type=int, nargs="+", default=None, help="episode indices (default: all)")


def _decode(options: argparse.Namespace) -> None:
    from repvitok.decoding import decode_shards
    from repvitok.model import RepViTok

    decode_shards(RepViTok.from_pretrained(options.tokenizer), options.latents, options.out, options.episodes)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by fit, or a run's folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where config, weights and model card go")
    parser.add_argument("--raw", action="store_true", help="the last step's weights, not their moving average")


def _export(options: argparse.Namespace) -> None:
    from repvitok.checkpointing import resolve_checkpoint
    from repvitok.export import export_checkpoint

    tokenizer = export_checkpoint(resolve_checkpoint(options.ckpt), options.out, averaged=not options.raw)
    print(f"{options.out}: RepViTok {tokenizer.digest()[:16]}")


def _size(text: str) -> tuple[int, int]:
    """ "64" -> (64, 64), "96x128" -> (96, 128)."""
    parts = text.lower().split("x")
    if not all(part.isdigit() for part in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected a size like 64 or 96x128 (height x width), got {text!r}")
    return int(parts[0]), int(parts[-1])
