"""What is written is whole or absent wherever its writer stops, folders have one writer, and nothing foreign goes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from repvitok.runtime.checkpointing import find_checkpoint, write_checkpoint
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import (
    WriteError,
    atomic_file,
    atomic_folder,
    is_held,
    readable,
    refuse_foreign,
    sole_writer,
    translated,
    write_text_atomic,
)

OWN = ("config.json", "model.bin", "part/data.bin", "part/more.bin")
FIRST = {"config.json": "first", "part/data.bin": "first", "part/more.bin": "first"}
SECOND = {"config.json": "second", "model.bin": "second", "part/data.bin": "second"}
_WRITES = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


# -- wherever a writer stops ------------------------------------------------------------------------------------------


def _in_a_fork(work: Callable[[], None], number: int, folder: Path, stop: Callable[[], None]) -> bool:
    """Runs `work` in a process of its own, in which `stop` happens before the `number`-th call that changes anything
    below a folder; returns False where there are fewer calls."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    calls = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal calls
        if event not in _WRITES or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        calls += 1
        if calls == number:
            stop()

    sys.addaudithook(hook)
    with suppress(BaseException):
        work()
    os._exit(0 if calls < number else 1)


def _stops() -> dict[str, Callable[[], None]]:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupt() -> None:
        raise KeyboardInterrupt

    return {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "full disk": full, "Ctrl-C": interrupt}


def _fill(folder: Path, files: dict[str, str]) -> None:
    with atomic_folder(folder, OWN) as fresh:
        for name, text in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_text(text)


def _content(folder: Path) -> dict[str, str]:
    """All files of a folder but hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file())
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_text() for name, path in named.items() if not name.startswith(".")}


@pytest.mark.parametrize("how", ["kill", "full disk", "Ctrl-C"])
def test_a_folder_is_the_old_or_the_new_one_wherever_its_writer_stops(tmp_path, how):
    folder, number, stopped, seen = tmp_path / "model", 0, True, set()
    while stopped:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        _fill(folder, FIRST)
        (folder / "mine.txt").write_text("a user's")
        stopped = _in_a_fork(lambda: _fill(folder, SECOND), number, tmp_path, _stops()[how])
        found = _content(readable(folder)) | {"mine.txt": "a user's"}
        assert found in (FIRST | {"mine.txt": "a user's"}, SECOND | {"mine.txt": "a user's"}), (number, found)
        seen.add(found["config.json"])
        _fill(folder, SECOND)
        assert _content(folder) == SECOND | {"mine.txt": "a user's"}
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.bin", "part", "mine.txt"}
    assert number > 20
    assert seen == {"first", "second"}


@pytest.mark.parametrize("how", ["kill", "full disk", "Ctrl-C"])
def test_a_file_is_the_old_or_the_new_one_wherever_its_writer_stops(tmp_path, how):
    path, number, stopped = tmp_path / "folder" / "notes.json", 0, True
    while stopped:
        number += 1
        write_text_atomic(path, "old")
        stopped = _in_a_fork(lambda: write_text_atomic(path, "new"), number, tmp_path, _stops()[how])
        assert path.read_text() in ("old", "new")
        write_text_atomic(path, "last")
        assert path.read_text() == "last"
        assert [entry.name for entry in path.parent.iterdir()] == ["notes.json"]
    assert number > 4


@pytest.mark.parametrize("how", ["kill", "full disk"])
def test_there_is_a_whole_checkpoint_wherever_its_writer_stops(tmp_path, how):
    def save(step: int) -> None:
        write_checkpoint({"global_step": step, "weights": torch.full((10,), float(step))}, tmp_path / "last.ckpt", 3)

    number, stopped, step = 0, True, 0
    while stopped:
        number, step = number + 1, step + 10
        save(step - 5)
        stopped = _in_a_fork(lambda: save(step), number, tmp_path, _stops()[how])  # noqa: B023
        found = find_checkpoint(tmp_path)
        assert found is not None
        assert not found.damaged
        assert found.step in (step - 5, step)
        assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} <= {
            "last.ckpt", "last.1.ckpt", "last.2.ckpt",
        }  # fmt: skip
    save(step + 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.1.ckpt", "last.2.ckpt", "last.ckpt"]
    assert number > 4


def test_sigterm_of_a_command_leaves_nothing_behind(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from repvitok.runtime.errors import run_cli
from repvitok.runtime.files import atomic_folder
def main(argv):
    with atomic_folder({str(tmp_path / "model")!r}, ["config.json"]) as fresh:
        (fresh / "config.json").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
sys.exit(run_cli(main)())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, "terminated\n")
    assert not (tmp_path / "model").exists()


# -- one writer -------------------------------------------------------------------------------------------------------


@contextmanager
def _held_elsewhere(folder: Path) -> Iterator[int]:
    """For the length of a block another process writes a folder; gives its number."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with sole_writer(folder):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


