"""A checkpoint is whole or absent: also when its writer is killed, and when the file was damaged."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.runtime.checkpointing import (
    find_checkpoint,
    read_checkpoint,
    resolve_checkpoint,
    resume_path,
    set_aside,
    sharded_folders,
    write_checkpoint,
)
from repvitok.runtime.errors import UserError


def write_for_ever(path: Path, number: int) -> None:
    while True:
        number += 1
        write_checkpoint({"number": number, "weights": torch.full((400_000,), float(number))}, path)


def test_round_trip(tmp_path):
    write_checkpoint({"step": 3, "weights": torch.arange(4.0)}, tmp_path / "run" / "last.ckpt")
    found = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert found["step"] == 3
    assert torch.equal(found["weights"], torch.arange(4.0))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.ckpt"]


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path):
    path, number, draw = tmp_path / "last.ckpt", 0, random.Random(0)
    for _ in range(12):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path, number))
        writer.start()
        while not path.exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.1))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = read_checkpoint(path)
        assert found["number"] >= number
        assert (found["weights"] == found["number"]).all()
        number = found["number"]
    write_checkpoint({"number": 0}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]  # what killed writers left is gone


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever torch says of an object that cannot be stored)
        write_checkpoint({"step": 2, "function": lambda: None}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt")["step"] == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_files_are_named(tmp_path, damage):
    path = write_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "last.ckpt")
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "garbage": b"\x00not a checkpoint" * 50, "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=r"last\.ckpt \(\d+ bytes\) is not a readable checkpoint"):
        read_checkpoint(path)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole .*last\.ckpt"):
        resume_path(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match="no readable checkpoint in"):
        resolve_checkpoint(tmp_path)


def test_resume_takes_the_newest_that_can_be_read(tmp_path):
    for age, name in enumerate(["broken.ckpt", "new.ckpt", "old.ckpt"]):
        write_checkpoint({"name": name}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "broken.ckpt").write_bytes(b"cut")
    os.utime(tmp_path / "broken.ckpt", (2000, 2000))
    assert resume_path(tmp_path) == tmp_path / "new.ckpt"
    assert resolve_checkpoint(tmp_path) == tmp_path / "new.ckpt"
    assert resume_path(tmp_path / "nowhere") is None


def test_states_before_the_last_one_are_kept(tmp_path):
    for step in range(5):
        write_checkpoint({"global_step": step}, tmp_path / "last.ckpt", generations=3)
    steps = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.iterdir()}
    assert steps == {"last.ckpt": 4, "last.1.ckpt": 3, "last.2.ckpt": 2}
    for name, expected in (("last.ckpt", 3), ("last.1.ckpt", 2)):
        (tmp_path / name).write_bytes(b"cut")
        found = find_checkpoint(tmp_path)
        assert found is not None
        assert found.step == expected
        assert tmp_path / name in found.damaged


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("run")
    weights = torch.linspace(0, 1, 300)
    path = write_checkpoint({"global_step": 7, "weights": weights}, folder / "last.ckpt")
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = find_checkpoint(folder)
    except UserError:
        return
    assert found is not None
    assert found.step == 7
    assert torch.equal(read_checkpoint(path)["weights"], weights)  # an unread byte of the archive


def test_a_dangling_link_is_passed_over_and_a_users_files_are_no_generations(tmp_path):
    (tmp_path / "last.ckpt").symlink_to("last.ckpt-000007")
    write_checkpoint({"global_step": 3}, tmp_path / "mine.ckpt")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == ("mine.ckpt", 3)
    assert "which is not there" in found.damaged[tmp_path / "last.ckpt"]
    names = ("last.ckpt-000120", "last.ckpt-best", "last.ckpt-12-old", "last.ckpt-000060", "last.ckpt-000060-1")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pt").touch()
    (tmp_path / "last.ckpt-000200").mkdir()  # no checkpoint in it
    expected = ["last.ckpt-000120", "last.ckpt-000060-1", "last.ckpt-000060"]
    assert [path.name for path in sharded_folders(tmp_path / "last.ckpt")] == expected


def test_a_damaged_checkpoint_is_set_aside_under_a_name_of_its_own(tmp_path):
    for number in (1, 2):
        (tmp_path / "last.ckpt").write_text(f"damaged {number}")
        assert set_aside(tmp_path / "last.ckpt").read_text() == f"damaged {number}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt.damaged-1", "last.ckpt.damaged-2"]
