"""From a data set's own columns to named channels: what `repwam prepare` does, and the layouts that it knows. No torch.

A layout is a YAML file. It names an embodiment and, for `action` and `state`, the columns of the data set that are put
side by side, with a name for each of their numbers; channels of one name mean the same in every layout, so that data
sets of several robots share one order of channels (`repwam_core.interface.shared_channels`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from repvitok.data import LeRobotReader
from repvitok.data.contents import require_recorded
from repvitok.data.lerobot.format import arrow_type, huggingface_metadata, number_feature
from repvitok.data.lerobot.metadata import read_parquet
from repvitok.data.lerobot.tables import Where, robot_numbers, to_numpy
from repvitok.data.lerobot.writer import column_statistics, pooled_statistics
from repvitok.data.split import EpisodeNumbers, choose_episodes, format_episodes
from repvitok.runtime.documents import Count, load_json, load_json_lines, load_yaml, parse, read_json
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import sole_writer
from repvitok.runtime.progress import progress

from repwam_core.interface import Embodiment

LAYOUTS = Path(__file__).with_name("layouts")
ACTION, STATE = "action", "observation.state"
RECORD = "meta/prepared.json"
"""What a prepared data set was made of; it is there before anything else, info.json after everything else."""


@dataclass(frozen=True)
class Part:
    """Some numbers of one column.

    Attributes:
        column: name of the column in the data set.
        names: one per number, in order.
        units: one per number.
        select: first number and the one after the last; None is the whole column.
    """

    column: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    select: tuple[int, int] | None = None


@dataclass(frozen=True)
class DatasetLayout:
    """How a data set's columns become one action and one state vector.

    Attributes:
        embodiment: what the robot is called.
        action, state: parts that are put side by side; a data set without states has none.
        cameras: the videos that are kept, in the order of their tokens.
    """

    embodiment: str
    action: tuple[Part, ...]
    state: tuple[Part, ...]
    cameras: tuple[str, ...]

    @classmethod
    def load(cls, name: str | Path) -> DatasetLayout:
        """Read a layout: one of this package's by name, or a YAML file."""
        path = LAYOUTS / f"{name}.yaml" if "/" not in str(name) and not str(name).endswith(".yaml") else Path(name)
        if not path.is_file():
            raise UserError(f"no layout {str(name)!r}: expected a YAML file or one of {known_layouts()}")
        entry = parse(load_yaml(path), _LayoutEntry, str(path))
        for part in (*entry.action, *entry.state):
            selected = len(part.names) if part.select is None else part.select[1] - part.select[0]
            if len(part.units or part.names) != len(part.names) or selected != len(part.names):
                raise UserError(f"{path}: {part.column}: expected as many names as units and selected numbers")
        action, state = (
            tuple(
                Part(part.column, tuple(part.names), tuple(part.units or [part.unit] * len(part.names)), part.select)
                for part in parts
            )
            for parts in (entry.action, entry.state)
        )
        if twice := {name for names in (_names(state), entry.cameras) for name in names if names.count(name) > 1}:
            raise UserError(f"{path}: expected distinct names of states and cameras, got {sorted(twice)} twice")
        layout = cls(entry.embodiment, action, state, tuple(entry.cameras))
        layout.robot(1.0)
        return layout

    def robot(self, rate_hz: float) -> Embodiment:
        """The embodiment that data in this layout are of."""
        units = [unit for part in self.action for unit in part.units]
        return Embodiment.from_names(
            self.embodiment, _names(self.action), _names(self.state), self.cameras, rate_hz, units
        )


def known_layouts() -> list[str]:
    """Names of the layouts in this package."""
    return sorted(path.stem for path in LAYOUTS.glob("*.yaml"))


