"""What a report says: frozen dataclasses, validated, one per section of the page.

Frames are uint8 arrays `(n, H, W, 3)`, single images `(H, W, 3)`, RGB. Every section but `run` may be left
out; the page then says that it is absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.sim.results import Likeness, SuccessRate, mean_rates

Number: TypeAlias = float | int


class Curve(NamedTuple):
    """One measured series: `values[i]` at `steps[i]`. A plain `(steps, values)` tuple is taken as well."""

    steps: Sequence[Number] | np.ndarray
    values: Sequence[Number] | np.ndarray
    unit: str = ""


Curves: TypeAlias = Mapping[str, Curve | tuple]
Count = SuccessRate  #: its name in version 0.1


def as_curve(series: Curve | tuple) -> Curve:
    """The series as a Curve; a plain tuple is (steps, values) or (steps, values, unit)."""
    return series if isinstance(series, Curve) else Curve(*series)


@dataclass(frozen=True)
class Stage:
    """One row of the stage table: what it took and what came out of it."""

    name: str
    seconds: Number
    cached: bool = False  #: True when the result was taken from an earlier run; `seconds` is then its first cost
    digest: str = ""
    result: str = ""  #: the stage's key number in words, such as "24.8 dB PSNR on held-out clips"


@dataclass(frozen=True)
class RunInfo:
    """What was run, on what, and how long it took."""

    title: str
    command: str
    stages: Sequence[Stage] = ()
    summary: str = ""  #: one or two sentences under the title
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    seeds: Sequence[int] = ()
    config_yaml: str = ""
    peak_memory_bytes: int | None = None
    wall_seconds: Number | None = None  #: of this invocation; stages taken from the cache cost it nothing
    date: str = ""


@dataclass(frozen=True)
class ReconstructedClip:
    """One held-out clip beside its reconstruction."""

    name: str
    original: np.ndarray
    reconstructed: np.ndarray
    psnr_db: Number
    ssim: Number | None = None

    def __post_init__(self) -> None:
        require_frames(self.original, f"original of clip {self.name!r}")
        require_same_shape(self.original, self.reconstructed, f"reconstruction of clip {self.name!r}")


@dataclass(frozen=True)
class Reconstruction:
    """What the visual tokenizer keeps of a clip. Means are over `num_clips` clips, not over the ones shown."""

    clips: Sequence[ReconstructedClip]
    psnr_db: Number
    ssim: Number | None = None
    num_clips: int | None = None
    #: name -> (PSNR in dB, SSIM or None), such as {"mean colour": (14.1, 0.31), "last frame repeated": (22.0, 0.8)}
    baselines: Mapping[str, tuple] = field(default_factory=dict)


@dataclass(frozen=True)
class TransitionPicture:
    """One transition: the frame, the same frame with heat map and transport arrows drawn, the next frame."""

    name: str
    drawn: np.ndarray
    frame: np.ndarray | None = None
    next_frame: np.ndarray | None = None
    latent_action: Sequence[Number] | np.ndarray | None = None

    def __post_init__(self) -> None:
        for image, what in ((self.drawn, "drawn"), (self.frame, "frame"), (self.next_frame, "next_frame")):
            if image is not None:
                require_frames(image[None], f"{what} of transition {self.name!r}")


@dataclass(frozen=True)
class LatentActions:
    """What a latent action does, and what of the next latents it explains (mean squared errors, held-out)."""

    pictures: Sequence[TransitionPicture]
    forward_loss: Number | None = None  #: None where nothing was held out
    copy_loss: Number | None = None  #: the next latents taken equal to the current ones
    zero_action_loss: Number | None = None  #: the same forward model fed a zero action
    probe_r2: Mapping[str, Number] = field(default_factory=dict)  #: robot action channel -> R^2
    #: control -> channel -> R^2, such as {"untrained tokenizer": {...}, "head on both latents": {...}}
    probe_controls: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    map_check: str = ""  #: whether the heat maps follow the arm, in words

    @property
    def losses(self) -> dict[str, float]:
        """The measured losses, in words."""
        named = {
            "with the latent action": self.forward_loss,
            "with a zero action": self.zero_action_loss,
            "copy of the current latents": self.copy_loss,
        }
        return {name: float(value) for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class ImaginedClip:
    """Real frames of an episode, what the tokenizer makes of them, and the imagined ones, in step."""

    name: str
    real: np.ndarray
    imagined: np.ndarray
    psnr_db: Number
    copy_psnr_db: Number | None = None  #: of the last observed frame repeated
    observed: int = 0  #: how many leading frames of all arrays were given, not imagined
    reconstructed: np.ndarray | None = None
    reconstructed_psnr_db: Number | None = None  #: the most that imagined frames can be expected to reach
    #: frames imagined at a time, after which the real ones up to there are observed; 0: all that were not given
    chunk: int = 0
    frame_rate_hz: Number = 20.0  #: at which the frames play in real time

    def __post_init__(self) -> None:
        require_frames(self.real, f"real frames of {self.name!r}")
        require_same_shape(self.real, self.imagined, f"imagined frames of {self.name!r}")
        if self.reconstructed is not None:
            require_same_shape(self.real, self.reconstructed, f"reconstructed frames of {self.name!r}")
        if self.frame_rate_hz <= 0:
            raise UserError(f"expected frame_rate_hz > 0, got {self.frame_rate_hz} ({self.name!r})")

    @property
    def rows(self) -> list[tuple[str, np.ndarray]]:
        """The arrays by name, in the order in which they are shown."""
        made = [] if self.reconstructed is None else [("reconstructed", self.reconstructed)]
        return [("real", self.real), *made, ("imagined", self.imagined)]

    def ahead(self, frame: int) -> int:
        """How many frames after the last observed one a frame was imagined; 0 if it was observed."""
        after = frame - self.observed
        return 0 if after < 0 else 1 + (after % self.chunk if self.chunk else after)


@dataclass(frozen=True)
class Imagination:
    """How well the world model foresees the video."""

    clips: Sequence[ImaginedClip]
    psnr_db: Number
    copy_psnr_db: Number | None = None
    num_clips: int | None = None
    #: line -> PSNR against the number of frames ahead, such as {"imagined": ([4, 8], [23.1, 21.9]), "copy": ...}
    by_horizon: Curves = field(default_factory=dict)
    reconstructed_psnr_db: Number | None = None  #: of the same frames through the tokenizer and back


@dataclass(frozen=True)
class Rollout:
    """One closed-loop episode as seen by the policy's camera."""

    task: str
    seed: int
    success: bool
    frames: np.ndarray
    instruction: str = ""
    frame_rate_hz: Number = 20.0  #: at which `frames` play in real time
    method: str = "policy"
    distances: Curves = field(default_factory=dict)  #: name -> centimetres against seconds

    def __post_init__(self) -> None:
        require_frames(self.frames, f"frames of rollout {self.task} seed {self.seed}")
        if self.frame_rate_hz <= 0:
            raise UserError(f"expected frame_rate_hz > 0, got {self.frame_rate_hz} ({self.task} seed {self.seed})")


