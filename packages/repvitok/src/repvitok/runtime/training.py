"""What all trainers share: optimizers and their schedule, averaged weights, numbers that are finite, loaders.

AdamW, or Muon for hidden matrices and AdamW for the rest, also over several ranks.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from repvitok.runtime.documents import Above0, Count, Decay, From0, Share, check_fields
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import first_not_finite

OptimizerName = Literal["adamw", "muon"]
NewtonSchulzDtype = Literal["bfloat16", "float32", "float64"]

# The quintic a x + b x^3 + c x^5 with the steepest slope at 0 that still keeps singular values in about [0.5, 1.5].
QUINTIC = (3.4445, -4.7750, 2.0315)

# Steps of the Gram iteration between two looks at the whole matrix: what rounding makes of the smallest singular values
# grows by up to a^2 = 12 with each; after three it is still no larger than in the plain iteration (docs/decisions/064).
GRAM_STEPS = 3
Item = TypeVar("Item")
ENDLESS = 2**62  # the length of what has no end; a float holds it exactly
Batch = Callable[[], str]
"""Says which data a step was on; called for a step that went wrong, and only then."""


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
    """The ranks over which the rows of a parameter are spread, as FSDP2 and HSDP spread them."""
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


@torch.no_grad()
def orthogonalize(
    matrix: Float[Tensor, "*batch rows cols"], steps: int = 5, dtype: torch.dtype = torch.bfloat16, gram: bool = False
) -> Float[Tensor, "*batch rows cols"]:
    """Returns U S' V^T for a matrix U S V^T, with S' near one, by the Newton-Schulz iteration (Muon).

    Each step is X <- a X + (b A + c A^2) X with A = X X^T, after scaling X to Frobenius norm one. For m x n matrices,
    m <= n, five steps are 20 m^2 n + 10 m^3 FLOPs; with `gram`, 8 m^2 n + 28 m^3: from n = 1.5 m on it is less, and at
    n = 5 m, a feed-forward layer, 68 in place of 110.

    Args:
        matrix: one matrix, or a batch of equally shaped ones.
        steps: number of iterations.
        dtype: type the iteration computes in. bfloat16 is Muon's own and the fastest on a GPU; float32 is several
            times faster than bfloat16 on a CPU without bf16 units (docs/decisions/003).
        gram: iterate on the m x m matrix A where that is less work; equal but for rounding.

    Returns:
        The orthogonalised matrix in `dtype`.
    """
    a, b, c = QUINTIC
    x = matrix.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    with torch.autocast(x.device.type, enabled=False):
        if gram and x.size(-1) > 1.5 * x.size(-2):
            for first in range(0, steps, GRAM_STEPS):
                x = _polynomial(x @ x.mT, min(GRAM_STEPS, steps - first)) @ x
        else:
            for _ in range(steps):
                product = x @ x.mT
                x = a * x + (b * product + c * product @ product) @ x
    return x.mT if tall else x


def _polynomial(product: Float[Tensor, "*batch m m"], steps: int) -> Float[Tensor, "*batch m m"]:
    """What `steps` steps multiply X by, from the left, as a function of A = X X^T alone.

    A step multiplies by P = a I + b A + c A^2, and X X^T is then P A P, since P is symmetric.
    """
    a, b, c = QUINTIC
    whole = None
    for step in range(steps):
        factor = b * product + c * product @ product
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor if whole is None else factor @ whole
        if step < steps - 1:
            product = factor @ product @ factor
    assert whole is not None
    return whole


def parameter_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Splits trainable parameters into (hidden matrices, other matrices, vectors).

    A hidden matrix is the weight of an `nn.Linear` inside an `nn.ModuleList`, a stack of blocks: what Muon is made for.
    Weights of linear layers outside of any stack are embeddings, projections between spaces or heads; with embedding
    tables and convolutions they are the second list. All else (norms, biases, gains and other bare parameters, whatever
    their shape) is the third, and never decays.

    Args:
        module: the module whose parameters are split.

    Returns:
        Three disjoint lists that together hold every trainable parameter once.
    """
    stacks = [f"{name}." if name else "" for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    linear = _weights_of(module, (nn.Linear,))
    matrix = linear | _weights_of(module, (nn.Embedding, nn.modules.conv._ConvNd))
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        stacked = id(parameter) in linear and any(name.startswith(stack) for stack in stacks)
        if parameter.ndim == 2 and stacked:
            hidden.append(parameter)
        else:
            (matrices if id(parameter) in matrix else vectors).append(parameter)
    return hidden, matrices, vectors


def _weights_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    """The modules' own weights. One that is computed, as under `spectral_norm`, is no parameter and is not looked at:
    in training mode every look moves its power iteration on, and a resumed run would go another way."""
    weights = (dict(c.named_parameters(recurse=False)).get("weight") for c in module.modules() if isinstance(c, kinds))
    return {id(weight) for weight in weights if weight is not None}


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the groups marked `kind="muon"`, AdamW on those marked `kind="adamw"`: one optimizer, one state dict.

    Muon: m <- beta m + (1 - beta) g;  u = orthogonalize(g + beta (m - g));
    w <- (1 - lr decay) w - lr sqrt(max(1, rows / cols)) u   (docs/decisions/000, entry 8).

    Parameters may be sharded by rows (FSDP2's DTensor): all is done on this rank's part, but for `orthogonalize`, for
    which the ranks exchange rows (`sharded.orthogonalize_rows`, docs/decisions/032).
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """Takes groups with `params`, `kind`, `lr`, `weight_decay`; `momentum`, `dtype`, `gram`, or `betas`, `eps`."""
        super().__init__(list(groups), {})
        for group in self.param_groups:
            if group["kind"] not in ("muon", "adamw"):
                raise UserError(f'expected a group of kind "muon" or "adamw", got {group["kind"]!r}')
            wrong = [tuple(p.shape) for p in group["params"] if group["kind"] == "muon" and p.ndim != 2]
            if wrong:
                raise UserError(f"Muon takes 2-D parameters, got shape {wrong[0]}: put it in an adamw group")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._step_muon if group["kind"] == "muon" else self._step_adamw)(group, parameters)
        return loss

    def create_states(self) -> None:
        """Makes every parameter's moments, at zero, as the first step would: what a sharded checkpoint is read into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                (self._momentum if group["kind"] == "muon" else self._adamw_state)(parameter)

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for (rows, cols), same in by_shape.items():
            weights = [local(p) for p in same]
            grads = [local(p.grad) for p in same if p.grad is not None]
            moments = [local(self._momentum(p)) for p in same]
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            nesterov = list(torch._foreach_lerp(grads, moments, group["momentum"]))
            updates = _orthogonalized(nesterov, same[0], getattr(torch, group["dtype"]), group.get("gram", False))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            scale = group["lr"] * math.sqrt(max(1.0, rows / cols))
            torch._foreach_add_(weights, updates, alpha=-scale)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._adamw_state(p) for p in parameters]
        on_cpu = all(p.device.type == "cpu" and p.is_floating_point() for p in parameters)
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            foreach=not on_cpu,
            fused=on_cpu,  # one pass over memory: half the time of the loop over tensors
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adamw_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _orthogonalized(matrices: list[Tensor], like: Tensor, dtype: torch.dtype, gram: bool) -> list[Tensor]:
    """The matrices orthogonalised; they are this rank's rows of whole ones where the parameter `like` is sharded.

    In bfloat16 on one device the iteration is muon-optimizer's (extra `train`), which knows neither other types nor
    shards. Without that package it is ours, the same bits (docs/decisions/064).
    """
    if dtype == torch.bfloat16 and not gram and not isinstance(like, DTensor):
        try:
            from muon import zeropower_via_newtonschulz5
        except ImportError:
            pass  # not installed, or another package of that name
        else:
            with torch.autocast(like.device.type, enabled=False):
                return list(zeropower_via_newtonschulz5(torch.stack(matrices), steps=5).to(like.dtype).unbind())

    def iterate(batch: Tensor) -> Tensor:
        return orthogonalize(batch, dtype=dtype, gram=gram)

    if isinstance(like, DTensor):
        sent = torch.bfloat16 if dtype == torch.bfloat16 else matrices[0].dtype
        return orthogonalize_rows(matrices, like.shape[0], row_group(like), iterate, sent)
    return list(iterate(torch.stack(matrices)).to(like.dtype).unbind())


def build_optimizer(
    module: nn.Module,
    name: OptimizerName = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    muon_momentum: float = 0.95,
    adamw_lr: float | None = None,
    newton_schulz_dtype: NewtonSchulzDtype = "bfloat16",
    newton_schulz_gram: bool = False,
) -> MuonAdamW:
    """Builds the optimizer of a module's trainable parameters.

    Args:
        module: the model.
        name: "adamw" for AdamW everywhere, "muon" for Muon on hidden matrices and AdamW on the rest.
        lr: peak learning rate; Muon's own when name is "muon".
        weight_decay: decoupled decay of matrices; norms and biases never decay.
        betas: AdamW's decay rates of its two moments.
        eps: AdamW's epsilon.
        muon_momentum: Muon's momentum.
        adamw_lr: peak learning rate of the AdamW groups beside Muon; `lr` when None.
        newton_schulz_dtype: type of Muon's iteration; "float32" on a CPU.
        newton_schulz_gram: iterate on the Gram matrices of rectangular ones, see `orthogonalize`.
    """
    if name not in ("adamw", "muon"):
        raise UserError(f'expected optimizer "adamw" or "muon", got {name!r}')
    if lr <= 0 or (adamw_lr is not None and adamw_lr <= 0):
        raise UserError(f"expected positive learning rates, got lr={lr}, adamw_lr={adamw_lr}")
    hidden, matrices, vectors = parameter_groups(module)
    if name == "adamw":
        hidden, matrices = [], hidden + matrices
    rest = {"kind": "adamw", "lr": adamw_lr if name == "muon" and adamw_lr else lr, "betas": betas, "eps": eps}
    groups: list[dict[str, Any]] = [
        {"params": hidden, "kind": "muon", "lr": lr, "weight_decay": weight_decay}
        | {"momentum": muon_momentum, "dtype": newton_schulz_dtype, "gram": newton_schulz_gram},
        {"params": matrices, "weight_decay": weight_decay} | rest,
        {"params": vectors, "weight_decay": 0.0} | rest,
    ]
    return MuonAdamW(group for group in groups if group["params"])


@dataclass(frozen=True)
class OptimizerSettings:
    """What a recipe says about optimisation; fields as in `build_optimizer` and `warmup_cosine`."""

    name: OptimizerName = "muon"
    lr: Above0 = 1e-2
    weight_decay: From0 = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Above0 = 1e-8
    muon_momentum: Decay = 0.95
    adamw_lr: Above0 | None = 1e-3
    newton_schulz_dtype: NewtonSchulzDtype = "bfloat16"
    newton_schulz_gram: bool = False
    warmup_steps: Count = 1000
    lr_floor: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def build(
        self, module: nn.Module, total_steps: int, slower: tuple[nn.Module, float] | None = None
    ) -> tuple[MuonAdamW, LambdaLR]:
        """The optimizer of a module's trainable parameters, and its schedule over `total_steps` steps.

        `slower` is another module whose parameters AdamW trains, too, and the share of its learning rate that they get.
        """
        of_schedule = ("warmup_steps", "lr_floor")
        optimizer = build_optimizer(module, **{k: value for k, value in vars(self).items() if k not in of_schedule})
        if slower is not None:
            lr = slower[1] * (self.adamw_lr if self.name == "muon" and self.adamw_lr else self.lr)
            plain = build_optimizer(slower[0], "adamw", lr, self.weight_decay, self.betas, self.eps)
            for group in plain.param_groups:
                optimizer.add_param_group(group)
        return optimizer, warmup_cosine_schedule(optimizer, self.warmup_steps, total_steps, self.lr_floor)


def warmup_cosine(step: int, warmup: int, total: int, floor: float = 0.0) -> float:
    """Factor on the peak learning rate: linear from 1 / warmup to 1 over `warmup` steps, then a cosine to `floor`.

    Args:
        step: steps done so far, from 0.
        warmup: length of the warmup.
        total: step at which the floor is reached; the factor stays there afterwards.
        floor: last factor, in [0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int, floor: float = 0.0) -> LambdaLR:
    """Applies `warmup_cosine` to every group of the optimizer; call `.step()` after each training step."""
    if not 0 <= floor <= 1 or warmup < 0 or total < 1:
        raise UserError(f"expected warmup >= 0, total >= 1, floor in [0, 1]; got {warmup=}, {total=}, {floor=}")
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total, floor))


