"""The teacher's cache: every frame is shown once, and the result never depends on what the folder held."""

import numpy as np
import pytest
import torch
from repvitok.training.teacher import CachedTeacher, HOGTeacher, Teacher


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


def clip(frames=5, seed=0):
    return torch.rand(1, 3, frames, 32, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_overlapping_clips_show_each_frame_once(tmp_path):
    inner = Counting()
    cached = CachedTeacher(inner, str(tmp_path))
    video = clip(8)
    first = cached.features(video[:, :, :5], (2, 4))
    second = cached.features(video[:, :, 3:], (2, 4))
    assert inner.seen == 8
    torch.testing.assert_close(first[:, 3:], second[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(first, HOGTeacher().features(video[:, :, :5], (2, 4)), rtol=0, atol=5e-4)
    assert cached.name == inner.name


def test_the_result_does_not_depend_on_what_was_kept(tmp_path):
    cold = CachedTeacher(HOGTeacher(), str(tmp_path)).features(clip(), (2, 4))
    warm = CachedTeacher(HOGTeacher(), str(tmp_path)).features(clip(), (2, 4))
    full = CachedTeacher(HOGTeacher(), str(tmp_path / "full"), max_gib=1e-9).features(clip(), (2, 4))
    assert torch.equal(cold, warm)
    assert torch.equal(cold, full)
    assert not list((tmp_path / "full").rglob("*.npy"))


def test_teachers_and_grids_share_a_folder_and_nothing_else(tmp_path):
    a, b = Counting(), Counting(shift=1.0)
    assert a.digest() != b.digest()
    for teacher in (a, b):
        CachedTeacher(teacher, str(tmp_path)).features(clip(), (2, 4))
    assert (a.seen, b.seen) == (5, 5)
    CachedTeacher(a, str(tmp_path)).features(clip(), (1, 2))
    assert a.seen == 10


def test_a_damaged_file_is_named(tmp_path):
    CachedTeacher(HOGTeacher(), str(tmp_path)).features(clip(1), (2, 4))
    (path,) = tmp_path.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=path.name):
        CachedTeacher(HOGTeacher(), str(tmp_path)).features(clip(1), (2, 4))
    np.save(path, np.zeros((2, 4, 3), np.float16))
    with pytest.raises(ValueError, match=r"\(2, 4, 108\), got float16 \(2, 4, 3\); delete"):
        CachedTeacher(HOGTeacher(), str(tmp_path)).features(clip(1), (2, 4))


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
