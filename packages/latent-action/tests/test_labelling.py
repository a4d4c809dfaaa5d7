"""Labelled shards hold what the tokenizer says, come back after interruptions, and refuse strangers."""

import copy
import dataclasses
import json
import os
import shutil
from contextvars import Context
from functools import partial

import numpy as np
import pytest
import torch
from latent_action.labelling import label_latents, label_shards
from latent_action.model import LatentActionTokenizer
from repvitok.data import shards as shards_module
from repvitok.data.shards import LatentShards, LatentShardWriter, replace_instructions
from repvitok.encoding_plan import merge_latents
from repvitok.runtime.errors import UserError

FILES = ["labels-000000.tar", "latents-000000.tar", "meta.json"]


def test_labels_are_the_tokenizers_own(fitted_lat, blobs, tmp_path):
    meta = label_shards(fitted_lat, blobs, tmp_path / "out")
    source, labelled = LatentShards(blobs), LatentShards(tmp_path / "out")
    assert len(labelled) == len(source)
    everything = []
    for before, after in zip(source, labelled, strict=True):
        np.testing.assert_array_equal(before.latents, after.latents)
        np.testing.assert_array_equal(before.actions, after.actions)
        assert (before.key, before.episode_index, before.task) == (after.key, after.episode_index, after.task)
        z = fitted_lat.standardise(torch.from_numpy(before.latents))[None]
        with torch.no_grad():
            np.testing.assert_allclose(after.latent_actions, fitted_lat.encode(z)[0].numpy(), atol=1e-5)
        everything.append(after.latent_actions)
    assert meta is not None
    assert meta.to_dict() == labelled.meta.to_dict()
    assert labelled.meta.lat_digest == fitted_lat.digest()
    assert labelled.meta.tokenizer_digest == source.meta.tokenizer_digest
    np.testing.assert_array_equal(labelled.meta.mean, source.meta.mean)
    np.testing.assert_allclose(labelled.meta.latent_action_mean, np.concatenate(everything).mean(0), atol=1e-5)
    np.testing.assert_allclose(labelled.meta.latent_action_std, np.concatenate(everything).std(0), rtol=1e-4)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES


def test_long_episodes_in_pieces_equal_one_piece(fitted_lat, monkeypatch):
    latents = torch.randn(11, 16, 8)
    whole = label_latents(fitted_lat, latents, (1, 4, 4))
    monkeypatch.setattr("latent_action.labelling.TOKENS_PER_BATCH", 3 * 16)
    torch.testing.assert_close(label_latents(fitted_lat, latents, (1, 4, 4)), whole)
    assert label_latents(fitted_lat, latents[:1], (1, 4, 4)).shape == (0, 4)


def test_a_finished_folder_is_returned_and_another_lat_refused(fitted_lat, lat, blobs, tmp_path):
    first = label_shards(fitted_lat, blobs, tmp_path / "out")
    assert label_shards(fitted_lat, blobs, tmp_path / "out").to_dict() == first.to_dict()
    with torch.no_grad():
        fitted_lat.inverse_dynamics.mlp.first.bias += 1
    with pytest.raises(ValueError, match="already holds"):
        label_shards(fitted_lat, blobs, tmp_path / "out")