class FiniteCheck:
    """What the steps since the last look computed; the look is one wait for the device, before the optimizer's step.

        losses -> note(losses, batch) -> backward -> norm = clip_gradients(...) -> check(module, norm) -> optimizer step

    With accumulated gradients several steps are noted before one check.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[dict[str, Tensor], Batch]] = []

    def note(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Keeps a step's losses, scalars on the device, until the check."""
        self._noted.append(({name: loss.detach() for name, loss in losses.items()}, batch))

    def check(self, module: Any, *norms: Tensor) -> None:
        """Stops unless all losses noted and the norms of the gradients are finite; `module` is a LightningModule.

        Where gradients are scaled (16-mixed), a norm may overflow: the scaler leaves that step out by itself.
        """
        noted, self._noted = self._noted, []
        scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
        looked_at = [loss for losses, _ in noted for loss in losses.values()] + ([] if scaled else list(norms))
        if not looked_at or bool(torch.stack([value.float() for value in looked_at]).isfinite().all()):
            return
        lengths = ", ".join(f"{norm.item():.4g}" for norm in norms)
        for losses, batch in noted:
            values = {name: loss.item() for name, loss in losses.items()}
            if not all(map(math.isfinite, values.values())):
                self._stop(module, "loss", values, lengths, batch)
        losses, batch = noted[-1]
        self._stop(module, "gradient", {name: loss.item() for name, loss in losses.items()}, lengths, batch)

    def _stop(self, module: Any, what: str, losses: dict[str, float], norms: str, batch: Batch) -> None:
        raise UserError(
            f"the {what} is not finite at step {module.global_step} (losses {losses}, gradient norm {norms}) on "
            f"{batch()}. The last checkpoint is from before: lower the learning rate, lengthen the warmup or look at "
            "these data, then resume with --ckpt_path last"
        )


