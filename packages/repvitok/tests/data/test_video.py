"""A video file gives exactly the frames asked for, whatever the codec and order, or says what is wrong with it."""

from __future__ import annotations

import pickle
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from repvitok.data.video import VideoFile, concatenate_videos, write_video

SIZE = (32, 48)


def write_with(path: Path, frames: np.ndarray, codec: str, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("gop", [1, 3, 8, 100])
def test_any_frames_in_any_order(tmp_path, make_frames, read_number, gop):
    write_video(tmp_path / "a.mp4", make_frames(40, SIZE), 25, gop=gop)
    video = VideoFile(tmp_path / "a.mp4")
    assert (len(video), video.height, video.width, video.fps, video.codec) == (40, *SIZE, 25.0, "h264")
    random = np.random.default_rng(gop)
    for wanted in ([0], [39], [5, 5, 4], list(range(10, 27)), random.integers(0, 40, 12).tolist(), []):
        frames = video.read(wanted)
        assert frames.shape == (len(wanted), *SIZE, 3)
        assert [read_number(frame) for frame in frames] == wanted
    assert [read_number(frame) for frame in video.read()] == list(range(40))


@pytest.mark.parametrize(
    ("codec", "options", "suffix"),
    [
        ("libx264", {"bf": "3", "g": "12"}, "mp4"),
        ("libx264", {"bf": "3", "g": "12"}, "mkv"),
        ("libsvtav1", {"g": "6", "preset": "12"}, "mp4"),
        ("mpeg4", {"g": "9", "b": "4000000"}, "avi"),
    ],
)
def test_reordered_frames_and_other_codecs(tmp_path, make_frames, read_number, codec, options, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = make_frames(30, (64, 64))
    try:
        write_with(path, frames, codec, options)
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV was built without {codec}")
    video = VideoFile(path)
    assert len(video) == 30
    for wanted in ([17], [29, 0, 13], list(range(4, 22))):
        assert [read_number(frame) for frame in video.read(wanted)] == wanted


def test_colours_survive(tmp_path):
    frames = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 90), (128, 128, 128), (255, 255, 255)]
    frames[:] = np.array(colours, dtype=np.uint8)[:, None, None]
    write_video(tmp_path / "a.mp4", frames, 10)
    assert np.abs(VideoFile(tmp_path / "a.mp4").read().astype(int) - frames).max() <= 4


def test_same_frames_give_the_same_bytes(tmp_path, make_frames):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, make_frames(20, SIZE), 25)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("fps", [10, 25, 29.97, 80])
def test_concatenation_copies_every_frame_to_its_time(tmp_path, make_frames, fps):
    lengths, paths = [7, 12, 5], []
    for number, length in enumerate(lengths):
        paths.append(tmp_path / f"{number}.mp4")
        write_video(paths[-1], make_frames(length, SIZE, first=sum(lengths[:number])), fps)
    concatenate_videos(paths, tmp_path / "all.mp4", lengths, fps)
    joined = VideoFile(tmp_path / "all.mp4")
    np.testing.assert_array_equal(joined.read(), np.concatenate([VideoFile(path).read() for path in paths]))
    np.testing.assert_allclose(joined.times_s, np.arange(24) / fps, atol=1e-4)
    assert [int(joined.nearest(start / fps)) for start in (0, 7, 19)] == [0, 7, 19]
    with pytest.raises(ValueError, match="expected 8 frames, found 7"):
        concatenate_videos(paths, tmp_path / "wrong.mp4", [8, 12, 5], fps)


def test_a_file_can_be_sent_to_another_process(tmp_path, make_frames, read_number):
    write_video(tmp_path / "a.mp4", make_frames(9, SIZE), 25)
    video = pickle.loads(pickle.dumps(VideoFile(tmp_path / "a.mp4")))
    assert read_number(video.read([7])[0]) == 7


