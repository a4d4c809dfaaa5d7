"""Video in, clips and latents out: data sets on disk and how they are read.

The names below load on first use, so that `import repvitok.data` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repvitok.data.clips import ClipDataset, ClipLoader, ClipMixture, MixtureBatches, StepBatches
    from repvitok.data.latents import LatentEpisode, LatentMeta
    from repvitok.data.lerobot.reader import EpisodeInfo, LeRobotReader
    from repvitok.data.lerobot.writer import LeRobotWriter
    from repvitok.data.shards import LatentShards, LatentShardWriter
    from repvitok.data.sources import ImageFolder, LeRobotSource, VideoFolder, VideoSource, lerobot_sources
    from repvitok.data.tars import TarShards
    from repvitok.data.transforms import prepare_frames, resize_frames, to_uint8, to_unit
    from repvitok.data.video import VideoFile, concatenate_videos, write_video

_HOMES = {
    "ClipDataset": "clips",
    "ClipLoader": "clips",
    "ClipMixture": "clips",
    "EpisodeInfo": "lerobot.format",
    "ImageFolder": "sources",
    "LatentEpisode": "latents",
    "LatentMeta": "latents",
    "LatentShardWriter": "shards",
    "LatentShards": "shards",
    "LeRobotReader": "lerobot.reader",
    "LeRobotSource": "sources",
    "LeRobotWriter": "lerobot.writer",
    "MixtureBatches": "clips",
    "StepBatches": "clips",
    "TarShards": "tars",
    "VideoFile": "video",
    "VideoFolder": "sources",
    "VideoSource": "sources",
    "concatenate_videos": "video",
    "lerobot_sources": "sources",
    "prepare_frames": "transforms",
    "resize_frames": "transforms",
    "to_uint8": "transforms",
    "to_unit": "transforms",
    "write_video": "video",
}

__all__ = [
    "ClipDataset",
    "ClipLoader",
    "ClipMixture",
    "EpisodeInfo",
    "ImageFolder",
    "LatentEpisode",
    "LatentMeta",
    "LatentShardWriter",
    "LatentShards",
    "LeRobotReader",
    "LeRobotSource",
    "LeRobotWriter",
    "MixtureBatches",
    "StepBatches",
    "TarShards",
    "VideoFile",
    "VideoFolder",
    "VideoSource",
    "concatenate_videos",
    "lerobot_sources",
    "prepare_frames",
    "resize_frames",
    "to_uint8",
    "to_unit",
    "write_video",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
