"""Open-loop evaluation: on recorded episodes, what the policy would do and see next against what was done and seen.

The policy gets the recorded frames and states as it would while driving, plans, and is then told which actions were
really carried out. So every chunk is planned after a true prefix, by the code that drives a robot. Imagined video is
scored by PSNR, SSIM, and a Frechet distance where a network is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from repvitok.data import LeRobotReader, prepare_frames
from repvitok.data.contents import missing_actions, number_columns, require_recorded
from repvitok.data.split import EpisodeNumbers, format_episodes
from repvitok.data.transforms import to_frames
from repvitok.encoding_plan import infos_of, read_robot_columns
from repvitok.runtime.errors import UserError
from repvitok.runtime.progress import progress
from repvitok.training.metrics import FrechetStatistics, HOGClipFeatures, I3DFeatures, psnr, ssim
from torch import Tensor

from repwam_core.interface import Observation
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.statistics import HEADLINE, SCALES, VARIANTS, ActionStatistics, open_loop_score

CLIP_FRAMES = 16
"""Frames of a clip whose features are compared; the paper does not say how long its gFVD's are."""

Frames = UInt8[np.ndarray, "_ _ _ _ 3"]
BASELINES = ("mean action", "last action repeated")
SHOWN = ("imagined", "reconstructed", "copied")
"""Videos of an episode that are compared with its real frames."""


@runtime_checkable
class ClipFeatures(Protocol):
    """A frozen network that turns clips into vectors; `repvitok.training.metrics` has some.

    Attributes:
        metric: what its distance is called for reconstructions: "rfvd" for I3D, another name for a stand-in.
        backbone: the network and where its weights came from.
        dim: numbers in a vector.
    """

    metric: str
    backbone: str
    dim: int

    def features(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "n d"]:
        """Vectors of clips with pixels in [-1, 1]."""
        ...


def named_clip_features(named: Sequence[str] | None) -> ClipFeatures | None:
    """The network of `repwam openloop --clip-features`: its name and, for I3D, the file of its weights."""
    match list(named or ()):
        case []:
            return None
        case ["hog"]:
            return HOGClipFeatures()
        case [("tfhub-kinetics400" | "pytorch-i3d") as name, file]:
            return I3DFeatures(name, file)
        case other:
            told = " ".join(other)
            raise UserError(f"clip features: expected hog, tfhub-kinetics400 FILE or pytorch-i3d FILE, got {told}")


@dataclass(frozen=True)
class GeneratedScores:
    """What `score_video` found.

    Attributes:
        psnr_db, ssim: means over frames.
        frames: how many.
        frechet: distance between the features of imagined and of real clips; None without a network or two clips.
        frechet_name: "gfvd" where the network is FVD's, else the network's own name.
        backbone: the network.
        clips: clips on either side.
    """

    psnr_db: float
    ssim: float
    frames: int
    frechet: float | None = None
    frechet_name: str = ""
    backbone: str = ""
    clips: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the distance stands under its own name."""
        values: dict[str, Any] = {"psnr_db": self.psnr_db, "ssim": self.ssim, "frames": self.frames}
        if self.frechet is not None:
            values |= {self.frechet_name: self.frechet, "backbone": self.backbone, "clips": self.clips}
        return values


def frames_psnr(video_hat: Frames, video: Frames) -> Float[np.ndarray, "views n"]:
    """PSNR of every frame in dB, by the one definition that all stages share (`repvitok.training.metrics.psnr`)."""
    return psnr(_as_clips(video_hat), _as_clips(video)).numpy()


@torch.no_grad()
def score_video(pairs: Iterable[tuple[Frames, Frames]], network: ClipFeatures | None = None) -> GeneratedScores:
    """Compare (imagined, real) videos of the same episodes and frames.

    Clips are `CLIP_FRAMES` consecutive frames of one camera, cut one after the other; what is left at the end of an
    episode is in no clip.
    """
    sums, frames = np.zeros(2), 0
    sides = None if network is None else (FrechetStatistics(network.dim), FrechetStatistics(network.dim))
    for imagined, real in pairs:
        video_hat, video = _as_clips(imagined), _as_clips(real)
        sums += [float(psnr(video_hat, video).sum()), float(ssim(video_hat, video).sum())]
        frames += video.shape[0] * video.shape[2]
        if network is not None and sides is not None:
            whole = video.shape[2] // CLIP_FRAMES * CLIP_FRAMES
            for statistics, frames_of in zip(sides, (video_hat, video), strict=True) if whole else ():
                clips = rearrange(frames_of[:, :, :whole], "v c (clips n) h w -> (v clips) c n h w", n=CLIP_FRAMES)
                statistics.update(network.features(clips).float())
    if not frames:
        raise UserError("no imagined frames to compare: plan with video='imagine' on episodes of several chunks")
    mean_psnr, mean_ssim = (sums / frames).tolist()
    if network is None or sides is None or sides[0].count < 2:
        return GeneratedScores(mean_psnr, mean_ssim, frames)
    distance, clips = sides[0].distance(sides[1]), sides[0].count
    name = {"rfvd": "gfvd"}.get(network.metric, network.metric)
    return GeneratedScores(mean_psnr, mean_ssim, frames, distance, name, network.backbone, clips)


def _as_clips(frames: Frames) -> Float[Tensor, "views 3 n H W"]:
    """Bytes to pixels in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1
    return rearrange(pixels, "views n h w c -> views c n h w")