def test_missing_foreign_and_truncated_files_are_named(tmp_path, make_frames):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        VideoFile(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_bytes(b"no video at all" * 50)
    with pytest.raises(ValueError, match=r"text\.mp4.*not a readable video"):
        VideoFile(tmp_path / "text.mp4")
    noise = np.random.default_rng(0).integers(0, 256, (40, *SIZE, 3), dtype=np.uint8)
    write_video(tmp_path / "whole.mp4", noise, 25)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half\.mp4.*truncated.*promises 40 frames, \d+ are there"):
        VideoFile(tmp_path / "half.mp4")
    (tmp_path / "head.mp4").write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"head\.mp4"):
        VideoFile(tmp_path / "head.mp4")


def test_damage_in_the_middle_says_how_many_frames_were_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, *SIZE, 3), dtype=np.uint8)
    write_with(tmp_path / "a.avi", noise, "mpeg4", {"g": "1"})
    video = VideoFile(tmp_path / "a.avi")
    video._pts.append(video._pts[-1] + 1)  # a frame the file turns out not to hold
    with pytest.raises(ValueError, match=r"only 3 of 4 frames could be decoded \(frame 20 could not\)"):
        video.read([17, 18, 19, 20])


def test_frames_outside_the_file_are_refused(tmp_path, make_frames):
    write_video(tmp_path / "a.mp4", make_frames(9, SIZE), 25)
    video = VideoFile(tmp_path / "a.mp4")
    for wanted in ([9], [-1], [0, 12]):
        with pytest.raises(ValueError, match=r"the file has frames 0\.\.8"):
            video.read(wanted)


@pytest.mark.parametrize("shape", [(0, 32, 32, 3), (4, 31, 32, 3), (4, 32, 33, 3), (4, 32, 32), (4, 32, 32, 4)])
def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(tmp_path, shape):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises((ValueError, TypeError)):
        write_video(tmp_path / "a.mp4", np.zeros(shape, dtype=np.uint8), 25)
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def turned(path: Path, quarters_clockwise: int) -> Path:
    """A copy of an mp4 whose track header asks players to turn the picture: the matrix of ISO 14496-12, 8.3.2.3."""
    matrices = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}
    a, b, c, d = (value << 16 for value in matrices[quarters_clockwise])
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of times, ids, layer and volume come first
    assert struct.unpack_from(">9i", data, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    copy = path.with_name(f"turned_{quarters_clockwise}.mp4")
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_film_is_read_upright(tmp_path, make_frames, quarters):
    write_video(tmp_path / "a.mp4", make_frames(6, SIZE), 25)
    stored = VideoFile(tmp_path / "a.mp4").read()
    video = VideoFile(turned(tmp_path / "a.mp4", quarters))
    shown = video.read([4, 1])
    np.testing.assert_array_equal(shown, np.rot90(stored[[4, 1]], -quarters, axes=(1, 2)))
    assert (video.height, video.width) == shown.shape[1:3]
    if quarters == 1:  # what was left is on top
        assert shown[0, 2, :, 0].mean() > 150 > shown[0, -2, :, 0].mean()


def test_a_video_inside_another_file(tmp_path, make_frames, read_number):
    write_video(tmp_path / "a.mp4", make_frames(9, SIZE), 25)
    inner = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.bin").write_bytes(b"before" + inner + b"after")
    video = VideoFile(tmp_path / "b.bin", (6, len(inner)), "b.bin, a.mp4")
    assert [read_number(frame) for frame in pickle.loads(pickle.dumps(video)).read([7, 2])] == [7, 2]
    with pytest.raises(ValueError, match=r"b\.bin, a\.mp4: asked for frames 9\.\.9"):
        video.read([9])
    with pytest.raises(ValueError, match=r"b\.bin, a\.mp4"):
        VideoFile(tmp_path / "b.bin", (6, len(inner) - 300), "b.bin, a.mp4")


def test_whole_colour_planes_keep_colour_and_odd_sizes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 17, 33, 3), np.uint8)
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "a.mp4", frames, 10)
    with pytest.raises(ValueError, match="pix_fmt must be one of"):
        write_video(tmp_path / "a.mp4", frames, 10, pix_fmt="rgb24")
    write_video(tmp_path / "a.mp4", frames, 10, pix_fmt="yuv444p", crf=0)
    error = VideoFile(tmp_path / "a.mp4").read(range(3)).astype(float) - frames
    assert np.abs(error).mean() < 2  # rounding to YUV and back; half the colour would leave tens
