"""Teachers: the tokenizer's grid, frozen weights, and never a silent random one; the cache shows every frame once, and
the result never depends on what its folder held."""

import numpy as np
import pytest
import torch
from repvitok.training.teacher import CachedTeacher, HOGTeacher, OpenClipTeacher, Teacher, TimmTeacher
from safetensors.torch import save_file

TINY = "vit_pe_core_tiny_patch16_384"


def clip(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_hog_has_the_grid_and_unit_vectors():
    teacher = HOGTeacher()
    found = teacher.features(clip(2, 3, 5, 64, 96), (4, 6))
    assert found.shape == (2, 5, 4, 6, teacher.dim)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 5, 4, 6))
    assert "not Perception Encoder" in teacher.name


def test_hog_sees_the_orientation_of_an_edge():
    stripes = torch.sin(torch.arange(32) * 0.6).expand(3, 1, 32, 32)
    teacher = HOGTeacher()
    vertical = teacher.features(stripes[None], (2, 2))
    horizontal = teacher.features(stripes.mT[None], (2, 2))
    bins = teacher.BINS
    by_bin = lambda features: features.reshape(-1, bins).sum(dim=0)  # noqa: E731
    assert by_bin(vertical).argmax() == 0  # the gradient of vertical stripes points along x: orientation 0
    assert by_bin(horizontal).argmax() in (bins // 2, bins // 2 + 1)


def test_hog_of_a_shifted_patch_moves_with_it():
    teacher = HOGTeacher()
    video = clip(1, 3, 1, 64, 64)
    moved = torch.roll(video, shifts=16, dims=4)
    a, b = teacher.features(video, (4, 4)), teacher.features(moved, (4, 4))
    torch.testing.assert_close(a[:, :, :, 1], b[:, :, :, 2])


def test_teachers_without_weights_say_how_to_get_them():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"exactly one of weights_path, hub.*safetensors.*HOGTeacher"):
        TimmTeacher()
    with pytest.raises(ValueError, match="exactly one of"):
        TimmTeacher(weights_path="a", hub=True)
    with pytest.raises(ValueError, match=r"exactly one of weights_path, hub_tag"):
        OpenClipTeacher()
    with pytest.raises(ValueError, match="no teacher weights at"):
        TimmTeacher(TINY, weights_path="/nowhere/pe.safetensors")
    with pytest.raises(ValueError, match="timm has no model 'vit_nonsense'"):
        TimmTeacher("vit_nonsense", random_weights_for_tests=True)


def test_pickles_are_not_loaded(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "pe.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickles are not loaded"):
        TimmTeacher(TINY, weights_path=str(tmp_path / "pe.pt"))


def test_timm_teacher_is_one_to_one_at_patch_16_and_frozen():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    teacher = TimmTeacher(TINY, random_weights_for_tests=True).train()
    assert "random weights for tests" in teacher.name
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    video = clip(1, 3, 2, 64, 96)
    found = teacher.features(video, (4, 6))
    assert found.shape == (1, 2, 4, 6, teacher.dim)
    frame = (video[:, :, 1] + 1) / 2
    tokens = teacher.network.forward_features((frame - 0.5) / 0.5)
    torch.testing.assert_close(found[:, 1].reshape(1, 24, -1), tokens[:, 1:])


@pytest.mark.parametrize("name", [TINY, "vit_pe_spatial_tiny_patch16_512", "vit_tiny_patch16_224"])
def test_timm_teacher_loads_a_local_file(tmp_path, name):
    """Perception Encoder's core and spatial models, and any other vision transformer."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    first = TimmTeacher(name, random_weights_for_tests=True)
    save_file(first.network.state_dict(), tmp_path / "pe.safetensors")
    second = TimmTeacher(name, weights_path=str(tmp_path / "pe.safetensors"))
    assert first.digest() != second.digest()  # the name says "random weights for tests"
    video = clip(1, 3, 1, 64, 64)
    torch.testing.assert_close(first.features(video, (4, 4)), second.features(video, (4, 4)))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of"):
        TimmTeacher(TINY, weights_path=str(tmp_path / "other.safetensors"))


def test_patch_14_is_brought_to_the_tokenizers_grid():
    """Three by four 16-pixel tokens are three by four 14-pixel patches of the frame at 42 x 56 pixels."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    teacher = TimmTeacher("vit_small_patch14_dinov2", random_weights_for_tests=True)
    video = clip(1, 3, 1, 48, 64)
    found = teacher.features(video, (3, 4))
    frame = torch.nn.functional.interpolate(video[:, :, 0], (42, 56), mode="bilinear", antialias=True)
    pixels = ((frame + 1) / 2 - teacher.get_buffer("pixel_mean")) / teacher.get_buffer("pixel_std")
    tokens = teacher.network.forward_features(pixels)[:, teacher.network.num_prefix_tokens :]
    torch.testing.assert_close(found.reshape(1, 12, teacher.dim), tokens)


@pytest.mark.slow
def test_open_clip_teacher_resamples_to_the_grid():
    pytest.importorskip("open_clip")
    torch.manual_seed(0)
    teacher = OpenClipTeacher("PE-Core-T-16-384", image_size=64, random_weights_for_tests=True)
    assert teacher.features(clip(1, 3, 2, 96, 96), (6, 6)).shape == (1, 2, 6, 6, teacher.dim)
    assert not any(p.requires_grad for p in teacher.parameters())


