"""Kills, full disks, damaged files, two at once, at every verb: the next run ends as an undisturbed one or says why.
And malformed messages to a served policy: each is refused in words or answered, and the next client notices nothing.

`pytest tests/faults` does a few of each kind, drawn by `--faults-seed`; `--faults 400` does so many, and the closing
table says how many held. docs/reliability.md has the last long run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.chain import TIMEOUT_S, VERBS, Chain, Ended, Verb, contents, difference, run, start
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.policy.policy import Policy
from repwam_core.policy.serving import PolicyServer, PolicyServerError, ServeSettings
from repwam_core.policy.serving.command import metadata_of
from repwam_core.policy.serving.protocol import chunk_from_message, pack, unpack
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Of these nothing tells a changed bit from a recorded one: videos decode, tables' numbers have no digests.
UNCHECKED = (".mp4", ".parquet", ".csv")


@dataclass(frozen=True)
class Fault:
    """One fault to try: its kind, the verb it meets, and a seed for the rest."""

    kind: str
    verb: str
    seed: int


def faults(count: int, seed: int) -> list[Fault]:
    """`count` faults of all kinds over all verbs, the same for the same seed."""
    drawn = random.Random(seed)
    fits = [name for name in VERBS if name.endswith("-fit")]
    pairs = [("kill", name) for name in VERBS]
    pairs += [("full disk", name) for name in VERBS if name not in fits]
    # The quickstart's folders are named by the place of its data, and damage is done to a copy of them.
    pairs += [("damage", name) for name, verb in VERBS.items() if verb.reads and name != "quickstart"]
    pairs += [("two at once", name) for name in VERBS]
    pairs += [("message", "serve")] * len(VERBS)
    drawn.shuffle(pairs)
    return [Fault(*pairs[number % len(pairs)], drawn.randrange(2**32)) for number in range(count)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per fault."""
    if "fault" in metafunc.fixturenames:
        chosen = faults(metafunc.config.getoption("--faults"), metafunc.config.getoption("--faults-seed"))
        marks = {True: [pytest.mark.sim], False: []}
        metafunc.parametrize(
            "fault",
            [
                pytest.param(
                    f,
                    id=f"{f.kind.replace(' ', '-')}-{f.verb}-{n}",
                    marks=marks[f.verb in VERBS and VERBS[f.verb].sim],
                )
                for n, f in enumerate(chosen)
            ],
        )


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, shared_video_dataset: Path) -> Chain:
    """Undisturbed runs of all verbs."""
    root = tmp_path_factory.mktemp("chain")
    shutil.copytree(shared_video_dataset, root / "dataset")
    return Chain(root)


@dataclass(frozen=True)
class Served:
    """A policy behind a server in this process, and the actions of an episode that nothing disturbed."""

    port: int
    request: dict[str, Any]
    actions: np.ndarray


@pytest.fixture(scope="session")
def served(chain: Chain) -> Iterator[Served]:
    """The chain's policy, served."""
    parts = LoadedPolicy.load(chain.reference("repwam-export"))
    metadata = metadata_of(Policy(parts))
    pictures = np.random.default_rng(0).integers(0, 256, (1, 48, 72, 3), np.uint8)
    request = {
        "images": dict.fromkeys(metadata.embodiment.cameras, pictures),
        "state": np.zeros((1, len(metadata.embodiment.state_channels)), np.float32),
        "prompt": "move the square",
        "reset": True,
        "seed": 3,
    }
    with PolicyServer(lambda: Policy(parts), metadata, ServeSettings(port=0)).running() as port:
        yield Served(port, request, _ask(port, pack(request)))


@pytest.mark.slow
@pytest.mark.xdist_group("faults")  # one process: they share the undisturbed runs
def test_a_fault_loses_nothing(fault: Fault, chain: Chain, tmp_path: Path, record_property, request) -> None:
    record_property("fault", f"{fault.kind}\t{fault.verb}")
    if fault.kind == "message":
        _message(request.getfixturevalue("served"), random.Random(fault.seed))
        return
    kinds = {"kill": _kill, "full disk": _full_disk, "damage": _damage, "two at once": _two_at_once}
    kinds[fault.kind](chain, VERBS[fault.verb], tmp_path, random.Random(fault.seed))


def _kill(chain: Chain, verb: Verb, folder: Path, drawn: random.Random) -> None:
    """One to three kills at random moments, then the same command to its end: the undisturbed run's files."""
    out = folder / verb.name
    chain.reference(verb.name)
    for _ in range(drawn.randint(1, 3)):
        number, moment_s = drawn.choice(SIGNALS), drawn.uniform(0, 1.05) * chain.seconds[verb.name]
        process = start(verb, chain.root, out, folder / "said")
        process.join(moment_s)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(60)
        assert not process.is_alive(), f"signal {number} after {moment_s:.2f} s did not end {verb.name} in a minute"
    _must_end_whole(verb, chain, out)


def _two_at_once(chain: Chain, verb: Verb, folder: Path, drawn: random.Random) -> None:
    """The same command twice, a moment apart: one ends whole, the other too or is refused in one line."""
    out = folder / verb.name
    chain.reference(verb.name)
    first = start(verb, chain.root, out, folder / "first")
    time.sleep(drawn.uniform(0, 0.8) * chain.seconds[verb.name])
    second = start(verb, chain.root, out, folder / "second")
    for process in (first, second):
        process.join(TIMEOUT_S)
    codes = sorted([first.exitcode, second.exitcode])
    assert codes in ([0, 0], [0, 2]), (codes, (folder / "first").read_text(), (folder / "second").read_text())
    for name, process in (("first", first), ("second", second)):
        if process.exitcode == 2:
            _require_one_line(Ended(2, (folder / name).read_text(errors="replace"), 0))
    found = difference(contents(verb, out), chain.left[verb.name])
    assert not found, f"two {verb.name} at once, exit codes {codes}: {found}"


