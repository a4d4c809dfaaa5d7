"""A policy on latents of Wan's VAE: exported by the command, driven frame by frame, compared with recorded episodes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from repvitok.baselines.wan import WanVae
from repvitok.data import LatentShards, LeRobotReader
from repwam_core.cli import main
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy, Policy
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.sampling import SamplingConfig


@pytest.fixture(scope="module")
def exported(wan_world, fit_one_step, tmp_path_factory):
    """One step of `repwam fit` on the Wan latents, then `repwam export`, from a folder with the VAE in a subfolder."""
    folder = tmp_path_factory.mktemp("wan-run")
    plan = {"chunk_frames": 2, "video_steps": 2, "action_steps": 2}
    fit_one_step(folder, wan_world, window=2, chunk_sizes=[1, 2], plan=plan)
    pipeline = folder / "pipeline"
    WanVae.from_pretrained(wan_world.policy / "tokenizer").write_into(pipeline / "vae")
    (pipeline / "transformer.bin").write_bytes(bytes(2**20))
    export = ["export", "--ckpt", str(folder), "--tokenizer", str(pipeline), "--latents", str(wan_world.shards)]
    assert main([*export, "--out", str(folder / "policy"), "--execute-frames", "1", "--guidance", "1.5"]) == 0
    return folder / "policy"


def test_the_export_holds_the_vae_and_not_the_pipeline_around_it(exported):
    parts = LoadedPolicy.load(exported)
    assert isinstance(parts.tokenizer, WanVae)
    assert parts.manifest.size == (32, 16)
    fitted = SamplingConfig(chunk_frames=2, video_steps=2, action_steps=2)
    assert parts.manifest.plan == replace(fitted, execute_frames=1, guidance=1.5)
    assert "transformer.bin" not in {path.name for path in exported.rglob("*")}


def test_it_drives(exported, wan_world):
    reader, policy = LeRobotReader(wan_world.dataset), Policy.from_pretrained(exported, execute_frames=2)
    states = reader.episode(0)["observation.state"].astype(np.float32)
    policy.reset("go left", seed=1)
    for first, last in ((0, 1), (1, 5), (5, 13)):
        images = {camera: reader.frames(0, camera, range(first, last)) for camera in reader.camera_keys}
        chunk = policy.act(Observation(images, states[first:last]))
        assert chunk.actions.shape == (8, 3)


def test_its_latents_are_those_of_encode(wan_world):
    policy, shards = BatchedPolicy.from_pretrained(wan_world.policy, execute_frames=2), LatentShards(wan_world.shards)
    reader = LeRobotReader(wan_world.dataset)
    policy.reset(["go left", "go up"], [0, 1])
    seen = []
    for first, last in ((0, 1), (1, 9), (9, 13)):
        observations = []
        for episode in range(2):
            images = {camera: reader.frames(episode, camera, range(first, last)) for camera in reader.camera_keys}
            state = reader.episode(episode)["observation.state"][first:last].astype(np.float32)
            observations.append(Observation(images, state))
        policy.act(observations)
        seen.append(policy.observed_latents())
    latents = torch.cat(seen, dim=1)
    for episode in range(2):
        torch.testing.assert_close(latents[episode], torch.from_numpy(shards[episode].latents[:4]), atol=1e-4, rtol=0)


def test_openloop_decodes_what_it_imagines(exported, wan_world, tmp_path):
    out = tmp_path / "openloop.json"
    command = ["openloop", "--policy", str(exported), "--dataset", str(wan_world.dataset), "--out", str(out)]
    assert main([*command, "--action-steps", "1", "--no-clip", "--seed", "3"]) == 0
    written = json.loads(out.read_text())
    told, plan = written["about"], written["about"]["plan"]
    assert (told["device"], told["seed"], told["digests"]["wam"]) == (
        "cpu",
        3,
        LoadedPolicy.load(exported).wam.digest(),
    )
    assert (plan["action_steps"], plan["clip"], plan["guidance"]) == (1, False, 1.5)
    video = written["imagined_video"]
    assert video["frames"] > 0
    assert np.isfinite(video["psnr_db"])