class Counting(HOGTeacher):
    """Notes how many frames it was shown."""

    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.seen = 0
        self.register_buffer("shift", torch.tensor(shift))

    def frame_features(self, frames, grid):
        self.seen += len(frames)
        return super().frame_features(frames, grid) + self.shift

    def digest(self):
        self.seen, seen = 0, self.seen
        found = super().digest()
        self.seen = seen
        return found


def seen_clip(frames=5, seed=0):
    return torch.rand(1, 3, frames, 32, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_overlapping_clips_show_each_frame_once(tmp_path):
    inner = Counting()
    cached = CachedTeacher(inner, str(tmp_path))
    video = seen_clip(8)
    first = cached.features(video[:, :, :5], (2, 4))
    second = cached.features(video[:, :, 3:], (2, 4))
    assert inner.seen == 8
    torch.testing.assert_close(first[:, 3:], second[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(first, HOGTeacher().features(video[:, :, :5], (2, 4)), rtol=0, atol=5e-4)
    assert cached.name == inner.name


def test_the_result_does_not_depend_on_what_was_kept(tmp_path):
    cold = CachedTeacher(HOGTeacher(), str(tmp_path)).features(seen_clip(), (2, 4))
    warm = CachedTeacher(HOGTeacher(), str(tmp_path)).features(seen_clip(), (2, 4))
    full = CachedTeacher(HOGTeacher(), str(tmp_path / "full"), max_gib=1e-9).features(seen_clip(), (2, 4))
    assert torch.equal(cold, warm)
    assert torch.equal(cold, full)
    assert not list((tmp_path / "full").rglob("*.npy"))


def test_teachers_and_grids_share_a_folder_and_nothing_else(tmp_path):
    a, b = Counting(), Counting(shift=1.0)
    assert a.digest() != b.digest()
    for teacher in (a, b):
        CachedTeacher(teacher, str(tmp_path)).features(seen_clip(), (2, 4))
    assert (a.seen, b.seen) == (5, 5)
    CachedTeacher(a, str(tmp_path)).features(seen_clip(), (1, 2))
    assert a.seen == 10


def test_a_damaged_file_is_named(tmp_path):
    CachedTeacher(HOGTeacher(), str(tmp_path)).features(seen_clip(1), (2, 4))
    (path,) = tmp_path.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=path.name):
        CachedTeacher(HOGTeacher(), str(tmp_path)).features(seen_clip(1), (2, 4))
    np.save(path, np.zeros((2, 4, 3), np.float16))
    with pytest.raises(ValueError, match=r"\(2, 4, 108\), got float16 \(2, 4, 3\); delete"):
        CachedTeacher(HOGTeacher(), str(tmp_path)).features(seen_clip(1), (2, 4))


def test_the_digest_follows_weights_and_settings():
    class Linear(Teacher):
        def __init__(self, scale):
            super().__init__()
            self.name, self.dim = "linear", 3
            self.weight = torch.nn.Parameter(torch.full((3,), scale))
            self._freeze()

        def frame_features(self, frames, grid):
            return frames

    assert Linear(1.0).digest() == Linear(1.0).digest()
    assert Linear(1.0).digest() != Linear(2.0).digest()
    other = Linear(1.0)
    other.stage = 3
    assert other.digest() != Linear(1.0).digest()


@pytest.mark.parametrize("name", ["vit_pe_core_tiny_patch16_384", "vit_pe_spatial_tiny_patch16_512"])
def test_perception_encoder_from_a_file_in_timms_layout(tmp_path, name):
    """Half precision in the file, the model's own image size for the positions, frames of another size and shape.

    A file has what `timm.create_model(name).state_dict()` has: the core models' classifier (their projection) too, none
    in the spatial ones.
    """
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    published = timm.create_model(name).eval()
    stored = {key: value.half() for key, value in published.state_dict().items()}
    assert ("head.weight" in stored) == ("core" in name)
    save_file(stored, tmp_path / "model.safetensors")
    teacher = TimmTeacher(name, weights_path=str(tmp_path / "model.safetensors"))
    assert {value.dtype for value in teacher.network.state_dict().values()} == {torch.float32}
    assert (teacher.patch_size, teacher.dim) == ((16, 16), 192)
    assert teacher.get_buffer("pixel_mean").flatten().tolist() == [0.5] * 3
    assert teacher.get_buffer("pixel_std").flatten().tolist() == [0.5] * 3
    video = clip(1, 3, 1, 32, 64)
    other = timm.create_model(name, img_size=(32, 64)).eval()  # timm resamples the positions itself
    from timm.models.eva import checkpoint_filter_fn

    other.load_state_dict(checkpoint_filter_fn({key: value.float() for key, value in stored.items()}, other))
    expected = other.forward_features(video[:, :, 0])[:, other.num_prefix_tokens :]  # (x + 1) / 2 less 0.5 by 0.5 is x
    torch.testing.assert_close(teacher.features(video, (2, 4)).flatten(1, 3), expected, atol=1e-4, rtol=1e-4)
