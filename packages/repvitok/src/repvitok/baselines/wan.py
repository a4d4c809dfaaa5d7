"""Other people's video tokenizers behind RepViTok's interface: the VAE of Wan2.2, by diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repvitok.interface import Window, num_latent_frames, require_latents, require_video, token_grid
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import HUB, asks_hub, first_not_finite, hub_id

WAN_CLASS = "AutoencoderKLWan"
WAN22 = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""Wan2.2's configuration (705 M parameters) for random weights; trained ones bring their own latents_mean and _std."""


@dataclass(frozen=True)
class WanShape:
    """Sizes of a Wan VAE, in the words of `RepViTokConfig`.

    Attributes:
        patch_size: pixels per latent, along height and width.
        tubelet_frames: raw frames per latent frame but the first.
        latent_dim: channels of a latent.
        episode_window: None: a latent depends on the whole past, through the convolutions' memory.
    """

    patch_size: int
    tubelet_frames: int
    latent_dim: int
    episode_window: int | None = None


class WanVae(nn.Module):
    """The VAE of Wan2.2 as a tokenizer: video to 48 channels per 4x16x16 tubelet, and back.

    Latents are the posterior's mean, standardised by the checkpoint's latents_mean and latents_std, as Wan's own
    diffusion models see them. `window` arguments are taken and must be None or "config": a causal convolution has no
    window to choose.

    Attributes:
        vae: diffusers' `AutoencoderKLWan`.
        config: its sizes.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae
        config: Any = vae.config
        patch = config.patch_size or 1
        spatial = patch * 2 ** (len(config.dim_mult) - 1)
        self.config = WanShape(spatial, 2 ** sum(config.temperal_downsample), config.z_dim)
        if self.config.tubelet_frames != 4:
            raise UserError(f"expected a Wan VAE with 4 frames per latent, got {self.config.tubelet_frames}")
        for name in ("latents_mean", "latents_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float32), persistent=False)

    @classmethod
    def from_config(cls, changes: Mapping[str, Any] | None = None) -> WanVae:
        """Random weights in the configuration of Wan2.2, with some of its fields changed: for costs and tests."""
        return cls(_diffusers().AutoencoderKLWan(**(WAN22 | dict(changes or {})))).eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> WanVae:
        """A VAE in diffusers' layout, in evaluation mode, in float32.

        Args:
            source: a folder with config.json and safetensors weights, or one with a subfolder "vae", or the hub id of
                either, such as "hf://Wan-AI/Wan2.2-TI2V-5B-Diffusers".
            revision: branch, tag or commit on the hub.

        Raises:
            ValueError: diffusers is not installed.
            FileNotFoundError: neither a folder nor obtainable from the hub.
        """
        model = _diffusers().AutoencoderKLWan
        name = hub_id(source)
        if name is None and not Path(source).is_dir():
            raise FileNotFoundError(
                f"{source} does not exist; expected a folder, or a model of the hub, {HUB}owner/name"
            )
        top_level = (Path(source) / "config.json").is_file()
        options = {
            "use_safetensors": True,
            "torch_dtype": torch.float32,
            "low_cpu_mem_usage": False,
            "local_files_only": not asks_hub(source),
        }
        try:
            vae = model.from_pretrained(
                name or str(source), subfolder=None if top_level else "vae", revision=revision, **options
            )
        except OSError as error:
            raise FileNotFoundError(
                f"{source}: no Wan VAE here, nor in the hub's cache ({str(error).splitlines()[0]}); {HUB}owner/name "
                "asks the hub"
            ) from error
        if (bad := first_not_finite(vae.state_dict())) is not None:
            raise UserError(f"{source}: weight {bad} is not finite; the file is damaged")
        return cls(vae).eval()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of latents of a picture; ValueError unless both sides are multiples of the patch size."""
        return token_grid(height, width, self.config.patch_size)

    def encode(
        self, video: Float[Tensor, "b 3 T H W"], window: Window = "config"
    ) -> Float[Tensor, "b frames tokens d"]:
        """Latents of a clip: pixels in [-1, 1], T = 1 + 4n, H and W multiples of the patch size."""
        num_latent_frames(video.shape[2], self.config.tubelet_frames)
        return self.stream(video.shape[0], window).encode(video)

    def decode(
        self, z: Float[Tensor, "b frames tokens d"], size: tuple[int, int], window: Window = "config"
    ) -> Float[Tensor, "b 3 T H W"]:
        """Pixels of latents, clamped to [-1, 1]; size is (H, W)."""
        return self.stream(z.shape[0], window).decode(z, size)

    def stream(self, batch_size: int = 1, window: Window = "config") -> WanStream:
        """A stream; with bounded memory, for the convolutions look back over a few frames only."""
        if window not in (None, "config"):
            raise UserError(f"a Wan VAE has no attention window to set: expected None, got {window}")
        return WanStream(self, batch_size)

    def write_into(self, folder: Path) -> None:
        """Write config.json and weights, in diffusers' layout, into a folder that nobody reads yet."""
        self.vae.save_pretrained(str(folder), safe_serialization=True)

    def digest(self) -> str:
        """sha256 (hex) over its configuration and weights; see `PretrainedModel.digest`."""
        config = {key: value for key, value in dict(self.vae.config).items() if not key.startswith("_")}
        sha = hashlib.sha256(json.dumps({"class": WAN_CLASS, "config": config}, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            flat = tensor.detach().cpu().contiguous()
            sha.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
            sha.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True)
class WanState:
    """All that a Wan stream remembers; replaced at every call and never changed in place.

    Attributes:
        encoder, decoder: what each causal convolution keeps of its last input; None before the first call.
        size: (H, W) of the pictures; None until it is known.
    """

    encoder: tuple[Any, ...] | None = None
    decoder: tuple[Any, ...] | None = None
    size: tuple[int, int] | None = None


class WanStream:
    """Frames in, latents out, and the reverse; equal to the whole clip. As `TokenizerStream`, without gradients.

    The memory of a causal convolution is its last input frames; diffusers keeps one slot per convolution in a list
    whose entries the encoder or decoder replaces while it runs. Here a copy of that list is the stream's state.

    Attributes:
        batch_size: streams side by side; they advance together.
        state: the stream's memory.
    """

    def __init__(self, tokenizer: WanVae, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self._tokenizer, self.batch_size = tokenizer, batch_size
        self.state = WanState()

    def reset(self) -> None:
        """Begin a new clip."""
        self.state = WanState()

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b frames tokens d"]:
        """The latents of the next frames: 1 + 4n of them at the beginning, 4n afterwards."""
        tokenizer, vae, begins = self._tokenizer, self._tokenizer.vae, self.state.encoder is None
        require_video(frames, tokenizer.config, begins=begins)
        self._require_continuation(frames.shape[0], (frames.shape[-2], frames.shape[-1]))
        slots = _slots(vae.encoder) if self.state.encoder is None else list(self.state.encoder)
        patch, first = vae.config.patch_size or 1, int(begins)  # the first frame goes alone
        x = rearrange(frames, "b c t (h p) (w q) -> b (c q p) t h w", p=patch, q=patch)
        pieces = [x[:, :, :1]] if begins else []
        if x.shape[2] > first:
            pieces += x[:, :, first:].split(tokenizer.config.tubelet_frames, dim=2)
        moments = torch.cat([vae.encoder(piece, feat_cache=slots, feat_idx=[0]) for piece in pieces], dim=2)
        mean = rearrange(vae.quant_conv(moments).chunk(2, dim=1)[0], "b d t h w -> b t (h w) d")
        self.state = replace(self.state, encoder=tuple(slots), size=(frames.shape[-2], frames.shape[-1]))
        return (mean - tokenizer.latents_mean) / tokenizer.latents_std

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "b frames tokens d"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b 3 T H W"]:
        """The frames of the next latents; size = (H, W) is needed on a stream that has not seen a frame yet."""
        tokenizer, vae, begins = self._tokenizer, self._tokenizer.vae, self.state.decoder is None
        size = size or self.state.size
        if size is None:
            raise UserError("decode needs size=(H, W) on a stream that has not seen a frame yet")
        rows, _ = require_latents(latents, size, tokenizer.config)
        self._require_continuation(latents.shape[0], size)
        slots = _slots(vae.decoder) if self.state.decoder is None else list(self.state.decoder)
        z = latents * tokenizer.latents_std + tokenizer.latents_mean
        x = vae.post_quant_conv(rearrange(z, "b t (h w) d -> b d t h w", h=rows))
        parts = [
            vae.decoder(frame, feat_cache=slots, feat_idx=[0], first_chunk=begins and number == 0)
            for number, frame in enumerate(x.split(1, dim=2))
        ]
        self.state = replace(self.state, decoder=tuple(slots), size=size)
        patch = vae.config.patch_size or 1
        video = torch.cat(parts, dim=2)
        return rearrange(video, "b (c q p) t h w -> b c t (h p) (w q)", p=patch, q=patch).clamp(-1.0, 1.0)

    def _require_continuation(self, batch_size: int, size: tuple[int, int]) -> None:
        if batch_size != self.batch_size:
            raise UserError(f"this stream has batch size {self.batch_size}, got {batch_size}; open another for it")
        if self.state.size not in (None, size):
            began, came = ("{}x{}".format(*sides) for sides in (self.state.size, size))
            raise UserError(
                f"this stream began with frames of {began}, got {came}; reset() it to begin a clip of another size"
            )


def _slots(module: nn.Module) -> list[Any]:
    """An empty memory: one slot per causal convolution, of which diffusers' encoder and decoder use the first ones."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(layer, WanCausalConv3d) for layer in module.modules())


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError("Wan's VAE needs the package diffusers: pip install 'repvitok[baselines]'") from error
    return diffusers
