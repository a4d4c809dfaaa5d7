"""Parameters that are spread over ranks: the part that lies here, and Muon's iteration shared out among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from repvitok.errors import UserError


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: a view of it, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Overwrite a parameter with a tensor that every rank holds whole; each keeps its own part of it."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        spread = DTensor.from_local(whole.to(local(target).device), mesh, [Replicate()] * mesh.ndim, run_check=False)
        whole = spread.redistribute(placements=target.placements).to_local()
    local(target).copy_(whole)


def row_group(parameter: DTensor) -> dist.ProcessGroup:
    """The ranks over which the rows of a parameter are spread, as FSDP2 and HSDP spread them.

    Raises:
        ValueError: the parameter is spread in another way.
    """
    sharded = [(axis, place) for axis, place in enumerate(parameter.placements) if not place.is_replicate()]
    if len(sharded) != 1 or not sharded[0][1].is_shard(0):
        raise UserError(f"expected a parameter sharded by its rows over one mesh axis, got {parameter.placements}")
    return parameter.device_mesh.get_group(sharded[0][0])


@torch.no_grad()
def orthogonalize_rows(
    shards: Sequence[Float[Tensor, "_ cols"]],
    rows: int,
    group: dist.ProcessGroup,
    orthogonalize: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> list[Float[Tensor, "_ cols"]]:
    """Orthogonalise equally shaped matrices whose rows are spread over the ranks of a group.

    Rank r gathers every r-th part of the matrices whole, orthogonalises these alone, and scatters their rows again: two
    exchanges of one matrix's size per matrix, and no work is done twice.

    Args:
        shards: this rank's rows of each matrix, in the order that all ranks share.
        rows: rows of a whole matrix; as torch.chunk gives them out, ceil(rows / ranks) each and fewer to the last.
        group: the ranks.
        orthogonalize: what to do with a batch of whole matrices.
        dtype: what is sent; the result has the shards' own type.
    """
    ranks, cols = dist.get_world_size(group), shards[0].shape[1]
    per_rank, each = -(-rows // ranks), -(-len(shards) // ranks)
    sent = shards[0].new_zeros((ranks * each, per_rank, cols), dtype=dtype)
    for number, shard in enumerate(shards):
        sent[number, : len(shard)] = shard
    whole = rearrange(_exchange(sent, group), "(w k) r c -> k (w r) c", w=ranks)
    whole[:, :rows] = orthogonalize(whole[:, :rows]).to(dtype)
    back = _exchange(rearrange(whole, "k (w r) c -> (w k) r c", w=ranks).contiguous(), group)
    return [back[number, : len(shard)].to(shard.dtype) for number, shard in enumerate(shards)]


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part i of the leading axis goes to rank i; what comes back is in the order of the ranks it came from."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
