"""Training: it learns, resumes exactly, stops on NaN; its adversary counts no step, batches follow their number."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from repvitok import RepViTokConfig
from repvitok.data.clips import StepBatches
from repvitok.data.datamodule import ClipDataModule
from repvitok.data.video import write_video
from repvitok.model import RepViTok
from repvitok.runtime.callbacks import AtomicCheckpointIO, CurveLogger, SaveLast, TrainingInterrupted
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.lightning_cli import TRAINER_DEFAULTS
from repvitok.runtime.progress import append_curves, read_curves
from repvitok.runtime.training import OptimizerSettings
from repvitok.training.export import export_checkpoint
from repvitok.training.losses import AdversarySettings, LossWeights
from repvitok.training.metrics import HOGClipFeatures
from repvitok.training.module import RepViTokTraining, log_picture
from repvitok.training.teacher import HOGTeacher

CONFIG = RepViTokConfig(width=32, depth=1, heads=2, latent_dim=16)
PLAIN = LossWeights(l1=1.0, l2=2.0, gradient=0.5, perceptual=0.0, gan=0.0, align=0.0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Four short videos of a bright square that moves over a coloured ramp."""
    folder = tmp_path_factory.mktemp("videos")
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    for number in range(4):
        frames = np.zeros((16, 32, 32, 3), dtype=np.uint8)
        frames[..., number % 3] = ramp
        for t in range(16):
            frames[t, 8 + number : 18 + number, t : t + 10] = 255 - 40 * number
        write_video(folder / f"{number}.mp4", frames, fps=10)
    return folder


def data(videos: Path, **options) -> ClipDataModule:
    settings = {"size": (32, 32), "frames": 5, "batch_size": 2, "held_out": 0.25, "val_clips": 3, "seed": 1}
    return ClipDataModule([str(videos)], **(settings | options))


def module(weights: LossWeights = PLAIN, **options) -> RepViTokTraining:
    torch.manual_seed(0)
    optimizer = OptimizerSettings(lr=0.02, adamw_lr=3e-3, newton_schulz_dtype="float32", warmup_steps=2)
    return RepViTokTraining(CONFIG, weights, optimizer, ema_decay=0.9, **options)


def trainer(root: Path, steps: int, *callbacks: Callback, **options) -> Trainer:
    settings = TRAINER_DEFAULTS | {"accelerator": "cpu", "log_every_n_steps": 5, "default_root_dir": str(root)}
    return Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        logger=CurveLogger(root),
        **(settings | options),
    )


class Seen(Callback):
    """Keeps the sums of the batches that were trained on."""

    def __init__(self):
        self.sums = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sums.append(float(batch.double().sum()))


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action()


class AtValidation(Callback):
    """Does something in the validation after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action()


def test_it_learns_and_exports_its_average(videos, tmp_path):
    run = trainer(tmp_path, 60, SaveLast(), val_check_interval=60)
    run.fit(module(), data(videos))
    curves = read_curves(tmp_path)
    losses = curves["train/loss"]
    assert losses[:, 0].tolist() == list(range(5, 61, 5))
    assert losses[-1, 1] < 0.6 * losses[0, 1]
    assert {"train/l1", "train/l2", "train/gradient", "train/lr", "val/psnr", "val/ssim"} <= set(curves)
    pictures = list((tmp_path / "reconstructions").glob("*.png"))
    assert [picture.name for picture in pictures] == ["step_0000060.png"]

    tokenizer = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "export")
    assert RepViTok.from_pretrained(tmp_path / "export").digest() == tokenizer.digest()
    card = (tmp_path / "export" / "README.md").read_text()
    assert tokenizer.digest()[:16] in card
    assert "| steps | 60 |" in card
    half = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "half", half=True)
    assert RepViTok.from_pretrained(tmp_path / "half").digest() == half.digest() != tokenizer.digest()
    assert half.digest()[:16] in (tmp_path / "half/README.md").read_text()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "export")]
    assert sizes[0] < 0.6 * sizes[1]
    raw = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "raw", averaged=False)
    assert raw.digest() != tokenizer.digest()
    assert run.test(module(), data(videos), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True)[0][
        "test/psnr"
    ] == pytest.approx(curves["val/psnr"][-1, 1], abs=1e-3)


ADVERSARIAL = LossWeights(l1=1.0, perceptual=0.0, gan=0.1, align=0.0)
ADVERSARY = AdversarySettings(start_step=1, width=4, layers=2, warmup_steps=1)


def run_adversarial(videos: Path, root: Path, *callbacks: Callback, **more) -> Trainer:
    """Six steps with an adversary, means over four, three validations."""
    run = trainer(root, 6, SaveLast(every_n_steps=2), *callbacks, log_every_n_steps=4, val_check_interval=2)
    run.fit(module(ADVERSARIAL, adversary=ADVERSARY, pictures_every_n_validations=2), data(videos), **more)
    return run


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    run_adversarial(videos, root)
    return root


def assert_same(found: object, expected: object, where: str = "") -> None:
    """Two checkpoints hold the same, bit for bit, but for when batches were handed out and the hours spent."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - {"loops", "callbacks", "hours"}:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "error"])
