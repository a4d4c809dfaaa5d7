"""What a trained LAPA quantiser says of transitions: its codes as features, and where in the frame they act."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from latent_action.baselines.frame_pairs import FrameTable
from latent_action.baselines.lapa import LapaQuantizer

# A change of a patch by this much (root mean square, pixels in [-1, 1]) is drawn at full heat where nothing in the
# frame changes more.
HEAT_FLOOR = 0.05
_BATCH = 256


@torch.no_grad()
def lapa_features(
    lapa: LapaQuantizer, table: FrameTable, *, quantised: bool = True
) -> Float[Tensor, "transitions features"]:
    """The latent action of every transition: its codebook vectors one after another, (code_tokens * code_dim).

    With `quantised` false, the vectors before quantisation, which hold more than LAPA's own latent actions do.
    """
    pieces = []
    for index in torch.arange(len(table)).split(_BATCH):
        pair = table.pairs(index)
        codes = lapa.latent_actions(*pair)[0] if quantised else lapa.encode(*pair)
        pieces.append(rearrange(codes, "b places d -> b (places d)"))
    return torch.cat(pieces)


@torch.no_grad()
def lapa_acting_map(
    lapa: LapaQuantizer, x_t: Float[Tensor, "3 h w"], x_next: Float[Tensor, "3 h w"]
) -> Float[np.ndarray, "rows columns"]:
    """How strongly LAPA's latent action changes each patch, in [0, 1].

    The change is the root mean square over a patch's pixels of D(x_t, l_t) - D(x_t, l_0), where l_0 are the codes of
    (x_t, x_t), nothing happening; divided by its maximum, or by `HEAT_FLOOR` where that is larger.
    """
    one, other = lapa.latent_actions(torch.stack([x_t, x_t]), torch.stack([x_next, x_t]))[0]
    moved, kept = lapa.decode(torch.stack([x_t, x_t]), torch.stack([one, other]))
    side = lapa.config.patch
    change = rearrange((moved - kept).square(), "c (h p) (w q) -> h w (c p q)", p=side, q=side).mean(-1).sqrt()
    return (change / change.max().clamp(min=HEAT_FLOOR)).float().cpu().numpy()
