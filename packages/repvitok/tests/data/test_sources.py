"""Videos from data sets, folders and WebDataset shards."""

from __future__ import annotations

import functools
import http.server
import io
import json
import pickle
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from repvitok.data import sources
from repvitok.data.clips import ClipDataset
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.sources import (
    ImageFolder,
    LeRobotSource,
    SelectedVideos,
    TarShards,
    VideoFolder,
    VideoSource,
    expand_shards,
    is_shards,
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


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def films(tmp_path, make_frames) -> dict[int, bytes]:
    """Films of 7, 9 and 12 frames that begin with the numbers 0, 10 and 20."""
    made = {}
    for number, length in enumerate((7, 9, 12)):
        write_video(tmp_path / "film.mp4", make_frames(length, (16, 16), first=10 * number), 10)
        made[number] = (tmp_path / "film.mp4").read_bytes()
    return made


@pytest.fixture
def shards(tmp_path, films) -> Path:
    folder = tmp_path / "shards"
    write_tar(folder / "clips-000.tar", {"a.json": b"{}", "a.mp4": films[0], "a.jpg": png(1), "b.mp4": films[1]})
    write_tar(folder / "clips-001.tar", {"c.left.mp4": films[2], "c.txt": b"pick"})
    return folder


def test_every_clip_of_every_shard_at_any_frame(shards, read_number):
    source = TarShards(shards)
    assert isinstance(source, VideoSource)
    assert source.media == "videos"
    assert [source.num_frames(video) for video in range(len(source))] == [7, 9, 12]
    assert source.frame_rate_hz(2) == 10
    assert [read_number(frame) for frame in source.read(1, [8, 0])] == [18, 10]
    assert [read_number(frame) for frame in pickle.loads(pickle.dumps(source)).read(2)] == list(range(20, 32))
    assert source.describe(2).endswith("clips-001.tar, c.left.mp4")
    dataset = ClipDataset([source], frames=5, size=(16, 16), length=8)
    assert all(dataset[index].shape == (3, 5, 16, 16) for index in range(8))


def test_the_same_members_as_webdataset_finds(shards, read_number):
    stream = webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False)
    keys = [sample["__key__"] for sample in stream if any(name.endswith("mp4") for name in sample)]
    assert [TarShards(shards).describe(video).split(", ")[1].split(".")[0] for video in range(3)] == keys


def test_images_of_shards_are_videos_of_one_frame(tmp_path, shards):
    write_tar(tmp_path / "images.tar", {"a.png": png(10), "b.png": png(20), "b.cls": b"3"})
    source = TarShards(tmp_path / "images.tar")
    assert (source.media, len(source), source.num_frames(1), source.frame_rate_hz(1)) == ("images", 2, 1, None)
    assert (source.read(1) == 20).all()
    assert len(TarShards(shards, media="images")) == 1


def test_shards_are_named_in_four_ways(shards):
    names = [str(shards / f"clips-00{number}.tar") for number in range(2)]
    assert expand_shards(shards) == expand_shards(f"{shards}/clips-{{000..001}}.tar") == names
    assert expand_shards(names[0]) == names[:1]
    assert expand_shards("https://host/{a,b}.tar?token=1") == [
        "https://host/a.tar?token=1",
        "https://host/b.tar?token=1",
    ]
    assert is_shards(shards)
    assert is_shards("http://host/data")
    assert not is_shards(shards.parent)


def test_damage_is_named_or_counted(shards, films, caplog):
    write_tar(shards / "clips-002.tar", {"bad.mp4": films[2][: len(films[2]) // 2]})
    with pytest.raises(ValueError, match=r"clips-002\.tar, bad\.mp4.*1 of 4 files cannot be read, 0 may"):
        TarShards(shards)
    assert len(TarShards(shards, max_bad_fraction=0.25)) == 3
    assert "bad.mp4" in caplog.text
    whole = (shards / "clips-001.tar").read_bytes()
    (shards / "clips-001.tar").write_bytes(whole[:1500])
    with pytest.raises(ValueError, match=r"clips-001\.tar: not a readable, uncompressed tar"):
        TarShards(shards)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    (shards / "clips-001.tar").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"clips-001\.tar is a git-lfs pointer"):
        TarShards(shards)
    write_tar(shards / "clips-001.tar", {"bad.mp4": pointer})
    with pytest.raises(ValueError, match=r"clips-001\.tar, bad\.mp4 is a git-lfs pointer"):
        TarShards(shards)


def test_what_holds_no_clips_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected a WebDataset shard"):
        TarShards(tmp_path / "none.tar")
    with pytest.raises(ValueError, match=r"no \.tar files in this folder"):
        TarShards(tmp_path)
    with pytest.raises(ValueError, match="no readable images in 1 tars"):
        TarShards(write_tar(tmp_path / "a.tar", {"a.txt": b"words"}))
    with pytest.raises(ValueError, match="need a cache_folder"):
        TarShards("https://host/a.tar")


def test_an_index_is_made_once_per_state_of_a_tar(tmp_path, shards, films, monkeypatch):
    scanned: list[Path] = []

    def counting_scan(tar: Path, scan=sources.scan):
        scanned.append(tar)
        return scan(tar)

    monkeypatch.setattr(sources, "scan", counting_scan)
    first = TarShards(shards, cache_folder=tmp_path / "cache")
    again = TarShards(shards, cache_folder=tmp_path / "cache")
    assert len(scanned) == 2
    np.testing.assert_array_equal(first.read(2, [3]), again.read(2, [3]))
    write_tar(shards / "clips-001.tar", {"d.mp4": films[0]})
    assert [TarShards(shards, cache_folder=tmp_path / "cache").num_frames(v) for v in range(3)] == [7, 9, 7]
    assert len(scanned) == 3
    assert all(json.loads(path.read_text()) for path in (tmp_path / "cache").iterdir())


@pytest.fixture
def server(shards):
    """The shards over HTTP; counts the requests."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}", requests
        http_server.shutdown()
        thread.join()


def test_remote_shards_are_copied_once(tmp_path, server, read_number):
    address, requests = server
    url = f"{address}/clips-{{000..001}}.tar"
    for _ in range(2):
        source = TarShards(url, cache_folder=tmp_path / "cache")
        assert [read_number(frame) for frame in source.read(2, [11])] == [31]
    assert len(requests) == 2
    with pytest.raises(FileNotFoundError, match=r"clips-009\.tar: could not be fetched \(HTTP Error 404"):
        TarShards(f"{address}/clips-009.tar", cache_folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*partial"))
