"""The command line: quick help, one line for mistakes, every verb callable many times in one process."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.imports import RequirementCache
from repvitok import RepViTok
from repvitok.cli import main
from repvitok.data.video import VideoFile, write_video
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.errors import UserError
from repvitok.runtime.lightning_cli import several_processes
from repvitok.runtime.pretrained import find_device
from repvitok.runtime.progress import read_curves
from repvitok.training.module import RepViTokTraining
from safetensors.torch import load_file

RECIPE = """
seed_everything: 0
trainer: {accelerator: cpu, max_steps: 2, log_every_n_steps: 1, val_check_interval: 2}
model:
  tokenizer: {width: 32, depth: 1, heads: 2, latent_dim: 8}
  weights: {perceptual: 0, gan: 0, align: 1}
  teacher: {class_path: repvitok.training.teacher.HOGTeacher}
  optimizer: {newton_schulz_dtype: float32, warmup_steps: 1}
data: {size: [32, 32], frames: 5, batch_size: 1, held_out: 0.5, val_clips: 2}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    for number in range(2):
        frames = np.random.default_rng(number).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        (tmp_path / "videos").mkdir(exist_ok=True)
        write_video(tmp_path / "videos" / f"{number}.mp4", frames, fps=10)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def fit(recipe: Path, *extra: str, verb: str = "fit") -> int:
    root = recipe.parent
    places = ["--trainer.default_root_dir", str(root / "run"), "--data.folders", f"[{root / 'videos'}]"]
    return main([verb, "-c", str(recipe), *places, *extra])


