"""Videos come alike from data sets and folders, and what cannot be read is named or counted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.sources import (
    ImageFolder,
    LeRobotSource,
    SelectedVideos,
    VideoFolder,
    VideoSource,
    lerobot_sources,
)
from repvitok.data.video import write_video


@pytest.fixture
def folder(tmp_path, make_frames):
    for number, length in enumerate((5, 8, 6)):
        write_video(tmp_path / f"videos/{number}/clip.mp4", make_frames(length, (16, 16), first=10 * number), 10)
    return tmp_path / "videos"


def test_every_camera_of_a_data_set_is_a_source(data_sets, read_number):
    sources = lerobot_sources(data_sets["v3.0"])
    assert [source.camera for source in sources if isinstance(source, LeRobotSource)] == [
        "observation.images.top",
        "observation.images.wrist",
    ]
    assert all(isinstance(source, VideoSource) for source in sources)
    assert [sources[1].num_frames(video) for video in range(4)] == [9, 14, 6, 11]
    assert read_number(sources[1].read(3, [4])[0]) == 34
    assert [source.frame_rate_hz(0) for source in sources] == [20.0, 20.0]
    some = lerobot_sources(data_sets["v2.1"], cameras=["observation.images.wrist"], episodes=[3, 1])
    assert [len(source) for source in some] == [2]
    assert read_number(some[0].read(0, [4])[0]) == 34
    assert "episode 3, observation.images.wrist" in some[0].describe(0)
    with pytest.raises(ValueError, match="no camera 'left'"):
        lerobot_sources(data_sets["v2.1"], cameras=["left"])
    with pytest.raises(ValueError, match='episodes must be "all" or a list'):
        lerobot_sources(LeRobotReader(data_sets["v2.1"]), episodes="some")
    with pytest.raises(ValueError, match=r"no episodes \[4\]; there are 0\.\.3"):
        lerobot_sources(data_sets["v2.1"], episodes=[4])


def test_folders_of_videos_in_the_order_of_their_paths(folder, read_number):
    source = VideoFolder(folder)
    assert isinstance(source, VideoSource)
    assert [source.num_frames(video) for video in range(len(source))] == [5, 8, 6]
    assert [read_number(frame) for frame in source.read(1, [7, 0])] == [17, 10]
    assert source.read(2).shape == (6, 16, 16, 3)
    assert source.frame_rate_hz(1) == SelectedVideos(source, [1]).frame_rate_hz(0) == 10
    assert read_number(SelectedVideos(source, [2]).read(0, [1])[0]) == 21


def test_unreadable_videos_are_an_error_or_counted(folder, caplog):
    (folder / "1/broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4.*1 of 4 files cannot be read, 0 may.*max_bad_fraction"):
        VideoFolder(folder)
    assert len(VideoFolder(folder, max_bad_fraction=0.25)) == 3
    assert "broken.mp4" in caplog.text
    (folder / "2/broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="2 of 5 files cannot be read, 1 may"):
        VideoFolder(folder, max_bad_fraction=0.25)
    with pytest.raises(ValueError, match=r"max_bad_fraction must be in \[0, 1\)"):
        VideoFolder(folder, max_bad_fraction=1.0)


def test_images_are_videos_of_one_frame(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "b.png")
    Image.fromarray(pixels[1]).save(tmp_path / "a.png")
    Image.fromarray(pixels[0, ..., 0]).save(tmp_path / "c.png")
    source = ImageFolder(tmp_path)
    assert isinstance(source, VideoSource)
    assert (len(source), source.num_frames(0)) == (3, 1)
    np.testing.assert_array_equal(source.read(0), pixels[1:])
    assert source.read(2, [0, 0]).shape == (2, 10, 12, 3)
    assert source.frame_rate_hz(0) is None
    with pytest.raises(ValueError, match=r"a\.png: an image has frame 0 only"):
        source.read(0, [1])
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        source.read(0)
    (tmp_path / "a.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"a\.png: the image is a git-lfs pointer"):
        source.read(0)


def test_folders_without_videos_or_images_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; expected a folder of videos"):
        VideoFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no images in this folder; looked for \.bmp"):
        ImageFolder(tmp_path)


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    pixels = np.zeros((8, 12, 3), dtype=np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter clockwise: what was left is on top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    shown = ImageFolder(tmp_path).read(0)[0]
    assert shown.shape == (12, 8, 3)
    assert shown[:4].min() == 255
    assert shown[4:].max() == 0
