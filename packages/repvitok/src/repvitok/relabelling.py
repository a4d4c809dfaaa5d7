"""Instructions that were corrected in a data set, brought to its latents without encoding again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence

from repvitok.data.latents import InstructionSource
from repvitok.data.lerobot import LeRobotReader
from repvitok.data.lerobot_format import EpisodeInfo
from repvitok.data.shards import LatentShards, replace_instructions
from repvitok.data.split import format_episodes
from repvitok.errors import UserError


def relabel_latents(
    latents: str | os.PathLike[str], dataset: str | os.PathLike[str], report: Callable[[str], None] | None = None
) -> dict[int, tuple[str, str]]:
    """Gives latents, labelled with latent actions or not, the instructions that their data set has now.

    It is one atomic write of meta.json, so a killed call has done all or nothing, and calling again does what is left.

    Args:
        latents: a finished folder of latent shards.
        dataset: the LeRobot data set that they were made from.
        report: gets a line for each folder and each change.

    Returns:
        number of each episode whose instruction has changed -> the old one, the new one.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: the latents are not finished, or were made from another data set; says by what that is seen.
    """
    shards, reader = LatentShards(latents), LeRobotReader(dataset)
    _require_same_data(shards, reader)
    taken = {info.episode_index for info in shards.infos}
    infos = [info for info in reader.episodes if info.index in taken]
    return relabel(shards, infos, reader.instruction_source, report)


def relabel(
    shards: LatentShards,
    infos: Sequence[EpisodeInfo],
    source: InstructionSource,
    report: Callable[[str], None] | None = None,
) -> dict[int, tuple[str, str]]:
    """`relabel_latents` of the very data set, whose episodes are `infos`; reports nothing where nothing changes."""
    changes = replace_instructions(shards, {info.index: info.task for info in infos}, source)
    if changes and report is not None:
        report(f"{shards.root}: {len(changes)} of {len(infos)} episodes have another instruction now")
        for (old, new), count in Counter(changes.values()).items():
            report(f"  {old!r} -> {new!r} ({count} episode{'s' if count > 1 else ''})")
    return changes


def _require_same_data(shards: LatentShards, reader: LeRobotReader) -> None:
    """The data set must be the one that was encoded: by its name, its rate, and its episodes' numbers and lengths."""
    meta, other = shards.meta, f"{shards.root}: these latents were not made from {reader.root}"
    if meta.source not in (reader.root.name, reader.root.resolve().name):
        raise UserError(f"{other}: they come from a data set called {meta.source!r}; give that one, under its name")
    if meta.frame_rate_hz != reader.fps:
        raise UserError(f"{other}: they are of {meta.frame_rate_hz:g} frames per second, it has {reader.fps:g}")
    lengths = {info.index: info.length for info in reader.episodes}
    if missing := {info.episode_index for info in shards.infos} - set(lengths):
        raise UserError(f"{other}: it has no episodes {format_episodes(missing)}, only {format_episodes(lengths)}")
    for info in shards.infos:
        encoded = len(range(info.offset, lengths[info.episode_index], meta.stride))
        expected = 1 + (encoded - 1) // meta.tubelet_frames
        if info.frames != expected:
            raise UserError(
                f"{other}: its episode {info.episode_index} has {lengths[info.episode_index]} frames, which make "
                f"{expected} latent frames from frame {info.offset} on, and {info.frames} were encoded"
            )