def test_fit_resume_test_export_in_one_process(recipe, capsys):
    root = recipe.parent
    before = torch.get_rng_state(), os.environ.get("PL_GLOBAL_SEED"), list(sys.argv)
    assert fit(recipe) == 0
    assert {"config.yaml", "last.ckpt", "metrics.csv", "reconstructions"} <= {p.name for p in (root / "run").iterdir()}
    assert fit(recipe, "--trainer.max_steps", "4", "--ckpt_path", "last") == 0
    assert torch.load(root / "run" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert fit(recipe, verb="test") == 0
    assert fit(recipe, verb="predict") == 0
    predicted = [load_file(path) for path in sorted((root / "run/predictions").glob("*.safetensors"))]
    assert f"{root}/run/predictions: predictions in {len(predicted)} files" in capsys.readouterr().out
    for batch in predicted:
        assert batch["reconstruction"].shape == batch["video"].shape
        assert batch["video"].shape[1] == 3
    assert main(["export", "--ckpt", str(root / "run"), "--out", str(root / "export")]) == 0
    assert RepViTok.from_pretrained(root / "export").digest()[:16] in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (os.environ.get("PL_GLOBAL_SEED"), list(sys.argv)) == before[1:]


def test_a_run_ends_with_its_checkpoint_and_the_command_that_comes_next(recipe, capsys):
    root = recipe.parent
    assert fit(recipe) == 0
    run = root / "run"
    told = [f"{run}/last.ckpt: step 2", f"next: repvitok export --ckpt {run} --out TOKENIZER"]
    assert capsys.readouterr().out.splitlines()[-2:] == told
    assert main(["export", "--ckpt", str(run), "--out", str(root / "tok")]) == 0
    command = f"next: repvitok encode --tokenizer {root}/tok --dataset DATASET --size 32x32 --out LATENTS"
    assert capsys.readouterr().out.splitlines()[-1] == command
    card = (root / "tok/README.md").read_text()
    (psnr,) = [points[-1, 1] for name, points in read_curves(run).items() if name == "val/psnr"]
    for said in ("torch.zeros(1, 3, 5, 32, 32)", "| data sets | videos |", f"| val/psnr | {psnr:.4g} |"):
        assert said in card
    assert fit(recipe, verb="test") == 0
    said = capsys.readouterr().out
    assert "psnr" in said
    assert "DataLoader" not in said  # Lightning's table of the same numbers


def test_loggers_and_lightnings_callbacks_come_beside_what_a_run_always_has(recipe, capsys):
    """The overlay's way of naming a folder in the run's, a snapshot every two steps, a progress bar of Lightning's."""
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--trainer.logger.name=csv"]
    snapshots = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    snapshots += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks+=TQDMProgressBar"]
    assert fit(recipe, *logger, *snapshots, "--trainer.max_steps=4") == 0
    run = recipe.parent / "run"
    assert {"config.yaml", "last.ckpt", "metrics.csv", "csv"} <= {path.name for path in run.iterdir()}
    assert read_curves(run)["val/psnr"][:, 0].tolist() == [1, 3]  # Lightning counts from 0
    assert "val/psnr" in (run / "csv/version_0/metrics.csv").read_text()
    kept = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert [read_checkpoint(path)["global_step"] for path in kept] == [2, 4]
    shown = capsys.readouterr()
    assert "4/4" in shown.out
    assert "repvitok: step" not in shown.err  # one bar


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named(recipe, capsys, monkeypatch, name):
    overlay = Path(__file__).parents[3] / f"recipes/loggers/{name}.yaml"
    if not overlay.exists():
        pytest.skip("the recipes are not here, only this package's sdist")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=1000"))
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    assert fit(recipe, "-c", str(overlay)) == 2
    assert f"{name} is not installed: pip install 'repvitok[{name}]'" in capsys.readouterr().err


def test_without_a_recipe_one_is_proposed(capsys):
    assert main(["fit", "--data.folders=[x]"]) == 2
    assert "no recipe was given, -c recipes/1_repvitok/tiny.yaml for example" in capsys.readouterr().err


def test_a_validation_that_never_ended_is_made_up_for_after_the_last_step(recipe, monkeypatch):
    whole, stopped = recipe.parent / "whole", recipe.parent / "stopped"
    assert fit(recipe, "--trainer.default_root_dir", str(whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RepViTokTraining, "reconstruct", lambda *_: _fail())
        with pytest.raises(RuntimeError, match="broken"):
            fit(recipe, "--trainer.default_root_dir", str(stopped), "--checkpoint.every_n_steps", "2")
    assert "val/psnr" not in read_curves(stopped)
    assert fit(recipe, "--trainer.default_root_dir", str(stopped), "--ckpt_path", "last") == 0
    assert (stopped / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert "val/psnr" in read_curves(stopped)


def _fail() -> None:
    raise RuntimeError("broken")


def test_a_damaged_checkpoint_is_kept_and_the_one_before_it_used(recipe, capsys):
    run, more = recipe.parent / "run", ("--trainer.max_steps=3", "--checkpoint.every_n_steps=1", "--ckpt_path=last")
    assert fit(recipe, *more) == 0
    assert f"no checkpoint in {run}: starting at step 0" in capsys.readouterr().err
    whole = read_checkpoint(run / "last.ckpt")["state_dict"]
    damaged = bytearray((run / "last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 4
    (run / "last.ckpt").write_bytes(damaged)
    assert fit(recipe, *more) == 0
    said = capsys.readouterr().err
    assert f"warning: {run}/last.ckpt is damaged (the bytes of its data/" in said
    assert f"resuming at step 2 of {run}/last.1.ckpt" in said
    assert f"{run}/last.ckpt is kept as last.ckpt.damaged-1" in said
    assert (run / "last.ckpt.damaged-1").read_bytes() == damaged
    again = read_checkpoint(run / "last.ckpt")["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert fit(recipe, *more) == 0
    assert f"resuming at step 3 of {run}/last.ckpt" in capsys.readouterr().err

    for name in ("last.ckpt", "last.1.ckpt"):
        (run / name).write_bytes((run / name).read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert fit(recipe, *more) == 2
    assert "is whole (last.ckpt: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_has_its_folder_for_itself(recipe, capsys):
    run = recipe.parent / "run"
    run.mkdir()
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would hold it
        assert fit(recipe) == 2
    assert f"{run}: another run is training here; wait until it has ended" in capsys.readouterr().err
    (run / "policy.json").touch()
    assert fit(recipe) == 2
    assert f"{run} holds a policy; give a training run a folder of its own" in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} <= {"policy.json", ".lock"}


def test_the_same_seed_trains_the_same_weights(recipe):
    digests = []
    for _ in range(2):
        torch.rand(3)
        assert fit(recipe) == 0
        out = recipe.parent / "export"
        assert main(["export", "--ckpt", str(recipe.parent / "run"), "--out", str(out)]) == 0
        digests.append(RepViTok.from_pretrained(out).digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.tokenizer.widht", "3"], "widht 3 (did you mean --model.tokenizer.width?)"),
        (["--data.folders", "one"], "\"data.folders\": Expected a <class 'list'>"),
        (["--model.tokenizer.width", "wide"], "width"),
        (["--model.tokenizer.patch_size", "0"], "patch_size"),
        (["--data.folders", "[/nowhere/at/all]"], "/nowhere/at/all"),
        (["--ckpt_path", "/nowhere/last.ckpt"], "no checkpoint at /nowhere/last.ckpt"),
        (["--model.teacher", "null"], "there is no teacher"),
        (
            ["--model.teacher", "repvitok.training.teacher.TimmTeacher"],
            "teacher 'vit_pe_core_base_patch16_224' needs its weights",
        ),
        (["--data.size", "[30, 32]"], "30"),
        (["--data.frames", "6"], "6"),
        (["--trainer.precision=16-true"], "trainer.precision: expected 32-true"),
        (["--trainer.plugins=lightning.pytorch.plugins.DoublePrecision"], "trainer.precision: expected 32-true"),
        (["--trainer.devices=1000000000"], "trainer.devices: expected at most"),
        (["--data.seed=-1"], "seed: expected int >= 0 (-1)"),
        (["--data.stride=[1,1000000000]"], "stride must be 1 to 10000"),
        (["-c", "/nowhere/recipe.yaml"], "recipe.yaml"),
    ],
)
def test_mistakes_end_as_one_line_and_exit_2(recipe, capsys, extra, expected):
    assert fit(recipe, *extra) == 2
    message = capsys.readouterr().err.strip()
    assert message.splitlines()[-1].startswith("error: ")
    assert "Union" not in message
    assert expected in message.splitlines()[-1]
    assert "Traceback" not in message


def test_broken_yaml_and_broken_checkpoint_end_as_one_line(recipe, capsys):
    broken = recipe.parent / "broken.yaml"
    broken.write_text("trainer: {max_steps: [")
    assert fit(broken) == 2
    assert "error: " in capsys.readouterr().err
    (recipe.parent / "cut.ckpt").write_bytes(b"PK\x03\x04 cut")
    assert fit(recipe, "--ckpt_path", str(recipe.parent / "cut.ckpt")) == 2
    assert "cut.ckpt (8 bytes) is not a readable checkpoint" in capsys.readouterr().err
    assert fit(recipe, verb="validate") == 2
    assert "train first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["frobnicate"], "frobnicate"),
        (["export", "--out", "x"], "--ckpt"),
        (["encode", "--tokenizer", "x", "--dataset", "y", "--out", "z", "--size", "big"], "64 or 96x128"),
        (
            ["encode", "--tokenizer", "x", "--dataset", "y", "--out", "z", "--size", "64", "--shard", "3/3"],
            "0 <= I < N",
        ),
        (["merge", "--out", "/nowhere"], "/nowhere: no such folder"),
        (["export", "--ckpt", "/nowhere.ckpt", "--out", "x"], "no checkpoint at /nowhere.ckpt"),
    ],
)
def test_mistakes_of_other_verbs(capsys, argv, expected):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_encode_and_decode_a_data_set(tmp_path, shared_data, capsys):
    torch.manual_seed(0)
    from repvitok import RepViTokConfig

    RepViTok(RepViTokConfig(width=32, depth=1, heads=2)).save_pretrained(tmp_path / "tok")
    source = shared_data / "unitree-g1-lerobot-v2.1"
    tokenizer = ["--tokenizer", str(tmp_path / "tok")]
    places = ["--dataset", str(source), "--out", str(tmp_path / "latents"), "--size", "48x64", "--stride", "8"]
    assert main(["encode", *tokenizer, *places, "--shard", "1/2"]) == 0
    assert "clips/s of 17 frames" in capsys.readouterr().out
    assert main(["merge", "--out", str(tmp_path / "latents")]) == 2
    assert "1 of 2 parts are not finished (0/2)" in capsys.readouterr().err
    assert main(["encode", *tokenizer, *places, "--shard", "0/2"]) == 0
    assert main(["merge", "--out", str(tmp_path / "latents")]) == 0
    decode = ["decode", *tokenizer, "--latents", str(tmp_path / "latents"), "--out", str(tmp_path / "out")]
    assert main([*decode, "--episodes", "2"]) == 0
    (written,) = (tmp_path / "out").iterdir()
    assert (VideoFile(written).height, VideoFile(written).width) == (48, 64)
    assert main([*decode, "--episodes", "99"]) == 2
    torch.manual_seed(1)
    RepViTok(RepViTokConfig(width=32, depth=1, heads=2)).save_pretrained(tmp_path / "tok")
    assert main(decode) == 2
    assert "made by tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_torch(argument):
    code = (
        f"import sys; from repvitok.cli import main; code = main([{argument!r}]); "
        "heavy = {'torch', 'lightning', 'numpy'} & set(sys.modules); sys.exit(code or (3 if heavy else 0))"
    )
    started = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("usage" if argument == "--help" else "repvitok 0.") in done.stdout
    assert os.times().children_user - started[1] < 2.0


def test_the_help_of_a_training_verb_is_made_once(monkeypatch, tmp_path, capsys):
    made = []

    def slow(verb, argv, stage):
        made.append((verb, argv, stage.name))
        print(f"usage: {verb}, made {len(made)} times")
        raise SystemExit(0)

    monkeypatch.setattr("repvitok.runtime.lightning_cli.run_lightning", slow)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for verb, option, times in (("fit", "--help", 1), ("fit", "-h", 1), ("test", "--help", 2), ("fit", "--help", 2)):
        assert main([verb, option]) == 0
        assert len(made) == times
        assert capsys.readouterr().out == f"usage: {verb}, made {2 if verb == 'test' else 1} times\n"
    monkeypatch.setattr("repvitok.runtime.commands.version", lambda name: "another version")
    assert main(["fit", "--help"]) == 0
    assert capsys.readouterr().out == "usage: fit, made 3 times\n"
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["fit", "--help"]) == 0
    assert capsys.readouterr().out == "usage: fit, made 4 times\n"


def test_our_options_come_before_lightnings(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["fit", "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: repvitok fit -c RECIPE")
    places = [
        told.index(f"--{name}") for name in ("model.tokenizer", "data.folders", "checkpoint", "trainer.max_steps")
    ]
    assert places[-1] == max(places)


@pytest.mark.parametrize(
    ("gpus", "devices", "several"),
    [
        (1, "auto", False),
        (1, -1, False),
        (1, "-1", False),
        (1, [0], False),
        (1, "1", False),
        (2, "auto", True),
        (2, -1, True),
        (2, 2, True),
        (2, [1], False),
        (2, "1", False),
        (2, "0,1", True),
    ],
)
def test_one_gpu_takes_no_strategy_of_several(monkeypatch, gpus, devices, several):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    given = SimpleNamespace(accelerator="gpu", devices=devices, num_nodes=1)
    assert several_processes(given) == several
    assert several_processes(SimpleNamespace(accelerator="gpu", devices=devices, num_nodes=2))


def test_devices_auto_trains_on_one_device_without_ddp(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer, *_, **__: seen.append(trainer))
    monkeypatch.setattr("repvitok.runtime.lightning_cli.StageCLI.after_fit", lambda _: None)
    for devices in ("auto", "2"):
        assert fit(recipe, f"--trainer.devices={devices}") == 0
    assert [isinstance(trainer.strategy, DDPStrategy) for trainer in seen] == [False, True]


@pytest.mark.parametrize("name", ["xyz", "cuda:99", "meta", "", "mps:7"])
def test_a_device_that_is_none_is_one_line(name):
    with pytest.raises(UserError, match=r"^--device"):
        find_device(name)
