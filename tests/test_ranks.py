"""Several ranks on this machine, started as a user starts them: the paper's recipe and two overlays."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from repvitok.runtime.checkpointing import is_sharded, read_checkpoint
from repwam_core.export import export_wam, read_trained
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RECIPES = ("base.yaml", "sharded.yaml", "tiny.yaml")
PACKED = ("--data.packing.token_budget=400", "--model.optimizer.newton_schulz_dtype=float64")
STEPS, MORE = 3, 5


def _repwam(verb, latents, out, devices, *overrides, recipes=RECIPES, settings=PACKED):
    files = [word for name in recipes for word in ("-c", f"recipes/3_repwam/{name}")]
    command = [
        Path(sysconfig.get_path("scripts")) / "repwam", verb, *files, f"--data.latents={latents}",
        f"--trainer.devices={devices}", f"--trainer.default_root_dir={out}", *settings, *overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_and_four_ranks_of_the_papers_recipe_learn_the_same(noise_latents, tmp_path):
    """Two ranks that gather two sequences a step, and four, sharded by two; two go on where four ended."""
    two, four = tmp_path / "two", tmp_path / "four"
    steps = f"--trainer.max_steps={STEPS}"
    _repwam("fit", noise_latents, two, 2, steps, "--trainer.accumulate_grad_batches=2")
    _repwam("fit", noise_latents, four, 4, steps, "--trainer.strategy.init_args.shard_size=2")
    assert is_sharded(four / "last.ckpt")
    expected, found = (read_trained(folder / "last.ckpt").wam.state_dict() for folder in (two, four))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    _repwam("fit", noise_latents, four, 2, f"--trainer.max_steps={MORE}", "--ckpt_path=last")
    assert read_checkpoint(four / "last.ckpt")["global_step"] == MORE
    told = _repwam("predict", noise_latents, four, 2)  # what rollouts plan, with weights gathered from both
    assert f"{four}/predictions: predictions in 2 files" in told
    planned = [load_file(path)["actions"] for path in sorted((four / "predictions").iterdir())]
    assert all(torch.isfinite(actions).all() for actions in planned)


@pytest.mark.slow
def test_more_devices_need_no_other_setting(noise_latents, tmp_path):
    """Both stages on two ranks; the second one leaves the latent actions' projections without gradients."""
    small = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.transitions=2", "--data.batch_size=2")
    first, second = tmp_path / "first", tmp_path / "second"
    _repwam("fit", noise_latents, first, 2, recipes=("tiny_pretrain.yaml",), settings=small)
    export_wam(first / "last.ckpt", tmp_path / "wam")
    start = f"--model.init_from={tmp_path / 'wam'}"
    _repwam("fit", noise_latents, second, 2, start, recipes=("tiny_adapt.yaml",), settings=small)
    before, after = (read_trained(folder / "last.ckpt").wam.state_dict() for folder in (first, second))
    assert all(torch.equal(after[name], weight) for name, weight in before.items() if name.startswith("spaces.latent."))
    assert any(not torch.equal(after[name], weight) for name, weight in before.items() if name.startswith("layers."))
