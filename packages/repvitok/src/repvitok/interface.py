"""What data sets and policies need of a video tokenizer: RepViTok has it, and so have the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

Window = int | None | Literal["config"]


@runtime_checkable
class TokenizerShape(Protocol):
    """Sizes that a tokenizer's config tells: see `RepViTokConfig`."""

    @property
    def patch_size(self) -> int: ...
    @property
    def tubelet_frames(self) -> int: ...
    @property
    def latent_dim(self) -> int: ...
    @property
    def episode_window(self) -> int | None: ...


@runtime_checkable
class StreamMemory(Protocol):
    """All that a stream remembers, its two halves apart; None before the first frame, and the first latent."""

    @property
    def encoder(self) -> Any: ...
    @property
    def decoder(self) -> Any: ...


@runtime_checkable
class VideoStream(Protocol):
    """A video as it happens: see `TokenizerStream`.

    `state` is replaced at every call and never changed in place: one that was kept can be put back.
    """

    batch_size: int
    state: Any  # a StreamMemory; each stream takes its own kind only

    def reset(self) -> None: ...
    def select(self, rows: list[int]) -> None: ...
    def encode(self, frames: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor: ...


@runtime_checkable
class VideoTokenizer(Protocol):
    """Video (b, 3, T, H, W) to latents (b, frames, tokens, d) and back, whole or as a stream: see `RepViTok`."""

    @property
    def config(self) -> TokenizerShape: ...

    def grid(self, height: int, width: int) -> tuple[int, int]: ...
    def encode(self, video: Tensor, window: Window = "config") -> Tensor: ...
    def decode(self, z: Tensor, size: tuple[int, int], window: Window = "config") -> Tensor: ...
    def stream(self, batch_size: int = 1, window: Window = "config") -> VideoStream: ...
    def digest(self) -> str: ...
    def write_into(self, folder: Path) -> None: ...
    def to(self, device: str) -> Any: ...
    def parameters(self) -> Iterator[Any]: ...
