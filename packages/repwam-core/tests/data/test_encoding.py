"""Data sets given in place of latents: the same batches as from latents made by hand, made once, by one process."""

import fcntl
import json

import numpy as np
import pytest
import torch
from latent_action import LatentActionConfig, LatentActionTokenizer
from latent_action.labelling import label_shards
from repvitok import RepViTok, RepViTokConfig
from repvitok.data import LatentShards, LeRobotReader, LeRobotWriter
from repvitok.encoding import encode_dataset
from repvitok.runtime.errors import UserError
from repwam_core.data.datamodule import EncodingSettings, LatentsOnDemand, WAMDataModule

SIZE = (32, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_text_cache):
    """A data set, tokenizers, and its latents and labels as the commands write them."""
    root = tmp_path_factory.mktemp("on-demand")
    writer = LeRobotWriter(
        root / "robot", fps=20, cameras={"observation.images.top": SIZE}, state_names=["px"], action_names=["x", "y"],
        robot_type="arm",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for index, length in enumerate((19, 14, 23, 17)):
        frames = {"observation.images.top": rng.integers(0, 256, (length, *SIZE, 3), np.uint8)}
        state, action = (rng.normal(size=(length, width)).astype(np.float32) for width in (1, 2))
        writer.add_episode(index, frames=frames, state=state, action=action, task=("go left", "go up")[index % 2])
    writer.finalize()
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8, episode_window=2)).eval()
    tokenizer.save_pretrained(root / "tokenizer")
    encode_dataset(tokenizer, LeRobotReader(root / "robot"), root / "latents", size=SIZE, offsets=(0, 2))
    moments = {"latent_mean": (0.0,) * 8, "latent_std": (1.0,) * 8, "hidden": 16}
    lat = LatentActionTokenizer(LatentActionConfig(latent_dim=8, tokenizer_digest=tokenizer.digest(), **moments))
    lat.save_pretrained(root / "lat")
    label_shards(lat, root / "latents", root / "labelled")
    write_text_cache(root / "latents")
    write_text_cache(root / "labelled")
    return root


def settings(root, out, **changed) -> EncodingSettings:
    return EncodingSettings(
        **({"tokenizer": root / "tokenizer", "size": SIZE, "offsets": [0, 2], "out": out} | changed)
    )


def prepared(write_text_cache, **arguments) -> WAMDataModule:
    data = WAMDataModule(transitions=2, batch_size=2, held_out=0.25, steps_per_epoch=3, **arguments)
    data.prepare_data()
    given, made = data.data_sets[0].latents, data._on_demand
    write_text_cache(given if made is None else made.folder(given))  # no test loads the real text model
    return data


@pytest.mark.parametrize("space", ["robot", "latent"])
def test_batches_are_those_of_latents_made_by_hand(made, tmp_path, write_text_cache, space):
    lat = {"lat": made / "lat"} if space == "latent" else {}
    data = prepared(write_text_cache, latents=made / "robot", space=space, encoding=settings(made, tmp_path, **lat))
    by_hand = made / ("labelled" if lat else "latents")
    expected = prepared(write_text_cache, latents=by_hand, space=space)
    for found, wanted in zip(data.train_dataloader(), expected.train_dataloader(), strict=True):
        for name in ("latents", "actions", "text", "valid", "episode", "start"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_a_second_run_finds_what_the_first_one_made(made, tmp_path, monkeypatch):
    first = LatentsOnDemand(settings(made, tmp_path, lat=made / "lat")).make(made / "robot")
    monkeypatch.setattr("repvitok.encoding._stream_clips", None)  # encoding again would call it,
    monkeypatch.setattr("latent_action.labelling.label_latents", None)  # and labelling again this
    assert LatentsOnDemand(settings(made, tmp_path, lat=made / "lat")).make(made / "robot") == first
    assert LatentShards(first).meta.lat_digest is not None


def test_other_ways_of_encoding_lie_in_other_folders(made, tmp_path):
    ways = [{}, {"augment": 1}, {"stride": 2}, {"offsets": [0]}, {"size": (16, 16)}, {"lat": made / "lat"}]
    folders = [LatentsOnDemand(settings(made, tmp_path, **way)).folder(made / "robot") for way in ways]
    folders += [LatentsOnDemand(settings(made, tmp_path)).folder(made / "elsewhere" / "robot")]
    assert len(set(folders)) == len(folders)


def test_two_runs_do_not_write_one_folder(made, tmp_path):
    on_demand = LatentsOnDemand(settings(made, tmp_path))
    folder = on_demand.folder(made / "robot")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is making these latents"):
            on_demand.make(made / "robot")


def test_a_data_set_that_grew_is_an_error_that_names_the_change(made, tmp_path):
    on_demand = LatentsOnDemand(settings(made, tmp_path))
    folder = on_demand.make(made / "robot")
    document = json.loads((folder / "meta.json").read_text())
    document["provenance"]["num_frames"] = 50
    del document["sha256"]
    (folder / "meta.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"num_frames 50 \(now 73\); remove the folder or choose another"):
        on_demand.make(made / "robot")


def test_what_is_missing_is_named(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LatentsOnDemand(settings(made, tmp_path)).make(made / "nowhere")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"data\.encoding\.lat"):
        WAMDataModule(latents=made / "robot", space="latent", encoding=settings(made, tmp_path))
    with pytest.raises(ValueError, match="is a LeRobot data set, not its latents"):
        WAMDataModule(latents=made / "robot").setup("fit")