def configure_optimizer(
    module: Any, settings: OptimizerSettings, trained: nn.Module, slower: tuple[nn.Module, float] | None = None
) -> dict[str, Any]:
    """What a LightningModule's `configure_optimizers` returns for one optimizer: it, and its schedule, which ends at
    the trainer's max_steps; `slower` as of `OptimizerSettings.build`.
    """
    steps = module.trainer.max_steps
    if steps < 1:
        raise UserError(f"trainer.max_steps must be set: the learning rate falls to its floor there; got {steps}")
    optimizer, schedule = settings.build(trained, steps, slower)
    every_step = {"interval": "step"} if module.automatic_optimization else {}  # else the module steps it
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **every_step}}


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | int | None) -> Tensor:
    """Scales the gradients down to a norm of at most `limit` (None or 0: as they are); returns the norm before."""
    trained = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def require_finite_weights(module: Any) -> None:
    """Stops before a checkpoint is written of weights that are no numbers: the one on disk stays. Every rank calls it.

    Every weight is read once.
    """
    named = chain(module.named_parameters(), module.named_buffers())
    bad = first_not_finite({name: local(value) for name, value in named})
    if module.trainer.strategy.reduce_boolean_decision(bad is None, all=True):
        return
    raise UserError(
        f"{bad or 'a weight of another rank'} is not finite at step {module.global_step}: this state is not saved, the "
        "last checkpoint stays. Lower the learning rate or lengthen the warmup, then resume with --ckpt_path last"
    )


