"""Lightning's view of the world action model: either training stage, from segments to a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from repvitok.runtime.documents import Decay, Frames, Seed, check_arguments
from repvitok.runtime.errors import UserError
from repvitok.runtime.training import (
    ExponentialMovingAverage,
    FiniteCheck,
    OptimizerSettings,
    clip_gradients,
    configure_optimizer,
    require_finite_weights,
)

from repwam_core.data.batches import Noise, PackedBatch, SegmentBatch
from repwam_core.model.attention import AttentionFn, make_attention
from repwam_core.model.config import LATENT_SPACE
from repwam_core.model.sequence import TokenLayout
from repwam_core.model.wam import WorldActionModel
from repwam_core.sampling import ChunkSpec, SamplingConfig
from repwam_core.statistics import Statistics
from repwam_core.training.finetuning import FineTuning, LoRASettings, TuneTokenizer
from repwam_core.training.losses import (
    LossSettings,
    LossTerms,
    WAMLoss,
    combined,
    documents_loss,
    draw_noise,
    equal_chunks,
    over_ranks,
    wam_loss,
)
from repwam_core.training.metrics import SampledErrors, StepBanner, sample_segments
from repwam_core.training.parallel import (
    ScaleSettings,
    ShardedStrategy,
    build_sharded_wam,
    build_wam,
    gather_for_sampling,
    prepare_layers,
)

if TYPE_CHECKING:
    from repwam_core.data.episodes import EpisodeStore
    from repwam_core.data.packing import Mixture
    from repwam_core.training.tuning import TunedTokenizer

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
        chunk_sizes: smallest and largest chunk in latent frames; one size is drawn per step, or per packed sequence.
        loss: the objective's numbers.
        optimizer: the optimizer's.
        plan: how actions and video are sampled for validation; a policy exported from this run plans so too.
        ema_decay: decay of the averaged weights, which validation and export use; 0 follows the weights.
        seed: of every draw; draws depend on (seed, step, rank) only, and those of packed episodes on (seed, episode,
            visit), wherever they are packed.
        scale: what training trades at scale: recomputation, compilation, attention, sharded initialisation.
        tune_tokenizer: the tokenizer's last blocks are trained, too, by what the policy needs of its history; off by
            default (docs/decisions/078).
        freeze: parts of the pretrained model that stay as they are: "trunk", or of it "video_layers" or
            "action_layers"; "text", "noise_levels", "video_input", "video_head", "action_input", "action_head".
        lora: low-rank updates of the trunk are trained, and nothing else of the pretrained model
            (docs/decisions/089). What it lacks, a new action space's projections, is trained with either.
    """

    def __init__(
        self,
        preset: str = "1.3b",
        wam: dict[str, Any] | None = None,
        space: str = LATENT_SPACE,
        init_from: str | Path | None = None,
        use_state: bool = True,
        chunk_sizes: tuple[Frames, Frames] = (1, 4),
        loss: LossSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        plan: SamplingConfig | None = None,
        ema_decay: Decay = 0.999,
        seed: Seed = 0,
        scale: ScaleSettings | None = None,
        tune_tokenizer: TuneTokenizer | None = None,
        freeze: list[str] | None = None,
        lora: LoRASettings | None = None,
    ) -> None:
        super().__init__()
        check_arguments(WAMTraining.__init__, locals())
        if init_from is not None and wam:
            raise UserError(f"init_from keeps the config of {init_from}; remove these fields of wam: {sorted(wam)}")
        if "look_ahead" in (wam or {}):
            raise UserError("wam.look_ahead: layers that look ahead are training's; give loss.look_ahead in its place")
        self.preset, self.wam_fields, self.init_from = preset, dict(wam or {}), init_from
        self.space, self.use_state = space, use_state
        self.loss_settings = loss or LossSettings()
        self.chunks = ChunkSpec(smallest=chunk_sizes[0], largest=chunk_sizes[1], delay=self.loss_settings.delay)
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.plan = plan or SamplingConfig()
        self.chunks.require(self.plan.chunk_frames)
        self.ema_decay, self.seed = ema_decay, seed
        self.scale = scale or ScaleSettings()
        self._finite = FiniteCheck()
        self.wam: WorldActionModel | None = None
        self.ema: ExponentialMovingAverage | None = None
        self.tune_settings = tune_tokenizer
        self.tuned: TunedTokenizer | None = None
        self.finetuning = FineTuning(tuple(freeze or ()), lora)
        if self.finetuning and init_from is None:
            raise UserError(
                f"model.{'freeze' if freeze else 'lora'} keeps weights of a pretrained model as they are; give its "
                "folder, model.init_from"
            )
        if tune_tokenizer is not None and space == LATENT_SPACE:
            raise UserError("tune_tokenizer is of stage two: latent actions were made of the latents as they are")

    # -- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the model for the data, once."""
        del stage
        if self.wam is None:
            mixture = self._mixture()
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if data.packing is not None:
                self.chunks.require_borders(data.packing.chunk_multiple)
            elif self.chunks.largest > data.transitions:
                raise UserError(
                    f"chunk_sizes: a chunk of {self.chunks.largest} latent frames does not fit segments of "
                    f"{data.transitions} transitions"
                )
            strategy = self.trainer.strategy
            if isinstance(strategy, ShardedStrategy):
                bf16 = str(self.trainer.precision).startswith("bf16")
                self.wam = build_sharded_wam(self, mixture, strategy, torch.bfloat16 if bf16 else None)
            else:
                self.wam = build_wam(self, mixture)
            if self.scale.residual == "bfloat16" and self.trainer.precision != "bf16-mixed":
                told = f"which computes norms in float32; got {self.trainer.precision}"
                raise UserError(f"scale.residual: bfloat16 needs trainer.precision bf16-mixed, {told}")
            self._check_delay()
            prepare_layers(self.wam, self.scale)
            self.ema = ExponentialMovingAverage(self.wam, self.ema_decay)
            if self.tune_settings is not None:
                self._tune(self.tune_settings)

    def _tune(self, settings: TuneTokenizer) -> None:
        from repwam_core.training.tuning import TunedTokenizer  # with what reads frames, which other runs do without

        stores = self._mixture().stores
        packed = self.trainer.datamodule.packing is not None  # type: ignore[attr-defined]
        if len(stores) > 1 or packed or isinstance(self.trainer.strategy, ShardedStrategy):
            raise UserError(
                "tune_tokenizer takes segments of one data set and a whole model on each device; remove data.packing, "
                "data.data_sets and the sharded strategy"
            )
        if self._model().config.joint_actions:
            raise UserError("tune_tokenizer: joint prediction has actions among its latents; adapt the model first")
        self.tuned = TunedTokenizer(settings, stores[0], self.ema_decay)

    def configure_model(self) -> None:
        """Nothing: `setup` has built the model, sharded where the strategy asks for it."""

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run of this stage reports beside its losses."""
        return [StepBanner()]

    def configure_optimizers(self) -> Any:
        """One optimizer, linear warmup, then a cosine over the trainer's `max_steps`."""
        slower = None if self.tuned is None else (self.tuned, self.tuned.lr_factor)
        return configure_optimizer(self, self.optimizer_settings, self._model(), slower)

    # -- training ------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Put the averaged weights where the model is, and say which channels are not ordinary."""
        for average in self._averages():
            average[0].to(self.device)
        if self.global_rank == 0 and self.space != LATENT_SPACE:
            for store in self._mixture().stores:
                for line in store.statistics.remarks():
                    print(f"{store.shards.root}: {line}", file=sys.stderr)

    def training_step(self, batch: SegmentBatch | PackedBatch, batch_idx: int) -> torch.Tensor:
        """Loss of one batch; every draw follows from seeds and positions, so a resumed run repeats none."""
        if isinstance(batch, PackedBatch):
            losses = self._packed_loss(batch)
            keys = [self._mixture().stores[piece.data_set].keys[piece.episode] for piece in batch.pieces]
        else:
            key = (self.seed, self.trainer.global_step, self.global_rank, batch_idx)
            losses = self._loss(self._with_history(batch), self._drawn_chunks(batch), key)
            keys = [self._store().keys[i] for i in batch.episode.tolist()]
        whole = self._log_loss("train", over_ranks([losses.terms]))
        found = {"loss": whole.total, "video": whole.video, "action": whole.action}
        found |= {} if whole.look_ahead is None else {"look_ahead": whole.look_ahead}
        self._finite.note(found, lambda: f"episodes {keys}")
        return losses.total

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip as the trainer says; stop at the first loss or gradient that is no number."""
        by_value = gradient_clip_algorithm == "value"
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(parameters, None if by_value else gradient_clip_val)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._finite.check(self, norm)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, then average the weights at once: a checkpoint taken after this step holds both."""
        super().optimizer_step(*arguments, **options)
        for average, model in self._averages():
            average.update(model)

    # -- validation ----------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Validate the averaged weights."""
        self._swap_in_average()
        self._held_out: list[LossTerms] = []
        self._sampled = [
            SampledErrors(store.statistics, store.action_channels, self.space, self.plan)
            for store in self._mixture().stores
        ]

    def validation_step(self, batch: SegmentBatch, batch_idx: int) -> None:
        """Loss at fixed noise, and errors of actions and video sampled after each true prefix."""
        chunks = equal_chunks(batch.valid.shape[1], self.plan.chunk_frames)
        batch = self._with_history(batch)
        self._held_out.append(self._loss(batch, chunks, (self.seed, 2**31, batch_idx)).terms)
        if self._model().config.joint_actions:
            return  # a rollout plans action tokens, of which this stage has none
        grid = self._mixture().stores[batch.data_set].meta.grid
        self._sampled[batch.data_set].update(self._model(), batch, grid, seed=batch_idx)

    def on_validation_end(self) -> None:
        """Go on training with the weights as they were."""
        self._swap_in_live()

    @contextmanager
    def live_weights(self) -> Iterator[None]:
        """For the length of a block the model has the weights that are trained, also during a validation."""
        averaged = self._average().live is not None
        self._swap_in_live()
        try:
            yield
        finally:
            if averaged:
                self._swap_in_average()

    def _swap_in_average(self) -> None:
        for average, model in self._averages():
            average.to(self.device).swap_in(model)
        gather_for_sampling(self._model(), gathered=True)

    def _swap_in_live(self) -> None:
        if self._average().live is not None:
            gather_for_sampling(self._model(), gathered=False)
            for average, model in self._averages():
                average.swap_out(model)

    def on_validation_epoch_end(self) -> None:
        """Log the loss over all ranks' held-out numbers, and what was sampled, of each data set by itself."""
        self._log_loss(self._split(), over_ranks(self._held_out))
        stores = self._mixture().stores
        for number, (sampled, store) in enumerate(zip(self._sampled, stores, strict=True)):
            prefix = f"{self._split()}/{number}/" if len(stores) > 1 else f"{self._split()}/"
            absent = {f"{name}_mae_si" for name in set(store.action_channels) - set(store.statistics.actions.channels)}
            errors = {name: value for name, value in sampled.compute().items() if name not in absent}
            rows = {f"{prefix}{name}": value for name, value in errors.items()}
            self.log_dict(rows, sync_dist=self.trainer.world_size > 1)  # all ranks' already: Lightning is to know

    test_step = validation_step
    on_test_start, on_test_end, on_test_epoch_end = on_validation_start, on_validation_end, on_validation_epoch_end
    on_predict_start, on_predict_end = on_validation_start, on_validation_end

    def predict_step(self, batch: SegmentBatch, batch_idx: int) -> dict[str, torch.Tensor | None]:
        """Actions and latents of each transition of a batch, planned after its true prefix.

        Returns:
            `actions` (b, transitions, a, c), robot actions in the channels' units (of kind "from_state": changes from
            the state before their chunk), latent actions as they are scaled; `latents` (b, transitions, tokens, d),
            standardised, None where the plan skips the video; `valid` (b, transitions), False behind an episode's end;
            and whose they are: `data_set`, `episode` and `start`, the first latent frame, (b,) each.
        """
        if self._model().config.joint_actions:
            raise UserError("joint prediction has no action tokens to plan; predict with the adapted model")
        store, generator = self._mixture().stores[batch.data_set], torch.Generator().manual_seed(batch_idx)
        batch = self._with_history(batch)
        actions, latents = sample_segments(
            self._model(), batch, self.plan, space=self.space, grid=store.meta.grid, generator=generator
        )
        if self.space != LATENT_SPACE:
            scaling = store.statistics.actions.widened(store.action_channels)
            actions = torch.from_numpy(scaling.denormalise(actions.float().cpu().numpy()))
        numbers = [store.infos[row].episode_index for row in batch.episode.tolist()]
        return {
            "actions": actions,
            "latents": latents,
            "valid": batch.valid,
            "data_set": torch.full_like(batch.start, batch.data_set),
            "episode": torch.tensor(numbers),
            "start": batch.start,
        }

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights, and as JSON what the model needs to know of its data to be exported."""
        require_finite_weights(self)
        store, average = self._store(), self._average().state_dict()
        if isinstance(self.trainer.strategy, ShardedStrategy):
            del average["average"]  # the strategy writes it, each rank its part
        else:  # during a validation the model holds averages
            live = {f"wam.{name}": weight for name, weight in (self._average().live or {}).items()}
            if self.tuned is not None:
                live |= {f"tuned.tokenizer.{n}": weight for n, weight in (self.tuned.average.live or {}).items()}
            checkpoint["state_dict"] = checkpoint["state_dict"] | live
        described = {
            "config": self._model().config.to_dict(),
            "space": self.space,
            "text_encoder": store.text_encoder,
            "plan": asdict(self.plan),
            "chunks": self.chunks.to_dict(),
            "split_of_0_1": self.trainer.datamodule.split_of_0_1,  # type: ignore[attr-defined]
            **_described(store),
            "data_sets": [_described(store) for store in self._mixture().stores],
            "channels": list(store.action_channels),
            "state_channels": list(store.state_channels),
        }
        if self.finetuning:
            described["finetuning"] = self.finetuning.to_dict()
        checkpoint[CHECKPOINT_KEY] = {"ema": average, "json": json.dumps(described)}
        if self.tuned is not None:
            checkpoint[CHECKPOINT_KEY]["tokenizer"] = self.tuned.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged weights over, and the scaling that the run began with; the data must be the same.

        The scaling counted on the same data is another one where version 0.1, or other chunk sizes, began the run.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise UserError("this checkpoint was not written by `repwam fit`: it holds no averaged weights")
        stored = json.loads(checkpoint[CHECKPOINT_KEY]["json"])
        before, now = stored["config"].get("look_ahead", 0), self._model().config.look_ahead
        if before != now:
            raise UserError(
                f"the checkpoint was trained with loss.look_ahead {before}, this run has {now}; resume "
                f"with {before}, or start from its exported weights"
            )
        trained, trains = stored.get("finetuning"), self.finetuning.to_dict() if self.finetuning else None
        if trained != trains:
            raise UserError(
                f"the checkpoint was trained with model.freeze and model.lora {_told(trained)}, this run has "
                f"{_told(trains)}; resume with the former, or start from its exported weights"
            )
        if stored.get("split_of_0_1", "chunks" not in stored):
            self.trainer.datamodule.keep_split_of_0_1()  # type: ignore[attr-defined]
        expected = [Statistics.from_dict(entry["statistics"]) for entry in stored["data_sets"]]
        found = [store.statistics for store in self._mixture().stores]
        if len(expected) != len(found) or not all(map(Statistics.same_data, expected, found)):
            told = [", ".join(entry.digest[:16] for entry in entries) for entries in (expected, found)]
            raise UserError(
                f"the checkpoint was trained with action statistics {told[0]}, the data give {told[1]}; resume on the "
                "same shards, space and held_out"
            )
        for store, began in zip(self._mixture().stores, expected, strict=True):
            if began != store.statistics:
                store.scale_by(began)
        if not isinstance(self.trainer.strategy, ShardedStrategy):
            self._average().load_state_dict(checkpoint[CHECKPOINT_KEY]["ema"])
        tuned = checkpoint[CHECKPOINT_KEY].get("tokenizer")
        if (tuned is None) != (self.tuned is None):
            told = "without it" if tuned is None else "with it"
            raise UserError(f"model.tune_tokenizer: the run that goes on was begun {told}; resume it so")
        if self.tuned is not None:
            self.tuned.average.load_state_dict(tuned)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _check_delay(self) -> None:
        """Some action of every chunk must be left to learn."""
        config, delay = self._model().config, self.chunks.delay
        vectors = self.chunks.smallest * config.space(self.space).vectors_per_transition
        if delay and config.joint_actions:
            raise UserError("loss.delay: joint prediction has no action tokens that could be committed; leave it at 0")
        if delay >= vectors:
            raise UserError(
                f"loss.delay: expected less than the {vectors} action vectors of the smallest chunk "
                f"(model.chunk_sizes), got {delay}"
            )

    def _split(self) -> str:
        """What its held-out numbers are logged under."""
        return "test" if self.trainer.testing else "val"

    def _loss(self, batch: SegmentBatch, chunks: tuple[int, ...], key: tuple[int, ...]) -> WAMLoss:
        return wam_loss(
            self._model(),
            batch,
            space=self.space,
            chunk_sizes=chunks,
            grid=self._mixture().stores[batch.data_set].meta.grid,
            settings=self.loss_settings,
            generator=_generator(key, batch.latents.device),
            attention=self._attention,
        )

    def _packed_loss(self, batch: PackedBatch) -> WAMLoss:
        """Eq. 7 of a packed sequence."""
        noise = self.with_noise(batch).noise
        assert noise is not None
        chunk_sizes = [equal_chunks(piece.transitions, self.chunk_size(batch)) for piece in batch.pieces]
        weights = self.loss_settings.action_weight, self.loss_settings.look_ahead_weight
        documents, noise = batch.documents, noise.to(batch.documents.latents.device)
        return documents_loss(
            self._model(), documents, chunk_sizes, noise, self.space, *weights, attention=self._attention
        )

    def with_noise(self, batch: PackedBatch) -> PackedBatch:
        """The same sequence with its noise, drawn episode by episode: by their pieces, whatever they are packed with.

        Drawn on the CPU, ahead of the step: on a GPU a draw for each document would be a kernel for each.
        """
        if batch.noise is not None:
            return batch
        joint, draws = self._model().config.joint_actions, []
        for number, piece in enumerate(batch.pieces):
            segment = batch.segment(number).to("cpu")
            chunks = len(equal_chunks(piece.transitions, self.chunk_size(batch)))
            generator = _generator((self.seed, 3, *piece), segment.latents.device)
            draws.append(draw_noise(segment, chunks, self.loss_settings, generator, joint))
        return replace(batch, noise=Noise.packed(draws))

    def chunk_size(self, batch: PackedBatch) -> int:
        """The chunk size of a packed sequence, drawn by its number."""
        draw = np.random.default_rng((self.seed, 2, batch.index))
        return int(draw.integers(self.chunks.smallest, self.chunks.largest + 1))

    def _attention(self, layout: TokenLayout) -> AttentionFn:
        config = self._model().config
        return layout.once(make_attention, config.coupling, config.window, self.scale.attention, self.device)

    def _drawn_chunks(self, batch: SegmentBatch) -> tuple[int, ...]:
        """One chunk size per step, the same on every rank, so that ranks do equal work."""
        draw = np.random.default_rng((self.seed, self.trainer.global_step))
        size = int(draw.integers(self.chunks.smallest, self.chunks.largest + 1))
        return equal_chunks(batch.valid.shape[1], size)

    def _log_loss(self, split: str, terms: LossTerms) -> WAMLoss:
        """Log Eq. 7 over all ranks' numbers, and return it."""
        losses = combined([terms], self.loss_settings.action_weight, self.loss_settings.look_ahead_weight)
        rows = {"loss": losses.total, "video": losses.video, "action": losses.action}
        if losses.look_ahead is not None:
            rows["look_ahead"] = losses.look_ahead
        synced = split != "train" and self.trainer.world_size > 1
        self.log_dict({f"{split}/{name}": value for name, value in rows.items()}, sync_dist=synced)
        return losses

    def _mixture(self) -> Mixture:
        mixture: Mixture = self.trainer.datamodule.mixture  # type: ignore[attr-defined]
        if mixture.space != self.space:
            raise UserError(f"model.space is {self.space!r}, the data's space is {mixture.space!r}; give both one name")
        return mixture

    def _store(self) -> EpisodeStore:
        """The first data set, most often the only one."""
        return self._mixture().stores[0]

    def _model(self) -> WorldActionModel:
        if self.wam is None:
            raise RuntimeError("the model is built in setup, which has not run")
        return self.wam

    def _with_history(self, batch: SegmentBatch) -> SegmentBatch:
        return batch if self.tuned is None else self.tuned.with_history(batch)

    def _averages(self) -> list[tuple[ExponentialMovingAverage, torch.nn.Module]]:
        """Every average with the module that it is of."""
        found: list[tuple[ExponentialMovingAverage, torch.nn.Module]] = [(self._average(), self._model())]
        return found if self.tuned is None else [*found, (self.tuned.average, self.tuned.tokenizer)]

    def _average(self) -> ExponentialMovingAverage:
        if self.ema is None:
            raise RuntimeError("the averaged weights are made in setup, which has not run")
        return self.ema


def _generator(key: tuple[int, ...], device: torch.device) -> torch.Generator:
    """A generator on a device that depends on `key` alone."""
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    return generator


def _told(finetuning: dict[str, Any] | None) -> str:
    """What of `FineTuning.to_dict` a user chose."""
    return "off" if finetuning is None else json.dumps({n: v for n, v in finetuning.items() if v and n != "anew"})


def _described(store: EpisodeStore) -> dict[str, Any]:
    """What an exported policy needs to know of a data set."""
    return {
        "statistics": store.statistics.to_dict(),
        "statistics_digest": store.statistics.digest,
        "latents": store.meta.to_dict(),
        "instructions": sorted(set(store.tasks)),
    }
