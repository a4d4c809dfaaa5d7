"""From a run's checkpoint to a policy folder: everything arrives, and parts that do not belong are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from repvitok import RepViTok, RepViTokConfig
from repvitok.data import LeRobotReader
from repvitok.runtime.errors import UserError
from repvitok.runtime.progress import append_curves
from repwam_core.cli import main
from repwam_core.export import read_trained
from repwam_core.interface import Observation
from repwam_core.model.wam import WorldActionModel
from repwam_core.policy import Policy
from repwam_core.policy.folder import LoadedPolicy, PolicyManifest
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.sampling import ChunkSpec
from repwam_core.statistics import Statistics


@pytest.fixture(scope="module")
def checkpoint(world, fit_one_step, tmp_path_factory):
    """One step of `repwam fit` on the world's shards."""
    folder = tmp_path_factory.mktemp("run")
    plan = {"chunk_frames": 1, "video_steps": 2, "action_steps": 2}
    fit_one_step(folder, world, window=1, chunk_sizes=[1, 1], plan=plan)
    return folder / "last.ckpt"


def _export(checkpoint, world, out, *more: str) -> int:
    tokenizer = world.policy / "tokenizer"
    return main(["export", "--ckpt", str(checkpoint), "--tokenizer", str(tokenizer), "--out", str(out), *more])


def test_a_policy_plans_no_chunk_that_was_not_trained(checkpoint, world, tmp_path, capsys):
    out = tmp_path / "policy"
    assert _export(checkpoint, world, out) == 0
    parts = LoadedPolicy.load(out)
    assert parts.manifest.chunks == ChunkSpec(smallest=1, largest=1)
    assert BatchedPolicy(parts).plan.chunk_frames == 1
    with pytest.raises(UserError, match="trained on chunks of 1 to 1 latent frames"):
        BatchedPolicy(parts, chunk_frames=2)
    assert _export(checkpoint, world, tmp_path / "other", "--chunk-frames", "2") == 2
    assert "trained on chunks of 1 to 1 latent frames" in capsys.readouterr().err
    document = json.loads((out / "policy.json").read_text())
    del document["chunks"]  # as version 0.1 wrote it
    (out / "policy.json").write_text(json.dumps(document))
    assert BatchedPolicy.from_pretrained(out, chunk_frames=2).plan.chunk_frames == 2


def test_the_exported_policy_is_what_was_trained(checkpoint, world, tmp_path):
    assert _export(checkpoint, world, tmp_path / "policy", "--latents", str(world.shards), "--name", "arm") == 0
    trained = read_trained(checkpoint)
    manifest = PolicyManifest.load(tmp_path / "policy")
    assert manifest.size == (32, 16)
    assert manifest.embodiment.name == "arm"
    assert manifest.embodiment.rate_hz == 20
    assert manifest.plan.chunk_frames == 1
    assert Statistics.load(tmp_path / "policy" / "statistics.json") == world.store.statistics == trained.statistics
    wam = WorldActionModel.from_pretrained(tmp_path / "policy" / "wam")
    assert wam.digest() == trained.wam.digest() == manifest.digests["wam"]
    assert (tmp_path / "policy" / "text.safetensors").exists()


def test_the_exported_policy_acts(checkpoint, world, tmp_path):
    assert _export(checkpoint, world, tmp_path / "policy", "--latents", str(world.shards)) == 0
    policy = Policy.from_pretrained(tmp_path / "policy")
    policy.reset("go left")
    reader = LeRobotReader(world.dataset)
    images = {camera: reader.frames(0, camera, [0])[0] for camera in reader.camera_keys}
    chunk = policy.act(Observation(images=images, state=np.zeros(2, np.float32)))
    assert chunk.actions.shape == (4, 3)


def test_an_earlier_policy_is_replaced_and_other_folders_are_left_alone(checkpoint, world, tmp_path, capsys):
    assert _export(checkpoint, world, tmp_path / "policy") == 0
    assert _export(checkpoint, world, tmp_path / "policy") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert _export(checkpoint, world, tmp_path / "mine") == 2
    assert "holds no policy" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_damaged_instructions_are_not_exported(checkpoint, world, tmp_path, capsys):
    latents = shutil.copytree(world.shards, tmp_path / "latents")
    path = latents / "text-minilm.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert _export(checkpoint, world, tmp_path / "policy", "--latents", str(latents)) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_another_tokenizer_is_refused(checkpoint, world, tmp_path, capsys):
    torch.manual_seed(7)
    RepViTok(RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8)).save_pretrained(tmp_path / "other")
    arguments = ["--ckpt", str(checkpoint), "--tokenizer", str(tmp_path / "other"), "--out", str(tmp_path / "policy")]
    assert main(["export", *arguments]) == 2
    assert "the latents that were trained on come from" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


