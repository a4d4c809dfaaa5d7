"""Where latent actions act in the image and how they move what is there (RepWAM Fig. 4, left): pairs and episodes.

What the maps of all transitions share says nothing of any of them, so it is subtracted before one is drawn, and what is
left is compared with where the arm moves (docs/decisions/075).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.lerobot.metadata import read_hand_projection
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.shards import LatentShards
from repvitok.data.split import format_episodes
from repvitok.data.transforms import prepare_frames, resize_frames
from repvitok.data.video import write_video
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file
from torch import Tensor

from latent_action.baselines.lapa import HEAT_FLOOR as LAPA_HEAT_FLOOR
from latent_action.baselines.lapa import LapaQuantizer, lapa_action_effects
from latent_action.dynamics import Grid, resolve_grid, token_coordinates
from latent_action.labelling import require_same_tokenizer
from latent_action.model import LatentActionTokenizer

# A change of a token by this many standard deviations (root mean square over the channels) is drawn at full heat
# where nothing in the frame changes more; without it, noise on a still frame would glow.
HEAT_FLOOR = 0.25
# Arrows shorter than this many tokens are not drawn.
SHORTEST_ARROW = 0.15
# Of a view: how wide a hand is taken to be, and how far it must move to count as moving.
HAND_SIZE = 1 / 8
SHORTEST_WAY = 1 / 64
_ARROW = (40, 255, 120)
_SIDE = 256
_VIEW_HEIGHT = 256


@torch.no_grad()
def action_effect_map(
    lat: LatentActionTokenizer,
    z_t: Float[Tensor, "tokens d"],
    l_t: Float[Tensor, " action"],
    grid: Grid | None = None,
    shared: Float[np.ndarray, "views h w"] | None = None,
) -> Float[np.ndarray, "views h w"]:
    """How strongly a latent action changes each token, in [0, 1].

    That of `action_effects`, less what all maps share where `shared` (`shared_map`) says it and 0 where that is more,
    divided by its maximum over the frame, or by `HEAT_FLOOR` where that is larger.
    """
    return _heat(action_effects(lat, z_t[None], l_t[None], grid), shared, HEAT_FLOOR)[0]


@torch.no_grad()
def action_effects(
    lat: LatentActionTokenizer,
    z_t: Float[Tensor, "b tokens d"],
    l_t: Float[Tensor, "b action"],
    grid: Grid | None = None,
) -> Float[np.ndarray, "b views h w"]:
    """How strongly latent actions change each token of their frames, in standard deviations of a latent.

    The change is the root mean square over channels of f(z_t, l_t) - f(z_t, l_0), both by Eq. (3), where l_0 =
    q(z_t, z_t) is the latent action of nothing happening.
    """
    views, rows, columns = resolve_grid(z_t.shape[1], grid)
    still = lat.encode(torch.stack([z_t, z_t], dim=1), (views, rows, columns))[:, 0]
    moved, kept = lat.decode(torch.cat([z_t, z_t]), torch.cat([l_t, still]), (views, rows, columns)).chunk(2)
    change = (moved - kept).square().mean(-1).sqrt().float().cpu().numpy()
    return rearrange(change, "b (v h w) -> b v h w", v=views, h=rows, w=columns)


def shared_map(maps: Float[np.ndarray, "n views h w"]) -> Float[np.ndarray, "views h w"]:
    """What maps of many transitions have in common: the mean of all, each divided by its own mean."""
    means = maps.mean(axis=(1, 2, 3), keepdims=True)
    return (maps / np.where(means > 0, means, 1)).sum(axis=0) / max(1, (means > 0).sum())


def without_shared(
    maps: Float[np.ndarray, "n views h w"], shared: Float[np.ndarray, "views h w"]
) -> Float[np.ndarray, "n views h w"]:
    """Maps less what they share, which is scaled to each one's own mean: a strong map keeps no more of it."""
    return maps - shared * maps.mean(axis=(1, 2, 3), keepdims=True)


def _heat(
    maps: Float[np.ndarray, "n views h w"], shared: Float[np.ndarray, "views h w"] | None, floor: float
) -> Float[np.ndarray, "n views h w"]:
    left = maps if shared is None else without_shared(maps, shared).clip(min=0)
    return left / left.max(axis=(1, 2, 3), keepdims=True).clip(min=floor)