def test_a_second_writer_is_refused_until_the_first_ends_however_it_ends(tmp_path):
    folder = tmp_path / "out"
    assert not is_held(folder)
    with _held_elsewhere(folder):
        assert is_held(folder)
        with pytest.raises(UserError, match="another process is writing here"), sole_writer(folder):
            pass
        with pytest.raises(UserError, match="come back later"), sole_writer(folder, "come back later"):
            pass
        with pytest.raises(UserError, match="another process is writing here"):
            _fill(folder, FIRST)
    assert not is_held(folder)  # it was killed with -9
    with sole_writer(folder), sole_writer(folder):  # a verb may call another one
        (folder / "file").touch()
    assert [entry.name for entry in folder.iterdir()] == ["file"]
    with sole_writer(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


def test_one_writer_waits_for_the_other_of_the_same_file(tmp_path):
    path, writers = tmp_path / "shared.txt", []
    for name in "ab":
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(150):
                    with atomic_file(path, durable=False) as partial:
                        partial.write_text(name * 1000)
                os._exit(0)
            except BaseException:
                os._exit(1)
        writers.append(pid)
    while not path.exists():
        time.sleep(0.001)
    waiting = set(writers)
    while waiting:
        assert path.read_text() in ("a" * 1000, "b" * 1000)
        ended, code = os.waitpid(-1, os.WNOHANG)
        if ended in waiting:
            assert code == 0
            waiting.remove(ended)
    assert [entry.name for entry in tmp_path.iterdir()] == ["shared.txt"]


def test_a_finished_writer_does_not_take_the_next_ones_file(tmp_path, monkeypatch):
    """The second one begins between the rename of the first and the end of its block."""
    path, replace, second = tmp_path / "shared.txt", os.replace, atomic_file(tmp_path / "shared.txt")

    def replaced(source, target):
        replace(source, target)
        monkeypatch.undo()
        second.__enter__().write_text("second")

    monkeypatch.setattr(os, "replace", replaced)
    with atomic_file(path) as partial:
        partial.write_text("first")
    assert path.read_text() == "first"
    second.__exit__(None, None, None)
    assert path.read_text() == "second"


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on another file system than the tests'."""
    place = Path("/dev/shm") / f"repvitok-test-{os.getpid()}"
    if not place.parent.is_dir():
        pytest.skip("no /dev/shm")
    place.mkdir()
    yield place
    shutil.rmtree(place)


def test_links_are_followed_to_other_disks_and_stay(tmp_path, other_disk):
    (tmp_path / "model").symlink_to(other_disk)
    (tmp_path / "notes.txt").symlink_to(other_disk / "notes.txt")
    for files in (FIRST, SECOND):
        _fill(tmp_path / "model", files)
        write_text_atomic(tmp_path / "notes.txt", files["config.json"])
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "notes.txt").is_symlink()
        assert _content(other_disk) == files | {"notes.txt": files["config.json"]}


