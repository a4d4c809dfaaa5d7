"""Files of version 0.1.0 still load and mean what they meant: files_of_0_1/make.py made them with that version."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module

import numpy as np
import pytest
import torch
from latent_action import LatentActionTokenizer
from latent_action.cli import LAPA_STAGE
from latent_action.cli import STAGE as LATENT_ACTION
from latent_action.cli import main as latent_action
from repvitok import RepViTok
from repvitok.cli import STAGE as REPVITOK
from repvitok.cli import main as repvitok
from repvitok.data import LatentShards, LeRobotReader
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.commands import import_object
from repvitok.runtime.moved import MOVED
from repwam_core.cli import STAGE as REPWAM
from repwam_core.cli import main as repwam
from repwam_core.interface import Observation
from repwam_core.model.wam import WorldActionModel
from repwam_core.policy import Policy

CAMERA = "observation.images.top"
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def expected(files_of_0_1) -> Mapping[str, np.ndarray]:
    """What 0.1.0 computed with them."""
    return dict(np.load(files_of_0_1 / "expected.npz"))


@pytest.fixture(autouse=True)
def no_process_group_left(monkeypatch):
    """A sharded run of one rank leaves its process group and its address behind; later tests must not see them."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_tokenizer_gives_the_same_latents_and_pixels(files_of_0_1, expected):
    tokenizer = RepViTok.from_pretrained(files_of_0_1 / "tokenizer").eval()
    clip = torch.from_numpy(expected["clip"])
    with torch.no_grad():
        latents = tokenizer.encode(clip)
        video = tokenizer.decode(torch.from_numpy(expected["tokenizer_latents"]), clip.shape[-2:])
    np.testing.assert_allclose(latents, expected["tokenizer_latents"], **ROUNDING)
    np.testing.assert_allclose(video, expected["tokenizer_video"], **ROUNDING)
    assert tokenizer.digest() == expected["digests"][0]


def test_latent_action_tokenizer_gives_the_same_numbers(files_of_0_1, expected):
    lat = LatentActionTokenizer.from_pretrained(files_of_0_1 / "lat").eval()
    with torch.no_grad():
        z = lat.standardise(torch.from_numpy(expected["tokenizer_latents"]))
        actions = lat.encode(z)
        following = lat.decode(z[:, 0], torch.from_numpy(expected["lat_actions"])[:, 0])
    np.testing.assert_allclose(actions, expected["lat_actions"], **ROUNDING)
    np.testing.assert_allclose(following, expected["lat_next"], **ROUNDING)
    assert lat.digest() == expected["digests"][1]


def test_latents_are_read_with_the_same_values_and_labels(files_of_0_1, expected):
    labelled, plain = LatentShards(files_of_0_1 / "labelled"), LatentShards(files_of_0_1 / "latents")
    assert len(labelled) == len(plain) == 4
    for one, other in zip(labelled, plain, strict=True):
        for name in ("latents", "state", "actions"):
            value = expected[f"episode_{one.episode_index}_{name}"]
            np.testing.assert_array_equal(getattr(one, name), value)
            np.testing.assert_array_equal(getattr(other, name), value)
        np.testing.assert_array_equal(one.latent_actions, expected[f"episode_{one.episode_index}_latent_actions"])
        assert other.latent_actions is None
        assert one.task == ("go left", "go up")[one.episode_index % 2]
    assert labelled.meta.lat_digest == expected["digests"][1]


def test_latents_are_labelled_with_the_same_latent_actions(copied_files_of_0_1, expected):
    assert latent_action(["label", "--lat", "lat", "--latents", "latents", "--out", "new"]) == 0
    for episode in LatentShards("new"):
        labels = expected[f"episode_{episode.episode_index}_latent_actions"]
        np.testing.assert_allclose(episode.latent_actions, labels, **ROUNDING)


@pytest.mark.parametrize("folder", ["policy", "exported"])
def test_policy_gives_the_same_actions(folder, copied_files_of_0_1, expected):
    """The folder that 0.1.0 exported, and one that is exported today from the checkpoint of 0.1.0."""
    if folder == "exported":
        parts = "--tokenizer tokenizer --lat lat --latents labelled"
        assert repwam(f"export --ckpt adapt_run/last.ckpt --out exported {parts}".split()) == 0
    policy = Policy.from_pretrained(folder, clip=False)
    reader = LeRobotReader("dataset")
    state = reader.episode(1)["observation.state"].astype(np.float32)
    policy.reset("go up", 3)
    for name, first, last in (("policy_first", 0, 1), ("policy_second", 1, 5)):
        images = {CAMERA: np.stack(reader.frames(1, CAMERA, range(first, last)))}
        actions = policy.act(Observation(images=images, state=state[first:last])).actions
        np.testing.assert_allclose(actions, expected[name], **ROUNDING)


