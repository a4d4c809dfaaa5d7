"""Ranks that train together equal one process: every loss, images and videos of several sizes, odd validation."""

import multiprocessing
import runpy
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from repvitok.cli import main
from repvitok.data.clips import MixtureBatches
from repvitok.data.video import write_video
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.progress import read_curves

RANK = Path(__file__).with_name("rank.py")
STEPS, ADVERSARY_ENTERS = 10, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Videos and images of noise that moves."""
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(3):
        noise = generator.integers(0, 255, (32, 48, 3), dtype=np.uint8)
        write_video(root / f"videos/{number}.mp4", np.stack([np.roll(noise, t, axis=1) for t in range(12)]), 10)
        Image.fromarray(noise).save(root / f"images/{number}.png")
    return [str(root / "videos"), str(root / "images")]


def recipe(path: Path, folders: list[str], scale: int) -> Path:
    """A mixture of three kinds with every loss of Eq. 1-2; `scale` multiplies the clips per batch."""
    mixture = [{"frames": 1, "batch_size": 2 * scale}, {"size": [32, 48], "batch_size": scale}]
    perceptual = {"net": "squeeze", "weights_path": "", "frames_per_clip": 2, "random_backbone_for_tests": True}
    path.write_text(
        yaml.safe_dump(
            {
                "seed_everything": 0,
                "trainer": {"accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1, "val_check_interval": 5},
                "model": {
                    "tokenizer": {"width": 32, "depth": 1, "heads": 2, "latent_dim": 8},
                    "weights": {"l1": 1.0, "l2": 1.0, "gradient": 0.5, "perceptual": 1.0, "gan": 0.1, "align": 1.0},
                    "teacher": {"class_path": "repvitok.training.teacher.HOGTeacher"},
                    "perceptual": {"class_path": "repvitok.training.losses.PerceptualLoss", "init_args": perceptual},
                    "adversary": {
                        "start_step": ADVERSARY_ENTERS,
                        "width": 4,
                        "layers": 2,
                        "lecam": 1.0,
                        "warmup_steps": 1,
                    },
                    "optimizer": {"name": "adamw", "lr": 1e-3, "warmup_steps": 1},
                },
                "data": {
                    "folders": folders,
                    "size": [32, 32],
                    "frames": 5,
                    "batch_size": scale,
                    "mixture": mixture,
                    "held_out": 0.34,
                    "val_clips": 5,
                },
            }
        )
    )
    return path


def train_together(arguments: list[str], world: int) -> list[int | None]:
    """Run `repvitok` on gloo CPU ranks; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch.cli", "repvitok.training.module"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        process = context.Process(target=runpy.run_path, args=(str(RANK), {"place": place, "arguments": arguments}))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_two_ranks_train_a_mixture_with_every_loss_as_one_process_does(folders, tmp_path):
    kinds = MixtureBatches((1, 1, 1), (1.0, 1.0, 1.0), seed=0)
    assert {kinds.kind(step) for step in range(ADVERSARY_ENTERS, STEPS)} == {0, 1, 2}
    alone = recipe(tmp_path / "alone.yaml", folders, scale=2)
    assert main(["fit", "-c", str(alone), f"--trainer.default_root_dir={tmp_path / 'alone'}"]) == 0
    shared = recipe(tmp_path / "shared.yaml", folders, scale=1)
    run = ["fit", "-c", str(shared), f"--trainer.default_root_dir={tmp_path / 'shared'}", "--trainer.devices=2"]
    assert train_together(run, 2) == [0, 0]

    curves = [read_curves(tmp_path / name) for name in ("alone", "shared")]
    assert curves[0]["train/discriminator"][:, 0].tolist() == list(range(ADVERSARY_ENTERS + 1, STEPS + 1))
    assert curves[0].keys() == curves[1].keys()
    np.testing.assert_allclose(curves[1]["val/psnr"], curves[0]["val/psnr"], atol=1e-3)
    whole, halves = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("alone", "shared"))
    for name, weight in whole.items():
        torch.testing.assert_close(halves[name], weight, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