@dataclass(frozen=True)
class SuccessRow:
    """One method of the success table. The first row of the table is the method the report is about."""

    method: str
    counts: Mapping[str, SuccessRate]  #: task -> count; a task that was not run is left out
    note: str = ""

    @property
    def total(self) -> SuccessRate:
        """All tasks pooled."""
        counts = list(self.counts.values())
        if not counts:
            raise UserError(f"expected at least one task in the success row of {self.method!r}, got none")
        return sum(counts[1:], start=counts[0])

    def over(self, tasks: Sequence[str]) -> SuccessRate | None:
        """Those of `tasks` that were run, pooled."""
        counts = [count for task, count in self.counts.items() if task in tasks]
        return sum(counts[1:], start=counts[0]) if counts else None

    def mean_of(self, groups: Mapping[str, Sequence[str]]) -> float | None:
        """Mean over the groups of their tasks' mean success rates, as MT50 is published; None if a group is missing."""
        means = mean_rates(self.counts, groups)
        return sum(means.values()) / len(means) if means and len(means) == len(groups) else None


@dataclass(frozen=True)
class LanguageRow:
    """One task of a pair that shares its scene: success under three instructions. None: not run."""

    task: str
    right: SuccessRate | None
    other: SuccessRate | None
    none: SuccessRate | None


@dataclass(frozen=True)
class ChannelError:
    """Mean absolute action error of one channel, in its unit, with the same error of the baselines."""

    name: str
    unit: str
    error: Number
    baselines: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class ActionTrace:
    """Predicted against recorded actions of one channel over one episode."""

    name: str
    unit: str
    time_s: Sequence[Number] | np.ndarray
    real: Sequence[Number] | np.ndarray
    predicted: Sequence[Number] | np.ndarray

    def __post_init__(self) -> None:
        if not len(self.time_s) == len(self.real) == len(self.predicted):
            raise UserError(
                f"expected time_s, real and predicted of trace {self.name!r} to have one length, "
                f"got {len(self.time_s)}, {len(self.real)}, {len(self.predicted)}"
            )


@dataclass(frozen=True)
class OpenLoop:
    """Predicted against recorded actions on the measured episodes."""

    channels: Sequence[ChannelError]
    traces: Sequence[ActionTrace] = ()
    note: str = ""  #: how the error was measured: episodes, horizon, what the policy saw

    @property
    def won(self) -> int:
        """On how many channels the policy's error is below every baseline's."""
        return sum(bool(c.baselines) and c.error < min(c.baselines.values()) for c in self.channels)


@dataclass(frozen=True)
class ReportData:
    """Everything one report says, in the order in which a run produces it."""

    run: RunInfo
    findings: Sequence[str] = ()
    success: Sequence[SuccessRow] = ()
    #: group -> its tasks, where success is told by groups
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    #: task -> where its failed episodes ended -> how many
    endings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    likeness: Likeness | None = None
    language: Sequence[LanguageRow] = ()
    rollouts: Sequence[Rollout] = ()
    open_loop: OpenLoop | None = None
    reconstruction: Reconstruction | None = None
    latent_actions: LatentActions | None = None
    imagination: Imagination | None = None
    #: stage -> metric -> curve. "train/loss" and "val/loss" share a chart named "loss"; names that end in "_db" or
    #: "psnr" are in dB
    curves: Mapping[str, Curves] = field(default_factory=dict)
    #: under which success was counted, as JSON values: suite, settings, seeds
    protocol: Mapping[str, Any] = field(default_factory=dict)
    #: which episodes were reconstructed, planned along and imagined: training ones where none could be held out
    measured: Literal["held-out", "training"] = "held-out"


def require_frames(frames: np.ndarray, what: str) -> None:
    """Raise ValueError unless `frames` is a uint8 array (n, H, W, 3) with at least one frame."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(
            f"expected {what} as a uint8 RGB array (n, H, W, 3), got {frames.dtype} of shape {frames.shape}"
        )


def require_same_shape(reference: np.ndarray, frames: np.ndarray, what: str) -> None:
    """Raise ValueError unless `frames` is a uint8 array of the reference's shape."""
    require_frames(frames, what)
    if frames.shape != reference.shape:
        raise UserError(f"expected {what} of shape {reference.shape}, got {frames.shape}")
