"""Latents as data: one episode of them, and what a folder of them has in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import numpy as np
from jaxtyping import Float

from repvitok.runtime.documents import Count, From0, checked_range, parse
from repvitok.runtime.errors import UserError

InstructionSource = Literal["task_index", "tasks", "none"]
"""Rows' task_index and the table of tasks; the episode's own list of tasks; no instructions."""
MAX_TOKENS = 2**20
"""Of a latent frame; also the most channels of a latent, and frames between two."""
_ARRAYS = ("mean", "std", "latent_action_mean", "latent_action_std")
_OF_VERSION_1 = (
    "action_names", "cameras", "frame_rate_hz", "grid", "lat_digest", "latent_dim", "mean", "source", "state_names",
    "std", "stride", "tokenizer_digest", "window",
)  # fmt: skip
"""Fields that every file has had from the beginning, whether or not they have a default in code."""


@dataclass(frozen=True)
class EpisodeInfo:
    """What a folder of latents says of an episode without its arrays; see `LatentEpisode`.

    Attributes:
        key: name of the sample.
        episode_index: index of the episode in the data set the latents were made from.
        offset: the first raw frame used.
        task: the instruction, in words.
        frames: its latent frames.
        augmentation: which of its augmented encodings it is, from 1; 0 is the episode as it was recorded.
    """

    key: str
    episode_index: Count
    offset: Count
    task: str
    frames: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    augmentation: Count = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `augmentation` only where it is one, as files of before 0.4 have it."""
        return {name: value for name, value in vars(self).items() if value or name != "augmentation"}


@dataclass(frozen=True, eq=False)
class LatentEpisode:
    """One episode (or one tubelet offset of it) as latents, with what the robot felt and did.

    Latent 0 stands for raw frame `offset` alone; latent k > 0 for the tubelet whose last raw frame is
    `offset + frames_per_latent * k`, see `LatentMeta`.

    Attributes:
        key: name of the sample, unique in its data set, without dots.
        episode_index: index of the episode in the data set the latents were made from.
        offset: the first raw frame used.
        task: the instruction, in words.
        latents: (frames, tokens, d), as the tokenizer gave them, NOT standardised; tokens = views*h*w, camera-major.
        state: (frames, S) robot state at the last raw frame of each latent, or None.
        actions: (frames-1, a, C): the a = frames_per_latent actions executed after the last raw frame of latent k and
            up to the last raw frame of latent k+1, or None.
        latent_actions: (frames-1, d_l) latent actions, as their tokenizer gave them, or None.
        augmentation: see `EpisodeInfo`.
    """

    key: str
    episode_index: int
    offset: int
    task: str
    latents: Float[np.ndarray, "frames tokens d"]
    state: Float[np.ndarray, "_ s"] | None = None
    actions: Float[np.ndarray, "_ a c"] | None = None
    latent_actions: Float[np.ndarray, "_ l"] | None = None
    augmentation: int = 0

    @property
    def info(self) -> EpisodeInfo:
        """The episode without its arrays."""
        frames = len(self.latents)
        return EpisodeInfo(self.key, self.episode_index, self.offset, self.task, frames, self.augmentation)

    def __post_init__(self) -> None:
        if not self.key or "." in self.key or "/" in self.key:
            raise UserError(f"an episode's key must be non-empty, without '.' and '/'; got {self.key!r}")
        if self.latents.ndim != 3 or not self.latents.shape[0]:
            raise UserError(f"{self.key}: expected latents (frames, tokens, d), got {self.latents.shape}")
        frames = self.latents.shape[0]
        for name, length, ndim in (
            ("state", frames, 2),
            ("actions", frames - 1, 3),
            ("latent_actions", frames - 1, 2),
        ):
            array = getattr(self, name)
            if array is not None and (array.ndim != ndim or array.shape[0] != length):
                raise UserError(
                    f"{self.key}: {frames} latent frames need {name} with {ndim} axes, the first of {length}; "
                    f"got shape {array.shape}"
                )


@dataclass(frozen=True, eq=False)
class Standardizer:
    """z = (x - mean) / std along the last axis, and back: the scale in which every model meets latents.

    Attributes:
        mean, std: (d,) numpy arrays, for numpy arrays; or tensors, see `like`.
        floor: the least standard deviation that is divided by, for channels that never move.
    """

    mean: Any
    std: Any
    floor: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "std", self.std.clip(self.floor))

    def __call__(self, raw: Any) -> Any:
        """From raw latents to standardised ones, (..., d)."""
        return (raw - self.mean) / self.std

    def inverse(self, z: Any) -> Any:
        """From standardised latents to raw ones, (..., d)."""
        return z * self.std + self.mean

    def like(self, tensor: Any) -> Standardizer:
        """The same for tensors of the type and on the device of this one. (Data sets are read without torch.)"""
        return Standardizer(tensor.new_tensor(self.mean), tensor.new_tensor(self.std), self.floor)


