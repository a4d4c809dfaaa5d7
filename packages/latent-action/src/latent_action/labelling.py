"""Latent shards in, latent actions beside them out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from repvitok.data.latents import EpisodeInfo, LatentMeta
from repvitok.data.shards import (
    LABEL_WORK,
    LatentShards,
    refuse_foreign_tars,
    remove_work,
    replace_instructions,
    write_labels,
)
from repvitok.runtime.documents import read_json
from repvitok.runtime.errors import UserError, require_disk_space
from repvitok.runtime.files import atomic_file, is_held, sha256_of, sole_writer, write_json_atomic
from repvitok.runtime.pretrained import find_device
from repvitok.runtime.progress import progress
from torch import Tensor

from latent_action.dynamics import Grid
from latent_action.model import LatentActionTokenizer

# Transitions per forward pass: 1,024 tokens * 512 * 256 hidden units in float32 are 0.5 GB.
TOKENS_PER_BATCH = 2**19 // 8


def label_shards(
    lat: LatentActionTokenizer,
    source: str | Path,
    out: str | Path | None = None,
    *,
    shard: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> LatentMeta | None:
    """Give every transition of `source` its latent action, in tars of their own beside those of the latents.

    The latents stay as they are. The meta gains the LAT's digest and the mean and standard deviation of the latent
    actions, and keeps the rest, the visual tokenizer's digest and how they were encoded included. Latents are
    standardised with the statistics in the LAT's config, not with those of `source`: so the same motion has the same
    latent action in every data set.
    Interrupted work resumes at the next episode; what is labelled by this LAT already is returned as it is, but
    damaged labels in `source` itself are made again.

    Args:
        lat: the latent action tokenizer.
        source: folder of latent shards.
        out: None writes the labels into `source`. Another folder becomes latents of its own, labelled: its shards are
            those of `source` by hard links (copies, where it is on another disk), so it can be moved without it.
        shard: (i, n): label only every n-th episode, from i (0 <= i < n), and finish nothing yet. Once all n are
            done, a call without `shard` finds their work and finishes it.
        device: where to compute.

    Returns:
        The meta of the labelled latents, or None where `shard` was given.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: the shards come from another visual tokenizer than the LAT was trained on, they or `out` are
            labelled by another LAT, `out` holds something else or is being written by another process, or a latent
            action is not finite.
    """
    shards = LatentShards(source, labels=False)
    require_same_tokenizer(lat, shards)
    out, digest = Path(source if out is None else out), lat.digest()
    frames = lat.config.transition_frames
    if (meta := _finished(out, shards, digest, frames)) is not None:
        return meta
    if not _same_folder(out, shards.root):
        within = os.path.relpath(shards.root.resolve(), out.resolve()).split(os.sep)[0]
        refuse_foreign_tars(out, within)  # the latents themselves may lie in `out`
    if shard is None:
        _require_space(out, shards, lat.config.action_dim)
    index, shares = shard or (0, 1)
    if not 0 <= index < shares:
        raise UserError(f"shard i/n: expected 0 <= i < n, got {index}/{shares}.")
    with _sole_labeller(out, shard):
        if (meta := _finished(out, shards, digest, frames)) is not None:  # another process has made them meanwhile
            return meta
        parts = _open_parts(out, shards, digest)
        lat = lat.to(find_device(device)).eval()
        for number in progress(range(index, len(shards), shares), desc="label", unit="episode"):
            path = parts / f"{shards.keys[number]}.npy"
            if not path.exists():
                _write_part(path, lat, shards, number)
        if shard is not None:
            return None
        meta = write_labels(shards, out, digest, lambda info: _read_part(parts, info), frames)
        remove_work(out, LABEL_WORK)
        return meta


def _require_space(out: Path, shards: LatentShards, action_dim: int) -> None:
    """Labels are written twice, as parts and in their tars; the shards too, where they have to be copied."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    copied = place.stat().st_dev != shards.root.stat().st_dev
    size_bytes = sum(path.stat().st_size for path in shards.paths) if copied else 0
    size_bytes += 2 * sum(4 * action_dim * info.frames + 2048 for info in shards.infos)
    require_disk_space(out, size_bytes, "labels of latents")


def _write_part(path: Path, lat: LatentActionTokenizer, shards: LatentShards, number: int) -> None:
    """The labels of an episode, for `_read_part`."""
    actions = label_latents(lat, torch.from_numpy(shards[number].latents), shards.meta.grid).numpy()
    if not np.isfinite(actions).all():
        raise UserError(
            f"{shards.root}: episode {shards.keys[number]} has a latent action that is not finite; its latents are "
            "damaged, or the LAT is. Run `LatentShards(...).verify()` on the latents."
        )
    with atomic_file(path) as partial:
        np.save(partial, actions)


