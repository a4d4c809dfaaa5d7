"""Joins the parts that a job array encoded into one folder of latent shards."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repvitok.data.latents import ChannelStatistics, LatentMeta
from repvitok.data.shards import LatentShards, remove_work, write_latent_meta
from repvitok.errors import UserError
from repvitok.files import link_or_copy, sole_writer
from repvitok.progress import progress as progress_bar

_PARTS = ".parts"


def part_folder(out: Path, share: tuple[int, int]) -> Path:
    """Where the i-th of n jobs leaves its shards."""
    return out / _PARTS / f"{share[0]:05d}-of-{share[1]:05d}"


def merge_latents(out: str | os.PathLike[str], *, progress: bool = False) -> LatentMeta:
    """Makes one folder of latent shards of all its parts, and removes the parts.

    Every shard is compared with its SHA-256 first. The files are linked into place, not written again (copied, where
    the file system has no links); mean and deviation are computed from the parts' sums in float64, so that they are
    those of one run over everything. meta.json is written last, then the parts go: a merge that was killed is begun
    again, and a finished one is verified and left as it is.

    Args:
        out: the folder given to `encode_dataset` with `shard`.
        progress: draw the progress bar even where stderr is no terminal.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: parts are missing, unfinished, damaged, or made otherwise than the others; names them.
    """
    out = Path(out)
    if not out.is_dir():
        raise FileNotFoundError(f"{out}: no such folder; expected one that `repvitok encode --shard` wrote to")
    if (out / "meta.json").exists():
        done = LatentShards(out)
        done.verify()
        remove_work(out)
        return done.meta
    with sole_writer(out):
        return _merge(out, progress)


def _merge(out: Path, progress: bool) -> LatentMeta:
    parts = _open_parts(out)
    for part in progress_bar(parts, desc="verify", unit="part", force=progress):
        part.verify()
    _require_every_episode(out, parts)
    entries: list[dict[str, Any]] = []
    statistics = ChannelStatistics()
    for part in parts:
        for path, entry in zip(part.paths, part.entries, strict=True):
            name = f"latents-{len(entries):06d}.tar"
            (out / name).unlink(missing_ok=True)  # of a merge that was killed
            link_or_copy(path, out / name)
            entry.pop("labels", None)  # of a part that somebody labelled: they are made again, of the whole
            entries.append({**entry, "name": name})
        statistics.merge(part.statistics)
    mean, std = statistics.mean_std()
    unlabelled = dict.fromkeys(("lat_digest", "latent_action_mean", "latent_action_std"))
    meta = dataclasses.replace(parts[0].meta, mean=mean, std=std, **unlabelled)
    write_latent_meta(out, meta, parts[0].dtype, entries, parts[0].provenance, statistics)
    remove_work(out)
    return meta


def _open_parts(out: Path) -> list[LatentShards]:
    """All parts in order, if they are complete and of one plan."""
    names = sorted(path.name for path in (out / _PARTS).glob("*-of-*"))
    if not names:
        raise UserError(f"{out}: neither finished latents nor parts of a job array (repvitok encode --shard i/n)")
    shares = {name.split("-of-")[1] for name in names}
    if len(shares) > 1:
        raise UserError(f"{out}: parts of job arrays of {sorted(map(int, shares))} jobs; remove those of all but one")
    count = int(shares.pop())
    folders = [part_folder(out, (index, count)) for index in range(count)]
    unfinished = [index for index, folder in enumerate(folders) if not (folder / "meta.json").is_file()]
    if unfinished:
        told = ", ".join(f"{index}/{count}" for index in unfinished[:8]) + (", ..." if len(unfinished) > 8 else "")
        raise UserError(f"{out}: {len(unfinished)} of {count} parts are not finished ({told}); run those jobs again")
    parts = [LatentShards(folder) for folder in folders]
    for part in parts:
        differing = [key for key, value in parts[0].provenance.items() if part.provenance.get(key) != value]
        if differing:
            raise UserError(f"{part.root}: made otherwise than the other parts: {', '.join(differing)} differ")
    return parts


def _require_every_episode(out: Path, parts: Sequence[LatentShards]) -> None:
    """Each episode of the plan, at each offset, once."""
    keys = [key for part in parts for key in part.keys]
    plan = parts[0].provenance
    expected = plan["num_episodes"] * len(plan["offsets"])
    if len(keys) != expected or len(set(keys)) != expected:
        raise UserError(f"{out}: the parts hold {len(set(keys))} different of {expected} episodes; encode them again")
