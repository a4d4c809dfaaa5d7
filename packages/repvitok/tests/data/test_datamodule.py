"""The data module: folders of any format, mixtures of kinds, the same batches whatever the workers."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from repvitok.data.datamodule import ClipDataModule, ClipKind
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.video import write_video

MIXTURE = [
    ClipKind(weight=1.0, frames=1, size=(32, 16), batch_size=3),
    ClipKind(weight=1.0, size=(24, 24), rate_hz=(5.0, 10.0), batch_size=1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_frames) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    for number in range(3):
        write_video(root / f"videos/{number}.mp4", make_frames(12, (16, 16), first=10 * number), 10)
    (root / "images").mkdir()
    for number in range(4):
        Image.fromarray(np.full((16, 16, 3), 10 * number, dtype=np.uint8)).save(root / f"images/{number}.png")
    return {name: str(root / name) for name in ("videos", "images")}


def module(*folders: str, **options) -> ClipDataModule:
    settings = {"size": (16, 16), "frames": 5, "batch_size": 2, "held_out": 0.3, "val_clips": 3}
    found = ClipDataModule(list(folders), **(settings | options))
    found.setup("fit")
    return found


def shapes(data: ClipDataModule, count: int) -> list[tuple[int, ...]]:
    return [tuple(batch.shape) for batch in islice(data.train_dataloader(), count)]


def test_images_and_two_sizes_of_video_in_one_run(folders):
    data = module(folders["videos"], folders["images"], mixture=MIXTURE)
    found = shapes(data, 40)
    assert set(found) == {(2, 3, 5, 16, 16), (3, 3, 1, 32, 16), (1, 3, 5, 24, 24)}
    assert found == shapes(module(folders["videos"], folders["images"], mixture=MIXTURE, num_workers=2), 40)
    assert {tuple(batch.shape[1:]) for batch in data.val_dataloader()} == {(3, 5, 16, 16)}


def test_images_are_drawn_from_videos_and_image_folders(folders):
    data = module(folders["videos"], folders["images"], mixture=[ClipKind(frames=1)], held_out=0.0)
    sources = {data._train[1].position(index).source for index in range(60)}
    assert sources == {0, 1}
    assert {data._train[0].position(index).source for index in range(60)} == {0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_mixture_continues_with_the_next_batch(folders, workers):
    options = {"mixture": MIXTURE, "num_workers": workers}
    whole = list(islice(module(folders["videos"], **options).train_dataloader(), 8))
    resumed = module(folders["videos"], **options)
    resumed.load_state_dict(resumed.state_dict() | {"batches": 5})
    rest = list(islice(resumed.train_dataloader(), 3))
    assert all(torch.equal(one, two) for one, two in zip(whole[5:], rest, strict=True))


def test_every_pass_over_the_batches_has_new_ones(folders):
    """Lightning makes a pass of every epoch; an epoch that was left early loses no batch and repeats none."""
    for options in ({}, {"mixture": MIXTURE, "num_workers": 1}):
        whole = list(islice(module(folders["videos"], **options).train_dataloader(), 6))
        loader = module(folders["videos"], **options).train_dataloader()
        parts = [batch for count in (2, 3, 1) for batch in islice(loader, count)]
        assert all(torch.equal(one, two) for one, two in zip(whole, parts, strict=True))


def test_a_checkpoint_of_another_number_of_processes_is_refused(folders):
    data = module(folders["videos"])
    state = data.state_dict()
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(ValueError, match="number of processes = 1, got 2"):
        data.load_state_dict(state)
    of_version_0_1 = {"batches": 7, "batch_size": 2, "seed": 0}
    data.load_state_dict(of_version_0_1)
    data.trainer = None
    assert data.train_dataloader().position == 7


def test_a_checkpoint_of_another_mixture_is_refused(folders):
    state = module(folders["videos"], mixture=MIXTURE).state_dict()
    with pytest.raises(ValueError, match=r"was trained with data\.mixture"):
        module(folders["videos"]).load_state_dict(state)
    before = {name: value for name, value in module(folders["videos"]).state_dict().items() if name != "mixture"}
    module(folders["videos"]).load_state_dict(before)


def test_images_without_a_kind_for_them_are_refused(folders):
    with pytest.raises(ValueError, match=r"images: images, and no kind of clips has one frame; set data\.frames to 1"):
        module(folders["videos"], folders["images"])
    with pytest.raises(ValueError, match=r"weight: expected float > 0\.0"):
        ClipKind(weight=0.0)


def test_unreadable_files_count_against_the_bound(folders, tmp_path):
    for path in Path(folders["videos"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        module(str(tmp_path))
    assert shapes(module(str(tmp_path), max_bad_fraction=0.25), 1) == [(2, 3, 5, 16, 16)]


def test_every_process_validates_on_a_clip(folders):
    data = module(folders["videos"], val_clips=3)
    data.trainer = SimpleNamespace(global_rank=1, world_size=3)
    assert [len(batch) for batch in data.val_dataloader()] == [1]
    data.trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"data\.val_clips of at least one clip for each of 4 processes, got 3"):
        data.val_dataloader()


def train_and_held_out(data: ClipDataModule) -> list[list[str]]:
    """What the clips of both sides are cut from."""
    assert data._val is not None
    sides = (data._train[0], data._val)
    return [[source.describe(v) for source in side.sources for v in range(len(source))] for side in sides]


def shown(clips) -> list[int]:
    """The frames of some clips of a video by `make_frames`, as their numbers."""
    grey = torch.cat([clip[:, -1, :, :, -4:].mean(dim=(2, 3)).flatten() for clip in clips])
    return ((grey + 1) * 127.5).sub(8).div(6).round().int().tolist()


@pytest.mark.parametrize(("length", "fraction", "cut"), [(30, 0.2, 24), (30, 0.01, 25), (10, 0.1, 5), (40, 0.4, 24)])
def test_of_one_video_the_last_frames_are_held_out(tmp_path, make_frames, caplog, length, fraction, cut):
    write_video(tmp_path / "0.mp4", make_frames(length, (16, 16)), 10)
    data = module(str(tmp_path), held_out=fraction, val_clips=12)
    assert f"its frames 0-{cut - 1} are trained on, {cut}-{length - 1} held out" in caplog.text
    assert data._val is not None
    assert [part.sources[0].num_frames(0) for part in (data._train[0], data._val)] == [cut, length - cut]
    assert max(shown(islice(data.train_dataloader(), 20))) < cut <= min(shown(data.val_dataloader()))


@pytest.mark.parametrize("length", [5, 9])
def test_a_video_too_short_to_be_shared_is_trained_on_whole(tmp_path, make_frames, caplog, length):
    write_video(tmp_path / "0.mp4", make_frames(length, (16, 16)), 10)
    data = module(str(tmp_path), held_out=0.2)
    assert f"of {length} frames" in caplog.text
    assert "nothing is held out" in caplog.text
    assert data.val_dataloader() == []
    assert len(shapes(data, 2)) == 2


def test_short_videos_are_left_out_with_a_word(tmp_path, make_frames, caplog):
    caplog.set_level(logging.WARNING)
    for number, length in enumerate((3, 12, 4, 20)):
        write_video(tmp_path / f"{number}.mp4", make_frames(length, (16, 16)), 10)
    data = module(str(tmp_path), held_out=[3])
    assert [f"{tmp_path}: left out 2 of 4 videos, too short with a length of 3 to 4: a clip takes 5 frames"] == (
        caplog.messages
    )
    assert train_and_held_out(data) == [[str(tmp_path / "1.mp4")], [str(tmp_path / "3.mp4")]]
    with pytest.raises(ValueError, match="3 frames, a clip of 5 frames at stride 1 needs 5"):
        module(str(tmp_path), held_out=[3], skip_short=False)
    for number in (1, 3):
        (tmp_path / f"{number}.mp4").unlink()
    with pytest.raises(ValueError, match=r"no video of .* is long enough for a clip"):
        module(str(tmp_path))


def test_a_folder_may_have_nothing_that_is_long_enough(folders, tmp_path, make_frames):
    write_video(tmp_path / "0.mp4", make_frames(2, (16, 16)), 10)
    assert shapes(module(folders["videos"], str(tmp_path)), 1) == [(2, 3, 5, 16, 16)]


def test_episodes_are_chosen_and_held_out_by_their_numbers(gapped):
    """Numbers 2, 5, 9 and 40: none is a position."""
    data = module(str(gapped), held_out=[9], episodes="2,9,40")
    train, held_out = train_and_held_out(data)
    assert [name.split(", ")[1] for name in train] == ["episode 2", "episode 40"] * 2  # of two cameras
    assert [name.split(", ")[1] for name in held_out] == ["episode 9"] * 2
    assert train_and_held_out(module(str(gapped), held_out=[9], episodes=[2, 9, 40])) == [train, held_out]
    with pytest.raises(ValueError, match="no episodes 3; there are 2,5,9,40"):
        module(str(gapped), episodes=[3])
    with pytest.raises(ValueError, match="held_out: no episodes 40; there are 2,5"):
        module(str(gapped), episodes=[2, 5], held_out=[40])
    with pytest.raises(ValueError, match="numbers of episodes are those of one folder, got 2 folders"):
        ClipDataModule(["a", "b"], (16, 16), held_out=[1])


def test_a_camera_that_was_never_recorded_is_named_before_training(gapped, tmp_path):
    root = shutil.copytree(gapped, tmp_path / "data")
    info = json.loads((root / "meta/info.json").read_text())
    camera = next(key for key, feature in info["features"].items() if feature["dtype"] == "video")
    info["features"]["observation.images.egoview"] = info["features"][camera]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"egoview, but it was never recorded .* leave it out: --cameras"):
        module(str(root))
    with pytest.raises(FileNotFoundError, match="no such video file; if this camera was never recorded, leave it out"):
        LeRobotReader(root)[0]
    assert len(train_and_held_out(module(str(root), cameras=[camera]))) == 2


def test_testing_on_nothing_is_an_error(folders):
    data = module(folders["videos"], held_out=0.0)
    assert data.val_dataloader() == []
    for loader in (data.test_dataloader, data.predict_dataloader):
        with pytest.raises(ValueError, match=r"data\.held_out: nothing is held out of these videos"):
            loader()