@torch.no_grad()
def label_latents(
    lat: LatentActionTokenizer, latents: Float[Tensor, "frames tokens d"], grid: Grid
) -> Float[Tensor, "transitions action"]:
    """Latent actions of one episode of raw (not standardised) latents, in bounded memory.

    Row k is that from frame k to the one `lat.config.transition_frames` later, or to the last frame where that is
    nearer: there is one for every frame but the last.
    """
    device = next(lat.parameters()).device
    step, last = max(1, TOKENS_PER_BATCH // latents.shape[1]), len(latents) - 1
    if last < 1:
        return torch.zeros(0, lat.config.action_dim)
    pieces = []
    for start in range(0, last, step):
        index = torch.arange(start, min(start + step, last))
        ends = (index + lat.config.transition_frames).clamp(max=last)
        pair = lat.standardise(torch.stack([latents[index], latents[ends]], dim=1).to(device))
        pieces.append(lat.encode(pair, grid)[:, 0])
    return torch.cat(pieces).float().cpu()


def require_same_tokenizer(lat: LatentActionTokenizer, shards: LatentShards) -> None:
    """Check that the latents are of the tokenizer the LAT was trained on."""
    known, found = lat.config.tokenizer_digest, shards.meta.tokenizer_digest
    if known is None:
        raise UserError(
            "This LAT does not say which visual tokenizer it was trained on (tokenizer_digest in its config): "
            "train it with `latent-action fit`, which records it."
        )
    if known != found:
        raise UserError(
            f"{shards.root}: these latents come from visual tokenizer {found[:16]}, but this LAT was trained on "
            f"latents of {known[:16]}. Encode the data with that tokenizer, or train a LAT on these latents."
        )


@contextmanager
def _sole_labeller(out: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Holds `out`, or one share of the work on it: others may work on their shares, while nobody holds the whole.

    Each side takes its own lock before it looks for the other's, so that one of them notices.
    """
    busy = f"{out}: another process is labelling here; wait until it has ended, or choose another folder"
    if shard is None:
        with sole_writer(out, busy):
            if any(map(is_held, (out / LABEL_WORK).glob("share-*"))):
                raise UserError(busy)
            yield
        return
    with sole_writer(out / LABEL_WORK / f"share-{shard[0]}-of-{shard[1]}", busy):
        if is_held(out):
            raise UserError(busy)
        yield


def _open_parts(out: Path, shards: LatentShards, digest: str) -> Path:
    """The folder of labels already made for this LAT and source; one for anything else is an error."""
    parts = out / LABEL_WORK
    latents = hashlib.sha256(" ".join(_digests(shards)).encode()).hexdigest()
    claim = {"lat": digest, "tokenizer": shards.meta.tokenizer_digest, "episodes": len(shards), "latents": latents}
    known = parts / "claim.json"
    if not known.exists():
        write_json_atomic(known, claim)
    found = read_json(known, dict[str, Any])
    if {"latents": latents, **found} != claim:  # version 0.1 did not say which latents
        raise UserError(
            f"{out} holds unfinished labels of other latents or another LAT ({found}, expected {claim}): "
            f"remove {parts}, or choose another folder (--out)."
        )
    return parts


def _read_part(parts: Path, info: EpisodeInfo) -> np.ndarray:
    """The labels of an episode that were made before, whole."""
    path, expected = parts / f"{info.key}.npy", info.frames - 1
    try:
        actions = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, the same command makes it again") from error
    if actions.dtype != np.float32 or actions.ndim != 2 or len(actions) != expected:
        raise UserError(f"{path} is damaged: expected {expected} latent actions; remove it and label again")
    return actions


def _finished(out: Path, shards: LatentShards, digest: str, frames: int) -> LatentMeta | None:
    """The meta of `out` where it is what this call would write, None where that is still to be made."""
    if not (out / "meta.json").exists():
        return None
    here = _same_folder(out, shards.root)
    done = LatentShards(out, expect_digest=shards.meta.tokenizer_digest, labels=not here)
    if here and done.meta.lat_digest is None:
        return None
    # Shards that version 0.1 labelled are copies with the latent actions inside, so only the names can be compared.
    same = _digests(done) == _digests(shards) if done.has_labels_beside else done.keys == shards.keys
    if done.meta.lat_digest != digest or not same:
        by = f"labelled by LAT {done.meta.lat_digest[:16]}" if done.meta.lat_digest else "without labels"
        if done.meta.lat_digest and done.meta.latent_action_frames != frames:
            by += f" over {done.meta.latent_action_frames} latent frames each, this LAT's over {frames}"
        raise UserError(
            f"{out} already holds latents {by} ({len(done)} episodes); this call would write those of {digest[:16]} "
            f"({len(shards)} episodes{'' if same else ', others'}). Choose another folder (--out)."
        )
    if here:
        try:
            labels = [entry["labels"] for entry in LatentShards(out).entries if entry.get("labels")]
        except UserError:
            return None
        if any(sha256_of(out / tar["name"]) != tar["sha256"] for tar in labels):
            return None  # the latents are there, so their labels can be made again
    # The instructions of the source may have been corrected since.
    replace_instructions(done, {info.episode_index: info.task for info in shards.infos}, shards.meta.instruction_source)
    remove_work(out, LABEL_WORK)
    return done.meta


def _digests(shards: LatentShards) -> list[str]:
    return [entry["sha256"] for entry in shards.entries]


def _same_folder(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)
