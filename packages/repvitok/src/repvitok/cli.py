"""The command `repvitok`: train a video tokenizer, encode data sets with it, decode latents, export it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from repvitok.runtime.commands import (
    DEPTH_RANGE,
    EPISODES,
    Command,
    TrainingStage,
    add_half,
    add_license,
    parse_share,
    parse_size,
    path_argument,
    push_command,
    run_commands,
    text_argument,
    training_commands,
    whole_number,
)
from repvitok.runtime.documents import MAX_STRIDE
from repvitok.runtime.errors import MOST_PROCESSES, run_cli, say_next

STAGE = TrainingStage(
    name="repvitok",
    module="repvitok.training.module:RepViTokTraining",
    data="repvitok.data.datamodule:ClipDataModule",
    recipe="recipes/1_repvitok/tiny.yaml",
    tells_test=True,
    next_words=lambda run: ("repvitok", "export", "--ckpt", run.trainer.default_root_dir, "--out", "TOKENIZER"),
    # An image meets no tubelet and no video adversary, and each of the two backward passes skips the other's network.
    parallel_strategy="ddp_find_unused_parameters_true",
)


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokenizer",
        type=text_argument,
        required=True,
        metavar="FOLDER",
        help="exported tokenizer, an installed one's name, or hf://owner/name (Wan2.2's VAE too)",
    )
    add(
        "--dataset",
        type=text_argument,
        required=True,
        metavar="DATA",
        help="LeRobot data set, folder of videos or images, or tar shards",
    )
    add(
        "--out",
        type=text_argument,
        required=True,
        metavar="FOLDER",
        help="where the shards go; an interrupted run resumes",
    )
    add("--size", type=parse_size, required=True, metavar="H[xW]", help="pixels frames are resized to")
    add("--stride", type=whole_number(1, MAX_STRIDE), default=1, help="take every n-th frame (default 1)")
    add("--offsets", type=whole_number(), nargs="+", default=[0], help="first raw frames to start from (default 0)")
    add(
        "--augment",
        type=whole_number(0, 1000),
        default=0,
        metavar="N",
        help="N more encodings of each episode, with pictures cropped and coloured otherwise (default 0)",
    )
    add("--cameras", type=text_argument, nargs="+", default=None, help="camera keys (default: all)")
    add("--depth-range", **DEPTH_RANGE)
    add("--episodes", **EPISODES)
    add("--dtype", choices=["float32", "float16"], default="float32", help="type on disk")
    add(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the model's products; bfloat16 is faster on a GPU (default float32, as the policy)",
    )
    add(
        "--device", type=text_argument, default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    add(
        "--batch-size",
        type=whole_number(1, 65_536),
        default=8,
        metavar="B",
        help="videos encoded side by side (default 8)",
    )
    add("--workers", type=whole_number(1, MOST_PROCESSES), default=1, metavar="W", help="decoding threads (default 1)")
    add(
        "--processes",
        type=whole_number(1, MOST_PROCESSES),
        default=1,
        metavar="P",
        help="processes on this machine, spread over its GPUs",
    )
    add("--shard", type=parse_share, metavar="I/N", help="encode one of N shares (a job array); `merge` joins them")
    add(
        "--cache-folder",
        type=text_argument,
        default=None,
        metavar="FOLDER",
        help="for tar shards: their indices and local copies",
    )


def _encode(options: argparse.Namespace) -> None:
    from repvitok.encoding import EncodingJob, run_job

    settings = ("size", "stride", "cameras", "episodes", "dtype", "precision", "augment", "batch_size", "workers")
    job = EncodingJob(
        tokenizer=options.tokenizer,
        dataset=options.dataset,
        out=options.out,
        device=options.device,
        cache_folder=options.cache_folder,
        depth_range=options.depth_range,
        settings={name: getattr(options, name) for name in settings} | {"offsets": tuple(options.offsets)},
    )
    run_job(job, shard=options.shard, processes=options.processes)
    if options.shard is None:
        say_next("latent-action", "fit", "-c", "RECIPE", "--data.latents", options.out)
    else:  # when all are done
        say_next("repvitok", "merge", "--out", options.out)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=text_argument, required=True, metavar="FOLDER", help="the folder given to encode --shard"
    )


def _merge(options: argparse.Namespace) -> None:
    from repvitok.encoding_plan import merge_latents

    meta = merge_latents(options.out)
    print(f"{options.out}: latents of {meta.source}, by tokenizer {meta.tokenizer_digest[:16]}")
    say_next("latent-action", "fit", "-c", "RECIPE", "--data.latents", options.out)


def _relabel_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--latents",
        type=path_argument,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="latent shards, labelled or not; several folders",
    )
    add(
        "--dataset",
        type=path_argument,
        required=True,
        metavar="DATA",
        help="the LeRobot data set that they were made from",
    )


def _relabel(options: argparse.Namespace) -> None:
    from repvitok.encoding_plan import relabel_latents

    for latents in options.latents:
        if not relabel_latents(latents, options.dataset, report=print):
            print(f"{latents}: the instructions are those of {options.dataset} already")


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokenizer", type=text_argument, required=True, metavar="FOLDER", help="the tokenizer that made the latents")
    add("--latents", type=path_argument, required=True, metavar="FOLDER", help="latent shards written by encode")
    add("--out", type=path_argument, required=True, metavar="FOLDER", help="where the .mp4 files go")
    add("--episodes", **EPISODES)


def _decode(options: argparse.Namespace) -> None:
    from repvitok.encoding import decode_shards
    from repvitok.model import load_tokenizer

    decode_shards(load_tokenizer(options.tokenizer), options.latents, options.out, options.episodes)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--ckpt", type=path_argument, required=True, metavar="FILE", help="checkpoint written by fit, or a run's folder"
    )
    add("--out", type=path_argument, required=True, metavar="FOLDER", help="where config, weights and model card go")
    add("--raw", action="store_true", help="the last step's weights, not their moving average")
    add_half(parser)
    add_license(parser)


def _export(options: argparse.Namespace) -> None:
    from repvitok.runtime.checkpointing import resolve_checkpoint
    from repvitok.training.export import export_checkpoint, trained_size

    checkpoint = resolve_checkpoint(options.ckpt)
    settings = {"averaged": not options.raw, "license": options.license, "half": options.half}
    tokenizer = export_checkpoint(checkpoint, options.out, **settings)
    height, width = trained_size(Path(checkpoint).parent) or (256, 256)
    print(f"{options.out}: {type(tokenizer).__name__} {tokenizer.digest()[:16]}")
    command = ("repvitok", "encode", "--tokenizer", options.out, "--dataset", "DATASET", "--size", f"{height}x{width}")
    say_next(*command, "--out", "LATENTS")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-c",
        "--config",
        type=path_argument,
        action="append",
        required=True,
        metavar="RECIPE",
        help="a recipe of any of the three packages; later ones are laid over earlier ones, as by fit",
    )
    add(
        "overrides",
        type=text_argument,
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="as model.teacher.init_args.weights_path=FILE",
    )


def _doctor(options: argparse.Namespace) -> int:
    from repvitok.doctor import needs, read_recipe

    found = needs(read_recipe(options.config, options.overrides))
    for need in found:
        print(need)
    lacking = sum(need.problem is not None for need in found)
    print(f"{len(found)} needed beside data, {lacking} missing or wrong")
    return 1 if lacking else 0


COMMANDS = (
    *training_commands(STAGE),
    Command("encode", "a data set to latent shards", _encode, _encode_arguments),
    Command("merge", "the parts of a job array of encode to one folder of shards", _merge, _merge_arguments),
    Command("relabel", "a data set's corrected instructions to its latents", _relabel, _relabel_arguments),
    Command("decode", "latent shards back to video files", _decode, _decode_arguments),
    Command("doctor", "what a recipe needs: weights, where they are, what is missing", _doctor, _doctor_arguments),
    Command("export", "a checkpoint to the folder that from_pretrained loads", _export, _export_arguments),
    push_command("repvitok.runtime.pretrained:MODEL_FILES"),
)


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0 done, 2 a mistake in what was given, 130 Ctrl-C."""
    return run_commands("repvitok", "repvitok", __doc__ or "", COMMANDS, argv)