@dataclass(frozen=True, eq=False)
class LatentMeta:
    """What a folder of latent shards holds and which tokenizer made it.

    Attributes:
        tokenizer_digest: `RepViTok.digest()` of the tokenizer the latents come from.
        frame_rate_hz: frames per second of the source video, before `stride`.
        stride: every stride-th source frame was encoded.
        grid: (views, h, w): tokens per latent frame = views * h * w.
        cameras: the source's camera keys, in token order.
        latent_dim: channels of a latent.
        window: latent frames the encoding stream attended over, its own included; None: the whole prefix.
        source: name of the data set the latents were made from.
        action_names, state_names: channel names, empty without actions or state.
        mean, std: (d,) of the latents over all episodes, tokens and frames; 0 and 1 until measured.
        lat_digest: digest of the latent action tokenizer, once latent actions are there.
        latent_action_mean, latent_action_std: (d_l,) of the latent actions, or None.
        latent_action_frames: latent frames from the beginning to the end of what a latent action stands for.
        tubelet_frames: encoded frames per latent but the first, f of the tokenizer. 4 in shards of version 0.1.
        instruction_source: where the episodes' instructions come from, see `InstructionSource`. Shards of version 0.1
            took them from the episode's `tasks`.
        depth_range: (MIN, MAX) of the depth maps among the cameras, which became black and white; None: there were none
            to read. Who opens the source again for these latents opens it with this range.
    """

    tokenizer_digest: str
    frame_rate_hz: float | int
    stride: int
    grid: tuple[int, int, int]
    cameras: tuple[str, ...]
    latent_dim: int
    window: int | None
    source: str
    action_names: tuple[str, ...] = ()
    state_names: tuple[str, ...] = ()
    mean: Float[np.ndarray, " d"] = None  # type: ignore[assignment]  # None becomes zeros below
    std: Float[np.ndarray, " d"] = None  # type: ignore[assignment]  # None becomes ones below
    lat_digest: str | None = None
    latent_action_mean: Float[np.ndarray, " l"] | None = None
    latent_action_std: Float[np.ndarray, " l"] | None = None
    tubelet_frames: int = 4
    instruction_source: InstructionSource = "tasks"
    depth_range: tuple[float, float] | None = None
    latent_action_frames: int = 1

    def __post_init__(self) -> None:
        for name in ("cameras", "action_names", "state_names"):
            object.__setattr__(self, name, tuple(str(value) for value in getattr(self, name)))
        object.__setattr__(self, "grid", tuple(int(n) for n in self.grid))
        object.__setattr__(self, "depth_range", checked_range(self.depth_range))
        if not 1 <= self.latent_dim <= MAX_TOKENS:
            raise UserError(f"latent_dim: expected 1 to {MAX_TOKENS} channels, got {self.latent_dim}")
        for name in ("stride", "window", "tubelet_frames", "latent_action_frames"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_TOKENS:
                raise UserError(f"{name}: expected 1 to {MAX_TOKENS} frames, got {value}")
        if not (math.isfinite(self.frame_rate_hz) and self.frame_rate_hz > 0):
            raise UserError(f"frame_rate_hz: expected a number above 0, got {self.frame_rate_hz}")
        for name, default in (("mean", np.zeros), ("std", np.ones)):
            value = getattr(self, name)
            value = default(self.latent_dim) if value is None else value
            object.__setattr__(self, name, np.asarray(value, dtype=np.float32))
            if getattr(self, name).shape != (self.latent_dim,):
                raise UserError(f"{name} must have shape ({self.latent_dim},), got {getattr(self, name).shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise UserError(f"mean and std: expected finite numbers, std above 0; the smallest std is {self.std.min()}")
        for name in ("latent_action_mean", "latent_action_std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
        if len(self.grid) != 3 or min(self.grid) < 1 or self.grid[0] != len(self.cameras):
            raise UserError(f"grid must be (views, h, w) with one view per camera of {self.cameras}, got {self.grid}")
        if self.instruction_source not in get_args(InstructionSource):
            raise UserError(
                f"instruction_source: expected one of {get_args(InstructionSource)}, got {self.instruction_source!r}"
            )
        if self.tokens > MAX_TOKENS:
            raise UserError(f"grid: expected at most {MAX_TOKENS} tokens, got {self.grid}")

    @property
    def standardizer(self) -> Standardizer:
        """From these latents to mean 0 and standard deviation 1, and back; of numpy arrays."""
        return Standardizer(self.mean, self.std)

    @property
    def frames_per_latent(self) -> int:
        """Raw frames from the last one of a latent to the last one of the next: tubelet_frames * stride."""
        return self.tubelet_frames * self.stride

    @property
    def tokens(self) -> int:
        """Tokens per latent frame over all cameras."""
        views, height, width = self.grid
        return views * height * width

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; floats keep float32's exact value."""
        return {
            field.name: value.tolist() if isinstance(value, np.ndarray) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "latent meta") -> LatentMeta:
        """The inverse of `to_dict`; strict about keys and types. `source` is what an error calls it."""
        document = parse(values, _MetaDocument, source, required=_OF_VERSION_1)
        plain: dict[str, Any] = {name: value for name, value in vars(document).items() if name not in _ARRAYS}
        found = {name: getattr(document, name) for name in _ARRAYS}
        arrays: dict[str, Any] = {
            name: np.array(numbers, np.float32) for name, numbers in found.items() if numbers is not None
        }
        for names, expected in ((_ARRAYS[:2], document.latent_dim), (_ARRAYS[2:], len(found[_ARRAYS[2]] or ()))):
            for name in names:
                if name in arrays and len(arrays[name]) != expected:
                    raise UserError(f"{source}: {name}: expected {expected} numbers, got {len(arrays[name])}")
        try:
            return cls(**plain, **arrays)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


_MetaDocument: Any = dataclasses.make_dataclass(
    "_MetaDocument",
    [
        (field.name, list[float] | None if field.name in _ARRAYS else hint, dataclasses.field(default=field.default))
        for field in dataclasses.fields(LatentMeta)
        for hint in [get_type_hints(LatentMeta, include_extras=True)[field.name]]
    ],
)
"""`LatentMeta` as JSON has it: lists in place of arrays."""


@dataclass(frozen=True)
class _Sums:
    count: Count
    sum: list[float]
    sum_of_squares: list[From0]

    def __post_init__(self) -> None:
        if len(self.sum) != len(self.sum_of_squares):
            raise UserError(f"{len(self.sum)} sums, but {len(self.sum_of_squares)} sums of squares")


class ChannelStatistics:
    """Mean and standard deviation per channel of a stream of arrays, accumulated in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = np.zeros(())
        self._sum_of_squares = np.zeros(())

    def add(self, values: Float[np.ndarray, "*axes d"]) -> None:
        """Counts every vector along the last axis."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        self.count += len(flat)
        self._sum = self._sum + flat.sum(0)
        self._sum_of_squares = self._sum_of_squares + np.square(flat).sum(0)

    def merge(self, other: ChannelStatistics) -> None:
        """Counts what `other` has counted."""
        self.count += other.count
        self._sum = self._sum + other._sum
        self._sum_of_squares = self._sum_of_squares + other._sum_of_squares

    def to_dict(self) -> dict[str, Any]:
        """The sums as JSON types; float64's exact value."""
        return {"count": self.count, "sum": self._sum.tolist(), "sum_of_squares": self._sum_of_squares.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "statistics") -> ChannelStatistics:
        """The inverse of `to_dict`; `source` is what an error calls it."""
        sums = parse(dict(values), _Sums, source)
        statistics = cls()
        statistics.count = sums.count
        statistics._sum = np.array(sums.sum, dtype=np.float64)
        statistics._sum_of_squares = np.array(sums.sum_of_squares, dtype=np.float64)
        return statistics

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std), both (d,) float32; std at least 1e-6, so that dividing by it is safe."""
        if not self.count:
            raise UserError("no values were counted: there is nothing to take a mean of")
        mean = self._sum / self.count
        variance = np.maximum(self._sum_of_squares / self.count - np.square(mean), 0.0)
        return mean.astype(np.float32), np.maximum(np.sqrt(variance), 1e-6).astype(np.float32)


class ChannelRange:
    """Least and greatest value per channel of a stream of arrays."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._least, self._greatest = np.full(len(names), np.inf), np.full(len(names), -np.inf)

    def add(self, values: Float[np.ndarray, "*axes c"] | None) -> None:
        """Counts every vector along the last axis; None and arrays without one count nothing."""
        if values is not None and values.size:
            flat = values.reshape(-1, values.shape[-1])
            self._least = np.minimum(self._least, flat.min(0))
            self._greatest = np.maximum(self._greatest, flat.max(0))

    def constant(self) -> list[str]:
        """The channels that never moved, of those that were seen."""
        return [name for name, one in zip(self.names, self._least == self._greatest, strict=True) if one]
