"""Latent shards back to video files, by the tokenizer that made them."""

from __future__ import annotations

from glob import escape
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.shards import LatentShards
from repvitok.data.split import EpisodeNumbers, choose_episodes
from repvitok.data.transforms import to_frames
from repvitok.data.video import write_video
from repvitok.files import refuse_foreign
from repvitok.interface import VideoTokenizer
from repvitok.progress import progress

LATENTS_PER_CALL = 8


def decode_shards(
    tokenizer: VideoTokenizer, latents: str | Path, out: str | Path, episodes: EpisodeNumbers | None = None
) -> list[Path]:
    """Writes one mp4 per stored episode and camera, `<key>.<camera>.mp4`, at the rate the frames were taken at.

    Args:
        tokenizer: the one that made the latents, by its digest.
        latents: a finished folder of latent shards.
        out: folder for the videos.
        episodes: numbers of the episodes to decode; all when None.

    Returns:
        The files written.

    Raises:
        ValueError: if another tokenizer made the latents, or an episode asked for is not there.
    """
    shards = LatentShards(latents, expect_digest=tokenizer.digest())
    wanted = set(choose_episodes(episodes, [info.episode_index for info in shards.infos], str(latents)))
    chosen = [number for number, info in enumerate(shards.infos) if info.episode_index in wanted]
    names = [_video_name(key, camera) for key in shards.keys for camera in shards.meta.cameras]
    refuse_foreign(Path(out), map(escape, names), "decoded videos")
    written = []
    for number in progress(chosen, "decode", unit="episode"):
        episode = shards[number]
        video = decode_episode(tokenizer, episode, shards.meta)
        for camera, pixels in zip(shards.meta.cameras, video, strict=True):
            path = Path(out) / _video_name(episode.key, camera)
            write_video(path, to_frames(pixels.cpu()), shards.meta.frame_rate_hz / shards.meta.stride)
            written.append(path)
    return written


def _video_name(key: str, camera: str) -> str:
    return f"{key}.{camera.split('.')[-1]}.mp4"


def decode_episode(
    tokenizer: VideoTokenizer, episode: LatentEpisode, meta: LatentMeta
) -> Float[Tensor, "views 3 T H W"]:
    """Pixels of a whole episode, decoded as a stream with the window it was encoded with; cameras side by side."""
    views, height, width = meta.grid
    z = torch.from_numpy(episode.latents).to(next(tokenizer.parameters()))
    z = rearrange(z, "frames (views tokens) d -> views frames tokens d", views=views)
    size = (height * tokenizer.config.patch_size, width * tokenizer.config.patch_size)
    stream = tokenizer.stream(batch_size=views, window=meta.window)
    with torch.no_grad():
        parts = [stream.decode(part, size) for part in z.split(LATENTS_PER_CALL, dim=1)]
    return torch.cat(parts, dim=2)
