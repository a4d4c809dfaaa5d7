"""Who may attend to whom: one predicate, and the interface of the attention that follows it.

`visible` is the only definition. The dense mask, the blocks of visible pairs, FlexAttention's mask and the cached
rollout are all read off it, and tests hold them equal.
"""

from __future__ import annotations

from typing import Protocol, no_type_check, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from repwam_core.model.sequence import PADDING, Modality, TokenFields, TokenLayout


@runtime_checkable
class AttentionFn(Protocol):
    """Self-attention of one layer, given to the model as an argument: masked for training, cached for a rollout.

    One that takes another number of tokens than the layout has says so by `length`; zeros fill the rest.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (b, heads, n, c) for queries, keys and values of the layout's `streams` order."""
        ...


@no_type_check  # FlexAttention traces it, and checks of types at run time cannot be traced
def visible(query: TokenFields, key: TokenFields, coupling: str, window: int) -> Bool[Tensor, " *pairs"]:
    """Whether each query token may attend to each key token (docs/decisions/000, entries 2, 3 and 6).

    Only tokens of one document see each other, and nobody sees the future:

    - every token sees the clean tokens of earlier chunks, back to `window` frames before its chunk's first frame;
    - `joint`: a clean token also sees the clean tokens of its chunk, a noisy token the noisy ones of its chunk;
    - `sequential`: a noisy token sees the noisy tokens of its chunk and modality; a noisy action also the clean video
      of its chunk. So that this video tells an action nothing about itself, a clean video token sees of its own chunk
      only the clean video; clean actions and states see all clean tokens of their chunk.

    Args:
        query, key: fields that broadcast against each other, e.g. (n, 1) against (1, m).
        coupling: "joint" or "sequential".
        window: frames of history.
    """
    video = Modality.VIDEO
    same = (query.document == key.document) & (query.document != PADDING)
    history = ~key.noisy & (key.chunk < query.chunk) & (key.frame >= query.chunk_start - window)
    own_clean, own_noisy = ~query.noisy & ~key.noisy, query.noisy & key.noisy
    if coupling == "sequential":
        to_video = key.modality == video
        own_noisy = own_noisy & (query.modality == key.modality)
        inverse_dynamics = query.noisy & (query.modality == Modality.ACTION) & ~key.noisy & to_video
        own_clean = (own_clean & ((query.modality != video) | to_video)) | inverse_dynamics
    own = (key.chunk == query.chunk) & (own_clean | own_noisy)
    return same & (history | own)


def pairs(query: TokenFields, key: TokenFields, coupling: str, window: int) -> Bool[Tensor, "n m"]:
    """`visible` as a matrix: n query tokens against m key tokens."""
    rows = TokenFields(*(values[:, None] for values in query))
    columns = TokenFields(*(values[None, :] for values in key))
    return visible(rows, columns, coupling, window)


def alike(query: TokenFields, coupling: str) -> bool:
    """Whether `visible` lets all query tokens see the same: what it reads of them is the same."""
    read = [query.document, query.chunk, query.chunk_start, query.noisy]
    read += [query.modality] if coupling == "sequential" else []
    return all(bool((values == values[0]).all()) for values in read)


def dense_mask(layout: TokenLayout, coupling: str, window: int) -> Bool[Tensor, "n n"]:
    """Every token of a layout against every other: the oracle, and the mask of short sequences on a GPU."""
    return pairs(layout.fields, layout.fields, coupling, window)
