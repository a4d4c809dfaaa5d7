"""Latent shards in, the same shards with latent actions out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.shards import (
    LatentShards,
    LatentShardWriter,
    refuse_foreign_tars,
    remove_work,
    replace_instructions,
)
from repvitok.documents import load_json
from repvitok.errors import UserError, require_disk_space
from repvitok.files import atomic_file, is_held, sole_writer, write_json_atomic
from repvitok.pretrained import find_device
from repvitok.progress import progress
from torch import Tensor

from latent_action.grid import Grid
from latent_action.model import LatentActionTokenizer

# Transitions per forward pass: 1,024 tokens * 512 * 256 hidden units in float32 are 0.5 GB.
TOKENS_PER_BATCH = 2**19 // 8
_PARTS = ".labels"


def label_shards(
    lat: LatentActionTokenizer,
    source: str | Path,
    out: str | Path,
    *,
    shard: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    force_progress: bool = False,
) -> LatentMeta | None:
    """Give every transition of `source` its latent action, and write the result to `out`.

    The latents are copied as they are; the meta gains the LAT's digest and the mean and standard deviation of
    the latent actions, and keeps the rest, the visual tokenizer's digest and how they were encoded included. Latents
    are standardised with the statistics in the LAT's config, not with those of `source`: so the same motion has the
    same latent action in every data set.
    Interrupted work resumes at the next episode; a finished `out` of the same LAT is returned as it is.

    Args:
        lat: the latent action tokenizer.
        source: folder of latent shards.
        out: folder to write.
        shard: (i, n): label only every n-th episode, from i (0 <= i < n), and write no shards yet. Once all n are
            done, a call without `shard` finds their work in `out` and writes the shards.
        device: where to compute.
        force_progress: show the bar also where stderr is no terminal.

    Returns:
        The meta of `out`, or None where `shard` was given.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: the shards come from another visual tokenizer than the LAT was trained on, `out` holds
            something else or is being written by another process, or a latent action is not finite.
    """
    shards = LatentShards(source)
    require_same_tokenizer(lat, shards)
    out, digest = Path(out), lat.digest()
    if (out / "meta.json").exists():
        return _require_finished(out, shards, digest)
    within = os.path.relpath(Path(source).resolve(), out.resolve()).split(os.sep)[0]
    refuse_foreign_tars(out, within)  # the latents themselves may lie in `out`
    mine = range(len(shards)) if shard is None else _share(len(shards), shard)
    if shard is None:
        require_disk_space(out, sum(path.stat().st_size for path in shards.paths), "labelled latent shards")
    with _sole_labeller(out, shard):
        if (out / "meta.json").exists():  # another process has made them meanwhile
            return _require_finished(out, shards, digest)
        parts = _open_parts(out, shards, digest)
        lat = lat.to(find_device(device)).eval()
        for index in progress(mine, desc="label", unit="episode", force=force_progress):
            _label_episode(lat, shards, index, parts)
        if shard is not None:
            return None
        return _write_shards(shards, parts, out, digest, within)


@torch.no_grad()
def label_latents(
    lat: LatentActionTokenizer, latents: Float[Tensor, "frames tokens d"], grid: Grid
) -> Float[Tensor, "transitions action"]:
    """Latent actions of one episode of raw (not standardised) latents, in bounded memory."""
    device = next(lat.parameters()).device
    step = max(1, TOKENS_PER_BATCH // latents.shape[1])
    if len(latents) < 2:
        return torch.zeros(0, lat.config.action_dim)
    pieces = [
        lat.encode(lat.standardise(latents[start : start + step + 1].to(device))[None], grid)[0]
        for start in range(0, len(latents) - 1, step)
    ]
    return torch.cat(pieces).float().cpu()


def require_same_tokenizer(lat: LatentActionTokenizer, shards: LatentShards) -> None:
    """Check that the latents are of the tokenizer the LAT was trained on.

    Raises:
        ValueError: the digests differ, or the LAT records none.
    """
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


def _label_episode(lat: LatentActionTokenizer, shards: LatentShards, index: int, parts: Path) -> None:
    path = parts / f"{shards.keys[index]}.npy"
    if path.exists():
        return
    actions = label_latents(lat, torch.from_numpy(shards[index].latents), shards.meta.grid).numpy()
    if not np.isfinite(actions).all():
        raise UserError(
            f"{shards.root}: episode {shards.keys[index]} has a latent action that is not finite; its latents are "
            "damaged, or the LAT is. Run `LatentShards(...).verify()` on the latents."
        )
    with atomic_file(path) as partial:
        np.save(partial, actions)


@contextmanager
def _sole_labeller(out: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Holds `out`, or one share of the work on it: others may work on their shares, while nobody holds the whole.

    Each side takes its own lock before it looks for the other's, so that one of them notices.
    """
    busy = f"{out}: another process is labelling here; wait until it has ended, or choose another folder"
    if shard is None:
        with sole_writer(out, busy):
            if any(map(is_held, (out / _PARTS).glob("share-*"))):
                raise UserError(busy)
            yield
        return
    with sole_writer(out / _PARTS / f"share-{shard[0]}-of-{shard[1]}", busy):
        if is_held(out):
            raise UserError(busy)
        yield


