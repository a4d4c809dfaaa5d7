"""Keys and values of a rollout's history: a ring of fixed shape, and a scratch part for the chunk being planned.

Slots: [scratch: video, actions of one chunk | ring: `window + room` latent frames, each video, actions, state]. What
a slot holds is described by the same fields as a token of a layout, so `masks.visible` decides here too. Frame f
lives at ring place f mod (window + room); by the time it is overwritten no chunk's window reaches it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from repwam_core.model.config import WAMConfig
from repwam_core.model.masks import pairs
from repwam_core.model.sequence import PADDING, Modality, TokenFields, TokenLayout

KeysValues = tuple[Float[Tensor, "b heads slots c"], Float[Tensor, "b heads slots c"]]


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """Self-attention of a pass whose keys and values go into the cache and meet everything there.

    Attributes:
        layers: keys and values of each layer; written in place.
        slots: where the tokens of this pass go.
        mask: which of the slots in use each of them sees.
    """

    layers: list[KeysValues]
    slots: Int[Tensor, " n"]
    mask: Bool[Tensor, "n used"]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (b, heads, n, c) over the slots, this pass's own tokens included."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.slots, k.to(keys.dtype))
        values.index_copy_(2, self.slots, v.to(values.dtype))
        used = self.mask.shape[1]
        output = scaled_dot_product_attention(
            q.to(keys.dtype), keys[:, :, :used], values[:, :, :used], attn_mask=self.mask
        )
        return output.to(v.dtype)


class KeyValueCache:
    """The history of a batch of rollouts that proceed in step.

    Args:
        config: of the model.
        batch: rollouts.
        grid: views, rows, columns of a latent frame.
        vectors: action vectors per transition.
        room: the largest chunk, in latent frames, that will be observed or planned.
        static_shapes: always attend over all slots, the empty ones masked, so that shapes never change (CUDA graphs,
            compilation); otherwise over as many as have been used, which costs less while an episode is young.
        device, dtype: of keys and values.
    """

    def __init__(
        self,
        config: WAMConfig,
        *,
        batch: int,
        grid: tuple[int, int, int],
        vectors: int,
        room: int,
        static_shapes: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.grid, self.vectors, self.room = config, grid, vectors, room
        self.static_shapes = static_shapes
        self.capacity = config.window + room
        self.tokens = math.prod(grid)
        self.per_frame = self.tokens + vectors + 1
        self.scratch = room * (self.tokens + vectors)
        slots = self.scratch + self.capacity * self.per_frame
        shape = (batch, config.heads, slots, config.head_dim)
        self.layers: list[KeysValues] = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.depth)
        ]
        numbers = torch.zeros(slots, dtype=torch.long, device=device)
        self.fields = TokenFields(
            document=torch.full_like(numbers, PADDING),
            chunk=numbers.clone(),
            frame=numbers.clone(),
            chunk_start=numbers.clone(),
            noisy=numbers.bool(),
            modality=numbers.clone(),
        )
        self._used = self.scratch

    def attend_history(self, layout: TokenLayout) -> CachedAttention:
        """Attention for a clean chunk that becomes history."""
        place = self.scratch + layout.frame % self.capacity * self.per_frame
        self._forget(layout)
        frames = min(int(layout.frame.max()) + 1, self.capacity)
        self._used = max(self._used, self.scratch + frames * self.per_frame)
        side = torch.where(layout.modality == Modality.STATE, self.vectors, layout.vector) + self.tokens
        return self._attend(layout, place + torch.where(layout.modality == Modality.VIDEO, self._cell(layout), side))

    def attend_scratch(self, layout: TokenLayout) -> CachedAttention:
        """Attention for tokens of the chunk being planned; they are visible until the scratch part is cleared."""
        number = layout.frame - layout.chunk_start
        video = number * self.tokens + self._cell(layout)
        action = self.room * self.tokens + number * self.vectors + layout.vector
        return self._attend(layout, torch.where(layout.modality == Modality.VIDEO, video, action))

    def clear_scratch(self) -> None:
        """Empty the scratch part."""
        self.fields.document[: self.scratch] = PADDING

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only the given rollouts of the batch."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]

    def _cell(self, layout: TokenLayout) -> Tensor:
        """Number of a video token within its frame; camera-major."""
        _, rows, columns = self.grid
        return (layout.view * rows + layout.row) * columns + layout.col

    def _forget(self, layout: TokenLayout) -> None:
        """Empty the places of the layout's frames, whatever they held: a frame may now have fewer tokens."""
        ring = self.fields.document[self.scratch :].view(self.capacity, self.per_frame)
        ring[layout.frame % self.capacity] = PADDING

    def _attend(self, layout: TokenLayout, slots: Tensor) -> CachedAttention:
        device = self.fields.document.device
        slots, fields = slots.to(device), TokenFields(*(values.to(device) for values in layout.fields))
        for held, new in zip(self.fields, fields, strict=True):
            held[slots] = new
        used = len(self.fields.document) if self.static_shapes else self._used
        in_use = TokenFields(*(values[:used] for values in self.fields))
        return CachedAttention(self.layers, slots, pairs(fields, in_use, self.config.coupling, self.config.window))