acting_map = action_effect_map  # its name until version 0.3


@torch.no_grad()
def transport_arrows(
    lat: LatentActionTokenizer,
    z_t: Float[Tensor, "tokens d"],
    l_t: Float[Tensor, " action"],
    grid: Grid | None = None,
) -> Float[np.ndarray, "views h w 2"]:
    """How far the content that arrives at each token has come, (rows down, columns right), in tokens.

    Row i of K_t says where token i gathers from; the arrow is p_i - sum_j K_t[i, j] p_j, with p the place in its
    view. It points the way the content moves.
    """
    views, rows, columns = resolve_grid(z_t.shape[0], grid)
    transport, _ = lat.forward_dynamics(z_t[None], l_t[None], (views, rows, columns))
    place = token_coordinates((views, rows, columns), z_t.device)
    arrows = (place - transport.source((views, rows, columns))[0]).float().cpu().numpy()
    return rearrange(arrows, "(v h w) two -> v h w two", v=views, h=rows, w=columns)


@dataclass(frozen=True)
class MapCheck:
    """Whether maps show where the arm moves: correlation over the tokens, its mean over transitions and 95 % interval.

    Attributes:
        motion: what the maps are compared with: "the projected hand's motion", or "pixel motion energy" where nobody
            knows the hand.
        own: with the motion of the map's own transition, (mean, low, high).
        shuffled: with that of a transition of another episode (another transition, where there is one episode).
        gain: own - shuffled. Above 0 with its whole interval, or the map shows nothing.
        unsubtracted: mean own and shuffled correlation of the maps and motions as they are, with what all share.
        transitions, episodes: how many were compared.
    """

    motion: str
    own: tuple[float, float, float]
    shuffled: tuple[float, float, float]
    gain: tuple[float, float, float]
    unsubtracted: tuple[float, float]
    transitions: int
    episodes: int

    @property
    def shows_motion(self) -> bool:
        """Whether the maps follow the motion better than shuffled ones."""
        return self.gain[1] > 0

    def __str__(self) -> str:
        own, shuffled, gain = ("{:.2f} [{:.2f}, {:.2f}]".format(*v) for v in (self.own, self.shuffled, self.gain))
        verdict = "" if self.shows_motion else " THIS MAP SHOWS NOTHING: it is no better than a shuffled one."
        return (
            f"correlation of the map with {self.motion} {own}, shuffled {shuffled}, gain {gain} "
            f"({self.transitions} transitions of {self.episodes} episodes; 95 % intervals); with what all maps share "
            f"{self.unsubtracted[0]:.2f}, shuffled {self.unsubtracted[1]:.2f}.{verdict}"
        )


def check_maps(
    maps: Float[np.ndarray, "n views h w"],
    motions: Float[np.ndarray, "n views h w"],
    episodes: Int[np.ndarray, " n"],
    motion: str,
    seed: int = 0,
) -> MapCheck | None:
    """Compare maps with where something moved, both without what they share; None of fewer than three transitions.

    Args:
        maps: of `action_effects`.
        motions: how much moved at each token in the same transitions; one that is the same everywhere is left out.
        episodes: which episode each is of: the shuffled ones are of another, and the interval is a bootstrap over them.
        motion: what moved, see `MapCheck`.
        seed: of the bootstrap.
    """
    varied = [values.std(axis=(1, 2, 3)) > 1e-6 * values.mean(axis=(1, 2, 3)) for values in (maps, motions)]
    maps, motions, episodes = (values[varied[0] & varied[1]] for values in (maps, motions, episodes))
    if len(maps) < 3:
        return None
    several = len(np.unique(episodes)) > 1
    group = episodes if several else np.arange(len(maps))
    # for each transition the first of another group from half of all further on
    order = (np.arange(len(maps))[:, None] + len(maps) // 2 + np.arange(len(maps))) % len(maps)
    donor = order[np.arange(len(maps)), (group[order] != group[:, None]).argmax(axis=1)]
    plain = [_correlations(maps, other) for other in (motions, motions[donor])]
    maps, motions = (without_shared(values, shared_map(values)) for values in (maps, motions))
    own, shuffled = (_correlations(maps, other) for other in (motions, motions[donor]))
    random, names = np.random.default_rng(seed), np.unique(group)
    draws = random.integers(len(names), size=(1000, len(names)))
    weight = np.apply_along_axis(np.bincount, 1, draws, minlength=len(names))[:, np.searchsorted(names, group)]

    def told(values: np.ndarray) -> tuple[float, float, float]:
        low, high = np.percentile(weight @ values / weight.sum(axis=1), (2.5, 97.5))
        return float(values.mean()), float(low), float(high)

    return MapCheck(
        motion,
        told(own),
        told(shuffled),
        told(own - shuffled),
        (float(plain[0].mean()), float(plain[1].mean())),
        len(maps),
        len(np.unique(episodes)),
    )


def _correlations(
    one: Float[np.ndarray, "n views h w"], other: Float[np.ndarray, "n views h w"]
) -> Float[np.ndarray, " n"]:
    """Pearson's r over the tokens of each pair of maps; 0 where one of them is the same everywhere."""
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (one, other))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(scale > 1e-12, (a * b).sum(axis=1) / np.maximum(scale, 1e-12), 0.0)


