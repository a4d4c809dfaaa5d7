"""Training of RepViTok (RepWAM Eq. 1-2) as a LightningModule, and the sheet of reconstructions a person looks at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from repvitok.baselines.features import FeatureTokenizer, Squeeze
from repvitok.config import RepViTokConfig
from repvitok.model import RepViTok, load_tokenizer
from repvitok.runtime.documents import Count, Decay, From0, check_arguments
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file
from repvitok.runtime.training import (
    ExponentialMovingAverage,
    FiniteCheck,
    OptimizerSettings,
    clip_gradients,
    configure_optimizer,
    require_finite_weights,
)
from repvitok.training.losses import (
    AdversarySettings,
    Discriminator,
    LeCam,
    LossWeights,
    PerceptualLoss,
    alignment_loss,
    generator_loss,
    gradient_loss,
    hinge_discriminator_loss,
    l1_loss,
    l2_loss,
)
from repvitok.training.metrics import Evaluation, FeatureNetwork, ReconstructionMetrics, report, to_unit
from repvitok.training.teacher import Teacher

PCA_CLIPS = 64
"""Clips of which the principal components of frozen features are taken."""


def reconstruction_sheet(
    video: Float[Tensor, "b 3 T H W"], video_hat: Float[Tensor, "b 3 T H W"], clips: int = 4
) -> UInt8[np.ndarray, "height width 3"]:
    """Lays out clips in pairs of rows, original above reconstruction, time from left to right.

    Args:
        video: originals in [-1, 1].
        video_hat: reconstructions.
        clips: how many of the batch to show.
    """
    both = [rearrange(to_unit(v[:clips]), "b c T H W -> b H (T W) c") for v in (video, video_hat)]
    rows = [row.cpu().numpy() for pair in zip(*both, strict=True) for row in pair]
    return (np.concatenate(rows) * 255).round().astype(np.uint8)


def save_png(path: str | Path, pixels: UInt8[np.ndarray, "height width 3"]) -> Path:
    """Writes an image, creating its folder."""
    path = Path(path)
    with atomic_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
    return path


def log_picture(loggers: Iterable[Any], name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
    """Hands an image to those of Lightning's loggers that take images: Weights & Biases and its like, TensorBoard."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[pixels], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")


