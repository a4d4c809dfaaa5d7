"""The report's pictures and measurements that need the models: reconstructions, latent actions, imagination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from latent_action import LatentActionTokenizer
from latent_action.visualize import action_effect_map, draw_transition, measure_maps, transport_arrows
from repvitok.data import LatentEpisode, LatentMeta, LatentShards, LeRobotReader, prepare_frames
from repvitok.data.split import split_latents
from repvitok.data.transforms import to_frames
from repvitok.model import load_tokenizer
from repvitok.runtime.documents import read_json
from repvitok.training.metrics import psnr, ssim
from torch import Tensor

from repwam_core.policy.openloop import OpenLoopEpisode, OpenLoopResult, evaluate_open_loop, frames_psnr
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.report import (
    ActionTrace,
    ChannelError,
    Curve,
    Imagination,
    ImaginedClip,
    LatentActions,
    OpenLoop,
    ReconstructedClip,
    Reconstruction,
    TransitionPicture,
)

if TYPE_CHECKING:
    from repwam_core.quickstart.stages import Run, Trained

MEASURED_EPISODES = 10
SHOWN = 4
TRACED_CHANNELS = 6


@dataclass(frozen=True)
class OpenLoopFindings:
    """Actions and imagined video of some episodes."""

    actions: OpenLoop
    imagination: Imagination | None


def measured_episodes(this: Run, trained: Trained) -> tuple[list[int], bool]:
    """Numbers of the episodes to show and measure, at most `MEASURED_EPISODES`, and whether they are held out.

    They are those that no training stage saw and that every stage could use. Where there are none, because only one
    episode is long enough, they are those that were trained on: the end of an only one, which is held out of it, is too
    short to be driven along.
    """
    shards = LatentShards(trained.prepared.latents)
    sides = split_latents(shards, this.config.held_out, shortest=3)
    train, kept = ({shards.infos[part.number].episode_index for part in side} for side in sides)
    held_out = sorted(kept - train)
    return (held_out or sorted(train))[:MEASURED_EPISODES], bool(held_out)


def reconstruction(this: Run, trained: Trained, episodes: Sequence[int]) -> Reconstruction:
    """Episodes through the tokenizer's stream and back, beside two trivial baselines."""
    meta = LatentShards(trained.prepared.latents).meta
    reader = LeRobotReader(trained.prepared.data.folder, depth_range=meta.depth_range)
    lengths = {info.index: info.length for info in reader.episodes}
    tokenizer = load_tokenizer(trained.prepared.tokenizer_folder)
    camera, size = meta.cameras[0], this.config.size
    per_latent = tokenizer.config.tubelet_frames * this.config.stride
    clips, baselines = [], []
    for index in episodes:
        frames = range(0, 1 + (lengths[index] - 1) // per_latent * per_latent, this.config.stride)
        video = prepare_frames(reader.frames(index, camera, frames), size)[None]
        with torch.no_grad():
            stream = tokenizer.stream(window=tokenizer.config.episode_window)
            video_hat = stream.decode(stream.encode(video), size).clamp(-1, 1)
        clip = ReconstructedClip(
            f"episode {index}", to_frames(video[0]), to_frames(video_hat[0]), *_quality(video_hat, video)
        )
        clips.append(clip)
        mean_colour = video.mean(dim=(2, 3, 4), keepdim=True).expand_as(video)
        first_frame = video[:, :, :1].expand_as(video)
        baselines.append([_quality(trivial, video) for trivial in (mean_colour, first_frame)])
    means = np.mean(baselines, axis=0)
    shown = [
        replace(clip, original=_thinned(clip.original), reconstructed=_thinned(clip.reconstructed))
        for clip in clips[:: max(1, len(clips) // SHOWN)][:SHOWN]
    ]
    return Reconstruction(
        shown,
        float(np.mean([clip.psnr_db for clip in clips])),
        float(np.mean([clip.ssim for clip in clips if clip.ssim is not None])),
        len(clips),
        {name: tuple(map(float, means[i])) for i, name in enumerate(("mean colour", "first frame repeated"))},
    )


def _quality(video_hat: Tensor, video: Tensor) -> tuple[float, float]:
    """Mean over the frames of PSNR (dB) and SSIM."""
    return float(psnr(video_hat, video).mean()), float(ssim(video_hat, video).mean())


def latent_actions(this: Run, trained: Trained, episodes: Sequence[int]) -> LatentActions:
    """Where latent actions of some episodes act, and how much of the next latents they explain."""
    lat = LatentActionTokenizer.from_pretrained(trained.prepared.lat_folder)
    shards = LatentShards(trained.prepared.latents)
    reader = LeRobotReader(trained.prepared.data.folder, depth_range=shards.meta.depth_range)
    by_index = {e.episode_index: e for e in shards if e.offset == 0 and e.episode_index in episodes}
    maps = measure_maps(lat, shards, reader)
    chosen = [by_index[index] for index in episodes if index in by_index]
    pictures = [_transition(this, reader, lat, episode, shards.meta, maps.ours) for episode in chosen]
    check = str(maps.checks["ours"] or "")
    names = ("forward_loss", "copy_loss", "zero_action_loss")
    losses: dict[str, Any] = {name: trained.prepared.lat.summary.get(f"val/{name}") for name in names}
    path = trained.prepared.labelled.folder / "probe.json"
    if not path.exists():  # the data allow of none, see `work.label`
        return LatentActions(pictures[:SHOWN], map_check=check, **losses)
    probe = read_json(path, dict[str, Any])
    r2 = {
        name: {c: v for c, v in zip(probe["channels"], probe[name]["r2"], strict=True) if v is not None}
        for name in ("latent_action", "untrained", "frames")
    }
    controls = {"untrained latent action": r2["untrained"], "head on both latents": r2["frames"]}
    probed: dict[str, Any] = {"probe_r2": r2["latent_action"], "probe_controls": controls}
    return LatentActions(pictures[:SHOWN], map_check=check, **losses, **probed)


def _transition(
    this: Run,
    reader: LeRobotReader,
    lat: LatentActionTokenizer,
    episode: LatentEpisode,
    meta: LatentMeta,
    shared: np.ndarray,
) -> TransitionPicture:
    """The episode's transition that changes the latents most, without what all share, on its frame (first camera)."""
    z = lat.standardise(torch.from_numpy(episode.latents)[None])
    with torch.no_grad():
        actions = lat.encode(z, meta.grid)[0]
        step = int((z[0, 1:] - z[0, :-1]).square().mean(dim=(1, 2)).argmax())
        heat = action_effect_map(lat, z[0, step], actions[step], meta.grid, shared)[:1]
        arrows = transport_arrows(lat, z[0, step], actions[step], meta.grid)[:1]
    at = [step * meta.frames_per_latent, (step + 1) * meta.frames_per_latent]
    raw = reader.frames(episode.episode_index, meta.cameras[0], at)
    frame, following = to_frames(prepare_frames(raw, this.config.size))
    drawn = draw_transition(frame, heat, arrows)
    return TransitionPicture(
        f"episode {episode.episode_index}, latent frame {step}: {episode.task}",
        drawn,
        frame,
        following,
        actions[step].numpy(),
    )


def open_loop(this: Run, trained: Trained, episodes: Sequence[int], measured: str = "held-out") -> OpenLoopFindings:
    """The policy's actions and imagined video along some episodes, `measured` ones: held-out or training."""
    policy = BatchedPolicy.from_pretrained(trained.policy, video="imagine")
    latents = policy.parts.manifest.latents
    reader = LeRobotReader(trained.prepared.data.folder, depth_range=latents.depth_range)
    result = evaluate_open_loop(policy, reader, episodes, seed=this.seed)
    errors = result.errors()
    baselines = {name: values for name, values in errors.items() if name != "policy"}
    channels = [
        ChannelError(name, unit, errors["policy"][name], {b: values[name] for b, values in baselines.items()})
        for name, unit in zip(result.channels, result.units, strict=True)
    ]
    note = f"{len(result.episodes)} {measured} episodes, each chunk planned after the recorded frames and actions."
    return OpenLoopFindings(OpenLoop(channels, _traces(result), note), _imagination(result))


def _traces(result: OpenLoopResult) -> list[ActionTrace]:
    """Recorded and predicted actions of one episode, the channels that move most, none that stands still."""
    episode = result.episodes[0]
    deviation = episode.real.std(axis=0)
    moving = [c for c in np.argsort(-deviation, kind="stable")[:TRACED_CHANNELS] if deviation[c] > 0]
    time_s = np.arange(len(episode.real)) / episode.rate_hz
    return [
        ActionTrace(
            f"{result.channels[c]} (episode {episode.index})",
            result.units[c],
            time_s,
            episode.real[:, c],
            episode.predicted[:, c],
        )
        for c in sorted(moving)
    ]


def _imagination(result: OpenLoopResult) -> Imagination | None:
    measured = result.psnr()
    if not measured:
        return None
    return Imagination(
        [_imagined(episode) for episode in result.episodes[:SHOWN]],
        measured["imagined"],
        measured["copied"],
        len(result.episodes),
        _by_horizon(result.episodes),
        measured["reconstructed"],
    )


def _by_horizon(episodes: Sequence[OpenLoopEpisode]) -> dict[str, Curve]:
    """PSNR by how many frames after the last observed one a frame was imagined, over all cameras and episodes."""
    names = {
        "imagined": "imagined",
        "reconstructed": "reconstructed (ceiling)",
        "copied": "last observed frame repeated",
    }
    lines = {}
    for name, told in names.items():
        found: dict[int, list[float]] = {}
        for episode in episodes:
            if episode.frames is not None:
                for frame, values in enumerate(frames_psnr(getattr(episode, name), episode.frames).T):
                    found.setdefault(1 + frame % _chunk_frames(episode), []).extend(values.tolist())
        lines[told] = Curve(sorted(found), [float(np.mean(found[ahead])) for ahead in sorted(found)], "dB")
    return lines


def _chunk_frames(episode: OpenLoopEpisode) -> int:
    """Frames that are imagined at a time."""
    assert episode.frames is not None
    return max(1, round(episode.chunk * episode.frames.shape[1] / len(episode.real)))


def _imagined(episode: OpenLoopEpisode) -> ImaginedClip:
    """One episode of the first camera, beginning with the one frame that was seen before anything was imagined."""
    assert episode.copied is not None
    psnr_db, first = episode.psnr(), episode.copied[0, :1]
    videos = {name: getattr(episode, name) for name in ("frames", "imagined", "reconstructed")}
    frames = {name: np.concatenate([first, video[0]]) for name, video in videos.items()}
    return ImaginedClip(
        f"episode {episode.index}: {episode.instruction}",
        frames["frames"],
        frames["imagined"],
        psnr_db["imagined"],
        psnr_db["copied"],
        observed=1,
        reconstructed=frames["reconstructed"],
        reconstructed_psnr_db=psnr_db["reconstructed"],
        chunk=_chunk_frames(episode),
        frame_rate_hz=episode.rate_hz * videos["frames"].shape[1] / len(episode.real),
    )


def _thinned(frames: np.ndarray, count: int = 10) -> np.ndarray:
    """At most `count` frames, evenly spread."""
    return frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
