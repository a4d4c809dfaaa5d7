"""Wan's VAE behind RepViTok's interface: equal to diffusers' own calls, whole and streamed, and able to encode data."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from repvitok import RepViTok
from repvitok.baselines.wan import WAN22, WanVae
from repvitok.data.shards import LatentShards
from repvitok.data.video import write_video
from repvitok.encoding import decode_shards, encode_dataset
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer

pytest.importorskip("diffusers", reason="the baselines need repvitok[baselines]")

TINY = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 1.0, 2.0],
}
SIZE = (32, 48)


@pytest.fixture(scope="module")
def wan() -> WanVae:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanVae.from_config(TINY)


@pytest.fixture
def video(make_video) -> torch.Tensor:
    return make_video(9, SIZE)


def test_its_shape_is_the_one_of_the_tables(wan):
    assert isinstance(wan, VideoTokenizer)
    assert (wan.config.patch_size, wan.config.tubelet_frames, wan.config.latent_dim) == (16, 4, 4)
    with torch.device("meta"):
        full = WanVae.from_config()
    assert full.config.latent_dim == 48
    assert round(sum(p.numel() for p in full.parameters()) / 1e6) == 705
    assert WAN22["z_dim"] == 48


@torch.no_grad()
def test_encode_and_decode_are_diffusers_own(wan, video):
    mean, std = (torch.tensor(TINY[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    theirs = (wan.vae.encode(video).latent_dist.mode() - mean) / std
    ours = wan.encode(video)
    assert ours.shape == (2, 3, 6, 4)
    torch.testing.assert_close(ours, theirs.permute(0, 2, 3, 4, 1).flatten(2, 3))
    torch.testing.assert_close(wan.decode(ours, SIZE), wan.vae.decode(theirs * std + mean).sample)


def test_an_image_is_a_clip_of_one_frame(wan, video):
    torch.testing.assert_close(wan.encode(video[:, :, :1]), wan.encode(video)[:, :1])
    assert wan.decode(wan.encode(video[:, :, :1]), SIZE).shape == (2, 3, 1, *SIZE)


def test_a_stream_equals_the_whole_clip(wan, video):
    stream = wan.stream(2, window=None)
    z = torch.cat([stream.encode(part) for part in (video[:, :, :1], video[:, :, 1:5], video[:, :, 5:])], dim=1)
    torch.testing.assert_close(z, wan.encode(video))
    frames = torch.cat([stream.decode(part) for part in z.split([1, 2], dim=1)], dim=2)
    torch.testing.assert_close(frames, wan.decode(z, SIZE))


def test_what_does_not_fit_is_refused(wan, video):
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames"):
        wan.encode(video[:, :, :4])
    with pytest.raises(ValueError, match="multiples of 16"):
        wan.encode(video[..., :40])
    with pytest.raises(ValueError, match="no attention window"):
        wan.encode(video, window=3)
    with pytest.raises(ValueError, match="32x32 pixels are 2x2 = 4 tokens per latent frame, got latents with 6"):
        wan.decode(wan.encode(video), (32, 32))
    with pytest.raises(ValueError, match=r"decode needs size=\(H, W\)"):
        wan.stream(2).decode(wan.encode(video))


def test_saved_folders_load_by_what_their_config_says(wan, tok, tmp_path, monkeypatch):
    wan.vae.save_pretrained(tmp_path / "wan", safe_serialization=True)
    wan.vae.save_pretrained(tmp_path / "pipeline/vae", safe_serialization=True)
    tok.save_pretrained(tmp_path / "ours")
    for folder in ("wan", "pipeline"):
        loaded = load_tokenizer(tmp_path / folder)
        assert isinstance(loaded, WanVae)
        assert loaded.digest() == wan.digest()
    assert isinstance(load_tokenizer(tmp_path / "ours"), RepViTok)
    assert json.loads((tmp_path / "wan/config.json").read_text())["_class_name"] == "AutoencoderKLWan"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'repvitok\[baselines\]'"):
        load_tokenizer(tmp_path / "wan")


def test_the_hub_is_asked_only_where_the_name_says_so(tmp_path, monkeypatch):
    asked = []

    def look(source, *, local_files_only, **_):
        asked.append((source, local_files_only))
        raise OSError("nothing there")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.AutoencoderKLWan.from_pretrained", look)
    for name in ("Wan-AI/Wan", "hf://Wan-AI/Wan"):
        with pytest.raises(FileNotFoundError, match="hf://"):
            load_tokenizer(name)
    assert asked == [("Wan-AI/Wan", True), ("Wan-AI/Wan", False)]


def test_weights_are_part_of_the_digest(wan):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = WanVae.from_config(TINY)
    assert other.digest() != wan.digest()


def test_a_data_set_is_encoded_and_decoded_by_it(wan, tmp_path):
    from repvitok.data.folders import open_episodes

    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 4, 6, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    for number in range(2):
        write_video(tmp_path / f"videos/{number}.mp4", frames[number, : 9 - 4 * number], 10)
    encode_dataset(wan, open_episodes(str(tmp_path / "videos")), tmp_path / "latents", size=SIZE)
    shards = LatentShards(tmp_path / "latents", expect_digest=wan.digest())
    assert [item.latents.shape for item in shards] == [(3, 6, 4), (2, 6, 4)]
    assert shards.meta.window is None
    assert len(decode_shards(wan, tmp_path / "latents", tmp_path / "decoded")) == 2