class ExponentialMovingAverage:
    """Averages w_ema <- d w_ema + (1 - d) w, kept beside the module and stored with its checkpoint.

    The decay of update k (from 0) is d_k = min(decay, (1 + k) / (10 + k)), so that a short run is not dominated by its
    random start.

    Attributes:
        average: of each trained parameter, by its name.
        live: the parameters themselves while their averages are in the module; None otherwise.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        """Starts from the module's present parameters."""
        if not 0 <= decay < 1:
            raise UserError(f"expected an EMA decay in [0, 1), got {decay}")
        self.decay = decay
        self.updates = 0
        self.live: dict[str, Tensor] | None = None
        self.average: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes one step towards the module's parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        parameters = self._parameters(module)
        averages = [local(self.average[name]) for name in parameters]
        torch._foreach_lerp_(averages, [local(parameter) for parameter in parameters.values()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters with their averages."""
        for name, parameter in self._parameters(module).items():
            parameter.copy_(self.average[name])

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        """Puts the averages into the module for the length of a `with` block, then the parameters back."""
        self.swap_in(module)
        try:
            yield module
        finally:
            self.swap_out(module)

    def swap_in(self, module: nn.Module) -> None:
        """Puts the averages into the module until `swap_out`; what is trained waits in `live`."""
        self.live = {name: p.detach().clone() for name, p in self._parameters(module).items()}
        self.copy_to(module)

    @torch.no_grad()
    def swap_out(self, module: nn.Module) -> None:
        """Puts the parameters back, if the averages are in."""
        for name, value in (self.live or {}).items():
            module.get_parameter(name).copy_(value)
        self.live = None

    def to(self, device: torch.device | str) -> ExponentialMovingAverage:
        """Moves the averages to a device, in place."""
        self.average = {name: value.to(device) for name, value in self.average.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, safe to load with `weights_only=True`."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; names and shapes must be the module's."""
        for name in sorted(self.average.keys() ^ state["average"].keys()):
            raise UserError(f"EMA state and model differ at parameter {name!r}: load a checkpoint of this model")
        for name, value in state["average"].items():
            if value.shape != self.average[name].shape:
                shapes = f"{tuple(self.average[name].shape)} in the model, {tuple(value.shape)} in the EMA state"
                raise UserError(f"parameter {name!r} has shape {shapes}: load a checkpoint of this model")
            self.average[name].copy_(value)
        self.updates = int(state["updates"])

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters() if name in self.average}


class EndlessLoader(ABC, Generic[Item]):
    """Training batches that keep their place: batch k of rank r is the same in every run.

    Each pass over them goes on after the last batch handed out: so a new epoch of Lightning's (`limit_train_batches`)
    has new batches, and a run that is resumed has those it would have had. Lightning stores `state_dict` in its
    checkpoints. It asks for no batch ahead of time, because there is a length: the place is that of the training.

    Attributes:
        position: batches handed out so far, those of earlier runs included.
    """

    def __init__(self, first: int = 0, length: int = ENDLESS) -> None:
        """Begins with batch `first`; every `length` batches end a pass."""
        self.position, self._length = first, length

    @abstractmethod
    def batches_from(self, number: int) -> Iterator[Item]:
        """Batch `number` and those after it, without end."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        end = (self.position // self._length + 1) * self._length
        for batch in islice(self.batches_from(self.position), end - self.position):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place, in plain numbers."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the last batch that was handed out."""
        self.position = int(state["position"])
