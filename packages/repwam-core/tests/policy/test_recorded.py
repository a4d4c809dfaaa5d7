"""`repwam test` with recorded episodes says what exporting the checkpoint and `repwam openloop` would say."""

import json

import pytest
import yaml
from repvitok.runtime.progress import read_curves
from repwam_core.cli import main

SIZES = {"width": 32, "depth": 1, "heads": 2, "ffn": 64, "action_width": 32, "action_ffn": 64}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run of two steps on one of the world's two episodes: the folder, and the arguments of its recipe."""
    folder = tmp_path_factory.mktemp("run")
    values = {
        "seed_everything": 0,
        "model": {
            "preset": "tiny",
            "wam": {**SIZES, "window": 1, "state_token": True},
            "space": "robot",
            "chunk_sizes": [1, 1],
            "plan": {"chunk_frames": 1, "video_steps": 2, "action_steps": 2},
            "optimizer": {"name": "adamw", "lr": 1e-3, "warmup_steps": 1},
        },
        "data": {"latents": str(world.shards), "space": "robot", "transitions": 2, "batch_size": 2, "held_out": 0.5},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(folder)},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    arguments = ["-c", str(recipe), "--data.text_encoder=minilm"]
    assert main(["fit", *arguments]) == 0
    return folder, arguments


def recorded(world, **changes: str) -> list[str]:
    settings = {"dataset": str(world.dataset), "tokenizer": str(world.policy / "tokenizer"), **changes}
    return [f"--recorded.{name}={value}" for name, value in settings.items()]


def test_the_test_verb_equals_export_and_openloop(world, run, tmp_path):
    folder, arguments = run
    assert main(["test", *arguments, *recorded(world, clip_features="[hog]")]) == 0
    tested = json.loads((folder / "openloop.json").read_text())
    (held_out,) = tested["episodes"]
    assert not held_out["seen"], "training has not seen the held-out episode's task"

    policy, written = str(tmp_path / "policy"), tmp_path / "written.json"
    tokenizer = str(world.policy / "tokenizer")
    exported = ["--ckpt", str(folder), "--tokenizer", tokenizer, "--latents", str(world.shards), "--out", policy]
    assert main(["export", *exported]) == 0
    chosen = ["--policy", policy, "--dataset", str(world.dataset), "--episodes", str(held_out["index"])]
    assert main(["openloop", *chosen, "--clip-features", "hog", "--out", str(written)]) == 0
    expected = json.loads(written.read_text())
    for name in ("mean_absolute_error", "open_loop_score", "psnr_db", "imagined_video"):
        assert tested[name] == expected[name], name

    curves = read_curves(folder)
    rows = {name: float(points[-1, 1]) for name, points in curves.items() if name.startswith("test/")}
    video = expected["imagined_video"]
    assert rows["test/unseen/psnr_db"] == pytest.approx(video["psnr_db"], rel=1e-4)
    assert rows["test/unseen/ssim"] == pytest.approx(video["ssim"], rel=1e-4, abs=1e-6)
    for name in ("copied", "reconstructed"):
        assert rows[f"test/unseen/psnr_db_{name}"] == pytest.approx(expected["psnr_db"][name], rel=0.05), name
    assert rows["test/unseen/y_mae_si"] == pytest.approx(expected["mean_absolute_error"]["policy"]["y"], rel=1e-4)
    headline = next(iter(expected["open_loop_score"].values()))
    assert rows["test/unseen/ols_0.1"] == pytest.approx(headline["0.1"], abs=1e-6)


def test_all_episodes_of_a_data_set_are_tested_if_asked(world, run):
    folder, arguments = run
    assert main(["test", *arguments, *recorded(world, episodes="all")]) == 0
    tested = json.loads((folder / "openloop.json").read_text())
    assert {name: len(part["episodes"]) for name, part in tested["groups"].items()} == {"seen": 1, "unseen": 1}


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"dataset": "nowhere"}, [], "nowhere"),
        ({"tokenizer": "nowhere"}, [], "nowhere"),
        ({"tokenizer": "null"}, [], "expected both --recorded.dataset and --recorded.tokenizer"),
        ({"clip_features": "[i4d]"}, [], "clip features: expected hog"),
        ({}, ["--data.held_out=0"], "the run holds out no whole episodes"),
    ],
)
def test_what_cannot_be_tested_ends_in_one_error(world, run, capsys, changes, extra, message):
    _, arguments = run
    assert main(["test", *arguments, *recorded(world, **changes), *extra]) == 2
    assert message in capsys.readouterr().err
