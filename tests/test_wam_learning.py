"""The benchmark's arms that compare tokenizers: their overrides fit the recipes, their measures what was trained."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from repvitok import RepViTokConfig
from repvitok.cli import STAGE as REPVITOK
from repvitok.data import LeRobotWriter
from repvitok.runtime.lightning_cli import parse_recipe
from repwam_core.cli import STAGE as REPWAM
from safetensors.torch import save_file

pytestmark = pytest.mark.sim
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CAMERA, SIZE = "observation.images.corner2", (32, 32)


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    pytest.importorskip("metaworld")
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module("wam_learning")
    for name in ("wam_learning", "tokenizer_quality", "pretrained_teacher"):
        sys.modules.pop(name, None)


@pytest.fixture
def options(tmp_path) -> argparse.Namespace:
    return argparse.Namespace(
        network="test_vit", stage=None, weights=tmp_path / "net.safetensors", wan=None, tasks=None, run=None,
        demonstrations=None, steps=None,
    )  # fmt: skip


def test_every_arm_of_the_tokenizers_is_a_recipe(bench, options):
    recipes = [str(path) for path in bench._config(options).recipe_files("repvitok")]
    for name, arm in bench.QUESTIONS["tokenizers"].items():
        given = bench._overrides(options, arm)
        model = parse_recipe("fit", recipes, REPVITOK, ["--data.folders=[x]", *given]).model
        network = model.teacher if name == "RepViTok" else model.features
        assert (network is not None) == (name not in ("ViTok", "Wan2.2")), name
        if network is not None:
            assert network.init_args.name == "test_vit"
        if "features" in name:
            assert (model.teacher, model.weights.align) == (None, 0)
            expected = {"features, 48": 48, "features, 48, learned": 48}.get(name, 96)
            assert model.tokenizer.latent_dim == expected
    options.stage = 3
    (override,) = bench._overrides(options, bench.Arm(tokenizer=("--model.features=NETWORK",)))
    assert '"stage": 3' in override
    assert "ConvNetTeacher" in override


def test_the_arms_that_tune_are_recipes_of_stage_two(bench, options):
    recipes = [str(path) for path in bench._config(options).recipe_files("adapt")]
    data = bench.Data(*map(Path, ("dataset", "tokenizer", "lat", "latents")), digest="")
    for arm in bench.QUESTIONS["tuning"].values():
        model = parse_recipe("fit", recipes, REPWAM, ["--data.latents=x", *bench._tuning(arm, data)]).model
        assert (model.tune_tokenizer is None) == (arm.tune == 0)
        assert arm.tune == 0 or (model.tune_tokenizer.last_k, model.tune_tokenizer.dataset) == (arm.tune, "dataset")


def test_features_predict_themselves_and_little_else(bench, options, tmp_path):
    """R^2 of a network's own raw features is near 1, of six components less; without a probe of actions it is NaN."""
    from repvitok.baselines import FeatureTokenizer
    from repvitok.training.teacher import TimmTeacher

    writer = LeRobotWriter(
        tmp_path / "data", version="v2.1", fps=20, cameras={CAMERA: SIZE}, state_names=["p"], action_names=["x"],
        robot_type="arm",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for index in range(4):
        frames = rng.integers(0, 256, (18, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        numbers = {name: rng.normal(size=(18, 1)).astype(np.float32) for name in ("state", "action")}
        writer.add_episode(index, frames={CAMERA: frames}, task="go", **numbers)
    writer.finalize()
    torch.manual_seed(0)
    teacher = TimmTeacher("test_vit", random_weights_for_tests=True)
    save_file(teacher.network.state_dict(), options.weights)
    config = argparse.Namespace(size=SIZE, held_out=0.25)
    found = {}
    for squeeze, d in (("none", 6), ("pca", 6)):
        sizes = RepViTokConfig(width=32, depth=1, heads=2, latent_dim=d)
        tokenizer = FeatureTokenizer.of(teacher, sizes, squeeze).eval()
        tokenizer.fit_squeeze([torch.rand(1, 3, 9, *SIZE) * 2 - 1 for _ in range(2)])
        tokenizer.save_pretrained(tmp_path / squeeze)
        latents = tmp_path / "latents"
        data = bench.Data(tmp_path / "data", tmp_path / squeeze, tmp_path, latents, digest="")
        found[squeeze] = bench._quality(tmp_path, data=data, config=config, options=options)
    name = "R^2 of the network's features"
    assert found["none"][name] > 0.9 > found["pca"][name]
    assert np.isnan(found["none"][bench.QUALITIES[-1]])
    assert np.isfinite(found["pca"]["PSNR, dB"])