@dataclass(frozen=True, eq=False)
class OpenLoopEpisode:
    """One recorded episode beside what the policy planned for it.

    Attributes:
        index: the episode's index in its data set.
        instruction: what it was told.
        seen: whether the policy was trained on the episode's recorded instruction.
        chunk: action vectors of a planned chunk; the last one may be shorter.
        rate_hz: control rate of the rows below.
        real: recorded actions in their units.
        predicted: the policy's.
        baselines: `BASELINES`, by name.
        frames: what the cameras saw from the second latent frame on, resized; None without imagined video.
        imagined: what the model expected instead.
        reconstructed: what the tokenizer makes of the true latents: the best that can be imagined.
        copied: the last observed frame repeated.
    """

    index: int
    instruction: str
    seen: bool
    chunk: int
    rate_hz: float
    real: Float[np.ndarray, "T C"]
    predicted: Float[np.ndarray, "T C"]
    baselines: dict[str, Float[np.ndarray, "T C"]]
    frames: UInt8[np.ndarray, "views n H W 3"] | None = None
    imagined: UInt8[np.ndarray, "views n H W 3"] | None = None
    reconstructed: UInt8[np.ndarray, "views n H W 3"] | None = None
    copied: UInt8[np.ndarray, "views n H W 3"] | None = None

    def psnr(self) -> dict[str, float]:
        """Mean PSNR of its frames in dB, of imagined, reconstructed and copied ones; empty without video."""
        if self.frames is None:
            return {}
        return {name: float(frames_psnr(getattr(self, name), self.frames).mean()) for name in SHOWN}


@dataclass(frozen=True, eq=False)
class OpenLoopResult:
    """Errors over all episodes; `to_dict` is what is written to disk.

    Attributes:
        statistics: the policy's scaling of actions, with their channels and units.
        episodes: what was compared.
        too_short: numbers of the chosen episodes without a whole transition.
    """

    statistics: ActionStatistics
    episodes: list[OpenLoopEpisode]
    too_short: tuple[int, ...] = ()

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the action channels."""
        return self.statistics.channels

    @property
    def units(self) -> tuple[str, ...]:
        """Their units."""
        return self.statistics.units

    def groups(self) -> dict[str, OpenLoopResult]:
        """The episodes of tasks that the policy was trained on, "seen", and of others, "unseen"; only what there is."""
        parts = {"seen": [e for e in self.episodes if e.seen], "unseen": [e for e in self.episodes if not e.seen]}
        return {name: OpenLoopResult(self.statistics, episodes) for name, episodes in parts.items() if episodes}

    def open_loop_scores(self) -> dict[str, dict[float, float]]:
        """Open-loop score in every variant: variant -> threshold -> share, the headline first."""
        chunks: dict[str, list[np.ndarray]] = {scale: [] for scale in SCALES}  # planned minus recorded, by chunk
        for e in self.episodes:
            scaled = self.statistics.normalise(e.predicted) - self.statistics.normalise(e.real)
            for scale, errors in (("si", e.predicted - e.real), ("scaled", scaled)):
                chunks[scale] += np.split(errors, range(e.chunk, len(errors), e.chunk))
        variants = sorted(VARIANTS, key=lambda variant: variant != HEADLINE)
        return {str(variant): open_loop_score(chunks[variant.scale], variant) for variant in variants}

    def video(
        self, network: ClipFeatures | None = None, of: Literal["imagined", "reconstructed", "copied"] = "imagined"
    ) -> GeneratedScores | None:
        """PSNR, SSIM and Frechet distance of the imagined, or other, frames; None without imagined video."""
        pairs = [(getattr(e, of), e.frames) for e in self.episodes if e.frames is not None]
        return score_video(pairs, network) if pairs else None

    def errors(self) -> dict[str, dict[str, float]]:
        """Mean absolute error per channel in its unit: method -> channel -> error, "policy" first."""
        real = np.concatenate([episode.real for episode in self.episodes])
        methods = {"policy": [episode.predicted for episode in self.episodes]}
        methods |= {name: [episode.baselines[name] for episode in self.episodes] for name in BASELINES}
        errors = {name: np.abs(np.concatenate(rows) - real).mean(axis=0) for name, rows in methods.items()}
        return {name: dict(zip(self.channels, map(float, error), strict=True)) for name, error in errors.items()}

    def psnr(self) -> dict[str, float]:
        """Mean over all episodes' frames of their PSNR in dB, as `video` has it; empty without imagined video."""
        each = {
            name: [frames_psnr(getattr(e, name), e.frames).ravel() for e in self.episodes if e.frames is not None]
            for name in SHOWN
        }
        return {name: float(np.concatenate(values).mean()) for name, values in each.items() if values}

    def to_dict(self, network: ClipFeatures | None = None) -> dict[str, Any]:
        """Numbers without arrays, for JSON: over all episodes, and over those of seen and of unseen tasks."""
        groups = {name: part._numbers(network) for name, part in self.groups().items()}
        return {**self._numbers(network), "too_short": list(self.too_short), "groups": groups}

    def _numbers(self, network: ClipFeatures | None) -> dict[str, Any]:
        video = self.video(network)
        return {
            "channels": list(self.channels),
            "units": list(self.units),
            "mean_absolute_error": self.errors(),
            "open_loop_score": self.open_loop_scores(),
            "psnr_db": self.psnr(),
            "imagined_video": None if video is None else video.to_dict(),
            "episodes": [
                {"index": e.index, "instruction": e.instruction, "seen": e.seen, "actions": len(e.real)}
                for e in self.episodes
            ],
        }


