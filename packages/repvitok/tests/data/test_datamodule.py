"""The data module: folders of any format, mixtures of kinds, the same batches whatever the workers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from repvitok.data.datamodule import ClipDataModule, ClipKind
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


def test_a_checkpoint_of_another_mixture_is_refused(folders):
    state = module(folders["videos"], mixture=MIXTURE).state_dict()
    with pytest.raises(ValueError, match=r"was trained with data\.mixture"):
        module(folders["videos"]).load_state_dict(state)
    before = {name: value for name, value in module(folders["videos"]).state_dict().items() if name != "mixture"}
    module(folders["videos"]).load_state_dict(before)


def test_images_without_a_kind_for_them_are_refused(folders):
    with pytest.raises(ValueError, match=r"images: images, and no kind of clips has one frame; set data\.frames to 1"):
        module(folders["videos"], folders["images"])
    with pytest.raises(ValueError, match=r"weights above 0 in data\.mixture"):
        module(folders["videos"], mixture=[ClipKind(weight=0.0)])


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
