"""Lightning's view of the world action model: either training stage, from segments to a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from repvitok.ema import ExponentialMovingAverage
from repvitok.optim import OptimizerSettings

from repwam_core.data.episodes import EpisodeStore, SegmentBatch
from repwam_core.model.config import LATENT_SPACE, ActionSpace, WAMConfig
from repwam_core.model.wam import WorldActionModel
from repwam_core.planning import PlanSettings
from repwam_core.training.losses import LossSettings, WAMLoss, equal_chunks, wam_loss
from repwam_core.training.metrics import SampledErrors, sample_segments

CHECKPOINT_KEY = "repwam"


class WAMTraining(L.LightningModule):
    """Trains a `WorldActionModel` on latent actions ("latent" space) or on a robot's (any other name).

    Sizes that the data knows (channels, vectors per transition, state and text width) are read from the data module.

    Args:
        preset: "1.3b", "5b" or "tiny".
        wam: fields of `WAMConfig` that differ from the preset.
        space: action space; must be the data module's.
        init_from: folder of a pretrained model. Its config is kept and its weights are the start; a new space's
            projections are added. `preset` and `wam` are not used then.
        use_state: whether the space has robot states, if the data holds them and `WAMConfig.state_token` is on.
        chunk_sizes: smallest and largest chunk in latent frames; one size is drawn per step.
        loss: the objective's numbers.
        optimizer: the optimizer's.
        plan: how actions and video are sampled for validation; a policy exported from this run plans so too.
        ema_decay: decay of the averaged weights, which validation and export use; 0 follows the weights.
        seed: of every draw; draws depend on (seed, step, rank) only.
    """

    def __init__(
        self,
        preset: str = "1.3b",
        wam: dict[str, Any] | None = None,
        space: str = LATENT_SPACE,
        init_from: str | Path | None = None,
        use_state: bool = True,
        chunk_sizes: tuple[int, int] = (1, 4),
        loss: LossSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        plan: PlanSettings | None = None,
        ema_decay: float = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        low, high = chunk_sizes
        if not 1 <= low <= high:
            raise ValueError(f"chunk_sizes: expected 1 <= smallest <= largest, got {tuple(chunk_sizes)}")
        if init_from is not None and wam:
            raise ValueError(f"init_from keeps the config of {init_from}; remove these fields of wam: {sorted(wam)}")
        self.preset, self.wam_fields, self.init_from = preset, dict(wam or {}), init_from
        self.space, self.use_state, self.chunk_sizes = space, use_state, (low, high)
        self.loss_settings = loss or LossSettings()
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.plan = plan or PlanSettings()
        self.ema_decay, self.seed = ema_decay, seed
        self.wam: WorldActionModel | None = None
        self.ema: ExponentialMovingAverage | None = None
        self._live: dict[str, torch.Tensor] | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the model for the data, once."""
        del stage
        if self.wam is None:
            store = self._store()
            self._check_transitions()
            self.wam = build_wam(self, store)
            self.ema = ExponentialMovingAverage(self.wam, self.ema_decay)

    def configure_optimizers(self) -> Any:
        """One optimizer, linear warmup, then a cosine over the trainer's `max_steps`."""
        settings, total = self.optimizer_settings, self.trainer.max_steps
        if total < 1:
            raise ValueError(f"trainer.max_steps: expected the number of training steps, got {total}")
        optimizer, schedule = settings.build(self._model(), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the averaged weights where the model is."""
        self._average().to(self.device)

    def training_step(self, batch: SegmentBatch, batch_idx: int) -> torch.Tensor:
        """Loss of one batch; all draws follow from (seed, step, rank), so a resumed run repeats none."""
        key = (self.seed, self.trainer.global_step, self.global_rank, batch_idx)
        losses = self._loss(batch, self._drawn_chunks(batch), key)
        self._stop_unless_finite(losses, batch)
        rows = {"train/loss": losses.total, "train/video": losses.video, "train/action": losses.action}
        self.log_dict({name: value.detach() for name, value in rows.items()}, batch_size=len(batch))
        return losses.total

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, then average the weights at once: a checkpoint taken after this step holds both."""
        super().optimizer_step(*arguments, **options)
        self._average().update(self._model())

    # -- validation ----------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Validate the averaged weights."""
        model, average = self._model(), self._average().to(self.device)
        self._live = {name: p.detach().clone() for name, p in model.named_parameters() if name in average.average}
        average.copy_to(model)
        self._sampled = SampledErrors(self._store().statistics.actions, self.space, self.plan)

    def validation_step(self, batch: SegmentBatch, batch_idx: int) -> None:
        """Loss at fixed noise, and errors of actions and video sampled after each true prefix."""
        chunks = equal_chunks(batch.valid.shape[1], self.plan.chunk_frames)
        losses = self._loss(batch, chunks, (self.seed, 2**31, batch_idx))
        rows = {"val/loss": losses.total, "val/video": losses.video, "val/action": losses.action}
        self.log_dict(rows, batch_size=len(batch))
        self._sampled.update(self._model(), batch, self._store().meta.grid, seed=batch_idx)

    def on_validation_end(self) -> None:
        """Go on training with the weights as they were."""
        if self._live is not None:
            with torch.no_grad():
                for name, parameter in self._model().named_parameters():
                    if name in self._live:
                        parameter.copy_(self._live[name])
            self._live = None

    def on_validation_epoch_end(self) -> None:
        """Log what was sampled."""
        self.log_dict({f"val/{name}": value for name, value in self._sampled.compute().items()})

    test_step = validation_step
    on_test_start, on_test_end, on_test_epoch_end = on_validation_start, on_validation_end, on_validation_epoch_end

    def predict_step(self, batch: SegmentBatch, batch_idx: int) -> dict[str, torch.Tensor | None]:
        """Actions and latents, scaled as the data are, of each transition, planned after its true prefix."""
        generator, grid = torch.Generator().manual_seed(batch_idx), self._store().meta.grid
        actions, latents = sample_segments(
            self._model(), batch, self.plan, space=self.space, grid=grid, generator=generator
        )
        return {"actions": actions, "latents": latents, "episode": batch.episode, "start": batch.start}

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights, and as JSON what the model needs to know of its data to be exported."""
        store = self._store()
        described = {
            "config": self._model().config.to_dict(),
            "space": self.space,
            "statistics": {
                "actions": asdict(store.statistics.actions),
                "state": None if store.statistics.state is None else asdict(store.statistics.state),
            },
            "statistics_digest": store.statistics.digest,
            "latents": store.meta.to_dict(),
            "text_encoder": store.text_encoder,
            "instructions": sorted(set(store.tasks)),
            "plan": asdict(self.plan),
        }
        checkpoint[CHECKPOINT_KEY] = {"ema": self._average().state_dict(), "json": json.dumps(described)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged weights over; the data's scaling must be the one the run began with."""
        if CHECKPOINT_KEY not in checkpoint:
            raise ValueError("this checkpoint was not written by `repwam fit`: it holds no averaged weights")
        stored = json.loads(checkpoint[CHECKPOINT_KEY]["json"])
        found = self._store().statistics.digest
        if stored["statistics_digest"] != found:
            raise ValueError(
                f"the checkpoint was trained with action statistics {stored['statistics_digest'][:16]}, the data give "
                f"{found[:16]}; resume on the same shards, space and held_out"
            )
        self._average().load_state_dict(checkpoint[CHECKPOINT_KEY]["ema"])

    # -- parts ---------------------------------------------------------------------------------------------------

    def _loss(self, batch: SegmentBatch, chunks: tuple[int, ...], key: tuple[int, ...]) -> WAMLoss:
        generator = torch.Generator(batch.latents.device)
        generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
        return wam_loss(
            self._model(),
            batch,
            space=self.space,
            chunk_sizes=chunks,
            grid=self._store().meta.grid,
            settings=self.loss_settings,
            generator=generator,
        )

    def _drawn_chunks(self, batch: SegmentBatch) -> tuple[int, ...]:
        """One chunk size per step, the same on every rank, so that ranks do equal work."""
        low, high = self.chunk_sizes
        draw = np.random.default_rng((self.seed, self.trainer.global_step))
        return equal_chunks(batch.valid.shape[1], int(draw.integers(low, high + 1)))

    def _stop_unless_finite(self, losses: WAMLoss, batch: SegmentBatch) -> None:
        if not torch.isfinite(losses.total):
            keys = [self._store().keys[i] for i in batch.episode.tolist()]
            parts = f"video {losses.video.item():.4g}, action {losses.action.item():.4g}"
            raise ValueError(
                f"the loss is {losses.total.item()} at step {self.trainer.global_step} ({parts}) on episodes {keys}; "
                "lower the learning rate or look at these data"
            )

    def _check_transitions(self) -> None:
        transitions, largest = self.trainer.datamodule.transitions, self.chunk_sizes[1]  # type: ignore[attr-defined]
        if largest > transitions:
            raise ValueError(
                f"chunk_sizes: a chunk of {largest} latent frames does not fit segments of {transitions} transitions"
            )

    def _store(self) -> EpisodeStore:
        store: EpisodeStore = self.trainer.datamodule.store  # type: ignore[attr-defined]
        if store.space != self.space:
            raise ValueError(f"model.space is {self.space!r}, the data's space is {store.space!r}; give both one name")
        return store

    def _model(self) -> WorldActionModel:
        if self.wam is None:
            raise RuntimeError("the model is built in setup, which has not run")
        return self.wam

    def _average(self) -> ExponentialMovingAverage:
        if self.ema is None:
            raise RuntimeError("the averaged weights are made in setup, which has not run")
        return self.ema


def build_wam(training: WAMTraining, store: EpisodeStore) -> WorldActionModel:
    """Build the model that `training` asks for, sized by the data; or load a pretrained one and add the space.

    Raises:
        ValueError: when the data do not fit the pretrained model.
    """
    states = len(store.state_channels) if training.use_state else 0
    space = ActionSpace(
        channels=len(store.action_channels),
        vectors_per_transition=store.vectors_per_transition,
        state_channels=states,
    )
    torch_seed = int(np.random.SeedSequence((training.seed, 1)).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        if training.init_from is None:
            sizes = {"latent_dim": store.meta.latent_dim, "text_dim": store.text.shape[-1]}
            config = WAMConfig.preset(
                training.preset, **{**sizes, **training.wam_fields, "spaces": {training.space: space}}
            )
            wam = WorldActionModel(config)
        else:
            wam = WorldActionModel.from_pretrained(training.init_from)
            if training.space not in wam.config.spaces:
                wam.add_action_space(training.space, space)
    _check_fit(wam.config, store, training.space, space)
    return wam.train()


def _check_fit(config: WAMConfig, store: EpisodeStore, name: str, space: ActionSpace) -> None:
    expected = {"latent_dim": config.latent_dim, "text_dim": config.text_dim, f"space {name!r}": config.space(name)}
    got = {"latent_dim": store.meta.latent_dim, "text_dim": store.text.shape[-1], f"space {name!r}": space}
    wrong = [f"{key}: the model has {expected[key]}, the data {got[key]}" for key in got if got[key] != expected[key]]
    if wrong:
        raise ValueError("the model does not fit the data: " + "; ".join(wrong))