def _open_parts(out: Path, shards: LatentShards, digest: str) -> Path:
    """The folder of labels already made for this LAT and source; one for anything else is an error."""
    parts = out / _PARTS
    claim = {"lat": digest, "tokenizer": shards.meta.tokenizer_digest, "episodes": len(shards)}
    known = parts / "claim.json"
    if not known.exists():
        write_json_atomic(known, claim)
    if (found := load_json(known)) != claim:
        raise UserError(
            f"{out} holds unfinished labels of other latents or another LAT ({found}, expected {claim}): "
            "remove the folder, or choose another."
        )
    return parts


def _write_shards(shards: LatentShards, parts: Path, out: Path, digest: str, within: str) -> LatentMeta:
    require_disk_space(out, sum(path.stat().st_size for path in shards.paths), "labelled latent shards")
    meta = dataclasses.replace(shards.meta, lat_digest=digest, latent_action_mean=None, latent_action_std=None)
    made = {"dtype": shards.dtype, "provenance": shards.provenance}
    with LatentShardWriter(out, meta, measure=False, beside=(within,), **made) as writer:
        for episode in _labelled(shards, parts):
            writer.add(episode)
    remove_work(out)
    return writer.meta


def _labelled(shards: LatentShards, parts: Path) -> Iterator[LatentEpisode]:
    for episode in shards:
        path, expected = parts / f"{episode.key}.npy", len(episode.latents) - 1
        try:
            actions = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, the same command makes it again") from error
        if actions.dtype != np.float32 or actions.ndim != 2 or len(actions) != expected:
            raise UserError(f"{path} is damaged: expected {expected} latent actions; remove it and label again")
        yield dataclasses.replace(episode, latent_actions=actions)


def _require_finished(out: Path, shards: LatentShards, digest: str) -> LatentMeta:
    """The meta of a finished `out`, if it is what this call would write."""
    done = LatentShards(out, expect_digest=shards.meta.tokenizer_digest)
    if done.meta.lat_digest != digest or done.keys != shards.keys:
        raise UserError(
            f"{out} already holds latents labelled by LAT {str(done.meta.lat_digest)[:16]} ({len(done)} episodes); "
            f"this call would write those of {digest[:16]} ({len(shards)} episodes). Choose another folder."
        )
    # The instructions of the source may have been corrected since.
    replace_instructions(done, {info.episode_index: info.task for info in shards.infos}, shards.meta.instruction_source)
    remove_work(out)
    return done.meta


def _share(count: int, shard: tuple[int, int]) -> range:
    index, shares = shard
    if not 0 <= index < shares:
        raise UserError(f"shard i/n: expected 0 <= i < n, got {index}/{shares}.")
    return range(index, count, shares)
