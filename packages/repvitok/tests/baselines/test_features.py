"""Frozen features behind RepViTok's interface: principal components, streams, folders, training of its decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from repvitok import RepViTok, RepViTokConfig
from repvitok.baselines import FeatureTokenizer
from repvitok.cli import main
from repvitok.data.shards import LatentShards
from repvitok.data.video import write_video
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer
from repvitok.training.module import RepViTokTraining
from repvitok.training.teacher import ConvNetTeacher, HOGTeacher, TimmTeacher
from safetensors.torch import save_file

pytest.importorskip("timm")
SIZE = (32, 48)
SIZES = RepViTokConfig(width=32, depth=1, heads=2, latent_dim=8, window=2, episode_window=2)


def network(seed: int = 0) -> TimmTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TimmTeacher("test_vit", random_weights_for_tests=True)


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(1, 3, 9, *SIZE, generator=generator) * 2 - 1 for _ in range(6)]


@pytest.fixture(scope="module")
def tokenizer(clips) -> FeatureTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = FeatureTokenizer.of(network(), SIZES).eval()
    found.fit_squeeze(clips)
    return found


def test_latents_are_the_principal_components_of_four_frames(tokenizer, clips):
    """Against numpy's singular values: projections equal but for sign, and nothing linear keeps more."""
    features = network()
    stacked = []
    for clip in clips:
        by_frame = features.features(clip, (2, 3))[0].flatten(1, 2)  # (9, 6, c)
        stacked += [torch.cat([by_frame[i] for i in four], dim=1) for four in ((0,) * 4, (1, 2, 3, 4), (5, 6, 7, 8))]
    x = torch.cat(stacked).double().numpy()
    x -= x.mean(0)
    _, values, directions = np.linalg.svd(x, full_matrices=False)
    z = torch.cat([tokenizer.encode(clip)[0].flatten(0, 1) for clip in clips]).double().numpy()
    expected = x @ directions[:8].T
    expected /= np.sqrt(expected.var(0).mean())
    np.testing.assert_allclose(np.abs(z), np.abs(expected), atol=2e-3)
    np.testing.assert_allclose(z.var(0).mean(), 1, rtol=1e-3)
    share = (values[:8] ** 2).sum() / (values**2).sum()
    assert FeatureTokenizer.of(network(), SIZES).fit_squeeze(clips) == pytest.approx(share, rel=1e-4)


def test_raw_features_are_the_networks_own(clips):
    raw = FeatureTokenizer.of(network(), SIZES, "none").eval()
    features = network()
    assert raw.config.latent_dim == 4 * features.dim
    assert raw.fit_squeeze(clips) == 1.0
    z = raw.encode(clips[0])
    last = features.features(clips[0][:, :, 4:5], (2, 3))[:, 0].flatten(1, 2)
    torch.testing.assert_close(z[:, 1, :, -features.dim :], last)
    assert raw.decode(z, SIZE).shape == clips[0].shape


def test_a_convolutional_stage_is_taken_too(clips):
    teacher = ConvNetTeacher("test_efficientnet", 3, random_weights_for_tests=True)
    found = FeatureTokenizer.of(teacher, SIZES)
    assert (found.config.network.partition(".")[0], found.config.stage) == ("test_efficientnet", 3)
    assert found.encode(clips[0]).shape == (1, 3, 6, 8)


@pytest.mark.parametrize("cuts", [(1, 4, 4), (5, 4), (1, 8)])
def test_a_stream_equals_the_whole_clip(tokenizer, clips, cuts):
    assert isinstance(tokenizer, VideoTokenizer)
    stream = tokenizer.stream(1, window=2)
    z = torch.cat([stream.encode(part) for part in clips[0].split(cuts, dim=2)], dim=1)
    torch.testing.assert_close(z, tokenizer.encode(clips[0]))
    frames = torch.cat([stream.decode(part) for part in z.split(1, dim=1)], dim=2)
    torch.testing.assert_close(frames, tokenizer.decode(z, SIZE, window=2))


def test_later_frames_never_change_earlier_latents(tokenizer, clips):
    other = torch.cat([clips[0][:, :, :5], clips[1][:, :, 5:]], dim=2)
    torch.testing.assert_close(tokenizer.encode(other)[:, :2], tokenizer.encode(clips[0])[:, :2])