class RepViTokTraining(L.LightningModule):
    """Trains a RepViTok and keeps the moving average of its weights, which is what gets validated and exported.

    One step: the weighted losses of the tokenizer, gradients clipped, a step of its optimizer and of the average; then,
    once the adversary has entered, one step of the discriminator on the same clips. Optimisation is manual, and a step
    counts as one however many optimizers took part.

    Logs train/loss, train/<loss name>, train/gradient_norm, train/lr; val/psnr (dB), val/ssim; test/<metric> for all
    that `metrics.Evaluation` measures, which `test` also prints and writes to the run's test_metrics.json.
    """

    def __init__(
        self,
        tokenizer: RepViTokConfig = RepViTokConfig(),  # noqa: B008 (frozen)
        weights: LossWeights = LossWeights(),  # noqa: B008 (frozen)
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008 (frozen)
        adversary: AdversarySettings = AdversarySettings(),  # noqa: B008 (frozen)
        teacher: Teacher | None = None,
        perceptual: PerceptualLoss | None = None,
        ema_decay: Decay = 0.999,
        gradient_clip: From0 = 2.0,
        init_from: str | None = None,
        features: Teacher | None = None,
        squeeze: Squeeze = "pca",
        gradient_checkpointing: bool = False,
        compile_blocks: bool | None = None,
        pictures_every_n_validations: Count = 1,
        test_features: list[FeatureNetwork] | None = None,
    ) -> None:
        """Builds the tokenizer and whatever its losses need.

        Args:
            tokenizer: architecture.
            weights: weights of the losses.
            optimizer: the tokenizer's optimizer and learning rate schedule.
            adversary: the discriminator, used when weights.gan > 0.
            teacher: G(o) of Eq. 2; required when weights.align > 0.
            perceptual: LPIPS; required when weights.perceptual > 0, and measured by `test` whatever its weight.
            ema_decay: decay of the moving average of the weights.
            gradient_clip: largest norm of the tokenizer's gradient; 0 for no clipping.
            init_from: a folder or hub id of a trained tokenizer of the same architecture to start from.
            features: frozen features in the encoder's place, see `FeatureTokenizer`: the decoder alone is trained.
            squeeze: from the features to `tokenizer.latent_dim` channels, see `FeatureTokenizerConfig`; the principal
                components are those of the first clips of the training data. "none" sets `latent_dim` itself.
            gradient_checkpointing: recompute activations in the backward pass.
            compile_blocks: compile the tokenizer's layers (`RepViTok.compile_blocks`); null is on a GPU.
            pictures_every_n_validations: reconstructions are saved as PNG, and given to loggers that take images,
                every so many validations; 0 for never.
            test_features: feature networks of the Frechet distances that `test` measures (repvitok.training.metrics).
        """
        super().__init__()
        check_arguments(RepViTokTraining.__init__, locals())
        self.automatic_optimization = False
        self.weights = weights
        self.optimizer_settings = optimizer
        self.adversary_settings = adversary
        self.gradient_clip = gradient_clip
        if init_from is not None and features is not None:
            raise UserError(f"init_from {init_from} has its encoder already: remove features, or init_from")
        if features is not None:
            self.tokenizer: RepViTok = FeatureTokenizer.of(features, tokenizer, squeeze)
        elif init_from is not None:
            self.tokenizer = _trained_tokenizer(init_from).train()
            require_same_config(tokenizer, self.tokenizer.config, init_from)
        else:
            self.tokenizer = RepViTok(tokenizer)
        self.tokenizer.gradient_checkpointing = gradient_checkpointing
        self.tokenizer.compile_blocks = compile_blocks
        needed = _needed(teacher, weights.align, "align")
        d = self.tokenizer.config.latent_dim
        self.align = None if needed is None else nn.Linear(d, needed.dim, bias=False)  # W_align
        self.discriminator = Discriminator(adversary.width, adversary.layers) if weights.gan else None
        self.lecam = nn.ModuleList(
            [LeCam(), LeCam()] if weights.gan else []
        )  # running means of each adversary's scores
        self.ema = ExponentialMovingAverage(self.tokenizer, ema_decay)
        self.metrics = ReconstructionMetrics()
        self._evaluation = Evaluation(perceptual, test_features or ())
        self._frozen = _FrozenNetworks(teacher, _needed(perceptual, weights.perceptual, "perceptual"))
        self._finite = FiniteCheck()
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._validations = 0
        self._of_features = features is not None
        self._pictures_every = pictures_every_n_validations

    # -- losses ------------------------------------------------------------------------------------------------------

    def losses(self, video: Float[Tensor, "b 3 T H W"]) -> tuple[dict[str, Tensor], Float[Tensor, "b 3 T H W"]]:
        """Every loss with a weight above zero, unweighted, and the reconstruction."""
        video_hat, z = self.tokenizer(video)
        weights, found = self.weights, {}
        if weights.l1:
            found["l1"] = l1_loss(video_hat, video)
        if weights.l2:
            found["l2"] = l2_loss(video_hat, video)
        if weights.gradient:
            found["gradient"] = gradient_loss(video_hat, video)
        if self._frozen.perceptual is not None:
            found["perceptual"] = self._frozen.perceptual(video_hat, video, seed=self.global_step)
        if self.align is not None:
            assert self._frozen.teacher is not None
            features = self._frozen.teacher.features(video, self.tokenizer.grid(*video.shape[3:]))
            target = rearrange(features, "b T h w c -> b T (h w) c").to(video.dtype)
            found["align"] = alignment_loss(self.align(z), target)
        if self.discriminator is not None and self._adversary_entered:
            self.discriminator.requires_grad_(False)  # its own step turns them on again
            scores = self.discriminator(video_hat)
            found["gan"] = torch.stack([generator_loss(score) for score in scores]).mean()
        return found, video_hat

    @property
    def _adversary_entered(self) -> bool:
        return self.global_step >= self.adversary_settings.start_step

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        """One step of the tokenizer, and one of the adversary once it has entered; returns the weighted loss."""
        video = _video(batch)
        adversary_plays = self.discriminator is not None and self._adversary_entered
        losses, video_hat = self.losses(video)
        loss = torch.stack([getattr(self.weights, name) * value for name, value in losses.items()]).sum()
        norm = self._tokenizer_step(loss, video, losses)
        logged = {"loss": loss, **losses, "gradient_norm": norm}
        if adversary_plays:
            logged["discriminator"] = self._discriminator_step(video, video_hat.detach())
        self._log_means(logged)
        return loss.detach()

    def _tokenizer_step(self, loss: Tensor, video: Tensor, losses: dict[str, Tensor]) -> Tensor:
        optimizer = self._optimizers()[0]
        optimizer.zero_grad()
        self.manual_backward(loss)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_gradients(parameters, self.gradient_clip)
        self._finite.note({"loss": loss, **losses}, lambda: self._saved(video, losses))
        self._finite.check(self, norm)
        optimizer.step()
        self._schedulers()[0].step()
        self.ema.update(self.tokenizer)
        return norm

    def _discriminator_step(self, video: Tensor, video_hat: Tensor) -> Tensor:
        """Steps the plain optimizer below Lightning's, which would count a second global step."""
        assert self.discriminator is not None
        optimizer = self._optimizers()[1].optimizer
        optimizer.zero_grad()
        self.discriminator.requires_grad_(True)
        losses = []
        scores = zip(self.discriminator(video), self.discriminator(video_hat), strict=True)
        for number, (real, fake) in enumerate(scores):  # the image adversary's, then the video adversary's
            losses.append(hinge_discriminator_loss(real, fake))
            if self.adversary_settings.lecam:
                losses.append(self.adversary_settings.lecam * self.lecam[number](real, fake))
        loss = torch.stack(losses).sum()
        self.manual_backward(loss)
        norm = clip_gradients(self.discriminator.parameters(), self.gradient_clip)
        self._finite.note({"discriminator": loss}, lambda: self._saved(video, {"discriminator": loss}))
        self._finite.check(self, norm)
        optimizer.step()
        self._schedulers()[1].step()
        return loss

    def _saved(self, video: Tensor, losses: dict[str, Tensor]) -> str:
        """Saves the clips of a step that went wrong, and says where."""
        rank = f"_rank_{self.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.default_root_dir) / f"nan_batch_step_{self.global_step}{rank}.pt"
        values = {name: value.detach().item() for name, value in losses.items()}
        with atomic_file(path) as partial:
            torch.save({"video": video.detach().cpu(), "step": self.global_step, "losses": values}, partial)
        return f"the clips that are saved in {path}"

    def configure_optimizers(self) -> Any:
        """The tokenizer's optimizer with the alignment head's parameters in it, and the discriminator's."""
        trained = nn.ModuleDict({"tokenizer": self.tokenizer})
        if self.align is not None:
            trained["align"] = self.align
        configured = [configure_optimizer(self, self.optimizer_settings, trained)]
        if self.discriminator is not None:
            of = self.adversary_settings
            settings = OptimizerSettings(
                name="adamw", lr=of.lr, betas=of.betas, weight_decay=0.0, warmup_steps=of.warmup_steps
            )
            configured.append(configure_optimizer(self, settings, self.discriminator))
        return configured

    def _optimizers(self) -> list[Any]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _schedulers(self) -> list[Any]:
        found = self.lr_schedulers()
        return found if isinstance(found, list) else [found]

    def _log_means(self, values: dict[str, Tensor]) -> None:
        """Adds up every step, and logs the means every `trainer.log_every_n_steps` steps: logging costs little."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._summed += 1
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self.global_step % every and self.global_step != self.trainer.max_steps:
            return
        means = {f"train/{name}": (total / self._summed).item() for name, total in self._sums.items()}
        means["train/lr"] = self._optimizers()[0].param_groups[0]["lr"]
        for logger in self.loggers:
            logger.log_metrics(means, step=self.global_step)
            logger.save()
        self._sums, self._summed = {}, 0

    # -- evaluation --------------------------------------------------------------------------------------------------

    def reconstruct(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b 3 T H W"]:
        """Reconstruction by the averaged weights."""
        with self.ema.swapped(self.tokenizer), torch.no_grad():
            return self.tokenizer(video)[0]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to PSNR and SSIM; draws the first one."""
        video = _video(batch)
        video_hat = self.reconstruct(video)
        self.metrics.update(video_hat.float(), video.float())
        due = self._pictures_every > 0 and self._validations % self._pictures_every == 0
        if batch_idx == 0 and due and self.trainer.is_global_zero:
            sheet = reconstruction_sheet(video.float(), video_hat.float())
            folder = Path(self.trainer.default_root_dir) / "reconstructions"
            save_png(folder / f"step_{self.global_step:07d}.png", sheet)
            log_picture(self.loggers, "val/reconstructions", sheet, self.global_step)

    def on_validation_epoch_end(self) -> None:
        """Logs val/psnr and val/ssim."""
        found = self.metrics.compute()
        self.log_dict({"val/psnr": found.psnr.float(), "val/ssim": found.ssim.float()})
        self.metrics.reset()
        self._validations += 1

    def test_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to every metric."""
        video = _video(batch)
        self._evaluation.update(self.reconstruct(video).float(), video.float())

    def on_test_epoch_end(self) -> None:
        """Logs test/<metric>, prints all of them and writes test_metrics.json."""
        stride = getattr(self.trainer.datamodule, "stride", "unknown")  # pyright: ignore[reportAttributeAccessIssue]
        rows = self._evaluation.rows(str(stride))
        self.log_dict({f"test/{row.name}": row.value for row in rows})
        if self.trainer.is_global_zero:
            report(rows, self.trainer.default_root_dir)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Clips of a batch and their reconstructions, (b, 3, T, H, W) in [-1, 1]."""
        video = _video(batch)
        return {"video": video, "reconstruction": self.reconstruct(video)}

    # -- state -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Moves what Lightning does not know of to the device, and fits a PCA of frozen features, before all else."""
        if stage == "fit" and self._of_features:
            assert isinstance(self.tokenizer, FeatureTokenizer)
            device = self.trainer.strategy.root_device
            clips = self.trainer.datamodule.first_clips(PCA_CLIPS)  # pyright: ignore[reportAttributeAccessIssue]
            kept = self.tokenizer.to(device).fit_squeeze(clip[None].to(device) for clip in clips)
            self.ema = ExponentialMovingAverage(self.tokenizer, self.ema.decay)
            if self.trainer.is_global_zero:
                print(f"{self.tokenizer.config.latent_dim} channels keep {kept:.1%} of the features' variance")
        self._frozen.to(self.device)
        self._evaluation.to(self.device)
        self.ema.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the config and the averaged weights, from which `export` makes a folder, and the means under way."""
        require_finite_weights(self)
        checkpoint[self.tokenizer.format] = {
            "config": self.tokenizer.config.to_dict(),
            "ema": self.ema.state_dict(),
            "sums": dict(self._sums),
            "summed": self._summed,
            "validations": self._validations,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the averaged weights; another architecture is an error."""
        stored = checkpoint.get(self.tokenizer.format)
        if stored is None:
            raise UserError(f"this checkpoint was not written by a training of {type(self.tokenizer).__name__}")
        config = self.tokenizer.config
        require_same_config(config, config.from_dict(stored["config"]), "the checkpoint")
        self.ema.load_state_dict(stored["ema"])
        state = checkpoint["state_dict"]
        for name in ("real_mean", "fake_mean"):  # version 0.1 kept one pair of means for both adversaries
            if (shared := state.pop(f"lecam.{name}", None)) is not None:
                state |= {f"lecam.{number}.{name}": shared.clone() for number in range(len(self.lecam))}
        self._sums, self._summed = dict(stored.get("sums", {})), stored.get("summed", 0)
        self._validations = stored.get("validations", 0)