def hand_motion(
    before: Float[np.ndarray, "n views 2"], after: Float[np.ndarray, "n views 2"], size: tuple[int, int]
) -> Float[np.ndarray, "n views h w"]:
    """How much a hand moves at each token: its way, on the line that it takes, fading over `HAND_SIZE`.

    Args:
        before, after: (down, right) in each view, as fractions of its height and width.
        size: rows and columns of tokens.
    """
    centres = [(np.arange(count) + 0.5) / count for count in size]
    place = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1)  # (h, w, 2)
    way = (after - before)[:, :, None, None]
    length = (way**2).sum(-1)
    from_start = place - before[:, :, None, None]
    # how far along the line from start to end the nearest point lies, in [0, 1]
    along = ((from_start * way).sum(-1) / np.maximum(length, 1e-12)).clip(0, 1)
    distance = ((from_start - along[..., None] * way) ** 2).sum(-1)
    moved = np.where(length >= SHORTEST_WAY**2, np.sqrt(length), 0.0)
    return (moved * np.exp(-distance / (2 * HAND_SIZE**2))).astype(np.float32)


def pixel_motion(
    before: UInt8[np.ndarray, "n H W 3"], after: UInt8[np.ndarray, "n H W 3"], size: tuple[int, int]
) -> Float[np.ndarray, "n h w"]:
    """Pixel motion energy: mean square difference of two frames at each token, pixels in [0, 1]."""
    fine = (8 * size[0], 8 * size[1])
    one, other = (resize_frames(frames, fine).astype(np.float32) / 255 for frames in (before, after))
    cells = rearrange((one - other) ** 2, "n (h p) (w q) rgb -> n h w (p q rgb)", p=8, q=8)
    return cells.mean(axis=-1)


@dataclass(frozen=True)
class SharedMaps:
    """What the maps of a data set's transitions share, and whether the rest follows the arm.

    Attributes:
        ours, lapa: `shared_map` of the LAT's and of LAPA's maps (None without LAPA).
        checks: by whose maps they are, "ours" and "LAPA"; None where there is too little to compare.
    """

    ours: Float[np.ndarray, "views h w"]
    lapa: Float[np.ndarray, "views h2 w2"] | None
    checks: dict[str, MapCheck | None]