def test_a_stopped_run_goes_on_as_if_it_had_not(videos, undisturbed, tmp_path, where, how):
    def stop():
        if how == "error":  # as a kill: nothing is saved on the way out
            raise RuntimeError("broken")
        os.kill(os.getpid(), getattr(signal, how))

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopper = At(3, stop) if where == "training" else AtValidation(4, stop)
    with pytest.raises(RuntimeError if how == "error" else TrainingInterrupted, match=r"broken|at step 4") as stopped:
        run_adversarial(videos, tmp_path, stopper)
    if how != "error":
        assert str(stopped.value).endswith("last.ckpt holds step 4")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    torch.manual_seed(99)
    saved = tmp_path / "last.ckpt"
    assert read_checkpoint(saved)["global_step"] == (2 if (where, how) == ("training", "error") else 4)
    run_adversarial(videos, tmp_path, ckpt_path=str(saved), weights_only=True)
    assert_same(read_checkpoint(saved), read_checkpoint(undisturbed / "last.ckpt"))
    assert (tmp_path / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()
    drawn = [{path.name: path.read_bytes() for path in root.glob("*/*.png")} for root in (tmp_path, undisturbed)]
    assert len(drawn[0]) == 2
    assert drawn[0] == drawn[1]


def test_an_error_does_not_overwrite_the_last_good_state(videos, tmp_path):
    def fail():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, 6, SaveLast(every_n_steps=2), At(5, fail)).fit(module(), data(videos))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4


def test_another_architecture_or_data_order_is_refused(videos, tmp_path):
    trainer(tmp_path, 2, SaveLast()).fit(module(), data(videos))
    path = str(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"trained with data\.batch_size = 2, got 3"):
        trainer(tmp_path, 4).fit(module(), data(videos, batch_size=3), ckpt_path=path, weights_only=True)
    exported = export_checkpoint(path, tmp_path / "export")
    other = RepViTokConfig(width=48, depth=1, heads=2, latent_dim=16)
    with pytest.raises(ValueError, match=r"tokenizer\.width = 48, .* has 32"):
        RepViTokTraining(other, PLAIN, init_from=str(tmp_path / "export"))
    started = RepViTokTraining(CONFIG, PLAIN, init_from=str(tmp_path / "export"))
    assert started.tokenizer.digest() == exported.digest()