def _full_disk(chain: Chain, verb: Verb, folder: Path, drawn: random.Random) -> None:
    """An output disk smaller than the output, then space: one clear line, then the undisturbed run's files."""
    reference = chain.reference(verb.name)
    needed = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    with _small_disk(folder / "disk", int(drawn.uniform(0.15, 1.05) * needed) + 8192) as disk:
        ended = run(verb, chain.root, disk / verb.name)
        assert ended.code in (0, 2), f"{verb.name} on a full disk: exit code {ended.code}\n{ended.said[-2000:]}"
        if ended.code == 2:
            _require_one_line(ended)
        subprocess.run(["mount", "-o", f"remount,size={8 * needed + 2**26}", str(disk)], check=True)
        _must_end_whole(verb, chain, disk / verb.name)


@contextmanager
def _small_disk(place: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of some bytes for the length of a block; skips where it cannot be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small tmpfs here: needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _damage(chain: Chain, verb: Verb, folder: Path, drawn: random.Random) -> None:
    """One input file damaged: refused in one line, or, where it does not matter, the undisturbed run's files."""
    root, out = folder / "inputs", folder / verb.name
    chain.reference(verb.name)
    root.mkdir()
    for name in verb.reads:
        shutil.copytree(chain.reference(name), root / name)
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix not in UNCHECKED and p.stat().st_size]
    path = drawn.choice(files)
    how = _damaged(path, drawn)
    ended = run(verb, root, out)
    what = f"{verb.name} with {path.relative_to(root)} {how}"
    assert ended.code in (0, 2), f"{what}: exit code {ended.code}\n{ended.said[-3000:]}"
    if ended.code == 2:
        _require_one_line(ended)
    elif how != "removed" or not path.name.startswith("text-"):  # instructions are embedded again when they are needed
        found = difference(contents(verb, out), chain.left[verb.name])
        assert not found, f"{what} was not noticed: {found}"


def _damaged(path: Path, drawn: random.Random) -> str:
    """Damage a file in one of the ways files get damaged; returns which."""
    data = bytearray(path.read_bytes())
    how = drawn.choice(["cut short", "emptied", "removed", "with a bit flipped", "overwritten"])
    if how == "removed":
        path.unlink()
        return how
    if how == "cut short":
        data = data[: drawn.randrange(len(data))]
    elif how == "emptied":
        data = bytearray()
    elif how == "with a bit flipped":
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    else:
        start = drawn.randrange(len(data))
        data[start : start + 64] = drawn.randbytes(len(data[start : start + 64]))
    path.write_bytes(data)
    return how


ODD: tuple[Any, ...] = (
    None, True, -1, 2**63, 1e308, float("nan"), "", "go " * 2000, b"bytes", [], [[]], {}, {"a": {"b": None}},
    np.zeros(0), np.zeros((1, 1), np.int64), np.full((1, 48, 72, 3), np.nan), np.zeros((1, 2**22, 1, 3), np.uint8),
    np.float32(1),
)  # fmt: skip


def _message(served: Served, drawn: random.Random) -> None:
    """A request damaged in its values or bytes: words and a close code, or whole actions; then a client as before."""
    values, where = dict(served.request), drawn.choice(["values", "pictures", "bytes"])
    if where == "values":
        values[drawn.choice([*values, "colour"])] = drawn.choice(ODD)
    elif where == "pictures":
        values["images"] = values["images"] | {drawn.choice([*values["images"], "colour"]): drawn.choice(ODD)}
    data = bytearray(pack(values))
    if where == "bytes":
        for _ in range(drawn.randint(1, 4)):
            start = drawn.randrange(min(len(data), 400)) if drawn.random() < 0.8 else drawn.randrange(len(data))
            change = drawn.choice(["bit", "cut", "more", "noise"])
            if change == "bit":
                data[start] ^= 1 << drawn.randrange(8)
            elif change == "cut":
                del data[start : start + drawn.randint(1, 2000)]
            elif change == "more":
                data[start:start] = drawn.randbytes(drawn.randint(1, 50))
            else:
                data[start : start + 8] = drawn.randbytes(8)
    with suppress(PolicyServerError):
        assert np.isfinite(_ask(served.port, bytes(data))).all()
    np.testing.assert_array_equal(_ask(served.port, pack(served.request)), served.actions)


def _ask(port: int, data: bytes) -> np.ndarray:
    """The actions that one message on a connection of its own gets; PolicyServerError where it is refused."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None, max_size=2**26) as connection:
        connection.recv(timeout=60)
        connection.send(data)
        answer = connection.recv(timeout=60)
        if isinstance(answer, bytes):
            return chunk_from_message(unpack(answer)).actions
        with pytest.raises(ConnectionClosedError) as closed:
            connection.recv(timeout=60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code in (1009, 1011), closed.value
        assert "Traceback" not in answer, answer
        raise PolicyServerError(answer)


def _must_end_whole(verb: Verb, chain: Chain, out: Path) -> None:
    ended = run(verb, chain.root, out)
    assert ended.code == 0, f"{verb.name} does not go on: exit code {ended.code}\n{ended.said[-3000:]}"
    found = difference(contents(verb, out), chain.left[verb.name])
    assert not found, f"{verb.name} after the fault: {found}"


def _require_one_line(ended: Ended) -> None:
    errors = [line for line in ended.said.splitlines() if line.startswith(("error:", "usage:"))]
    assert errors, f"no line that says what is wrong:\n{ended.said[-3000:]}"
    assert "Traceback" not in ended.said, ended.said[-3000:]