def measure_maps(
    lat: LatentActionTokenizer,
    shards: LatentShards,
    reader: LeRobotReader,
    lapa: LapaQuantizer | None = None,
    transitions: int = 256,
) -> SharedMaps:
    """The maps of transitions spread evenly over a data set, compared with the arm's motion.

    That is the motion of the hand in the pictures where the data set has a `HandProjection` for all of them, and pixel
    motion energy elsewhere.

    Args:
        lat: the latent action tokenizer.
        shards: latents.
        reader: the data set they were made from.
        lapa: LAPA's quantiser, to be measured alike.
        transitions: most to look at.
    """
    step, meta = lat.config.transition_frames, shards.meta
    # the first transition of every entry is no motion (docs/decisions/020)
    places = [
        (n, k) for n, info in enumerate(shards.infos) if not info.augmentation for k in range(1, info.frames - step)
    ]
    if not places:
        raise UserError(f"{shards.root}: no episode has {step + 2} latent frames, so there is no map to measure.")
    spread = np.unique(np.linspace(0, len(places) - 1, min(transitions, len(places))).round().astype(int))
    projection = read_hand_projection(reader.root)
    if projection is not None and not projection.serves(meta.state_names, meta.cameras):
        projection = None
    sizes = {"ours": meta.grid[1:]} | ({} if lapa is None else {"LAPA": _lapa_grid(lapa, len(meta.cameras))})
    maps: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    motions: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    of_episode: list[int] = []
    for number, chosen in groupby((places[i] for i in spread), key=lambda place: place[0]):
        episode, index = shards[number], np.array([k for _, k in chosen])
        z = lat.standardise(torch.from_numpy(episode.latents))
        pair = torch.stack([z[index], z[index + step]], dim=1)
        with torch.no_grad():
            actions = lat.encode(pair, meta.grid)[:, 0]
        maps["ours"].append(action_effects(lat, pair[:, 0], actions, meta.grid))
        of_episode += [episode.episode_index] * len(index)
        frames = [] if projection is not None and lapa is None else _frames_at(reader, meta, episode, index, step)
        if lapa is not None:
            pixels = (_lapa_pixels(lapa, [views[end] for views in frames]) for end in (0, 1))
            wide = lapa_action_effects(lapa, *pixels)
            maps["LAPA"].append(rearrange(wide, "n h (v w) -> n v h w", v=len(meta.cameras)))
        for name, size in sizes.items():
            if projection is not None:
                assert episode.state is not None
                seen = projection.places(episode.state, meta.state_names, meta.cameras)
                motions[name].append(hand_motion(seen[index], seen[index + step], size))
            else:
                motions[name].append(np.stack([pixel_motion(*views, size) for views in frames], axis=1))
    found = {name: np.concatenate(values) for name, values in maps.items()}
    motion = "pixel motion energy" if projection is None else "the projected hand's motion"
    checks = {
        name: check_maps(values, np.concatenate(motions[name]), np.array(of_episode), motion)
        for name, values in found.items()
    }
    lapa_shared = None if lapa is None else shared_map(found["LAPA"])
    return SharedMaps(shared_map(found["ours"]), lapa_shared, checks)


def _frames_at(
    reader: LeRobotReader, meta: LatentMeta, episode: LatentEpisode, index: np.ndarray, step: int
) -> list[tuple[UInt8[np.ndarray, "n H W 3"], UInt8[np.ndarray, "n H W 3"]]]:
    """Of every camera the frames at the beginnings and at the ends of some transitions."""
    ends = np.unique(np.concatenate([index, index + step]))
    wanted = (episode.offset + meta.frames_per_latent * ends).tolist()
    views = [reader.frames(episode.episode_index, camera, wanted) for camera in meta.cameras]
    first, last = (np.searchsorted(ends, at) for at in (index, index + step))
    return [(view[first], view[last]) for view in views]