def test_nan_stops_with_the_batch_saved(videos, tmp_path):
    broken = module()

    def poison():
        next(broken.tokenizer.parameters()).data.fill_(math.nan)

    with pytest.raises(ValueError, match=r"not finite at step 2 .*nan_batch_step_2\.pt"):
        trainer(tmp_path, 6, SaveLast(every_n_steps=1), At(2, poison)).fit(broken, data(videos))
    saved = torch.load(tmp_path / "nan_batch_step_2.pt", weights_only=True)
    assert saved["video"].shape == (2, 3, 5, 32, 32)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_nan_in_the_adversary_stops_too(videos, tmp_path):
    settings = AdversarySettings(start_step=0, width=4, layers=2, warmup_steps=1)
    broken = module(LossWeights(l1=1.0, perceptual=0.0, gan=0.1, align=0.0), adversary=settings)
    poisoned = broken.discriminator.image.score.parametrizations.weight.original
    forward = broken._discriminator_step

    def poison(*batch):
        poisoned.data.fill_(math.nan)
        return forward(*batch)

    broken._discriminator_step = poison
    with pytest.raises(ValueError, match=r"not finite at step 1 .*'discriminator': nan.*nan_batch_step_1\.pt"):
        trainer(tmp_path, 6).fit(broken, data(videos))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_images_and_any_size_train_with_every_loss(tmp_path, optimizer):
    """One module takes images and clips of several sizes, batch by batch, adversary and alignment included."""

    class Mixed(torch.utils.data.IterableDataset):
        shapes = ((2, 3, 1, 32, 48), (1, 3, 5, 32, 32), (1, 3, 9, 48, 32), (3, 3, 1, 64, 64))

        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            while True:
                yield from (torch.rand(shape, generator=generator) * 2 - 1 for shape in self.shapes)

    torch.manual_seed(0)
    trained = RepViTokTraining(
        CONFIG,
        LossWeights(l1=1.0, l2=1.0, gradient=0.5, perceptual=0.0, gan=0.1, align=1.0),
        OptimizerSettings(optimizer, lr=0.01, adamw_lr=3e-3, newton_schulz_dtype="float32", warmup_steps=2),
        AdversarySettings(start_step=2, width=4, layers=2, warmup_steps=1),
        teacher=HOGTeacher(),
    )
    before = trained.tokenizer.digest()
    trainer(tmp_path, 8, log_every_n_steps=1).fit(
        trained, torch.utils.data.DataLoader(Mixed(), batch_size=None, num_workers=0)
    )
    curves = read_curves(tmp_path)
    assert trained.tokenizer.digest() != before
    assert curves["train/discriminator"][:, 0].tolist() == [3, 4, 5, 6, 7, 8]
    assert np.isfinite(curves["train/loss"][:, 1]).all()


def test_test_prints_and_writes_every_metric_with_its_sample(videos, tmp_path, capsys):
    measured = module(test_features=[HOGClipFeatures()])
    trainer(tmp_path, 1).test(measured, data(videos, stride=2), verbose=False)
    rows = {row["name"]: row for row in json.loads((tmp_path / "test_metrics.json").read_text())}
    assert set(rows) == {"psnr", "ssim", "frechet_hog_distance"}
    assert rows["psnr"]["samples"] == "15 frames"
    assert rows["psnr"]["stride"] == "2"
    assert "frechet_hog_distance" in capsys.readouterr().out


def test_pictures_go_to_loggers_that_take_them(tmp_path):
    class Images:
        def __init__(self):
            self.seen = []

        def log_image(self, **arguments):
            self.seen.append(arguments)

        def add_image(self, *arguments, **named):
            self.seen.append((*arguments, named))

    class Board:
        def __init__(self):
            self.experiment = Images()

    class Weights:
        def __init__(self):
            self.images = Images()
            self.log_image = self.images.log_image

    weights, board = Weights(), Board()
    pixels = np.zeros((4, 6, 3), np.uint8)
    log_picture([weights, CurveLogger(tmp_path), board], "val/reconstructions", pixels, 7)
    assert weights.images.seen[0]["step"] == 7
    assert board.experiment.seen[0][2:] == (7, {"dataformats": "HWC"})


def test_adversary_enters_at_its_step_and_counts_none(videos, tmp_path):
    weights = LossWeights(l1=1.0, perceptual=0.0, gan=0.1, align=0.0)
    settings = AdversarySettings(start_step=2, width=4, layers=2, warmup_steps=1)
    adversarial = module(weights, adversary=settings)
    assert adversarial.discriminator is not None
    before = [p.detach().clone() for p in adversarial.discriminator.parameters()]
    run = trainer(tmp_path, 4, SaveLast(), log_every_n_steps=1)
    run.fit(adversarial, data(videos))
    assert run.global_step == 4
    curves = read_curves(tmp_path)
    assert curves["train/gan"][:, 0].tolist() == [3, 4]
    assert curves["train/discriminator"][:, 0].tolist() == [3, 4]
    after = adversarial.discriminator.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    resumed = module(weights, adversary=settings)
    trainer(tmp_path, 5).fit(resumed, data(videos), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)


def test_alignment_trains_its_projection_and_leaves_the_teacher_out(videos, tmp_path):
    aligned = module(LossWeights(l1=1.0, perceptual=0.0, gan=0.0, align=1.0), teacher=HOGTeacher())
    assert aligned.align is not None
    before = aligned.align.weight.detach().clone()
    trainer(tmp_path, 3, SaveLast()).fit(aligned, data(videos))
    assert not torch.equal(before, aligned.align.weight)
    assert not any("teacher" in name for name in read_checkpoint(tmp_path / "last.ckpt")["state_dict"])


