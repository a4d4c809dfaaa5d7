"""What a run reports beside its losses: how far sampled chunks are from the recorded ones, and what its steps cost.

Each chunk is planned after a true prefix. The cost is tokens per second, share of the peak, memory, packing waste and
waiting for data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, distributed

from repwam_core.data.batches import PackedBatch, SegmentBatch
from repwam_core.model.config import LATENT_SPACE
from repwam_core.model.wam import WorldActionModel
from repwam_core.sampling import SamplingConfig
from repwam_core.statistics import THRESHOLDS, Statistics, count_below
from repwam_core.training.losses import equal_chunks, from_chunk_starts

if TYPE_CHECKING:
    from repwam_core.estimate import DocumentCosts

DocumentKind = tuple[int, int, bool]
"""Tokens of a latent frame, action vectors of a transition, whether there are states."""


def sample_segments(
    wam: WorldActionModel,
    batch: SegmentBatch,
    plan: SamplingConfig,
    *,
    space: str,
    grid: tuple[int, int, int],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b transitions a c"], Float[Tensor, "b transitions tokens d"] | None]:
    """Plan every chunk of the segments after the true frames and actions before it (open loop).

    Returns:
        Actions and imagined latents (None where the video is skipped), scaled as the batch is; actions that are learned
        from the state are measured from that before their chunk.
    """
    from repwam_core.model.rollout import Rollout  # in validation alone: a step of training loads no rollout

    batch = from_chunk_starts(batch, equal_chunks(batch.valid.shape[1], plan.chunk_frames))
    rollout = Rollout.from_settings(wam, plan, space=space, grid=grid, text=batch.text, text_mask=batch.text_mask)
    transitions, first, chunks = batch.valid.shape[1], 0, []
    seen = batch.latents if batch.history is None else batch.history
    rollout.observe(seen[:, :1], None if batch.state is None else batch.state[:, :1])
    while first < transitions:
        last = min(first + plan.chunk_frames, transitions)
        chunks.append(rollout.plan_chunk(plan, frames=last - first, generator=generator))
        states = None if batch.state is None else batch.state[:, first + 1 : last + 1]
        rollout.observe(seen[:, first + 1 : last + 1], states, batch.actions[:, first:last])
        first = last
    imagined = [chunk.latents for chunk in chunks if chunk.latents is not None]
    actions = torch.cat([chunk.actions for chunk in chunks], dim=1)
    return actions, torch.cat(imagined, dim=1) if imagined else None


class SampledErrors:
    """Errors of sampled segments, summed over batches of held-out data.

    Args:
        statistics: scaling of the actions.
        channels: names of the batches' action channels, in order.
        space: the action space; latent actions have no unit and are reported as they are scaled.
        plan: how to sample.
    """

    def __init__(self, statistics: Statistics, channels: Sequence[str], space: str, plan: SamplingConfig) -> None:
        self.statistics, self.recorded = statistics.actions.widened(channels), statistics.targets.widened(channels)
        self.space, self.plan = space, plan
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def update(self, wam: WorldActionModel, batch: SegmentBatch, grid: tuple[int, int, int], seed: int) -> None:
        """Sample a batch with noise that `seed` fixes, and add its errors."""
        generator = torch.Generator().manual_seed(seed)
        batch = from_chunk_starts(batch, equal_chunks(batch.valid.shape[1], self.plan.chunk_frames))  # what is compared
        actions, latents = sample_segments(wam, batch, self.plan, space=self.space, grid=grid, generator=generator)
        weight = batch.valid[..., None, None] & batch.channel_mask[:, None, None]
        self._add("action_mae", (actions - batch.actions).abs(), weight)
        self._add("action_mae_of_zero", batch.actions.abs(), weight)
        errors = (actions - batch.actions).detach().cpu().numpy()
        if self.space != LATENT_SPACE:
            error_si = self.statistics.unscaled(errors)
            for channel, name in enumerate(self.statistics.channels):
                self._add(f"{name}_mae_si", torch.from_numpy(error_si[..., channel]).abs(), weight[..., channel])
            errors = self.recorded.scaled(error_si)
        errors = errors * batch.channel_mask[:, None, None].cpu().numpy()
        below, of = count_below(errors, batch.valid.cpu().numpy(), THRESHOLDS)
        for threshold, hits in below.items():
            name = f"ols_{threshold:g}"
            self._sums[name] = self._sums.get(name, 0.0) + hits
            self._counts[name] = self._counts.get(name, 0.0) + of
        if latents is not None:
            valid = batch.valid[..., None, None]
            self._add("imagined_mse", (latents - batch.latents[:, 1:]).square(), valid)
            self._add("copied_mse", (batch.latents[:, :-1] - batch.latents[:, 1:]).square(), valid)

    def compute(self) -> dict[str, float]:
        """Return means over what all ranks sampled, each of which must call this.

        `action_mae` in scaled units beside predicting zero, each channel in its own unit, `ols_0.1` and so on the
        open-loop score (`statistics.HEADLINE`: largest error over the channels, per action vector, in the scale of the
        recorded actions, as `repwam openloop` counts it, also where changes from the state are learned), and the mean
        squared error of imagined latents beside repeating the last true ones.
        """
        ranks = [{name: (self._sums[name], self._counts[name]) for name in self._sums}]
        if distributed.is_available() and distributed.is_initialized():
            ranks = [{} for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(ranks, {name: (self._sums[name], self._counts[name]) for name in self._sums})
        names = {name: None for rank in ranks for name in rank}  # in order; a rank without batches has none
        totals = {name: np.sum([rank.get(name, (0.0, 0.0)) for rank in ranks], axis=0) for name in names}
        return {name: float(total / max(1.0, count)) for name, (total, count) in totals.items()}

    def _add(self, name: str, values: Tensor, weight: Tensor) -> None:
        weight = weight.to(values.device).expand_as(values)
        self._sums[name] = self._sums.get(name, 0.0) + float((values * weight).sum())
        self._counts[name] = self._counts.get(name, 0.0) + float(weight.sum())


class StepBanner(L.Callback):
    """Logs the cost of packed training steps, every `log_every_n_steps` steps.

    `cost/tokens_per_s` over all ranks; `cost/mfu` where the device's peak is known, with recomputation counted once;
    `cost/memory_gib` at most so far, on a GPU; `cost/waste`, the share of the token budget that holds no token;
    `cost/data_wait` and `cost/optimizer`, the shares of time spent on getting batches, and on clipping gradients,
    stepping and averaging weights.
    """

    def __init__(self) -> None:
        self._start_s = self._waited_s = 0.0
        self._optimizer: list[list[Any]] = []  # when each step of the optimizer began and ended
        self._tokens = self._budget = self._flops = 0.0
        self._known: dict[DocumentKind, tuple[DocumentCosts, DocumentCosts]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Start the clock."""
        self._restart(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:  # noqa: ARG002
        """The backward pass is over."""
        self._optimizer.append([_now(trainer.strategy.root_device)])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, _outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step; report and begin anew when it is time."""
        if self._optimizer and len(self._optimizer[-1]) == 1:
            self._optimizer[-1].append(_now(trainer.strategy.root_device))
        if not isinstance(batch, PackedBatch):
            self._optimizer = []
            return
        self._tokens += batch.tokens
        self._budget += batch.token_budget
        self._flops += batch_flops(pl_module, batch, self._known)
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self.report(trainer))
            self._restart(trainer)

    def report(self, trainer: L.Trainer) -> dict[str, float]:
        """The costs since the last report."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        spent_s = max(time.perf_counter() - self._start_s, 1e-9)
        in_optimizer_s = sum(
            begin.elapsed_time(end) / 1000 if isinstance(begin, torch.cuda.Event) else end - begin
            for begin, end in self._optimizer
        )
        rows = {
            "cost/tokens_per_s": trainer.world_size * self._tokens / spent_s,
            "cost/waste": 1 - self._tokens / self._budget,
            "cost/data_wait": (_waited_s(trainer) - self._waited_s) / spent_s,
            "cost/optimizer": in_optimizer_s / spent_s,
        }
        if trainer.strategy.root_device.type == "cuda":
            from repwam_core.estimate import peak_flops

            rows["cost/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if (peak := peak_flops(torch.cuda.get_device_name())) is not None:
                rows["cost/mfu"] = self._flops / spent_s / peak
        return rows

    def _restart(self, trainer: L.Trainer) -> None:
        self._start_s, self._waited_s = time.perf_counter(), _waited_s(trainer)
        self._tokens = self._budget = self._flops = 0.0
        self._optimizer = []


def _now(device: torch.device) -> Any:
    """A moment of a device's work: on a GPU an event in its stream, which nothing waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _waited_s(trainer: L.Trainer) -> float:
    """Seconds that the loader has spent on handing out batches."""
    loader = trainer.train_dataloader
    return getattr(loader, "waited_s", 0.0)  # only loaders that read ahead count it


def batch_flops(
    training: Any, batch: PackedBatch, known: dict[DocumentKind, tuple[DocumentCosts, DocumentCosts]]
) -> int:
    """FLOPs of a step on one packed sequence, forward and backward; recomputation does not count.

    `known` holds the costs of the kinds of documents that came before, and takes those of new kinds: with one text
    token and with two. Each further one costs the same, so that instructions of another length need no other model.
    """
    from repwam_core.estimate import DocumentCosts, SequenceCost  # of packed steps alone

    config, sequence, documents = training.wam.config, SequenceCost(), batch.documents
    vectors, text = 0 if config.joint_actions else documents.actions.shape[2], documents.text.shape[2]
    state = config.has_state(training.space) and documents.state is not None
    for tokens, transitions in zip(documents.frame_tokens.tolist(), documents.transitions, strict=True):
        kind = (tokens, vectors, state)
        if kind not in known:
            one, two = (DocumentCosts(config, training.space, *kind[:2], state=state, text=n) for n in (1, 2))
            known[kind] = one, two
        chunks = equal_chunks(transitions, training.chunk_size(batch))
        one, two = (costs.of(chunks) for costs in known[kind])
        sequence += one + (two + one * -1) * (text - 1)
    return sequence.training_flops