def evaluate_open_loop(
    policy: BatchedPolicy,
    reader: LeRobotReader,
    episodes: EpisodeNumbers | None = None,
    *,
    cameras: Sequence[str] | None = None,
    instruction: str | None = None,
    seed: int = 0,
) -> OpenLoopResult:
    """Compare the policy with recorded episodes, chunk by chunk.

    Args:
        policy: what is evaluated; how it plans is its own setting.
        reader: the data set, with the policy's cameras, state and action channels, opened with the depth range of the
            policy's latents (`policy.parts.manifest.latents.depth_range`).
        episodes: their numbers in the data set; None is all of them.
        cameras: the data set's cameras that the policy's stand for, in the policy's order; None where they are called
            the same.
        instruction: what the policy is told instead of each episode's own instruction.
        seed: of the policy's draws.
    """
    theirs = list(cameras or policy.embodiment.cameras)
    if len(theirs) != len(policy.embodiment.cameras):
        raise UserError(f"expected a camera for each of the policy's {policy.embodiment.cameras}, got {theirs}")
    _check_data(policy, reader, theirs)
    asked = infos_of(reader, episodes)
    chosen = [info for info in asked if info.length > policy.frames_per_latent]
    too_short = tuple(info.index for info in asked if info.length <= policy.frames_per_latent)
    if not chosen:
        raise UserError(
            f"{reader.root}: none of the episodes {format_episodes(too_short)} has more than "
            f"{policy.frames_per_latent} frames, which a transition takes"
        )
    require_recorded(reader, theirs, [info.index for info in chosen])
    views = dict(zip(policy.embodiment.cameras, theirs, strict=True))
    results = []
    for info in progress(chosen, desc="open loop", unit="episode"):
        told = info.task if instruction is None else instruction
        results.append(_Replay(policy, reader, info.index, info.task, views).run(told, seed))
    return OpenLoopResult(policy.parts.statistics.targets, results, too_short)