def test_missing_networks_are_named():
    with pytest.raises(ValueError, match=r"weights\.align is 1\.0 and there is no teacher.*model\.teacher"):
        module(LossWeights(perceptual=0.0, gan=0.0))
    with pytest.raises(ValueError, match=r"weights\.perceptual is 1\.0 and there is no perceptual"):
        module(LossWeights(gan=0.0, align=0.0))


def test_batches_follow_their_number_over_ranks():
    whole = [next(iter(StepBatches(4, first=k))) for k in range(3)]
    ranks = [[next(iter(StepBatches(2, first=k, rank=r, world_size=2))) for r in range(2)] for k in range(3)]
    assert [a + b for a, b in ranks] == whole


def test_training_clips_do_not_depend_on_workers(videos):
    def first_batches(workers):
        module = data(videos, num_workers=workers)
        module.setup("fit")
        batches = iter(module.train_dataloader())
        return [next(batches) for _ in range(3)]

    for a, b in zip(first_batches(0), first_batches(1), strict=True):
        assert torch.equal(a, b)


def test_held_out_videos_are_never_trained_on(videos):
    module = data(videos)
    module.setup("fit")
    (train,) = module._train
    assert module._val is not None
    names = lambda set_: {s.describe(v) for s in set_.sources for v in range(len(s))}  # noqa: E731
    assert len(names(module._val)) == 1
    assert not names(train) & names(module._val)


def test_epochs_of_a_few_batches_have_new_ones_and_resume_exactly(videos, tmp_path):
    """limit_train_batches ends an epoch early; its batches are not those of the last one, also after a resume."""
    seen, straight = [Seen() for _ in range(4)], module()
    trainer(tmp_path / "a", 7, seen[0]).fit(straight, data(videos))
    assert len(set(seen[0].sums)) == 7
    short = {"limit_train_batches": 2}
    trainer(tmp_path / "b", 7, seen[1], **short).fit(module(), data(videos))
    assert seen[1].sums == seen[0].sums
    trainer(tmp_path / "c", 5, seen[2], SaveLast(), **short).fit(module(), data(videos))
    resumed, ckpt = module(), str(tmp_path / "c" / "last.ckpt")
    trainer(tmp_path / "c", 7, seen[3], **short).fit(resumed, data(videos), ckpt_path=ckpt, weights_only=True)
    assert seen[2].sums + seen[3].sums == seen[0].sums


def test_curves_keep_the_later_of_two_values_and_skip_a_cut_line(tmp_path):
    append_curves(tmp_path, [(1, "loss", 3.0), (2, "loss", 2.0)])
    append_curves(tmp_path, [(2, "loss", 1.5), (3, "loss", 1.0)])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,loss,0.")
    assert read_curves(tmp_path)["loss"].tolist() == [[1, 3.0], [2, 1.5], [3, 1.0]]
    with pytest.raises(FileNotFoundError, match=r"no metrics\.csv in"):
        read_curves(tmp_path / "nowhere")


def test_each_adversary_has_its_own_means_of_scores(videos, tmp_path):
    """LeCam's penalty holds each adversary near its own means; one pair for both would mix two scales of scores."""
    weights = LossWeights(l1=1.0, perceptual=0.0, gan=0.1, align=0.0)
    settings = AdversarySettings(start_step=0, width=4, layers=2, warmup_steps=1, lecam=1.0, lr=1e-12)
    trained = module(weights, adversary=settings)
    torch.nn.init.constant_(trained.discriminator.image.score.bias, 3.0)
    torch.nn.init.constant_(trained.discriminator.video.score.bias, -3.0)
    trainer(tmp_path, 3, SaveLast()).fit(trained, data(videos))
    image, video = trained.lecam
    assert image.real_mean > 0.05
    assert video.real_mean < -0.05

    shared = read_checkpoint(tmp_path / "last.ckpt")
    state = {k: v for k, v in shared["state_dict"].items() if not k.startswith("lecam.1")}
    shared["state_dict"] = {k.replace("lecam.0.", "lecam."): v for k, v in state.items()}
    torch.save(shared, tmp_path / "old.ckpt")
    resumed = module(weights, adversary=settings)
    trainer(tmp_path, 3).fit(resumed, data(videos), ckpt_path=str(tmp_path / "old.ckpt"), weights_only=True)
    assert [part.real_mean.item() for part in resumed.lecam] == [image.real_mean.item()] * 2
