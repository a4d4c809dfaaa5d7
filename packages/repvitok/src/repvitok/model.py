"""RepViTok: a causal video autoencoder whose latents are few, ordered in time, and meant to carry meaning."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from repvitok.config import RepViTokConfig
from repvitok.documents import load_json
from repvitok.errors import UserError
from repvitok.interface import (
    VideoTokenizer,
    Window,
    num_latent_frames,
    require_latents,
    require_video,
    token_grid,
)
from repvitok.nn.attention import Kernel
from repvitok.nn.blocks import init_transformer
from repvitok.nn.codec import Decoder, Encoder
from repvitok.pretrained import PretrainedModel, drawn_once, hub_id
from repvitok.streaming import TokenizerStream


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
        attention_kernel: "frames", or "flex" for FlexAttention on a GPU: the same numbers (docs/decisions/010).
            Neither in the config nor saved.
    """

    format = "repvitok"
    config_class = RepViTokConfig

    @drawn_once
    def __init__(self, config: RepViTokConfig | None = None) -> None:
        super().__init__()
        self.config: RepViTokConfig = config or RepViTokConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.gradient_checkpointing = False
        self.attention_kernel: Kernel = "frames"

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
            (b, T', tokens, d), each latent with mean 0 and deviation 1 over its channels; tokens by row, then
            column.

        Raises:
            ValueError: T, H or W does not fit; says what would.
        """
        require_video(video, self.config)
        return self.encoder(
            video, self._window(window), checkpointing=self.gradient_checkpointing, kernel=self.attention_kernel
        )

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

        Raises:
            ValueError: the latents do not fit the model or the size.
        """
        grid = require_latents(z, size, self.config)
        return self.decoder(
            z, grid, self._window(window), checkpointing=self.gradient_checkpointing, kernel=self.attention_kernel
        )

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

    def _window(self, window: Window) -> int | None:
        if window == "config":
            return self.config.window
        if window is not None and window < 1:
            raise UserError(f"window must be at least 1 latent frame, None or 'config', got {window}")
        return window


def load_tokenizer(source: str | Path) -> VideoTokenizer:
    """A tokenizer by folder or hub id: RepViTok, or Wan's VAE where the folder's config.json names its class.

    A folder that holds a whole Wan pipeline is known by its subfolder "vae"; a hub id, by an owner "Wan-AI".

    Raises:
        FileNotFoundError, ValueError: as `RepViTok.from_pretrained` and `WanVae.from_pretrained`.
    """
    folder, wan_on_hub = Path(source), (hub_id(source) or "").startswith("Wan-AI/")
    configs = [load_json(path) for path in (folder / "config.json", folder / "vae/config.json") if path.is_file()]
    of_diffusers = [config.get("_class_name") for config in configs if isinstance(config, dict)]
    if wan_on_hub or any(of_diffusers):
        from repvitok.baselines import WAN_CLASS, WanVae

        if wan_on_hub or WAN_CLASS in of_diffusers:
            return WanVae.from_pretrained(source)
    return RepViTok.from_pretrained(source)