def test_a_link_inside_a_folder_is_replaced_and_what_it_leads_to_is_not(tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    _fill(elsewhere, FIRST)
    folder.mkdir()
    (folder / "part").symlink_to(elsewhere / "part")
    _fill(folder, SECOND)
    assert _content(folder) == SECOND
    assert _content(elsewhere) == FIRST


@contextmanager
def _mounted(place: Path, options: str) -> Iterator[None]:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here: needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_mount_point_is_written_and_a_full_one_is_one_line(tmp_path):
    with _mounted(tmp_path / "disk", "size=64k"):
        for files in (FIRST, SECOND):
            _fill(tmp_path / "disk", files)
            assert _content(tmp_path / "disk") == files
        with pytest.raises(WriteError, match=r"disk could not be written: No space left on device; free some space"):
            _fill(tmp_path / "disk", {"config.json": "x" * 100_000})
        assert _content(tmp_path / "disk") == SECOND
        with pytest.raises(WriteError, match=r"notes\.txt could not be written: No space left on device"):
            write_text_atomic(tmp_path / "disk" / "notes.txt", "x" * 100_000)
        with pytest.raises(WriteError, match=r"last\.ckpt could not be written: No space left on device"):
            write_checkpoint({"weights": torch.zeros(100_000)}, tmp_path / "disk" / "last.ckpt", 2)
        assert _content(tmp_path / "disk") == SECOND


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path):
    with _mounted(tmp_path / "disk", "ro"):
        for write in (lambda: _fill(tmp_path / "disk" / "model", FIRST), lambda: _fill(tmp_path / "disk", FIRST)):
            with pytest.raises(WriteError, match=r"could not be written: Read-only file system; choose a folder that"):
                write()
        with pytest.raises(WriteError, match="Read-only file system"):
            write_text_atomic(tmp_path / "disk" / "notes.txt", "")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(WriteError, match=r"closed.* could not be written: Permission denied"):
        write_text_atomic(tmp_path / "closed" / "notes.txt", "")
    with pytest.raises(WriteError, match=r"closed.* could not be written: Permission denied"):
        _fill(tmp_path / "closed", FIRST)


def test_a_folder_that_vanishes_is_one_line(tmp_path):
    folder = tmp_path / "run" / "here"
    with pytest.raises(WriteError, match=r"the folder .*here is gone"), atomic_file(folder / "notes.txt") as partial:  # noqa: PT012
        partial.write_text("")
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device; free some space, and run the same command again"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; free some of your quota"),
        (RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 641472 vs 641360"), "unexpected pos"),
        (RuntimeError("Error while serializing: I/O error: Read-only file system (os error 30)"), "Read-only file"),
    ],
)
def test_what_libraries_say_of_a_failed_write_is_translated(tmp_path, error, told):
    with pytest.raises(WriteError, match=told), translated(tmp_path / "out"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "x", "/other"), KeyError()])
def test_other_errors_are_not(tmp_path, error):
    with pytest.raises(type(error)) as found, translated(tmp_path / "out"):
        raise error
    assert not isinstance(found.value, UserError)


def test_others_may_read_what_is_written(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "model", ["model.bin"]) as fresh:
            (fresh / "model.bin").touch(mode=0o600)  # as safetensors makes its files
        with atomic_file(tmp_path / "text.bin") as partial:
            partial.unlink()
            partial.touch(mode=0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "model" / "model.bin", tmp_path / "text.bin"):
        assert path.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".json")
    write_text_atomic(path, "whole")
    assert path.read_text() == "whole"


# -- what is another's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["meta/info.json", "data/x.parquet"], r"holds no latents but a LeRobot data set \(data and 1 more\)"),
        (["policy.json"], r"holds no latents but a policy \(policy.json\)"),
        (["photo.jpg"], r"holds no latents but photo.jpg; name another folder"),
        (["latents-backup.tar"], r"holds no latents but latents-backup.tar"),
    ],
)
def test_something_elses_folder_is_refused_by_what_it_is(tmp_path, names, told):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=told):
        refuse_foreign(tmp_path, ["latents-[0-9].tar"], "latents")


def test_an_empty_disk_and_ones_own_names_are_not_foreign(tmp_path):
    for name in ("latents-1.tar", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "lost+found").mkdir()
    refuse_foreign(tmp_path, ["latents-[0-9].tar"], "latents")
    refuse_foreign(tmp_path / "nowhere", [], "latents")
    with pytest.raises(UserError, match=r"latents-1\.tar is a file; name a folder"):
        refuse_foreign(tmp_path / "latents-1.tar", [], "latents")


def test_what_version_0_1_left_beside_a_folder_goes_unless_its_writer_lives(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for name in (f".model.tmp-{int(dead.stdout)}", f".model.tmp-{os.getpid()}", ".model.tmp-notes", ".other.tmp-1"):
        (tmp_path / name).mkdir()
    _fill(tmp_path / "model", FIRST)
    expected = [f".model.tmp-{os.getpid()}", ".model.tmp-notes", ".other.tmp-1", "model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