@pytest.mark.parametrize("name", ["dataset", "dataset_v3"])
def test_lerobot_data_sets_are_read(files_of_0_1, name, expected):
    reader = LeRobotReader(files_of_0_1 / name)
    assert [info.length for info in reader.episodes] == [14, 15, 16, 17][: len(reader.episodes)]
    assert [info.task for info in reader.episodes][:2] == ["go left", "go up"]
    frames = np.stack(reader.frames(0, CAMERA, range(9)))
    assert frames.shape == (9, 16, 16, 3)
    if name == "dataset":
        clip = frames.transpose(3, 0, 1, 2)[None, :, :, ::2, ::2] / np.float32(127.5) - 1
        np.testing.assert_array_equal(clip, expected["clip"])
    state = reader.episode(0)["observation.state"].astype(np.float32)
    np.testing.assert_array_equal(state[[0, 4, 8, 12]], expected["episode_0_state"])


@pytest.mark.parametrize(
    ("main", "run", "model", "digest"),
    [(repvitok, "tokenizer_run", RepViTok, 0), (latent_action, "lat_run", LatentActionTokenizer, 1)],
)
def test_checkpoints_are_exported_as_the_same_model(main, run, model, digest, copied_files_of_0_1, expected):
    assert main(["export", "--ckpt", f"{run}/last.ckpt", "--out", "new"]) == 0
    assert model.from_pretrained("new").digest() == expected["digests"][digest]


@pytest.mark.parametrize(
    ("main", "run"),
    [(repvitok, "tokenizer_run"), (latent_action, "lat_run"), (repwam, "adapt_run"), (repwam, "sharded_run")],
)
def test_fit_goes_on_by_the_same_config_from_the_same_checkpoint(main, run, copied_files_of_0_1):
    """By 0.1.0's config.yaml, with nothing but more steps; the optimizer's own count tells that its state was read."""
    last = 4 if run == "adapt_run" else 3  # resumed twice: what that run held out is known from the first time on
    for steps in range(3, last + 1):
        longer = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1"]
        assert main(["fit", "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/last.ckpt", *longer]) == 0
    checkpoint = read_checkpoint(f"{run}/last.ckpt")
    assert checkpoint["global_step"] == last
    if run != "sharded_run":
        counts = {int(s["step"]) for o in checkpoint["optimizer_states"] for s in o["state"].values() if "step" in s}
        assert counts == {last}
    assert main(["export", "--ckpt", f"{run}/last.ckpt", "--out", "new", *_wam_only(main)]) == 0


def _wam_only(main: Callable) -> list[str]:
    return ["--wam-only"] if main is repwam else []


def test_a_model_folder_is_what_a_new_run_starts_from(copied_files_of_0_1, expected):
    assert WorldActionModel.from_pretrained("wam").digest() == expected["digests"][2]
    assert repwam(["fit", "--config", "adapt_run/config.yaml", "--trainer.default_root_dir=new"]) == 0


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (REPVITOK, "configs/tokenizer"),
        (LATENT_ACTION, "configs/latent_action"),
        (LAPA_STAGE, "configs/lapa"),
        (REPWAM, "configs/sharded"),
        (REPWAM, "pretrain_run/config"),
    ],
)
def test_recipes_as_0_1_resolved_them_are_accepted(stage, config, files_of_0_1):
    """With every default of 0.1.0 written out, and its class paths: a teacher, a perceptual loss, a strategy."""
    from repvitok.runtime.lightning_cli import parse_recipe

    parse_recipe("fit", [str(files_of_0_1 / f"{config}.yaml")], stage)


def test_every_class_path_of_0_1_leads_to_a_class(files_of_0_1):
    for path in (files_of_0_1 / "class_paths.txt").read_text().splitlines():
        module, _, name = path.rpartition(".")
        assert isinstance(import_object(f"{module}:{name}"), type), path


@pytest.mark.parametrize("old", [name for name in MOVED if not name.startswith("repvitok.")])
def test_an_old_name_is_the_new_module(old, monkeypatch):
    """Of the two packages that repvitok's own test does not know."""
    monkeypatch.delitem(sys.modules, old, raising=False)  # another test may have met it
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        assert import_module(old) is import_module(MOVED[old])


def test_old_names_are_known_to_whoever_asks_first():
    code = "import repwam_core.sim.failures as old; print(old.__name__)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "repwam_core.sim.results\n"), done.stderr