class _Replay:
    """Walks through one recorded episode, chunk by chunk."""

    def __init__(
        self, policy: BatchedPolicy, reader: LeRobotReader, index: int, task: str, cameras: dict[str, str]
    ) -> None:
        """`cameras`: each of the policy's -> the data set's that stands for it."""
        self.policy, self.reader, self.index, self.cameras = policy, reader, index, cameras
        self.seen = task in policy.parts.instructions
        columns = read_robot_columns(reader, index)
        self.actions, self.state = columns["action"], columns.get("observation.state")
        manifest = policy.parts.manifest
        self.size, self.views, self.stride = manifest.size, manifest.latents.grid[0], manifest.latents.stride
        self._stream = policy.parts.tokenizer.stream(self.views, window=manifest.latents.window)
        self._video: dict[str, list[np.ndarray]] = {"frames": [], "imagined": [], "reconstructed": [], "copied": []}

    def run(self, instruction: str, seed: int) -> OpenLoopEpisode:
        """Plan along the whole episode."""
        per, policy = self.policy.frames_per_latent, self.policy
        policy.reset([instruction], [seed])
        span = policy.plan.executed * per
        first, seen, predicted = 0, 0, []
        # Frame `first` is the newest seen; the actions first .. last - 1 lead from it to frame `last`.
        while (left := (len(self.actions) - 1 - first) // per) > 0:
            chunk = policy.act([self._observation(seen, first)])[0]
            last = first + min(span, left * per)
            predicted.append(chunk.actions[: last - first])
            self._keep_video(first, last)
            policy.record([self.actions[first:last]])
            seen, first = first + 1, last
        if self._video["frames"]:  # the frames after the last plan too: reconstructions cover all that was imagined
            policy.act([self._observation(seen, first)])
            self._reconstruct()
        return self._result(instruction, np.concatenate(predicted))

    def _observation(self, seen: int, last: int) -> Observation:
        """Frames and states `seen` .. `last`, both included."""
        frames = range(seen, last + 1)
        images = {camera: self.reader.frames(self.index, own, frames) for camera, own in self.cameras.items()}
        return Observation(images=images, state=None if self.state is None else self.state[seen : last + 1])

    def _keep_video(self, first: int, last: int) -> None:
        """Decode what was expected, beside what came; the stream that decodes follows the true latents only."""
        frames = (last - first) // self.policy.frames_per_latent
        imagined = self.policy.imagined_latents()
        if imagined is None:
            return
        self._reconstruct()
        kept = self._stream.state
        self._video["imagined"].append(self._decode(imagined[:, :frames]))
        self._stream.state = kept
        real = self._resized(range(first + self.stride, last + 1, self.stride))
        newest = self._resized(range(first, first + 1))
        self._video["frames"].append(real)
        self._video["copied"].append(np.repeat(newest, real.shape[1], axis=1))

    def _reconstruct(self) -> None:
        begins = self._stream.state.decoder is None
        frames = self._decode(self.policy.observed_latents())
        if not begins:
            self._video["reconstructed"].append(frames)

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        z = rearrange(latents, "1 frames (views tokens) d -> views frames tokens d", views=self.views)
        return np.stack([to_frames(view) for view in self._stream.decode(z.contiguous(), self.size)])

    def _resized(self, frames: range) -> np.ndarray:
        raw = [self.reader.frames(self.index, own, frames) for own in self.cameras.values()]
        return np.stack([to_frames(prepare_frames(view, self.size)) for view in raw])

    def _result(self, instruction: str, predicted: np.ndarray) -> OpenLoopEpisode:
        real, span = self.actions[: len(predicted)], self.policy.plan.executed * self.policy.frames_per_latent
        mean = np.array(self.policy.parts.statistics.targets.mean, np.float32)
        before = np.arange(len(real)) // span * span - 1
        repeated = np.where(before[:, None] >= 0, real[np.maximum(before, 0)], mean)
        baselines = {BASELINES[0]: np.broadcast_to(mean, real.shape).copy(), BASELINES[1]: repeated}
        video = {name: np.concatenate(parts, axis=1) for name, parts in self._video.items() if parts}
        rate_hz = self.policy.embodiment.rate_hz
        return OpenLoopEpisode(self.index, instruction, self.seen, span, rate_hz, real, predicted, baselines, **video)


def _check_data(policy: BatchedPolicy, reader: LeRobotReader, cameras: Sequence[str]) -> None:
    """The data set must be of the policy's robot, and its depth maps be read as those that were trained on."""
    if reader.depth_range != (known := policy.parts.manifest.latents.depth_range):
        raise UserError(
            f"{reader.root}: opened with depth_range {reader.depth_range}, the policy's latents were made with {known}"
        )
    if missing := [camera for camera in cameras if camera not in reader.camera_keys]:
        raise UserError(
            f"{reader.root}: the policy needs the cameras {missing}, there are {reader.camera_keys}; name those that "
            "stand for the policy's with --cameras, in its order"
        )
    if "action" not in reader.features:
        told = missing_actions(str(reader.root), number_columns(reader), cameras)
        raise UserError(f"there are no recorded actions to compare with: {told}")
    names = reader.channel_names("action")
    if names != policy.parts.statistics.actions.channels:
        raise UserError(
            f"{reader.root}: expected the action channels {policy.parts.statistics.actions.channels}, got {names}"
        )
    if reader.fps != policy.embodiment.rate_hz:
        raise UserError(f"{reader.root}: expected {policy.embodiment.rate_hz} frames per second, got {reader.fps}")
