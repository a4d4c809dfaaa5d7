"""Pictures of one episode, as a sheet or a film: what each latent action acts on, over the camera's own frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from repvitok.data.latents import LatentEpisode
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.shards import LatentShards
from repvitok.data.split import format_episodes
from repvitok.data.transforms import prepare_frames
from repvitok.data.video import write_video
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file

from latent_action.baselines.lapa import LapaQuantizer
from latent_action.baselines.readout import lapa_acting_map
from latent_action.grid import Grid
from latent_action.labelling import require_same_tokenizer
from latent_action.model import LatentActionTokenizer
from latent_action.visualize import acting_map, draw_transition, side_by_side, transport_arrows

_VIEW_HEIGHT = 256


def write_episode_picture(
    *,
    lat: LatentActionTokenizer,
    latents: str | Path,
    dataset: str | Path,
    out: str | Path,
    episode: int | None = None,
    transitions: int = 12,
    columns: int = 4,
    lapa: LapaQuantizer | None = None,
) -> None:
    """Draw transitions of one episode: some of them, evenly spread, as one PNG, or all of them as an MP4 film.

    The first one, from the latent of an image to that of a tubelet, is no motion and left out (docs/decisions/020).

    Args:
        lat: the latent action tokenizer.
        latents: folder of latent shards.
        dataset: the LeRobot data set the latents were made from.
        out: file to write, .png or .mp4; the film runs at the speed of the recording.
        episode: its number in the data set; None for the first of the latents.
        transitions: most transitions to draw in a PNG.
        columns: pictures per row of a PNG.
        lapa: LAPA's quantiser; its map is drawn to the right of ours.

    Raises:
        ValueError: the latents come from another tokenizer, hold no such episode, or belong to another data set; or
            `out` is neither .png nor .mp4.
    """
    out = Path(out)
    if out.suffix.lower() not in (".png", ".mp4"):
        raise UserError(f"{out}: expected a .png or .mp4 file to write.")
    shards = LatentShards(latents)
    reader = LeRobotReader(dataset, depth_range=shards.meta.depth_range)
    require_same_tokenizer(lat, shards)
    if missing := sorted(set(shards.meta.cameras) - set(reader.camera_keys)):
        raise UserError(f"{dataset} has no cameras {missing}, which {latents} were made from: give that data set.")
    chosen = find_episode(shards, episode)
    film = out.suffix.lower() == ".mp4"
    index = _evenly(len(chosen.latents) - 1, len(chosen.latents) if film else transitions, chosen.episode_index)
    per_latent = shards.meta.frames_per_latent
    ends = sorted({*index, *(i + 1 for i in index)})
    raw = dict(zip(ends, _views(reader, chosen, shards.meta.cameras, per_latent, ends), strict=True))
    layers = transition_layers(lat, chosen, shards.meta.grid, index)
    rate_hz = shards.meta.frame_rate_hz / per_latent
    captions = [f"{'ours, ' if lapa else ''}{i / rate_hz:.1f} s" for i in index]
    drawn = zip(index, layers, captions, strict=True)
    pictures = [draw_transition(_joined(raw[i]), *layer, caption) for i, layer, caption in drawn]
    if lapa is not None:
        others = [_draw_lapa(lapa, raw[i], raw[i + 1]) for i in index]
        pictures = [np.concatenate(pair, axis=1) for pair in zip(pictures, others, strict=True)]
    if film:
        write_video(out, np.stack([_even(picture) for picture in pictures]), rate_hz)
    else:
        _save_png(side_by_side(pictures, columns), out)


def transition_layers(
    lat: LatentActionTokenizer, episode: LatentEpisode, grid: Grid, index: list[int]
) -> list[tuple[Float[np.ndarray, "views h w"], Float[np.ndarray, "views h w 2"]]]:
    """Heat and arrows of some transitions of an episode of raw latents."""
    z = lat.standardise(torch.from_numpy(episode.latents))
    with torch.no_grad():
        actions = lat.encode(z[None], grid)[0]
    return [(acting_map(lat, z[i], actions[i], grid), transport_arrows(lat, z[i], actions[i], grid)) for i in index]


def find_episode(shards: LatentShards, episode: int | None) -> LatentEpisode:
    """The first entry of an episode (it may have been encoded at several offsets); of None, the first of all.

    Raises:
        ValueError: there is none.
    """
    numbers = [info.episode_index for info in shards.infos]
    if episode is not None and episode not in numbers:
        raise UserError(f"{shards.root} holds no episode {episode}; it holds {format_episodes(numbers)}.")
    return shards[0 if episode is None else numbers.index(episode)]


def _evenly(available: int, wanted: int, episode: int) -> list[int]:
    """At most `wanted` of the transitions after the first, evenly spread."""
    if available < 2:
        raise UserError(
            f"Episode {episode} has {available + 1} latent frame(s), hence no transition to draw: it takes three, "
            "because the first transition is left out."
        )
    return np.linspace(1, available - 1, min(wanted, available - 1)).round().astype(int).tolist()


def _views(
    reader: LeRobotReader, episode: LatentEpisode, cameras: tuple[str, ...], per_latent: int, ends: list[int]
) -> list[list[UInt8[np.ndarray, "H W 3"]]]:
    """The last raw frame of each latent frame in `ends`, one picture per camera."""
    frames = [episode.offset + per_latent * end for end in ends]
    pictures = [reader.frames(episode.episode_index, camera, frames) for camera in cameras]
    return [list(views) for views in zip(*pictures, strict=True)]


def _joined(views: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The cameras side by side, all of the first one's size, which is lowered by a whole factor."""
    height, width = views[0].shape[:2]
    factor = max(1, round(height / _VIEW_HEIGHT))
    size = (width // factor, height // factor)
    return np.concatenate([np.asarray(Image.fromarray(view).resize(size)) for view in views], axis=1)


def _draw_lapa(
    lapa: LapaQuantizer, before: list[UInt8[np.ndarray, "H W 3"]], after: list[UInt8[np.ndarray, "H W 3"]]
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The frame under the map of LAPA's latent action, which has no transport, hence no arrows."""
    height, width = lapa.config.size
    view = (height, width // len(before))
    x_t, x_next = (
        torch.cat([prepare_frames(picture[None], view)[:, 0] for picture in views], dim=2) for views in (before, after)
    )
    heat = rearrange(lapa_acting_map(lapa, x_t, x_next), "h (v w) -> v h w", v=len(before))
    return draw_transition(_joined(before), heat, np.zeros((*heat.shape, 2), dtype=np.float32), "LAPA")


def _even(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Without its last row or column where the number of them is odd, as video wants it."""
    return picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]


def _save_png(picture: UInt8[np.ndarray, "H W 3"], path: Path) -> None:
    with atomic_file(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")