@pytest.mark.parametrize("squeeze", ["pca", "none"])
def test_a_folder_holds_the_network_too(clips, tmp_path, monkeypatch, squeeze):
    saved = FeatureTokenizer.of(network(), SIZES, squeeze).eval()
    saved.fit_squeeze(clips)
    saved.save_pretrained(tmp_path / "tokenizer")
    before = torch.random.get_rng_state()
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert torch.equal(before, torch.random.get_rng_state())  # what is drawn to be replaced is drawn aside
    assert isinstance(loaded, FeatureTokenizer)
    assert loaded.digest() == saved.digest()
    assert FeatureTokenizer.of(network(1), SIZES, squeeze).digest() != saved.digest()
    torch.testing.assert_close(loaded.encode(clips[0]), saved.encode(clips[0]), rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.encoder.parameters())
    with pytest.raises(ValueError, match='expected a "repvitok" folder, this one holds a "feature_tokenizer" model'):
        RepViTok.from_pretrained(tmp_path / "tokenizer")
    for module in ("repvitok.model", "repvitok.runtime.pretrained"):
        monkeypatch.setattr(f"{module}.installed_folder", {"features-small": tmp_path / "tokenizer"}.get)
    assert load_tokenizer("features-small").digest() == saved.digest()  # under a name that is installed


def test_what_does_not_fit_is_refused(clips):
    with pytest.raises(ValueError, match="expected TimmTeacher or ConvNetTeacher, got HOGTeacher"):
        FeatureTokenizer.of(HOGTeacher(), SIZES)
    wide = RepViTokConfig(width=32, depth=1, heads=2, latent_dim=300)
    with pytest.raises(ValueError, match="latent_dim 300 is more than the 256 features"):
        FeatureTokenizer.of(network(), wide)
    with pytest.raises(ValueError, match="a PCA to 8 channels needs more than 8 tokens, these clips have 6"):
        FeatureTokenizer.of(network(), SIZES).fit_squeeze([clips[0][:, :, :1]])
    with pytest.raises(ValueError, match="has its encoder already"):
        RepViTokTraining(SIZES, features=network(), init_from="somewhere", teacher=HOGTeacher(), perceptual=None)


RECIPE = """
model:
  tokenizer: {{width: 32, depth: 1, heads: 2, latent_dim: 8, window: 2, episode_window: 2}}
  weights: {{perceptual: 0, gan: 0, align: 0}}
  features:
    class_path: repvitok.training.teacher.TimmTeacher
    init_args: {{name: test_vit, weights_path: {weights}}}
  squeeze: {squeeze}
  optimizer: {{warmup_steps: 1, lr: 0.001}}
data: {{folders: [{videos}], size: [32, 48], frames: 9, batch_size: 1, held_out: 0.4, val_clips: 1}}
trainer:
  {{accelerator: cpu, max_steps: 3, val_check_interval: 3, enable_progress_bar: false, default_root_dir: {run}}}
"""


@pytest.mark.parametrize("squeeze", ["pca", "learned"])
def test_fit_trains_the_decoder_and_encode_takes_the_export(tmp_path, squeeze, capsys):
    """The frozen network and the principal components stay; a learned layer begins there and moves; a run resumes."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 13, 4, 6, 3), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    for number in range(3):
        write_video(tmp_path / f"videos/{number}.mp4", frames[number], 10)
    save_file(network().network.state_dict(), tmp_path / "net.safetensors")
    names = {"weights": tmp_path / "net.safetensors", "videos": tmp_path / "videos", "run": tmp_path / "run"}
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(squeeze=squeeze, **names))
    fit = ["fit", "-c", str(tmp_path / "recipe.yaml"), "--ckpt_path", "last"]
    assert main(fit) == 0
    assert "8 channels keep" in capsys.readouterr().out
    exported = {}
    for steps in (3, 5):
        assert main([*fit, "--trainer.max_steps", str(steps)]) == 0
        assert main(["export", "--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "tokenizer"), "--raw"]) == 0
        exported[steps] = load_tokenizer(tmp_path / "tokenizer")
    early, late = exported[3], exported[5]
    assert "FeatureTokenizer.from_pretrained" in (tmp_path / "tokenizer/README.md").read_text()
    for name, weight in network().network.state_dict().items():
        torch.testing.assert_close(late.encoder.features.network.state_dict()[name], weight, rtol=0, atol=0)
    assert torch.equal(early.encoder.squeeze.weight, late.encoder.squeeze.weight) == (squeeze == "pca")
    assert not torch.equal(early.decoder.expand.weight, late.decoder.expand.weight)
    encode = ["encode", "--tokenizer", str(tmp_path / "tokenizer"), "--dataset", str(tmp_path / "videos")]
    assert main([*encode, "--size", "32x48", "--out", str(tmp_path / "latents")]) == 0
    shards = LatentShards(tmp_path / "latents", expect_digest=late.digest())
    assert shards[0].latents.shape == (4, 6, 8)