def test_a_policy_needs_a_tokenizer_and_a_checkpoint(checkpoint, tmp_path, capsys):
    assert main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "policy")]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main(["export", "--ckpt", str(tmp_path / "none.ckpt"), "--out", str(tmp_path / "p"), "--wam-only"]) == 2


def test_openloop_writes_errors_and_scores(world, tmp_path, capsys):
    out = tmp_path / "openloop.json"
    command = ["openloop", "--policy", str(world.policy), "--dataset", str(world.dataset), "--out", str(out)]
    assert main([*command, "--clip-features", "hog"]) == 0
    written = json.loads(out.read_text())
    errors = written["mean_absolute_error"]
    assert list(errors) == ["policy", "mean action", "last action repeated"]
    assert set(errors["policy"]) == {"x", "y", "z"}
    assert set(written["open_loop_score"]["max norm, per step, scaled"]) == {"0.1", "0.05", "0.03", "0.01"}
    assert written["imagined_video"]["clips"] == 2
    assert written["imagined_video"]["frechet_hog_distance"] >= 0
    assert "open-loop score (max norm, per step, scaled)" in capsys.readouterr().out
    assert main([*command, "--clip-features", "i3d"]) == 2


def test_the_card_of_a_policy_and_of_a_model_comes_from_the_run(checkpoint, world, tmp_path):
    append_curves(checkpoint.parent, [(1, "val/video", 0.25)])  # a run of one step has no validation
    assert _export(checkpoint, world, tmp_path / "policy", "--license", "apache-2.0") == 0
    assert main(["export", "--ckpt", str(checkpoint), "--wam-only", "--out", str(tmp_path / "wam")]) == 0
    of_policy, of_wam = ((tmp_path / part / "README.md").read_text() for part in ("policy", "wam"))
    assert "\nlicense: apache-2.0\n" in of_policy
    assert "license:" not in of_wam
    assert "| licence | not stated by who exported it |" in of_wam
    assert "| size, pixels | 32 x 16 |" in of_policy
    for card in (of_policy, of_wam):
        assert "| rate of the frames, Hz | 20, every 1. taken |" in card
        assert "| steps | 1 |" in card
        assert "| command | `repwam fit -c " in card
        assert str(tmp_path) not in card, "no folder of this machine"
        assert "| val/video | 0.25 |" in card
    assert "README.md" not in {path.name for path in (tmp_path / "policy" / "wam").iterdir()}


def test_a_policy_is_loaded_by_its_hub_id(checkpoint, world, tmp_path, monkeypatch):
    assert _export(checkpoint, world, tmp_path / "policy", "--latents", str(world.shards)) == 0
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"], options["local_files_only"], set(options["allow_patterns"])))
        return str(tmp_path / "policy")

    monkeypatch.setattr("repvitok.runtime.pretrained.snapshot_download", snapshot)
    policy = Policy.from_pretrained("hf://somebody/policy", revision="v1", execute_frames=1)
    assert policy.plan.executed == 1
    BatchedPolicy.from_pretrained("hf://somebody/policy", local_files_only=True)
    assert [row[:3] for row in asked] == [("somebody/policy", "v1", False), ("somebody/policy", None, True)]
    assert {"policy.json", "wam/model.safetensors", "tokenizer/config.json", "README.md"} <= asked[0][3]


def test_a_policy_of_another_floating_type_acts_and_is_nearly_the_same(checkpoint, world, tmp_path):
    assert _export(checkpoint, world, tmp_path / "policy", "--latents", str(world.shards)) == 0
    reader, chunks = LeRobotReader(world.dataset), []
    images = {camera: reader.frames(0, camera, [0])[0] for camera in reader.camera_keys}
    for dtype in (None, torch.float32, torch.bfloat16):
        policy = Policy.from_pretrained(tmp_path / "policy", dtype=dtype)
        policy.reset("go left")
        chunks.append(policy.act(Observation(images=images, state=np.zeros(2, np.float32))).actions)
    np.testing.assert_array_equal(chunks[0], chunks[1])
    assert 0 < np.abs(chunks[2] - chunks[0]).max() < 0.1 * np.abs(chunks[0]).max()
    with pytest.raises(UserError, match="expected a floating type"):
        Policy.from_pretrained(tmp_path / "policy", dtype=torch.int8)
