"""Vector quantisation by noise substitution, which gives the codebook and the encoder a gradient (NSVQ)."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


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
