"""What encoding and decoding data sets need of a video tokenizer: RepViTok has it, and so have the baselines."""

from __future__ import annotations

from collections.abc import Iterator
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
class VideoStream(Protocol):
    """A video as it happens: see `TokenizerStream`."""

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
    def parameters(self) -> Iterator[Any]: ...
