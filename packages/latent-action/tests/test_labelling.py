"""Labelled shards hold what the tokenizer says, come back after interruptions, and refuse strangers."""

import dataclasses
from contextvars import Context

import numpy as np
import pytest
import torch
from latent_action.labelling import label_latents, label_shards
from latent_action.model import LatentActionTokenizer
from repvitok.data.shards import LatentShards
from repvitok.errors import UserError


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
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".json", ".tar"]


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
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".tar"]
