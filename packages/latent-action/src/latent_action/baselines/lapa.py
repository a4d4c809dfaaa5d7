"""LAPA's latent action quantisation: a transition between two frames of pixels as a few codes (arXiv 2410.11758).

    p_t, p_{t+1} = patches;  e = temporal(spatial(p));  d = e_{t+1} - e_t;  codes = NSVQ(reduce(d))
    x_hat_{t+1} = D(attend(sg[p_t], codes, codes)),   loss |x_hat_{t+1} - x_{t+1}|^2

The frames are encoded by a transformer over space and a causal one over time; their difference is reduced to
`code_tokens` vectors, each quantised to one of `codes` vectors of a codebook, by noise substitution (NSVQ), which gives
the codebook and the encoder a gradient. The decoder lets the patches of x_t, behind a stop-gradient, attend to the
codes and predicts the pixels of x_{t+1}. Written from the paper alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.shards import LatentShards
from repvitok.data.transforms import resize_frames, to_unit
from repvitok.runtime.documents import Layers, Side, Size, check_fields, parse
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import PretrainedModel
from repvitok.runtime.training import EndlessLoader
from torch import Tensor, nn
from torch.nn import functional as F

from latent_action.config import TransitionFrames
from latent_action.dynamics import position_feature_size, position_features
from latent_action.transfer import composed_by

_FREQUENCIES = 4
# A change of a patch by this much (root mean square, pixels in [-1, 1]) is drawn at full heat where nothing in the
# frame changes more.
HEAT_FLOOR = 0.05
_BATCH = 256


class FramePair(NamedTuple):
    """Pixels in [-1, 1] at the two ends of each of b transitions."""

    x_t: Float[Tensor, "b 3 h w"]
    x_next: Float[Tensor, "b 3 h w"]


@dataclass(frozen=True, eq=False)
class FrameTable:
    """The frames of many episodes at the ends of their transitions, in the order of `load_transitions`.

    Attributes:
        frames: uint8, one episode after another; several cameras stand side by side.
        first: index into `frames` of each transition's x_t; its x_{t+1} is `transition_frames` later.
        episode: index of the episode each transition belongs to.
        transition_frames: latent frames from a transition's beginning to its end.
    """

    frames: UInt8[Tensor, "frames h w 3"]
    first: Int[Tensor, " transitions"]
    episode: Int[Tensor, " transitions"]
    transition_frames: int = 1

    def __len__(self) -> int:
        return self.first.shape[0]

    def pairs(self, index: Int[Tensor, " b"]) -> FramePair:
        """Both frames of the transitions with these indices."""
        start = self.first[index]
        return FramePair(_pixels(self.frames[start]), _pixels(self.frames[start + self.transition_frames]))

    def of_episodes(self, episodes: list[int]) -> FrameTable:
        """The transitions of these episodes only; the frames are shared."""
        return self.where(torch.isin(self.episode, torch.tensor(sorted(episodes), dtype=torch.long)))

    def where(self, keep: Bool[Tensor, " transitions"]) -> FrameTable:
        """The transitions marked true; the frames are shared."""
        return FrameTable(self.frames, self.first[keep], self.episode[keep], self.transition_frames)


def load_frame_table(
    latents: str | Path, dataset: str | Path, size: tuple[int, int], transition_frames: int = 1
) -> FrameTable:
    """Read the last raw frame of every latent frame, so that transition i of the latents is transition i here.

    Args:
        latents: folder of latent shards; says which episodes, offsets, stride, cameras and depth range.
        dataset: the LeRobot data set they were made from.
        size: height and width of a frame with all its cameras side by side, in pixels.
        transition_frames: latent frames from a transition's beginning to its end.
    """
    shards = LatentShards(latents)
    reader = LeRobotReader(dataset, depth_range=shards.meta.depth_range)
    cameras = shards.meta.cameras
    if missing := sorted(set(cameras) - set(reader.camera_keys)):
        raise UserError(f"{dataset} has no cameras {missing}, which {latents} were made from: give that data set.")
    if size[1] % len(cameras):
        raise UserError(f"size {size}: {len(cameras)} cameras side by side need a width that they divide.")
    view = (size[0], size[1] // len(cameras))
    frames: list[np.ndarray] = []
    first: list[Tensor] = []
    episode_of: list[Tensor] = []
    start = 0
    for episode in shards:
        count = len(episode.latents)
        if count <= transition_frames:
            continue
        wanted = (episode.offset + shards.meta.frames_per_latent * np.arange(count)).tolist()
        views = [resize_frames(reader.frames(episode.episode_index, camera, wanted), view) for camera in cameras]
        frames.append(np.concatenate(views, axis=2))
        first.append(torch.arange(start, start + count - transition_frames))
        episode_of.append(torch.full((count - transition_frames,), episode.episode_index))
        start += count
    if not frames:
        raise UserError(
            f"{latents}: no episode has {transition_frames + 1} latent frames, so there is no transition to learn from."
        )
    return FrameTable(
        torch.from_numpy(np.concatenate(frames)), torch.cat(first), torch.cat(episode_of), transition_frames
    )


class PairBatches(EndlessLoader[FramePair]):
    """Batches of frame pairs: endless random ones, of (seed, number, rank) alone, or every pair once `in_order`."""

    def __init__(
        self,
        table: FrameTable,
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        *,
        in_order: bool = False,
    ) -> None:
        super().__init__(first_batch)
        self.table = table
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.in_order = in_order

    def draw(self, number: int) -> Int[Tensor, " b"]:
        """The transitions of random batch `number`, drawn with replacement: those that `TrainingBatches` draws."""
        random = np.random.default_rng([self.seed, number, self.rank])
        return torch.from_numpy(random.integers(len(self.table), size=self.batch_size))

    def batch(self, number: int) -> FramePair:
        """Random batch `number`."""
        return self.table.pairs(self.draw(number))

    def batches_from(self, number: int) -> Iterator[FramePair]:
        """Random batch `number` and those after it."""
        return map(self.batch, itertools.count(number))

    def __len__(self) -> int:
        return -(-len(self.table) // self.batch_size) if self.in_order else super().__len__()

    def __iter__(self) -> Iterator[FramePair]:
        if not self.in_order:
            return super().__iter__()
        index = torch.arange(len(self.table))
        return (self.table.pairs(index[k * self.batch_size : (k + 1) * self.batch_size]) for k in range(len(self)))


def _pixels(frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    return to_unit(rearrange(frames, "b h w rgb -> b rgb h w"))


class NoiseSubstitution(nn.Module):
    """A codebook whose quantisation error is replaced by noise of the same length in training.

        training:    x + |x - c| v / |v|,  v ~ N(0, 1),  c the nearest code
        evaluation:  c

    The noise hides which way c lies but not how far, so the loss pulls codes towards what they stand for, and no
    auxiliary loss or straight-through gradient is needed.
    """

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, dim))

    def nearest(self, x: Float[Tensor, "*batch dim"]) -> tuple[Float[Tensor, "*batch dim"], Int[Tensor, " *batch"]]:
        """The nearest code of every vector, and its index."""
        index = torch.cdist(x.detach().reshape(-1, x.shape[-1]), self.codebook.detach()).argmin(-1)
        index = index.reshape(x.shape[:-1])
        return self.codebook[index], index

    def forward(
        self, x: Float[Tensor, "*batch dim"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "*batch dim"], Int[Tensor, " *batch"]]:
        """Quantised vectors, by noise substitution in training, and the indices of their codes."""
        codes, index = self.nearest(x)
        if not self.training:
            return codes, index
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        length = (x - codes).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return x + length * noise, index

    @torch.no_grad()
    def replace_unused(self, used: Int[Tensor, " codes"], generator: torch.Generator | None = None) -> int:
        """Move codes that nothing chose beside codes in use, drawn by how often those were; returns how many.

        Args:
            used: how often each code was chosen since the last call.
            generator: of all draws.
        """
        idle = (used == 0).nonzero()[:, 0]
        if len(idle) and len(idle) < len(used):
            source = torch.multinomial(used.float(), len(idle), replacement=True, generator=generator)
            chosen, spread = self.codebook[source], self.codebook.std() * 1e-2
            noise = torch.randn(chosen.shape, generator=generator, dtype=chosen.dtype, device=chosen.device)
            self.codebook[idle] = chosen + spread * noise
        return len(idle)


def code_usage(index: Int[Tensor, "b places"], codes: int) -> Int[Tensor, " codes"]:
    """How often each code occurs."""
    return torch.bincount(rearrange(index, "b places -> (b places)"), minlength=codes)


@dataclass(frozen=True, kw_only=True)
class LapaConfig:
    """Sizes of a LAPA quantiser; the code is the paper's, 8 codes at each of 4 places, the network small.

    Attributes:
        size: height and width of a frame in pixels.
        patch: side of a square patch in pixels.
        width: width of the transformers.
        depth: layers of the spatial encoder, of the temporal encoder and of the decoder.
        heads: attention heads.
        codes: entries of the codebook.
        code_tokens: codes per transition, a square number.
        code_dim: channels of a code.
        residual: predict the change of the pixels instead of the pixels. Not the paper's; it spares a small budget
            from learning to copy.
        transition_frames: latent frames from x_t to x_{t+1}; that of the data trained on. A config with 1 is written
            without it, as before there was a choice.
    """

    size: tuple[Side, Side] = (64, 64)
    patch: Side = 8
    width: Side = 128
    depth: Layers = 2
    heads: Side = 4
    codes: Size = 8
    code_tokens: Side = 4
    code_dim: Side = 32
    residual: bool = False
    transition_frames: TransitionFrames = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if any(side % self.patch for side in self.size):
            raise UserError(f"size: expected (height, width), multiples of patch = {self.patch}, got {self.size}.")
        if self.width % self.heads:
            raise UserError(f"width = {self.width} must be a multiple of heads = {self.heads}.")
        if math.isqrt(self.code_tokens) ** 2 != self.code_tokens:
            raise UserError(f"code_tokens: expected a square number (they lie on a grid), got {self.code_tokens}.")
        if min(self.grid) < math.isqrt(self.code_tokens):
            raise UserError(f"{self.grid} patches are too few for {self.code_tokens} code tokens: lower `patch`.")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a frame, (rows, columns)."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it."""
        values = asdict(self) | {"size": list(self.size)}
        if self.transition_frames == 1:
            del values["transition_frames"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LapaConfig:
        """The inverse of `to_dict`."""
        required = [field.name for field in fields(cls) if field.name != "transition_frames"]
        parse(values, cls, cls.__name__, required=required)
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


class LapaQuantizer(PretrainedModel):
    """Encoder, codebook and decoder; frames are float pixels in [-1, 1]."""

    format: ClassVar[str] = "lapa"
    format_version: ClassVar[int] = 1
    config_class: ClassVar[type[LapaConfig]] = LapaConfig
    config: LapaConfig

    def __init__(self, config: LapaConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LapaConfig()
        pixels = 3 * config.patch**2
        self.embed = nn.Linear(pixels, config.width)
        self.place = nn.Linear(position_feature_size(_FREQUENCIES), config.width)
        self.spatial = _layers(config)
        self.temporal = _layers(config)
        self.reduce = nn.Sequential(
            nn.Conv2d(config.width, config.width, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(math.isqrt(config.code_tokens)),
            nn.Conv2d(config.width, config.code_dim, 1),
        )
        self.quantize = NoiseSubstitution(config.codes, config.code_dim)
        self.code_place = nn.Parameter(0.02 * torch.randn(config.code_tokens, config.width))
        self.enter = nn.Linear(config.code_dim, config.width)
        self.cross = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.decoder = _layers(config)
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, pixels))

    def require_transition_frames(self, expected: int) -> None:
        """Refuse to be compared with a LAT of transitions of another length."""
        if (own := self.config.transition_frames) != expected:
            raise UserError(
                f"LAPA was trained on transitions of {own} latent frames, the LAT on {expected}: train both with the "
                "same data.transition_frames"
            )

    def encode(
        self, x_t: Float[Tensor, "b 3 h w"], x_next: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b code_tokens code_dim"]:
        """The transition before quantisation, d_t."""
        self._require_frames(x_t, "x_t")
        self._require_frames(x_next, "x_next")
        seen = [_through(self.spatial, self._patches(x)) for x in (x_t, x_next)]
        in_time = rearrange(torch.stack(seen), "two b n c -> (b n) two c")
        causal = nn.Transformer.generate_square_subsequent_mask(2, device=x_t.device)
        before, after = rearrange(
            _through(self.temporal, in_time, causal), "(b n) two c -> two b n c", b=x_t.shape[0]
        ).unbind()
        rows, columns = self.config.grid
        change = rearrange(after - before, "b (h w) c -> b c h w", h=rows, w=columns)
        return rearrange(self.reduce(change), "b c h w -> b (h w) c")

    def latent_actions(
        self, x_t: Float[Tensor, "b 3 h w"], x_next: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b code_tokens code_dim"], Int[Tensor, "b code_tokens"]]:
        """The codebook vectors of a transition, what LAPA calls its latent action, and their indices."""
        return self.quantize.nearest(self.encode(x_t, x_next))

    def decode(
        self, x_t: Float[Tensor, "b 3 h w"], codes: Float[Tensor, "b code_tokens code_dim"]
    ) -> Float[Tensor, "b 3 h w"]:
        """The pixels of x_{t+1}, from the patches of x_t (without a gradient to them) and the codes."""
        patches = self._patches(x_t).detach()
        entered = self.enter(codes) + self.code_place
        mixed = patches + self.cross(patches, entered, entered, need_weights=False)[0]
        out = self.head(_through(self.decoder, mixed))
        rows, columns, side = *self.config.grid, self.config.patch
        image = rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", c=3, h=rows, w=columns, p=side, q=side)
        return x_t + image if self.config.residual else image

    def forward(
        self,
        x_t: Float[Tensor, "b 3 h w"],
        x_next: Float[Tensor, "b 3 h w"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, "b code_tokens"]]:
        """The loss |x_hat_{t+1} - x_{t+1}|^2, mean over pixels, and the codes that were used.

        In training the quantiser's noise is drawn from `generator`.
        """
        codes, index = self.quantize(self.encode(x_t, x_next), generator)
        return F.mse_loss(self.decode(x_t, codes), x_next), index

    def _patches(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n width"]:
        side = self.config.patch
        cut = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
        return self.embed(cut) + self.place(position_features((1, *self.config.grid), _FREQUENCIES, x.device))

    def _require_frames(self, x: Tensor, name: str) -> None:
        if x.shape[1:] != (3, *self.config.size) or not len(x):
            raise UserError(
                f"{name}: expected at least one frame (batch, 3, {self.config.size[0]}, {self.config.size[1]}), got "
                f"{tuple(x.shape)}: resize the frames, or train with their size."
            )


def _layers(config: LapaConfig) -> nn.ModuleList:
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        for _ in range(config.depth)
    )


def _through(layers: nn.ModuleList, x: Tensor, mask: Tensor | None = None) -> Tensor:
    for layer in layers:
        x = layer(x, src_mask=mask)
    return x


@torch.no_grad()
def lapa_features(
    lapa: LapaQuantizer, table: FrameTable, *, quantised: bool = True
) -> Float[Tensor, "transitions features"]:
    """The latent action of every transition: its codebook vectors one after another, (code_tokens * code_dim).

    With `quantised` false, the vectors before quantisation, which hold more than LAPA's own latent actions do.
    """
    return _between(lapa, table.frames, table.first, table.first + table.transition_frames, quantised=quantised)


@torch.no_grad()
def lapa_composed(
    lapa: LapaQuantizer, table: FrameTable, *, quantised: bool = True
) -> Float[Tensor, "3 triplets features"]:
    """For LAPA what `transfer.composed` is for the LAT, of all triplets of a table; values as of `lapa_features`."""
    step = table.transition_frames
    a = table.first[torch.isin(table.first + step, table.first)]
    return composed_by(partial(_between, lapa, table.frames, quantised=quantised), a, a + step, a + 2 * step)


def _between(
    lapa: LapaQuantizer,
    frames: UInt8[Tensor, "frames h w 3"],
    first: Int[Tensor, " n"],
    last: Int[Tensor, " n"],
    *,
    quantised: bool,
) -> Float[Tensor, "n features"]:
    """What LAPA reads between frames of these numbers."""
    pieces = [torch.zeros(0, lapa.config.code_tokens * lapa.config.code_dim)]
    device = lapa.code_place.device
    for one, other in zip(first.split(_BATCH), last.split(_BATCH), strict=True) if len(first) else ():
        pair = (_pixels(frames[index]).to(device) for index in (one, other))
        codes = lapa.latent_actions(*pair)[0] if quantised else lapa.encode(*pair)
        pieces.append(rearrange(codes, "b places d -> b (places d)").cpu())
    return torch.cat(pieces)


@torch.no_grad()
def lapa_action_effects(
    lapa: LapaQuantizer, x_t: Float[Tensor, "b 3 h w"], x_next: Float[Tensor, "b 3 h w"]
) -> Float[np.ndarray, "b rows columns"]:
    """How strongly LAPA's latent actions change each patch of their frames, in units of pixels.

    The change is the root mean square over a patch's pixels of D(x_t, l_t) - D(x_t, l_0), where l_0 are the codes of
    (x_t, x_t), nothing happening.
    """
    twice = torch.cat([x_t, x_t])
    moved, kept = lapa.decode(twice, lapa.latent_actions(twice, torch.cat([x_next, x_t]))[0]).chunk(2)
    side = lapa.config.patch
    change = rearrange((moved - kept).square(), "b c (h p) (w q) -> b h w (c p q)", p=side, q=side).mean(-1).sqrt()
    return change.float().cpu().numpy()