def draw_transition(
    image: UInt8[np.ndarray, "H W 3"],
    heat: Float[np.ndarray, "views h w"],
    arrows: Float[np.ndarray, "views h w 2"],
    caption: str = "",
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The frame with the heat laid over it and an arrow per token that moved.

    Args:
        image: the frame; several cameras stand side by side in the order of the views.
        heat: from `action_effect_map`, in [0, 1].
        arrows: from `transport_arrows`; drawn to scale, ending at the token they arrive at.
        caption: written in the lower left corner.

    Returns:
        The picture, enlarged by a whole factor to a height of about 256 pixels.
    """
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise UserError(f"image: expected uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    if heat.ndim != 3 or arrows.shape != (*heat.shape, 2):
        raise UserError(
            f"heat and arrows: expected (views, h, w) and (views, h, w, 2), got {heat.shape} and {arrows.shape}."
        )
    if heat.min() < 0 or heat.max() > 1:
        raise UserError(f"heat: expected values in [0, 1], got [{heat.min():.3g}, {heat.max():.3g}].")
    views, rows, columns = heat.shape
    scale = max(1, round(_SIDE / image.shape[0]))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    canvas = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    side_by_side = rearrange(heat, "v h w -> h (v w)")
    smooth = Image.fromarray((255 * side_by_side).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    hot = np.asarray(smooth) / 255
    # What is cold becomes a little darker; what is hot is coloured, from red to yellow.
    colour, weight = np.stack([np.full_like(hot, 255), 200 * hot, np.zeros_like(hot)], axis=-1), 0.6 * hot[..., None]
    blended = (1 - weight) * 0.85 * np.asarray(canvas) + weight * colour
    canvas = Image.fromarray(blended.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    cell = np.array([height / rows, width / (views * columns)])
    for view, row, column in np.ndindex(views, rows, columns):
        arrow = arrows[view, row, column]
        if np.hypot(*arrow) >= SHORTEST_ARROW:
            tip = (np.array([row, view * columns + column]) + 0.5) * cell
            _draw_arrow(pen, tip - arrow * cell, tip, width=max(1, height // 160))
    if caption:
        font, place = ImageFont.load_default(size=height // 16), (height // 32, height - height // 32)
        left, top, right, bottom = pen.textbbox(place, caption, font=font, anchor="ls")
        pen.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill=(20, 20, 20))
        pen.text(place, caption, fill=(255, 255, 255), font=font, anchor="ls")
    return np.asarray(canvas)


def side_by_side(pictures: list[UInt8[np.ndarray, "H W 3"]], columns: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Equal pictures in rows of `columns`, left to right, with a thin white gap; the rest of a row stays white."""
    if not pictures:
        raise UserError("There is no picture to draw: the episode has no transition.")
    gap = 4
    height, width = pictures[0].shape[0] + gap, pictures[0].shape[1] + gap
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height - gap, min(columns, len(pictures)) * width - gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def _draw_arrow(pen: ImageDraw.ImageDraw, tail: np.ndarray, tip: np.ndarray, width: int) -> None:
    """A line with a two-stroke head; points are (row, column)."""
    along = (tip - tail) / max(float(np.hypot(*(tip - tail))), 1e-6)
    across = np.array([-along[1], along[0]])
    for end in (tail, tip - 5 * width * along + 3 * width * across, tip - 5 * width * along - 3 * width * across):
        pen.line([tuple(end[::-1]), tuple(tip[::-1])], fill=_ARROW, width=width)


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
) -> dict[str, MapCheck | None]:
    """Draw transitions of one episode: some of them, evenly spread, as one PNG, or all of them as an MP4 film.

    The first one, from the latent of an image to that of a tubelet, is no motion and left out (docs/decisions/020).
    What the maps of the whole data set share is subtracted from each.

    Args:
        lat: the latent action tokenizer.
        latents: folder of latent shards.
        dataset: the LeRobot data set the latents were made from.
        out: file to write, .png or .mp4; the film runs at the speed of the recording.
        episode: its number in the data set; None for the first of the latents.
        transitions: most transitions to draw in a PNG.
        columns: pictures per row of a PNG.
        lapa: LAPA's quantiser; its map is drawn to the right of ours.

    Returns:
        What `measure_maps` found of all maps of the data set.
    """
    out = Path(out)
    if out.suffix.lower() not in (".png", ".mp4"):
        raise UserError(f"{out}: expected a .png or .mp4 file to write.")
    shards = LatentShards(latents)
    reader = LeRobotReader(dataset, depth_range=shards.meta.depth_range)
    require_same_tokenizer(lat, shards)
    if missing := sorted(set(shards.meta.cameras) - set(reader.camera_keys)):
        raise UserError(f"{dataset} has no cameras {missing}, which {latents} were made from: give that data set.")
    step = lat.config.transition_frames
    if lapa is not None:
        lapa.require_transition_frames(step)
    chosen = find_episode(shards, episode)
    film, available = out.suffix.lower() == ".mp4", len(chosen.latents) - step
    if available < 2:
        raise UserError(
            f"Episode {chosen.episode_index} has {len(chosen.latents)} latent frame(s), hence no transition to draw: "
            f"it takes {step + 2}, because the first transition is left out."
        )
    shared = measure_maps(lat, shards, reader, lapa)
    wanted = available - 1 if film else min(transitions, available - 1)
    index: list[int] = np.linspace(1, available - 1, wanted).round().astype(int).tolist()
    per_latent = shards.meta.frames_per_latent
    ends = sorted({*index, *(i + step for i in index)})
    frames = [chosen.offset + per_latent * end for end in ends]  # the last raw frame of each latent
    views = zip(*(reader.frames(chosen.episode_index, camera, frames) for camera in shards.meta.cameras), strict=True)
    raw = {end: list(pictures) for end, pictures in zip(ends, views, strict=True)}
    layers = transition_layers(lat, chosen, shards.meta.grid, index, shared.ours)
    rate_hz = shards.meta.frame_rate_hz / per_latent
    captions = [f"{'ours, ' if lapa else ''}{i / rate_hz:.1f} s" for i in index]
    drawn = zip(index, layers, captions, strict=True)
    pictures = [draw_transition(_joined(raw[i]), *layer, caption) for i, layer, caption in drawn]
    if lapa is not None:
        others = [_draw_lapa(lapa, raw[i], raw[i + step], shared.lapa) for i in index]
        pictures = [np.concatenate(pair, axis=1) for pair in zip(pictures, others, strict=True)]
    if film:
        height, width = (side // 2 * 2 for side in pictures[0].shape[:2])  # even, as video wants it
        write_video(out, np.stack([picture[:height, :width] for picture in pictures]), rate_hz)
    else:
        with atomic_file(out) as partial:
            Image.fromarray(side_by_side(pictures, columns)).save(partial, format="PNG")
    return shared.checks


def transition_layers(
    lat: LatentActionTokenizer,
    episode: LatentEpisode,
    grid: Grid,
    index: list[int],
    shared: Float[np.ndarray, "views h w"] | None = None,
) -> list[tuple[Float[np.ndarray, "views h w"], Float[np.ndarray, "views h w 2"]]]:
    """Heat, without what is `shared` with others, and arrows of some transitions of an episode of raw latents."""
    z, step = lat.standardise(torch.from_numpy(episode.latents)), lat.config.transition_frames
    with torch.no_grad():
        actions = dict(
            zip(
                index, lat.encode(torch.stack([z[index], z[[i + step for i in index]]], dim=1), grid)[:, 0], strict=True
            )
        )
    return [
        (action_effect_map(lat, z[i], actions[i], grid, shared), transport_arrows(lat, z[i], actions[i], grid))
        for i in index
    ]


def find_episode(shards: LatentShards, episode: int | None) -> LatentEpisode:
    """The first entry of an episode (it may have been encoded at several offsets); of None, the first of all."""
    numbers = [info.episode_index for info in shards.infos]
    if episode is not None and episode not in numbers:
        raise UserError(f"{shards.root} holds no episode {episode}; it holds {format_episodes(numbers)}.")
    return shards[0 if episode is None else numbers.index(episode)]


def _joined(views: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The cameras side by side, all of the first one's size, which is lowered by a whole factor."""
    height, width = views[0].shape[:2]
    factor = max(1, round(height / _VIEW_HEIGHT))
    size = (width // factor, height // factor)
    return np.concatenate([np.asarray(Image.fromarray(view).resize(size)) for view in views], axis=1)


def _draw_lapa(
    lapa: LapaQuantizer,
    before: list[UInt8[np.ndarray, "H W 3"]],
    after: list[UInt8[np.ndarray, "H W 3"]],
    shared: Float[np.ndarray, "views h w"] | None,
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The frame under the map of LAPA's latent action, which has no transport, hence no arrows."""
    x_t, x_next = (_lapa_pixels(lapa, [picture[None] for picture in views]) for views in (before, after))
    maps = rearrange(lapa_action_effects(lapa, x_t, x_next), "n h (v w) -> n v h w", v=len(before))
    heat = _heat(maps, shared, LAPA_HEAT_FLOOR)[0]
    return draw_transition(_joined(before), heat, np.zeros((*heat.shape, 2), dtype=np.float32), "LAPA")


def _lapa_pixels(lapa: LapaQuantizer, views: list[UInt8[np.ndarray, "n H W 3"]]) -> Float[Tensor, "n 3 h w"]:
    """Frames of all cameras as LAPA sees them, side by side, in [-1, 1]."""
    size = (lapa.config.size[0], lapa.config.size[1] // len(views))
    side_by_side = torch.cat([prepare_frames(view, size) for view in views], dim=3)  # (3, n, h, w)
    return rearrange(side_by_side, "rgb n h w -> n rgb h w").to(lapa.code_place.device)


def _lapa_grid(lapa: LapaQuantizer, views: int) -> tuple[int, int]:
    """Patches of one view, (rows, columns)."""
    rows, columns = lapa.config.grid
    if columns % views:
        raise UserError(f"LAPA's {columns} columns of patches do not divide into {views} views: train it with others.")
    return rows, columns // views
