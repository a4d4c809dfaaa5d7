"""Training of the latent action tokenizer as a LightningModule, and its checkpoint as a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from repvitok.data.latents import LatentMeta
from repvitok.data.shards import LatentShards
from repvitok.runtime.checkpointing import read_checkpoint, read_section, stored_by, with_weights
from repvitok.runtime.documents import Decay, From0, check_arguments
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import save_exported
from repvitok.runtime.progress import card_head, run_record, training_table
from repvitok.runtime.training import (
    ExponentialMovingAverage,
    FiniteCheck,
    OptimizerSettings,
    clip_gradients,
    configure_optimizer,
    require_finite_weights,
)
from torch import Tensor

from latent_action.config import LatentActionConfig
from latent_action.datamodule import TransitionBatch, which_episodes
from latent_action.dynamics import ForwardDynamics, Grid
from latent_action.model import LatentActionTokenizer, composition_error, copy_loss, transition_losses
from latent_action.transfer import composed, cycle_loss, effective_dimensions, read_again, reading_r2

DEFAULT_OPTIMIZER = OptimizerSettings(name="adamw", lr=1e-3, warmup_steps=500)
CHECKPOINT_KEY = "latent_action"


class LatentActionTraining(L.LightningModule):
    """Eq. (4)'s two losses, one for composition, and the control that shows what the latent action is worth.

    The zero-action control is a second FDM of the same size, trained on the same batches with the action held at
    zero and on the forward direction only. What the LAT's forward loss gains over the control's is the latent
    action's doing; the rest is what anybody could predict from z_t alone.

    Args:
        lat: settings of the model; the tokenizer digest and the latent statistics come from the data.
        forward_weight: weight of L_fwd.
        consistency_weight: weight of L_cons.
        composition_weight: weight of `composition_error` over triplets of frames, which is measured on held-out ones
            whatever the weight (docs/decisions/074); 0 trains as if it were not there.
        zero_action_control: train the control and log its loss.
        optimizer: of the LAT and the control; its schedule ends at the trainer's max_steps.
        gradient_clip: largest norm of the gradient, of the LAT and of the control each; null for none.
        ema_decay: validate and export an average of the weights with this decay; null for none.
    """

    def __init__(
        self,
        lat: LatentActionConfig,
        forward_weight: From0 = 1.0,
        consistency_weight: From0 = 1.0,
        zero_action_control: bool = True,
        optimizer: OptimizerSettings = DEFAULT_OPTIMIZER,
        gradient_clip: From0 | None = 1.0,
        ema_decay: Decay | None = None,
        composition_weight: From0 = 0.0,
    ) -> None:
        super().__init__()
        check_arguments(LatentActionTraining.__init__, locals())
        if forward_weight + consistency_weight == 0:
            raise UserError("forward_weight, consistency_weight: expected one of them above 0, got 0 and 0")
        self.lat = LatentActionTokenizer(lat)
        self.control = ForwardDynamics(lat) if zero_action_control else None
        self.forward_weight = forward_weight
        self.consistency_weight = consistency_weight
        self.composition_weight = composition_weight
        self.optimizer_settings = optimizer
        self.gradient_clip = gradient_clip
        self._finite = FiniteCheck()
        self.ema = None if ema_decay is None else ExponentialMovingAverage(self.lat, ema_decay)
        self.grid: Grid | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._triplets: list[Tensor] = []

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Take the grid, the statistics, the transitions' length and the tokenizer's digest from the data."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        meta: LatentMeta = data.meta
        self.grid = meta.grid
        self.lat.config = self.lat.config.fitted_to(meta, data.transition_frames)

    def training_step(self, batch: TransitionBatch) -> Tensor:
        """forward_weight * L_fwd + consistency_weight * L_cons + composition's, plus the control's own loss."""
        losses = transition_losses(self.lat, batch.z_t, batch.z_next, self.grid)
        loss = self.forward_weight * losses.forward + self.consistency_weight * losses.consistency
        found = {"forward": losses.forward, "consistency": losses.consistency}
        if self.composition_weight:
            found["composition"] = composition_loss(self.lat, batch, losses.latent_actions, self.grid)
            loss = loss + self.composition_weight * found["composition"]
        total = loss
        if self.control is not None:
            found["zero_action"] = self._control_loss(batch)
            total = loss + found["zero_action"]  # the two share no parameter, so the sum trains each on its own loss
        self.log_dict({"train/loss": loss} | {f"train/{name}_loss": value for name, value in found.items()})
        self._finite.note(found, lambda: which_episodes(self.trainer, batch[:2]))
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: callbacks that save at the end of a batch must find both done."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.lat)

    def on_fit_start(self) -> None:
        """Put the average where the weights are."""
        if self.ema is not None:
            self.ema.to(self.device)

    def validation_step(self, batch: TransitionBatch) -> None:
        """Held-out losses beside the copy baseline and the zero-action control."""
        self._evaluate(batch, "val")

    def test_step(self, batch: TransitionBatch) -> None:
        """As in validation."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Latent actions (b, d_l) of a batch, the latents (b, L, d) they lead to by Eq. 3, and the true next ones."""
        with self._averaged():
            z_t, z_next = batch[:2]
            actions = self.lat.encode(torch.stack([z_t, z_next], dim=1), self.grid)[:, 0]
            return {"actions": actions, "latents": self.lat.decode(z_t, actions, self.grid), "next_latents": z_next}

    def on_validation_epoch_end(self) -> None:
        """Log what the latent actions of all batches are like together."""
        self._log_actions("val")

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._log_actions("test")

    def configure_optimizers(self) -> Any:
        """One optimizer for the LAT and its control, and its schedule."""
        return configure_optimizer(self, self.optimizer_settings, self)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip the LAT's gradient by itself, so that the control cannot change how it trains; stop at no numbers."""
        trained = filter(None, (self.lat, self.control))
        self._finite.check(self, *[clip_gradients(module.parameters(), self.gradient_clip) for module in trained])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what makes the weights usable without this run's recipe."""
        require_finite_weights(self)
        ema = None if self.ema is None else self.ema.state_dict()
        checkpoint[CHECKPOINT_KEY] = {"config": self.lat.config.to_dict(), "ema": ema}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, other data or without the average that is asked for."""
        if CHECKPOINT_KEY not in checkpoint:
            raise UserError("this checkpoint was not written by `latent-action fit`: give that run's last.ckpt")
        stored = checkpoint[CHECKPOINT_KEY]
        self.lat.config.require_same(LatentActionConfig.from_dict(stored["config"]))
        if (stored["ema"] is None) != (self.ema is None):
            raise UserError("The checkpoint and this run differ in ema_decay: use the run's own config.yaml.")
        if self.ema is not None:
            self.ema.load_state_dict(stored["ema"])

    def _evaluate(self, batch: TransitionBatch, split: str) -> None:
        size = batch.z_t.shape[0]
        with self._averaged():
            losses = transition_losses(self.lat, batch.z_t, batch.z_next, self.grid)
            forward, backward = losses.latent_actions, losses.reversed_actions
            cycle = cycle_loss(self.lat, batch.z_t, forward, backward, self.grid)
            # Each latent action, acted out on the frame of the item half a batch away and read from there.
            stage = batch.z_t.roll(size // 2, dims=0)
            read = read_again(self.lat, stage, forward, self.grid)
            if (triplets := _triplets(batch)) is not None:
                self._triplets.append(composed(self.lat, *triplets, self.grid))
        self._seen.append((forward, read, forward.roll(size // 2, dims=0)))
        values = {
            "forward_loss": losses.forward,
            "consistency_loss": losses.consistency,
            "copy_loss": copy_loss(batch.z_t, batch.z_next),
            "cycle_loss": cycle,
        }
        if self.control is not None:
            values["zero_action_loss"] = self._control_loss(batch)
        for name, value in values.items():
            self.log(f"{split}/{name}", value, batch_size=size, sync_dist=True)

    def _control_loss(self, batch: TransitionBatch) -> Tensor:
        assert self.control is not None
        action = batch.z_t.new_zeros(batch.z_t.shape[0], self.lat.config.action_dim)
        transport, residual = self.control(batch.z_t, action, self.grid)
        return (transport.apply(batch.z_t) + residual - batch.z_next).square().mean()

    def _log_actions(self, split: str) -> None:
        given, read, own = (torch.cat(column).float() for column in zip(*self._seen, strict=True))
        self._seen = []
        triplets, self._triplets = self._triplets, []
        values = {f"action_std_{i}": float(v) for i, v in enumerate(given.std(dim=0, correction=0))}
        values["action_dimensions"] = effective_dimensions(given)
        values["transfer_r2"] = reading_r2(read, given)
        values["transfer_shuffled_r2"] = reading_r2(read, own)
        if triplets:
            whole, parts, elsewhere = torch.cat(triplets, dim=1).float()
            values["composition_error"] = float(composition_error(whole, parts))
            values["composition_shuffled_error"] = float(composition_error(whole, elsewhere))
        for name, value in values.items():
            self.log(f"{split}/{name}", value, sync_dist=True)

    def _averaged(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.ema is None else self.ema.swapped(self.lat)


def composition_loss(
    lat: LatentActionTokenizer, batch: TransitionBatch, first: Float[Tensor, "b action"], grid: Grid | None = None
) -> Float[Tensor, ""]:
    """`composition_error` of a batch's triplets, 0 where it has none; `first` are its own latent actions, l(a, b)."""
    if (triplets := _triplets(batch)) is None:
        return first.new_zeros(())
    a, b, c = triplets
    # l(b, c) and l(a, c) in one pass
    both, _ = lat.encode_both_ways(torch.cat([b, a]), torch.cat([c, c]), grid)
    second, whole = both.chunk(2)
    return composition_error(whole, first[batch.continued] + second)


