"""RepViTok: a causal video autoencoder whose latents are few, ordered in time, and meant to carry meaning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repvitok.config import RepViTokConfig
from repvitok.interface import VideoTokenizer, Window, num_latent_frames, require_latents, require_video, token_grid
from repvitok.nn.attention import Kernel, visible_frames
from repvitok.nn.codec import CodecState, Decoder, Encoder, init_transformer
from repvitok.runtime.documents import load_json
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import PretrainedModel, drawn_once, hub_id, installed_folder

_CHANNELS = 3


def encode_flops(config: RepViTokConfig, frames: int, size: tuple[int, int]) -> int:
    """Operations of `encode` on one clip of `frames` x `size`: two per multiplication of a matrix product.

    Norms, rotations and softmax are left out (under 2 % at the paper's size). A training step costs about three times
    the sum of both directions, four with recomputed activations.
    """
    latent_frames, tokens, pairs = _tokens_and_pairs(config, frames, size)
    width, n = config.width, latent_frames * tokens
    attention = 4 * n * width * width + 2 * pairs * width
    projection = 3 * n * width * width + 2 * pairs * width + 2 * n * width * config.latent_dim
    blocks = config.depth * (attention + 2 * n * width * config.mlp_width)
    return 2 * (_patch_products(config, latent_frames, tokens) + blocks + projection)


def decode_flops(config: RepViTokConfig, frames: int, size: tuple[int, int]) -> int:
    """Operations of `decode` to one clip of `frames` x `size`; see `encode_flops`."""
    latent_frames, tokens, pairs = _tokens_and_pairs(config, frames, size)
    width, n = config.width, latent_frames * tokens
    attention = 4 * n * width * width + 2 * pairs * width
    blocks = config.depth * (attention + 2 * n * width * config.mlp_width)
    return 2 * (n * config.latent_dim * width + blocks + _patch_products(config, latent_frames, tokens))


def _tokens_and_pairs(config: RepViTokConfig, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """Latent frames, tokens in each, and pairs of a query and a key it sees."""
    latent_frames = num_latent_frames(frames, config.tubelet_frames)
    rows, columns = token_grid(*size, config.patch_size)
    seen = sum(len(visible_frames(frame, config.window)) for frame in range(latent_frames))
    return latent_frames, rows * columns, seen * (rows * columns) ** 2


def _patch_products(config: RepViTokConfig, latent_frames: int, tokens: int) -> int:
    """Multiplications between pixels and tokens."""
    pixels = _CHANNELS * config.patch_size**2
    return tokens * config.width * (pixels + (latent_frames - 1) * pixels * config.tubelet_frames)


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
    grows; rotary positions are formed in float64, so that they do not wear out (`repvitok.nn.attention`). Runs
    without gradients.

    Attributes:
        batch_size: streams side by side; they advance together.
        window: latent frames a token sees, its own included; None is the whole prefix.
        state: the stream's memory.
    """

    def __init__(
        self,
        encoder: Any,  # an `Encoder`, or what has its `step`
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

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b frames tokens d"]:
        """The latents of the next frames.

        Args:
            frames: pixels in [-1, 1]; T = 1 + f n at the beginning, f n afterwards; H and W stay what they
                were.
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
        """
        state = self.state.decoder
        if size is None:
            known = self.state.decoder or self.state.encoder
            if known is None:
                raise UserError("decode needs size=(H, W) on a stream that has not seen a frame yet")
            size = known.grid[0] * self._config.patch_size, known.grid[1] * self._config.patch_size
        grid = require_latents(latents, size, self._config)
        self._require_continuation(latents.shape[0], grid, state)
        frames, state = self._decoder.step(latents, grid, self.window, state)
        self.state = replace(self.state, decoder=state)
        return frames

    def _require_continuation(self, batch_size: int, grid: tuple[int, int], state: CodecState | None) -> None:
        if batch_size != self.batch_size:
            raise UserError(f"this stream has batch size {self.batch_size}, got {batch_size}; open another for it")
        if state is not None and grid != state.grid:
            p = self._config.patch_size
            raise UserError(
                f"this stream began with frames of {state.grid[0] * p}x{state.grid[1] * p}, got {grid[0] * p}x"
                f"{grid[1] * p}; reset() it to begin a clip of another size"
            )


class RepViTok(PretrainedModel):
    """The visual tokenizer of RepWAM (Sec. 3.2): video to semantic latents, and back to pixels.

    The first frame is cut into p x p patches, later ones into f x p x p tubelets (p = 16, f = 4 by default);
    encoder and decoder are transformers whose attention is full within a latent frame and causal across
    frames, so that a latent depends only on frames up to its own and T = 1 (an image) is a clip like any
    other. Positions are rotary, so that one model takes any number of frames and any picture size.

    Attributes:
        config: the architecture.
        gradient_checkpointing: recompute activations in the backward pass of `encode` and `decode`: less
            memory for a third more compute. A matter of training, hence neither in the config nor saved.
        compile_blocks: compile the layers of `encode` and `decode` with torch.compile, one graph for all blocks; None
            is on a GPU, for clips of more than 128 tokens (docs/decisions/068). As little in the config.
        attention_kernel: of compiled blocks, "flex" for FlexAttention or "frames" for a call per latent frame.
    """

    format = "repvitok"
    config_class = RepViTokConfig

    @drawn_once
    def __init__(self, config: RepViTokConfig | None = None, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config: RepViTokConfig = config or RepViTokConfig()
        self.encoder: Any = Encoder(self.config) if encoder is None else encoder
        self.decoder = Decoder(self.config)
        self.gradient_checkpointing = False
        self.compile_blocks: bool | None = None
        self.attention_kernel: Kernel = "flex"

    def draw(self) -> None:
        """Give every parameter its initial value."""
        init_transformer(self.encoder, self.config.depth)
        init_transformer(self.decoder, self.config.depth)

    def num_latent_frames(self, frames: int) -> int:
        """Latent frames T' = 1 + (T - 1) / f of T raw frames; ValueError unless T = 1 + f n."""
        return num_latent_frames(frames, self.config.tubelet_frames)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a picture; ValueError unless both are multiples of the patch size."""
        return token_grid(height, width, self.config.patch_size)

    def encode(
        self, video: Float[Tensor, "b 3 T H W"], window: Window = "config"
    ) -> Float[Tensor, "b frames tokens d"]:
        """Latents z of a clip.

        Args:
            video: pixels in [-1, 1], T = 1 + f n, H and W multiples of the patch size.
            window: latent frames a token attends back over, its own included; None is the whole prefix;
                "config" is the config's.

        Returns:
            (b, T', tokens, d), each latent with mean 0 and standard deviation 1 over its channels; tokens by row, then
            column.
        """
        require_video(video, self.config)
        return self.encoder(video, self._window(window), **self._way())

    def decode(
        self, z: Float[Tensor, "b frames tokens d"], size: tuple[int, int], window: Window = "config"
    ) -> Float[Tensor, "b 3 T H W"]:
        """Pixels of latents.

        Args:
            z: latents as `encode` gives them.
            size: (H, W) of the frames.
            window: as for `encode`.

        Returns:
            (b, 3, T, H, W) with T = 1 + f (frames - 1), meant to lie in [-1, 1] and not clamped to it.
        """
        grid = require_latents(z, size, self.config)
        return self.decoder(z, grid, self._window(window), **self._way())

    def forward(
        self, video: Float[Tensor, "b 3 T H W"]
    ) -> tuple[Float[Tensor, "b 3 T H W"], Float[Tensor, "b frames tokens d"]]:
        """The reconstruction of a clip, and its latents."""
        z = self.encode(video)
        return self.decode(z, (video.shape[3], video.shape[4])), z

    def stream(self, batch_size: int = 1, window: Window = "config") -> TokenizerStream:
        """A stream: frames in as they come, latents out, and the reverse; equal to `encode` and `decode`.

        Args:
            batch_size: streams side by side.
            window: as for `encode`; `config.episode_window` is the one for episodes longer than the training
                clips.
        """
        return TokenizerStream(
            self.encoder, self.decoder, self.config, batch_size=batch_size, window=self._window(window)
        )

    def _way(self) -> dict[str, Any]:
        """How whole clips are computed."""
        return {
            "checkpointing": self.gradient_checkpointing,
            "compiled": self.compile_blocks,
            "kernel": self.attention_kernel,
        }

    def _window(self, window: Window) -> int | None:
        if window == "config":
            return self.config.window
        if window is not None and window < 1:
            raise UserError(f"window must be at least 1 latent frame, None or 'config', got {window}")
        return window


def load_tokenizer(source: str | Path) -> VideoTokenizer:
    """A tokenizer by folder, installed name or hub id: RepViTok, or the baseline that the folder's config.json names.

    A folder that holds a whole Wan pipeline is known by its subfolder "vae"; a hub id, by an owner "Wan-AI".
    """
    folder, wan_on_hub = installed_folder(source) or Path(source), (hub_id(source) or "").startswith("Wan-AI/")
    configs = [load_json(path) for path in (folder / "config.json", folder / "vae/config.json") if path.is_file()]
    of_diffusers = [config.get("_class_name") for config in configs if isinstance(config, dict)]
    if wan_on_hub or any(of_diffusers):
        from repvitok.baselines.wan import WAN_CLASS, WanVae

        if wan_on_hub or WAN_CLASS in of_diffusers:
            return WanVae.from_pretrained(source)
    if any(config.get("format") == "feature_tokenizer" for config in configs if isinstance(config, dict)):
        from repvitok.baselines.features import FeatureTokenizer

        return FeatureTokenizer.from_pretrained(source)
    return RepViTok.from_pretrained(source)