def test_interrupted_work_goes_on_where_it_stopped(fitted_lat, blobs, tmp_path, monkeypatch):
    encode, calls = LatentActionTokenizer.encode, []

    def counted(self, z, grid=None):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(self, z, grid)

    monkeypatch.setattr(LatentActionTokenizer, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        label_shards(fitted_lat, blobs, tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()
    label_shards(fitted_lat, blobs, tmp_path / "out")
    assert len(calls) == len(LatentShards(blobs)) + 1  # each episode once, and the one that was interrupted
    label_shards(fitted_lat, blobs, tmp_path / "whole")
    for a, b in zip(LatentShards(tmp_path / "out"), LatentShards(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(a.latent_actions, b.latent_actions)


def test_shares_together_equal_one_run(fitted_lat, blobs, tmp_path):
    label_shards(fitted_lat, blobs, tmp_path / "whole")
    for share in range(3):
        assert label_shards(fitted_lat, blobs, tmp_path / "shares", shard=(share, 3)) is None
    label_shards(fitted_lat, blobs, tmp_path / "shares")
    whole, shares = LatentShards(tmp_path / "whole"), LatentShards(tmp_path / "shares")
    assert whole.meta.to_dict() == shares.meta.to_dict()
    assert [p.read_bytes() for p in whole.paths] == [p.read_bytes() for p in shares.paths]
    with pytest.raises(ValueError, match="3/3"):
        label_shards(fitted_lat, blobs, tmp_path / "more", shard=(3, 3))


def test_unfinished_work_of_another_lat_is_refused(fitted_lat, blobs, tmp_path):
    label_shards(fitted_lat, blobs, tmp_path / "out", shard=(0, 3))
    with torch.no_grad():
        fitted_lat.inverse_dynamics.mlp.first.bias += 1
    with pytest.raises(ValueError, match="another LAT"):
        label_shards(fitted_lat, blobs, tmp_path / "out")


def test_latents_of_another_tokenizer_are_refused(fitted_lat, lat, blobs, tmp_path):
    fitted_lat.config = dataclasses.replace(fitted_lat.config, tokenizer_digest="b" * 64)
    with pytest.raises(ValueError, match=f"{'a' * 16}.*{'b' * 16}"):
        label_shards(fitted_lat, blobs, tmp_path / "out")
    with pytest.raises(ValueError, match="tokenizer_digest"):
        label_shards(lat, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_stop_the_work(fitted_lat, blobs, tmp_path):
    with torch.no_grad():
        fitted_lat.inverse_dynamics.mlp.first.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        label_shards(fitted_lat, blobs, tmp_path / "out")


def test_a_second_labelling_of_one_folder_is_refused_and_shares_work_side_by_side(
    fitted_lat, blobs, tmp_path, monkeypatch
):
    encode, out, tried = LatentActionTokenizer.encode, tmp_path / "out", []

    def label(shard=None):
        return Context().run(label_shards, fitted_lat, blobs, out, shard=shard)  # as another process would

    def encoding(self, z, grid=None):
        if not tried:
            tried.append(True)
            for shard in (None, (0, 3)):
                with pytest.raises(UserError, match="another process is labelling here"):
                    label(shard)
            label((1, 3))
        return encode(self, z, grid)

    monkeypatch.setattr(LatentActionTokenizer, "encode", encoding)
    label((0, 3))
    tried.clear()
    monkeypatch.setattr(LatentActionTokenizer, "encode", lambda *a: label((1, 3)) if not tried.append(1) else None)
    with pytest.raises(UserError, match="another process is labelling here"):
        label()
    monkeypatch.setattr(LatentActionTokenizer, "encode", encode)
    label()
    label_shards(fitted_lat, blobs, tmp_path / "alone")
    for one, two in zip(LatentShards(out).paths, LatentShards(tmp_path / "alone").paths, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == FILES


def as_version_0_1(lat, source, out):
    """Labelled as version 0.1 did: every shard again, with the latent actions inside."""
    shards = LatentShards(source)
    meta = dataclasses.replace(shards.meta, lat_digest=lat.digest())
    with LatentShardWriter(out, meta, measure=False, provenance=shards.provenance) as writer:
        for episode in shards:
            labels = label_latents(lat, torch.from_numpy(episode.latents), shards.meta.grid).numpy()
            writer.add(dataclasses.replace(episode, latent_actions=labels))
    document = json.loads((out / "meta.json").read_text())
    assert not any("labels" in shard for shard in document["shards"])
    return out


def another(lat):
    other = copy.deepcopy(lat)
    with torch.no_grad():
        other.inverse_dynamics.mlp.first.bias += 1
    return other


def small_shards(blobs, out):
    """The same latents in several shards, in a folder that a test may change."""
    source = LatentShards(blobs)
    with LatentShardWriter(out, source.meta, shard_bytes=2**17) as writer:
        for episode in source:
            writer.add(episode)
    assert len(LatentShards(out).paths) > 2
    return out


def test_labels_lie_beside_shards_that_stay_as_they_are(fitted_lat, blobs, tmp_path):
    here = small_shards(blobs, tmp_path / "here")
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in here.glob("*.tar")}
    meta = label_shards(fitted_lat, here, tmp_path / "out")
    for folder in (here, tmp_path / "out", tmp_path / "moved"):
        if folder.name == "moved":  # alone, as on another machine
            shutil.copytree(tmp_path / "out", folder)
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(here)
        elif folder == here:
            assert label_shards(fitted_lat, here).to_dict() == meta.to_dict()
            assert {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
        else:
            assert all(path.samefile(here / path.name) for path in folder.glob("latents-*.tar"))
        shards = LatentShards(folder)
        shards.verify()
        assert shards.meta.to_dict() == meta.to_dict()
        assert shards.statistics.count == LatentShards(blobs).statistics.count
        assert {p.name for p in folder.iterdir()} == {"meta.json"} | {
            f"{what}-{number:06d}.tar" for what in ("latents", "labels") for number in range(len(before))
        }
        for index, source in enumerate(LatentShards(blobs)):
            labels = label_latents(fitted_lat, torch.from_numpy(source.latents), meta.grid).numpy()
            np.testing.assert_array_equal(shards[index].latent_actions, labels)
            np.testing.assert_array_equal(shards.mapped(index)["latent_actions"], labels)
            np.testing.assert_array_equal(shards.mapped(index)["latents"], source.latents)


def test_folders_that_version_0_1_labelled_are_finished_and_hold_the_same(fitted_lat, blobs, tmp_path):
    old = as_version_0_1(fitted_lat, blobs, tmp_path / "old")
    content = {path.name: path.read_bytes() for path in old.iterdir()}
    new = label_shards(fitted_lat, blobs, tmp_path / "new")
    for meta in (label_shards(fitted_lat, blobs, old), label_shards(fitted_lat, old)):  # from its source, and in place
        assert meta.to_dict() == new.to_dict()
    assert {path.name: path.read_bytes() for path in old.iterdir()} == content
    for index, (one, two) in enumerate(zip(LatentShards(old), LatentShards(tmp_path / "new"), strict=True)):
        np.testing.assert_array_equal(one.latent_actions, two.latent_actions)
        np.testing.assert_array_equal(LatentShards(old).mapped(index)["latent_actions"], one.latent_actions)
    with pytest.raises(UserError, match="labelled by LAT"):
        label_shards(another(fitted_lat), old)


@pytest.mark.parametrize("inside", [True, False])
def test_another_lat_labels_in_another_folder(fitted_lat, blobs, tmp_path, inside):
    first, other = tmp_path / "first", another(fitted_lat)
    if inside:
        as_version_0_1(fitted_lat, blobs, first)
    else:
        label_shards(fitted_lat, small_shards(blobs, first))
    before = [episode.latent_actions for episode in LatentShards(first)]
    meta = label_shards(other, first, tmp_path / "second")
    second = LatentShards(tmp_path / "second")
    assert meta.lat_digest == second.meta.lat_digest == other.digest()
    for index, labels in enumerate(before):
        expected = label_latents(other, torch.from_numpy(second[index].latents), meta.grid).numpy()
        np.testing.assert_array_equal(second[index].latent_actions, expected)
        np.testing.assert_array_equal(second.mapped(index)["latent_actions"], expected)
        assert not np.allclose(expected, labels)
        np.testing.assert_array_equal(LatentShards(first)[index].latent_actions, labels)


def test_a_finished_folder_of_other_latents_is_refused(fitted_lat, blobs, tmp_path):
    label_shards(fitted_lat, blobs, tmp_path / "out")
    source = LatentShards(blobs)
    with LatentShardWriter(tmp_path / "others", source.meta) as writer:
        for episode in source:  # of the same tokenizer, under the same names
            writer.add(dataclasses.replace(episode, latents=episode.latents + 1))
    with pytest.raises(UserError, match="others"):
        label_shards(fitted_lat, tmp_path / "others", tmp_path / "out")
    label_shards(fitted_lat, blobs, tmp_path / "begun", shard=(0, 2))
    with pytest.raises(UserError, match="unfinished labels of other latents"):
        label_shards(fitted_lat, tmp_path / "others", tmp_path / "begun")


@pytest.mark.parametrize("damage", ["bit", "cut", "removed", "another folder's"])
def test_damaged_or_foreign_labels_are_refused(fitted_lat, blobs, tmp_path, damage):
    root = small_shards(blobs, tmp_path / "latents")
    label_shards(fitted_lat, root)
    path = root / "labels-000001.tar"
    whole = path.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    if damage == "another folder's":
        label_shards(another(fitted_lat), root, tmp_path / "out")
        shutil.copy(tmp_path / "out" / path.name, path)
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes(data[:-512] if damage == "cut" else data)
    with pytest.raises(UserError, match=path.name):
        [episode.latent_actions for episode in LatentShards(root)]
    with pytest.raises(UserError, match=path.name):
        LatentShards(root).verify()
    label_shards(fitted_lat, root)  # makes them again, as the latents are there
    assert path.read_bytes() == whole
    LatentShards(root).verify()


@pytest.mark.parametrize("place", ["here", "elsewhere"])
@pytest.mark.parametrize("links", [True, False])
def test_a_call_killed_at_any_write_is_made_up_for(fitted_lat, blobs, tmp_path, monkeypatch, place, links):
    label_shards(fitted_lat, small_shards(blobs, tmp_path / "undisturbed"))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    latents = small_shards(blobs, tmp_path / "latents")
    out = latents if place == "here" else tmp_path / "out"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    label_shards(fitted_lat, latents, out, shard=(0, 1))
    for call in range(100):
        with monkeypatch.context() as patch:
            calls = []

            def killed(*arguments, real, calls=calls, call=call, **more):
                calls.append(arguments)
                if len(calls) > call:
                    raise KeyboardInterrupt
                return real(*arguments, **more)

            for name in ("atomic_file", "link_or_copy", "_describe_tar"):
                patch.setattr(shards_module, name, partial(killed, real=getattr(shards_module, name)))
            try:
                label_shards(fitted_lat, latents, out)
                break
            except KeyboardInterrupt:
                assert not (out / "meta.json").exists() or LatentShards(out).meta.lat_digest is None
                assert len(LatentShards(latents)) == len(LatentShards(blobs))  # what is there can be read all the while
    assert call > 6
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


def test_work_under_way_in_finished_latents_is_left_alone(fitted_lat, blobs, tmp_path):
    latents = small_shards(blobs, tmp_path / "latents")
    label_shards(fitted_lat, latents, shard=(0, 2))
    merge_latents(latents)  # what a finished `encode` does when it is called again
    assert len(list((latents / ".labels").glob("*.npy"))) == 20
    replace_instructions(LatentShards(latents), {3: "lift"}, "tasks")
    label_shards(fitted_lat, latents)
    replace_instructions(LatentShards(latents), {4: "turn"}, "tasks")
    labelled = LatentShards(latents)
    assert [labelled.infos[number].task for number in (2, 3, 4)] == ["move", "lift", "turn"]
    assert labelled.meta.lat_digest == fitted_lat.digest()
    assert labelled[4].latent_actions is not None


def test_instructions_corrected_while_labels_are_written_stay(fitted_lat, blobs, tmp_path):
    latents = small_shards(blobs, tmp_path / "latents")
    opened = LatentShards(latents)
    label_shards(fitted_lat, latents)
    replace_instructions(opened, {3: "lift"}, "tasks")  # by somebody who had looked before there were labels
    assert LatentShards(latents)[3].latent_actions is not None
    assert LatentShards(latents)[3].task == "lift"


def test_labels_of_several_latent_frames_say_so_and_do_not_mix(fitted_lat, make_blobs, tmp_path):
    """Row k leads transition_frames on, or to the last frame; another length in one folder is refused by name."""
    longer = LatentActionTokenizer(dataclasses.replace(fitted_lat.config, transition_frames=2))
    longer.load_state_dict(fitted_lat.state_dict())
    assert longer.digest() != fitted_lat.digest()
    latents = torch.randn(5, 16, 8)
    z = fitted_lat.standardise(latents)
    with torch.no_grad():
        expected = longer.encode(torch.stack([z[[0, 1, 2, 3]], z[[2, 3, 4, 4]]], dim=1))[:, 0]
    torch.testing.assert_close(label_latents(longer, latents, (1, 4, 4)), expected)
    few = make_blobs(tmp_path / "few", episodes=2)
    assert label_shards(longer, few, tmp_path / "out").latent_action_frames == 2
    assert LatentShards(tmp_path / "out").meta.latent_action_frames == 2
    with pytest.raises(ValueError, match="over 2 latent frames each, this LAT's over 1"):
        label_shards(fitted_lat, few, tmp_path / "out")