def _triplets(batch: TransitionBatch) -> tuple[Tensor, Tensor, Tensor] | None:
    """The frames a, b, c of the batch's triplets, if it has two or more: one does not vary."""
    if batch.z_after is None or batch.continued is None or batch.continued.sum() < 2:
        return None
    return batch.z_t[batch.continued], batch.z_next[batch.continued], batch.z_after[batch.continued]


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, license: str | None = None, half: bool = False
) -> LatentActionTokenizer:
    """Write the LAT of a checkpoint of `latent-action fit`, its averaged weights where the run kept an average.

    `license` is that of the weights, for the model card; `half` stores them in float16.

    Returns:
        The tokenizer that `from_pretrained` gives for the folder, in evaluation mode.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is damaged or of another stage.
    """
    loaded, where = read_checkpoint(checkpoint), str(checkpoint)
    stored = stored_by("latent-action fit", CHECKPOINT_KEY, loaded, where)
    lat = LatentActionTokenizer(LatentActionConfig.from_dict(read_section(stored, where, "config")))
    lat = with_weights(lat, "lat.", loaded, stored, where)
    return save_exported(lat, out, lambda lat: model_card(lat, loaded, Path(checkpoint).parent, license), half)


def model_card(lat: LatentActionTokenizer, checkpoint: Mapping[str, Any], run: Path, license: str | None = None) -> str:
    """The README.md of an exported LAT: what it is, how to use it, which latents it is for, what its `run` reached."""
    config = lat.config
    plain = {name: value for name, value in config.to_dict().items() if not name.startswith("latent_")}
    fields = "\n".join(f"| {name} | {value} |" for name, value in plain.items())
    recorded, reached = run_record(run)
    table = training_table(checkpoint, _trained_on(recorded), reached, license)
    return f"""{card_head("Latent action tokenizer", "latent-action", "robotics, latent actions", license)}
{sum(p.numel() for p in lat.parameters()):,} parameters, trained on latents of the visual tokenizer
`{str(config.tokenizer_digest)[:16]}`; it is of no use on latents of another. Digest `{lat.digest()[:16]}`.

```python
from latent_action import LatentActionTokenizer

lat = LatentActionTokenizer.from_pretrained("this/folder")
z = lat.standardise(latents)        # raw latents (B, T', L, {config.latent_dim}) of that visual tokenizer
l = lat.encode(z)                   # (B, T'-1, {config.action_dim})
z_hat = lat.decode(z[:, 0], l[:, 0])  # the next latent frame
```

| setting | value |
|---|---|
{fields}

## Training

{table}

{_MEASURED if reached else "Its run's metrics.csv was not beside the checkpoint."} Check it on your data with
`latent-action probe`.
"""


_MEASURED = (
    "Numbers are of held-out episodes of these latents. Only the gain of forward_loss over zero_action_loss is the "
    "latent action's."
)


def _trained_on(recorded: Mapping[str, Any]) -> dict[str, object]:
    """What a run's configuration says of its latents, and these of themselves where they still are."""
    folder = recorded.get("data", {}).get("latents")
    if folder is None:
        return {}
    with suppress(UserError, OSError):
        meta = LatentShards(folder).meta
        return {
            "latents": f"{Path(folder).name}, of {meta.source}",
            "cameras": ", ".join(meta.cameras),
            "tokens of a frame, rows x columns": f"{meta.grid[1]} x {meta.grid[2]}",
            "rate of the frames, Hz": f"{meta.frame_rate_hz:g}, every {meta.stride}. taken",
        }
    return {"latents": Path(folder).name}
