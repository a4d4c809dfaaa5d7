"""Encoding and decoding chunk by chunk: equal to the whole clip at once, with the state held in the open."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from repvitok.config import RepViTokConfig
from repvitok.errors import UserError
from repvitok.interface import require_latents, require_video
from repvitok.nn.codec import CodecState, Decoder, Encoder


@dataclass(frozen=True)
class StreamState:
    """All that a stream remembers: the encoder's and the decoder's position and cached keys and values.

    It is replaced at every call and never changed in place, so a state that was kept can be put back later
    (`stream.state = kept`) to branch or to rewind.
    """

    encoder: CodecState | None = None
    decoder: CodecState | None = None


class TokenizerStream:
    """A video as it happens: frames in, new latents out; latents in, new frames out.

    The first call begins the clip and takes 1 + f n frames (f frames per tubelet, n >= 0); each later call
    takes f n (n >= 1). The results equal those of `encode` and `decode` on the whole clip with the same
    window. With a bounded window, time and memory per new latent frame stay constant however long the stream
    grows; rotary positions are formed in float64, so that they do not wear out (`repvitok.nn.rope`). Runs
    without gradients.

    Attributes:
        batch_size: streams side by side; they advance together.
        window: latent frames a token sees, its own included; None is the whole prefix.
        state: the stream's memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        config: RepViTokConfig,
        *,
        batch_size: int,
        window: int | None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self._encoder, self._decoder, self._config = encoder, decoder, config
        self.batch_size = batch_size
        self.window = window
        self.state = StreamState()

    def reset(self) -> None:
        """Begin a new clip."""
        self.state = StreamState()

    def select(self, rows: list[int]) -> None:
        """Go on with some of the streams only, in the order of `rows`: the others have ended.

        Raises:
            ValueError: `rows` is empty or names a stream that is not there.
        """
        if not rows or not all(0 <= row < self.batch_size for row in rows):
            raise UserError(f"rows must name some of the streams 0 to {self.batch_size - 1}, got {rows}")
        halves = (self.state.encoder, self.state.decoder)
        self.state = StreamState(*(half if half is None else half.select(rows) for half in halves))
        self.batch_size = len(rows)

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b frames tokens d"]:
        """The latents of the next frames.

        Args:
            frames: pixels in [-1, 1]; T = 1 + f n at the beginning, f n afterwards; H and W stay what they
                were.

        Raises:
            ValueError: another batch size, frame count or picture size.
        """
        state = self.state.encoder
        grid = require_video(frames, self._config, begins=state is None)
        self._require_continuation(frames.shape[0], grid, state)
        latents, state = self._encoder.step(frames, self.window, state)
        self.state = replace(self.state, encoder=state)
        return latents

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "b frames tokens d"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b 3 T H W"]:
        """The frames of the next latents: 1 + f (frames - 1) of them at the beginning, f * frames afterwards.

        Args:
            latents: as `encode` gave them.
            size: (H, W); needed at the beginning, unless this stream has encoded frames of that size before.

        Raises:
            ValueError: another batch size or grid, or the size is not known.
        """
        state = self.state.decoder
        grid = require_latents(latents, size or self._known_size(), self._config)
        self._require_continuation(latents.shape[0], grid, state)
        frames, state = self._decoder.step(latents, grid, self.window, state)
        self.state = replace(self.state, decoder=state)
        return frames

    def _known_size(self) -> tuple[int, int]:
        known = self.state.decoder or self.state.encoder
        if known is None:
            raise UserError("decode needs size=(H, W) on a stream that has not seen a frame yet")
        return known.grid[0] * self._config.patch_size, known.grid[1] * self._config.patch_size

    def _require_continuation(self, batch_size: int, grid: tuple[int, int], state: CodecState | None) -> None:
        if batch_size != self.batch_size:
            raise UserError(f"this stream has batch size {self.batch_size}, got {batch_size}; open another for it")
        if state is not None and grid != state.grid:
            p = self._config.patch_size
            raise UserError(
                f"this stream began with frames of {state.grid[0] * p}x{state.grid[1] * p}, got {grid[0] * p}x"
                f"{grid[1] * p}; reset() it to begin a clip of another size"
            )