class _FrozenNetworks:
    """The teacher and LPIPS, kept out of the module tree: frozen weights belong in no checkpoint."""

    def __init__(self, teacher: Teacher | None, perceptual: PerceptualLoss | None) -> None:
        self.teacher = teacher
        self.perceptual = perceptual

    def to(self, device: torch.device) -> None:
        for network in (self.teacher, self.perceptual):
            if network is not None:
                network.to(device)


def _trained_tokenizer(source: str) -> RepViTok:
    """The RepViTok or FeatureTokenizer to start from."""
    found = load_tokenizer(source)
    if not isinstance(found, RepViTok):
        raise UserError(f"init_from {source}: a {type(found).__name__} is not trained here, RepViTok is")
    return found


def require_same_config(config: RepViTokConfig, other: RepViTokConfig, where: str) -> None:
    """Raises ValueError naming the first field in which two architectures differ."""
    mine, theirs = config.to_dict(), other.to_dict()
    for name, value in mine.items():
        if theirs[name] != value:
            raise UserError(f"the recipe has tokenizer.{name} = {value}, {where} has {theirs[name]}: make them equal")


def _needed(network: Any, weight: float, loss: str) -> Any:
    """The network if its loss has a weight; raises ValueError when it has one and there is no network."""
    if not weight:
        return None
    if network is None:
        argument = "teacher" if loss == "align" else loss
        raise UserError(
            f"weights.{loss} is {weight} and there is no {argument}: give model.{argument} (class_path, init_args) or "
            f"set model.weights.{loss} to 0"
        )
    return network


def _video(batch: Any) -> Float[Tensor, "b 3 T H W"]:
    """The clips of a batch, in [-1, 1]."""
    return batch["video"] if isinstance(batch, Mapping) else batch