def prepare(source: Path, out: Path, layout: DatasetLayout, episodes: EpisodeNumbers | None = None) -> Embodiment:
    """Write a LeRobot data set whose `action` and `observation.state` are the layout's channels.

    Only these two columns are rewritten, with their statistics. Every other column, file and row of the meta folder is
    kept: videos and pictures are linked (copied where the disk has no links), cameras that the layout leaves out are
    not. What was written is read back and compared before it becomes visible. A folder that is there and complete is
    left as it is, so that the tasks of a job array can be run again; one of a run that was killed is made anew.

    Of some `episodes` only, the rest of tables and meta folder is left out, with the videos that none of them uses.
    They keep their numbers; `index`, the place of a row in the whole data set, is counted anew.

    Args:
        source: LeRobot data set, v2.0, v2.1 or v3.0.
        out: folder to write; empty, or of an earlier `prepare` of the same data, layout and episodes.
        layout: which columns become what.
        episodes: numbers of those that are kept; all when None.
    """
    reader = LeRobotReader(source)
    kept = frozenset(choose_episodes(episodes, [episode.index for episode in reader.episodes], str(source)))
    robot, info = layout.robot(reader.fps), _info(reader, layout, kept)
    apart = (source.resolve(), out.resolve())
    if apart[0] in (apart[1], *apart[1].parents) or apart[1] in apart[0].parents:
        raise UserError(f"{out}: expected a folder apart from the data set {source}, or it would be overwritten")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")
    files = _files(source)
    part = None if len(kept) == reader.num_episodes else format_episodes(kept)
    record = {"layout": json.loads(json.dumps(asdict(layout))), "source": _digest(source, files), "episodes": part}
    there = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")) if out.is_dir() else []
    if there and not (out / RECORD).is_file():
        raise UserError(f"{out} holds something else ({', '.join(there[:3])}); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out, f"{out}: another run is preparing this folder; start this one when it has ended"):
        if (out / RECORD).is_file():
            before = read_json(out / RECORD, _Prepared)
            if (out / "meta/info.json").is_file():
                if {name: getattr(before, name) for name in record} != record:
                    raise UserError(f"{out} holds data prepared otherwise; remove the folder or choose another")
                return robot
            for name in (*before.entries, "meta"):  # killed while it was moved into place
                shutil.rmtree(out / name, ignore_errors=True)
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _fill(partial, reader, layout, info, files, kept)
            _verify(reader, LeRobotReader(partial), layout, kept)
            _publish(partial, out, record)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return robot


def _info(reader: LeRobotReader, layout: DatasetLayout, episodes: frozenset[int]) -> dict[str, Any]:
    """info.json of the prepared data set; complains of what the source lacks."""
    source, features = reader.root, reader.features
    colours = [camera for camera in layout.cameras if camera in reader.camera_keys]
    if missing := [camera for camera in layout.cameras if camera not in _pictured(reader)]:
        raise UserError(f"{source}: no cameras {missing}; there are {_pictured(reader)}")
    require_recorded(reader, colours, sorted(episodes), layout=True)
    for part in (*layout.action, *layout.state):
        if part.column not in features:
            raise UserError(f"{source}: no column {part.column!r}; there are {sorted(features)}")
        if not (described := reader.metadata.features[part.column]).is_number:
            raise UserError(f"{source}: {part.column} holds {described.dtype}, the layout expects numbers")
        size, stop = int(np.prod(described.shape)), len(part.names) if part.select is None else part.select[1]
        if size < stop or (part.select is None and size != stop):
            raise UserError(f"{source}: {part.column} has {size} numbers, the layout expects {stop}")
    kept = {key: features[key] for key in layout.cameras}
    kept |= {key: feature for key, feature in features.items() if key not in _dropped(reader, layout)}
    for key, parts in _rewritten(layout).items():
        names = list(_names(parts))
        kept[key] = number_feature("float32", [len(names)], names)
        if "fps" in features[parts[0].column]:  # as LeRobot writes version 3
            kept[key]["fps"] = features[parts[0].column]["fps"]
    info = {**reader.metadata.info, "robot_type": layout.embodiment, "features": kept}
    if "total_videos" in info:
        videos = [key for key, feature in kept.items() if feature["dtype"] == "video"]
        info["total_videos"] = len(videos) * len(episodes)
    if len(episodes) < reader.num_episodes:
        counted = {
            "total_episodes": len(episodes),
            "total_frames": sum(episode.length for episode in reader.episodes if episode.index in episodes),
            "total_chunks": len({number // reader.metadata.chunks_size for number in episodes}),
            "splits": {"train": f"0:{len(episodes)}"},
        }
        info |= {key: value for key, value in counted.items() if key in info}
    return info


def _pictured(reader: LeRobotReader) -> list[str]:
    """Every camera, depth maps too."""
    return [key for key, feature in reader.metadata.features.items() if feature.is_camera]


def _rewritten(layout: DatasetLayout) -> dict[str, tuple[Part, ...]]:
    """The columns that are written anew, and what of."""
    return {key: parts for key, parts in ((ACTION, layout.action), (STATE, layout.state)) if parts}


def _dropped(reader: LeRobotReader, layout: DatasetLayout) -> list[str]:
    """Features that the prepared data set does not have: cameras left out, but no depth maps, and a state left out."""
    colour = [key for key in reader.camera_keys if key not in layout.cameras]
    return colour if layout.state else [*colour, STATE]


def _files(root: Path) -> list[Path]:
    """Every file of a data set relative to its folder, links followed, hidden ones left out."""
    found, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        inner[:] = [
            name
            for name in inner
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in seen
        ]
        found += [Path(folder, name).relative_to(root) for name in names if not name.startswith(".")]
    return sorted(found)


def _digest(root: Path, files: Sequence[Path]) -> str:
    """Tells data sets apart by the names and sizes of all files and the content of the meta folder."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{(root / file).stat().st_size}\0".encode(errors="surrogateescape"))
        if file.parts[0] == "meta":
            digest.update((root / file).read_bytes())
    return digest.hexdigest()


def _fill(
    partial: Path,
    reader: LeRobotReader,
    layout: DatasetLayout,
    info: dict[str, Any],
    files: list[Path],
    kept: frozenset[int],
) -> None:
    """Write or link every file of the prepared data set but its statistics, then those."""
    rows: dict[int, int] | None = None  # number of each kept episode -> its first row there; None where all are kept
    if len(kept) < reader.num_episodes:
        infos = [episode for episode in reader.episodes if episode.index in kept]
        firsts = np.cumsum([0] + [info.length for info in infos]).tolist()
        rows = {info.index: first for info, first in zip(infos, firsts, strict=False)}
    tables = {reader.metadata.table_of(episode.index) for episode in reader.episodes}
    others = {episode.index for episode in reader.episodes} - kept
    videos = [key for key in _pictured(reader) if reader.features[key]["dtype"] == "video"]
    left_out = _videos(reader, [key for key in _dropped(reader, layout) if key in videos], kept | others)
    left_out |= _videos(reader, videos, others) - _videos(reader, videos, kept)
    left_out |= tables - {reader.metadata.table_of(episode) for episode in kept}
    meta = {Path("meta/info.json"), Path(RECORD), Path("meta/stats.json"), Path("meta/episodes_stats.jsonl")}
    meta |= {Path("meta/episodes.jsonl")} if others else set()
    for file in progress(files, desc="prepare", unit="file"):
        path, target = reader.root / file, partial / file
        if file in meta or path in left_out or file.parts[:2] == ("meta", "episodes"):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in tables:
            _rewrite(path, target, reader, layout, rows)
        elif file.parts[0] == "meta" or len(file.parts) == 1:  # a label that is mended here stays as it was there
            shutil.copyfile(path, target)
        else:
            try:
                os.link(path.resolve(), target)
            except OSError:  # no second names here: a link to a video, a copy of anything else
                if path.suffix in (".mp4", ".mkv", ".webm", ".avi", ".mov"):
                    target.symlink_to(path.resolve())
                else:
                    shutil.copyfile(path, target)
    (partial / "meta").mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.parts[:2] == ("meta", "episodes"):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            if rows is not None and file.suffix == ".parquet":
                _keep_episode_rows(reader.root / file, partial / file, rows)
            else:
                shutil.copyfile(reader.root / file, partial / file)
        elif others and file == Path("meta/episodes.jsonl"):
            lines = [line for place, line in load_json_lines(reader.root / file) if _episode_of(place, line) in kept]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (partial / file).write_text(text, encoding="utf-8")
    (partial / "meta/info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    _write_statistics(partial, reader, layout, files, rows)


def _of_episodes(table: pa.Table, episodes: Iterable[int]) -> pa.Table:
    """The rows of a table that are of these episodes."""
    return table.filter(np.isin(table["episode_index"].to_numpy(), list(episodes)))


def _keep_episode_rows(path: Path, target: Path, rows: dict[int, int]) -> None:
    """An episode table of version 3 with the rows of these episodes only, and where their rows are now."""
    table = _of_episodes(read_parquet(path), rows)
    first = np.array([rows[index] for index in table["episode_index"].to_pylist()], np.int64)
    for name, values in (("dataset_from_index", first), ("dataset_to_index", first + np.array(table["length"]))):
        if name in table.column_names:
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values).cast(table.schema.field(name).type))
    pq.write_table(table, target)


def _episode_of(place: str, line: Any) -> int:
    """The number of the episode that a line of version 2 is about; `place` is what an error calls it."""
    return parse(line, _EpisodeNumber, place, unknown=True).episode_index


def _videos(reader: LeRobotReader, cameras: Sequence[str], episodes: Iterable[int]) -> set[Path]:
    found = set()
    for camera in cameras:
        for episode in episodes:
            with suppress(UserError):  # a camera that was never recorded
                found.add(reader.metadata.video_of(episode, camera))
    return found


def _rewrite(
    path: Path, target: Path, reader: LeRobotReader, layout: DatasetLayout, rows: dict[int, int] | None
) -> None:
    """Write a table with the layout's columns in place of the recorded ones, all others as they are.

    Of some episodes only, with their `rows` in the whole data set.
    """
    table = read_parquet(path)
    told = dict(table.schema.metadata or {})
    if rows is not None:
        table = _of_episodes(table, rows)
        if "index" in table.column_names:
            index = table["episode_index"].to_numpy()
            begins = np.flatnonzero(np.diff(index, prepend=-1))
            within = np.arange(len(index)) - np.repeat(begins, np.diff(np.append(begins, len(index))))
            values = pa.array(within + [rows[episode] for episode in index.tolist()])
            column = values.cast(table.schema.field("index").type)
            table = table.set_column(table.column_names.index("index"), "index", column)
    for key, parts in _rewritten(layout).items():
        values = np.concatenate([_numbers(table, part, path, reader) for part in parts], axis=1)
        kind = arrow_type(number_feature("float32", [values.shape[1]], None))
        column = pa.array(values[:, 0]) if values.shape[1] == 1 else pa.array(list(values), kind)
        table = (
            table.set_column(table.column_names.index(key), key, column)
            if key in table.column_names
            else table.append_column(key, column)
        )
    table = table.drop([key for key in _dropped(reader, layout) if key in table.column_names])
    with suppress(KeyError, TypeError, ValueError):  # what the `datasets` library restores column types from
        described = json.loads(told.pop(b"huggingface"))
        features = described["info"]["features"]
        described["info"]["features"] = {key: value for key, value in features.items() if key in table.column_names}
        written = {
            key: number_feature("float32", [len(_names(parts))], None) for key, parts in _rewritten(layout).items()
        }
        described["info"]["features"] |= huggingface_metadata(written)["info"]["features"]
        told[b"huggingface"] = json.dumps(described).encode()
    pq.write_table(table.replace_schema_metadata(told), target)


def _numbers(table: pa.Table, part: Part, path: Path, reader: LeRobotReader) -> np.ndarray:
    """The part's numbers as float32, (rows, names)."""
    if part.column not in table.column_names:
        raise UserError(f"{path}: no column {part.column!r}, though info.json lists it")

    def where(row: int) -> str:
        episodes = table["episode_index"].to_pylist()
        return f"{path}: episode {episodes[row]}, row {row - episodes.index(episodes[row])}, {part.column}"

    values = to_numpy(table, part.column, reader.metadata.features[part.column], path)
    return _selected(values, part, where)


def _selected(values: np.ndarray, part: Part, where: Where) -> np.ndarray:
    values = values.reshape(len(values), -1)
    return robot_numbers(values if part.select is None else values[:, slice(*part.select)], part.names, where)


def _write_statistics(
    partial: Path, reader: LeRobotReader, layout: DatasetLayout, files: list[Path], rows: dict[int, int] | None
) -> None:
    """The data set's own statistics: those of rewritten columns counted anew, of left out ones removed.

    Of some episodes only, those of the whole are counted anew for all numbers, and pooled for cameras where the
    episodes' own are there; of cameras of version 2.0 they stay what they were.
    """
    prepared, keys = LeRobotReader(partial), list(_rewritten(layout))
    if rows is not None and "index" in prepared.features:
        keys.append("index")
    gone = {*_dropped(reader, layout), *keys}
    counted = {}
    for episode in prepared.episodes:
        columns = prepared.episode(episode.index, keys)
        counted[episode.index] = {key: column_statistics(columns[key]) for key in keys}
    for file in files:
        path = partial / file
        if file == Path("meta/stats.json"):
            kept = _kept_statistics(load_json(reader.root / file), gone, str(reader.root / file))
            pooled = {key: pooled_statistics([of[key] for of in counted.values()]) for key in keys}
            if rows is not None:
                pooled |= _pooled_anew(prepared, kept)
            path.write_text(json.dumps(kept | pooled, indent=2) + "\n", encoding="utf-8")
        elif file == Path("meta/episodes_stats.jsonl"):
            lines = []
            for place, line in load_json_lines(reader.root / file):
                episode = _episode_of(place, line)
                if rows is not None and episode not in rows:
                    continue
                kept = _kept_statistics(line.get("stats"), gone, f"{place}: field 'stats'")
                lines.append(json.dumps({**line, "stats": kept | counted.get(episode, {})}) + "\n")
            path.write_text("".join(lines), encoding="utf-8")
        elif file.parts[:2] == ("meta", "episodes") and file.suffix == ".parquet":
            _write_episode_table(path, counted, gone)


def _pooled_anew(prepared: LeRobotReader, keys: Iterable[str]) -> dict[str, Any]:
    """Statistics over all prepared episodes: counted for numbers, pooled for cameras whose episodes' own are there."""
    tables = [read_parquet(path) for path in sorted((prepared.root / "meta/episodes").rglob("*.parquet"))]
    found: dict[str, Any] = {}
    for key in (key for key in keys if key in prepared.features):
        if prepared.metadata.features[key].is_number:
            parts = [column_statistics(prepared.episode(info.index, [key])[key]) for info in prepared.episodes]
        else:
            names = {name: f"stats/{key}/{name}" for name in ("min", "max", "mean", "std", "count")}
            known = [table for table in tables if set(names.values()) <= set(table.column_names)]
            rows = [row for table in known for row in table.select(list(names.values())).to_pylist()]
            parts = [{name: row[column] for name, column in names.items()} for row in rows if None not in row.values()]
        if len(parts) == prepared.num_episodes:
            found[key] = pooled_statistics(parts)
    return found


def _kept_statistics(stats: Any, gone: set[str], source: str) -> dict[str, Any]:
    """Statistics without those of features that are gone; none where there are none."""
    if not isinstance(stats, dict | None):
        raise UserError(f"{source}: expected an object, statistics by feature, got {str(stats)[:60]}")
    return {key: value for key, value in (stats or {}).items() if key not in gone}


def _write_episode_table(path: Path, counted: dict[int, dict[str, Any]], gone: set[str]) -> None:
    """An episode table of version 3 without the columns of features that are gone, and with new statistics."""
    table = read_parquet(path)
    has_statistics = any(name.startswith("stats/") for name in table.column_names)
    prefixes = tuple(f"{what}/{key}/" for key in gone for what in ("stats", "videos"))
    table = table.drop([name for name in table.column_names if name.startswith(prefixes)])
    if has_statistics and len(table):
        rows = [counted[index] for index in table["episode_index"].to_pylist()]
        for key, numbers in rows[0].items():
            for name in numbers:
                table = table.append_column(f"stats/{key}/{name}", pa.array([row[key][name] for row in rows]))
    path.unlink()
    pq.write_table(table, path)


def _verify(reader: LeRobotReader, prepared: LeRobotReader, layout: DatasetLayout, kept: frozenset[int]) -> None:
    """Read back what was written and compare it with the source, all but the pixels between first and last frame."""

    def require(same: bool, what: str) -> None:
        if not same:
            raise UserError(
                f"{reader.root}: {what} came out otherwise than it is there; was the data set changed meanwhile?"
            )

    require(
        (prepared.version, prepared.fps, prepared.tasks) == (reader.version, reader.fps, reader.tasks),
        "the meta folder",
    )
    infos = [episode for episode in reader.episodes if episode.index in kept]
    require(list(prepared.episodes) == infos, "the table of episodes")
    changed = {*_rewritten(layout), *_dropped(reader, layout)}
    if len(infos) < reader.num_episodes:
        changed.add("index")
    for path in dict.fromkeys(reader.metadata.table_of(episode.index) for episode in infos):
        old, new = read_parquet(path), read_parquet(prepared.root / path.relative_to(reader.root))
        old = _of_episodes(old, kept) if len(infos) < reader.num_episodes else old
        same = [name for name in old.column_names if name not in changed]
        require([name for name in new.column_names if name not in changed] == same, f"{path}: the columns")
        for name in same:
            one, other = old[name], new[name]
            equal = one.equals(other) or repr(one.to_pylist()) == repr(other.to_pylist())  # NaN equals NaN
            require(one.type == other.type and equal, f"{path}: column {name!r}")
    for episode in progress(infos, desc="verify", unit="episode"):
        written = prepared.episode(episode.index, list(_rewritten(layout)))
        for key, parts in _rewritten(layout).items():
            columns = reader.episode(episode.index, list(dict.fromkeys(part.column for part in parts)))
            values = [_selected(columns[part.column], part, str) for part in parts]
            equal = np.array_equal(np.concatenate(values, axis=1), written[key].reshape(episode.length, -1))
            require(equal, f"episode {episode.index}: {key}")
        for camera in layout.cameras:
            require(_same_frames(reader, prepared, episode.index, camera), f"episode {episode.index}: camera {camera}")


def _same_frames(reader: LeRobotReader, prepared: LeRobotReader, episode: int, camera: str) -> bool:
    """Whether both have one and the same video, or the same first and last picture."""
    if reader.features[camera]["dtype"] == "video":
        paths = [each.metadata.video_of(episode, camera) for each in (reader, prepared)]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(f"{missing[0]}: missing from the data set")
        return os.path.samefile(*paths)
    if camera not in reader.camera_keys:  # depth maps in the tables were compared with these
        return True
    ends = [0, prepared.metadata.episodes[episode].length - 1]
    return np.array_equal(reader.frames(episode, camera, ends), prepared.frames(episode, camera, ends))


def _publish(partial: Path, out: Path, record: dict[str, Any]) -> None:
    """Move what is verified into place: first the note of what it is, info.json last."""
    aside = partial / ".info.json"
    os.replace(partial / "meta/info.json", aside)
    entries = sorted(entry.name for entry in partial.iterdir() if entry != aside and entry.name != "meta")
    (partial / RECORD).write_text(json.dumps({**record, "entries": entries}, indent=2) + "\n", encoding="utf-8")
    for name in ("meta", *entries):
        os.replace(partial / name, out / name)
    os.replace(aside, out / "meta/info.json")


@dataclass(frozen=True)
class _Prepared:
    """The note of what a prepared data set is."""

    layout: dict[str, Any]
    source: str
    episodes: str | None = None
    entries: list[Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}$)[^/]+$")]] = field(default_factory=list)


@dataclass(frozen=True)
class _EpisodeNumber:
    """What is read of a line of statistics of version 2."""

    episode_index: int


@dataclass(frozen=True)
class _PartEntry:
    """A part as a layout file writes it."""

    column: str
    names: Annotated[list[str], msgspec.Meta(min_length=1)]
    unit: str = "1"
    units: list[str] | None = None
    select: tuple[Count, Count] | None = None


@dataclass(frozen=True)
class _LayoutEntry:
    """A layout as its file writes it."""

    embodiment: str
    action: Annotated[list[_PartEntry], msgspec.Meta(min_length=1)]
    state: list[_PartEntry]
    cameras: list[str]


def _names(parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(name for part in parts for name in part.names)
