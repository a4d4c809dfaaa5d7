"""A sheet of pictures of one episode: what each latent action acts on, over the camera's own frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from repvitok.data.atomic import partial_path, replace_durably
from repvitok.data.latents import LatentEpisode
from repvitok.data.lerobot import LeRobotReader
from repvitok.data.shards import LatentShards

from latent_action.grid import Grid
from latent_action.labelling import require_same_tokenizer
from latent_action.model import LatentActionTokenizer
from latent_action.visualize import acting_map, draw_transition, side_by_side, transport_arrows

# Raw frames per latent frame (RepWAM Sec. 3.2).
TUBELET_FRAMES = 4
_VIEW_HEIGHT = 256


def write_episode_picture(
    *,
    lat: LatentActionTokenizer,
    latents: str | Path,
    dataset: str | Path,
    out: str | Path,
    episode: int = 0,
    transitions: int = 12,
    columns: int = 4,
) -> None:
    """Draw transitions of one episode, evenly spread over it, as one PNG.

    Args:
        lat: the latent action tokenizer.
        latents: folder of latent shards.
        dataset: the LeRobot data set the latents were made from.
        out: PNG file.
        episode: episode index in the data set.
        transitions: most transitions to draw.
        columns: pictures per row.

    Raises:
        ValueError: the latents come from another tokenizer, hold no such episode, or belong to another data set.
    """
    shards, reader = LatentShards(latents), LeRobotReader(dataset)
    require_same_tokenizer(lat, shards)
    if missing := sorted(set(shards.meta.cameras) - set(reader.camera_keys)):
        raise ValueError(f"{dataset} has no cameras {missing}, which {latents} were made from: give that data set.")
    chosen = find_episode(shards, episode)
    count = min(transitions, len(chosen.latents) - 1)
    if count < 1:
        raise ValueError(f"Episode {episode} has {len(chosen.latents)} latent frame(s), hence no transition to draw.")
    index = np.linspace(0, len(chosen.latents) - 2, count).round().astype(int).tolist()
    frames = [chosen.offset + TUBELET_FRAMES * shards.meta.stride * i for i in index]
    images = _camera_images(reader, episode, shards.meta.cameras, frames)
    layers = transition_layers(lat, chosen, shards.meta.grid, index)
    pictures = [draw_transition(image, *layer) for image, layer in zip(images, layers, strict=True)]
    _save_png(side_by_side(pictures, columns), Path(out))


def transition_layers(
    lat: LatentActionTokenizer, episode: LatentEpisode, grid: Grid, index: list[int]
) -> list[tuple[Float[np.ndarray, "views h w"], Float[np.ndarray, "views h w 2"]]]:
    """Heat and arrows of some transitions of an episode of raw latents."""
    z = lat.standardise(torch.from_numpy(episode.latents))
    with torch.no_grad():
        actions = lat.encode(z[None], grid)[0]
    return [(acting_map(lat, z[i], actions[i], grid), transport_arrows(lat, z[i], actions[i], grid)) for i in index]


def find_episode(shards: LatentShards, episode: int) -> LatentEpisode:
    """The first entry of an episode (it may have been encoded at several offsets).

    Raises:
        ValueError: there is none.
    """
    known = set()
    for candidate in shards:
        if candidate.episode_index == episode:
            return candidate
        known.add(candidate.episode_index)
    raise ValueError(f"{shards.root} holds no episode {episode}; it holds {sorted(known)[:20]}.")


def _camera_images(
    reader: LeRobotReader, episode: int, cameras: tuple[str, ...], frames: list[int]
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Each frame with its cameras side by side, all of one size; no camera is distorted."""
    views = [reader.frames(episode, camera, frames) for camera in cameras]
    height, width = views[0].shape[1:3]
    factor = max(1, round(height / _VIEW_HEIGHT))
    size = (width // factor, height // factor)
    return [
        np.concatenate([np.asarray(Image.fromarray(view[i]).resize(size)) for view in views], axis=1)
        for i in range(len(frames))
    ]


def _save_png(picture: UInt8[np.ndarray, "H W 3"], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    Image.fromarray(picture).save(partial, format="PNG")
    replace_durably(partial, path)
