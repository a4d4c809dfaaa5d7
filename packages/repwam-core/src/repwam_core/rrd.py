"""Episodes of a data set, of a simulator and of open-loop evaluation as one file for the Rerun viewer (`--rerun FILE`).

Each episode is an entity of its own, `<episode>/instruction`, `<episode>/<camera>`, `<episode>/state/<channel>`,
`<episode>/action/<channel>`, on two timelines: `step`, control steps, and `time`, seconds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from repvitok.encoding_plan import read_robot_columns
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file
from repvitok.runtime.progress import progress

if TYPE_CHECKING:
    from repvitok.data import LeRobotReader
    from repvitok.data.lerobot.format import EpisodeInfo

    from repwam_core.interface import Embodiment
    from repwam_core.policy.openloop import OpenLoopEpisode
    from repwam_core.sim.results import EpisodeResult

JPEG_QUALITY = 90


class Film(NamedTuple):
    """Frames `(n, H, W, 3)`, the first at control step `first`, with `every` steps between them."""

    frames: np.ndarray
    first: int = 0
    every: int = 1


@dataclass(frozen=True)
class ViewedEpisode:
    """One episode as the viewer shows it.

    Attributes:
        name: its entity, such as "episode 3".
        instruction: in words; empty where there was none.
        rate_hz: control steps per second.
        films: entity below the episode -> its frames.
        series: entity below the episode, such as "action/elbow" -> one number per control step, from the first on.
    """

    name: str
    instruction: str
    rate_hz: float
    films: Mapping[str, Film] = field(default_factory=dict)
    series: Mapping[str, Sequence[float] | np.ndarray] = field(default_factory=dict)


def import_rerun() -> ModuleType:
    """The package rerun; a UserError where it is not installed. Asked for before hours are spent."""
    try:
        import rerun
        import rerun.blueprint
    except ImportError as error:
        raise UserError("--rerun needs Rerun's SDK: pip install 'repwam-core[rerun]'") from error
    return rerun


def write_rrd(path: Path, episodes: Iterable[ViewedEpisode], title: str) -> int:
    """Write the episodes to `path`, whole or not at all, and return how many there were."""
    rr = import_rerun()
    tabs = []
    with atomic_file(path) as partial:
        recording = rr.RecordingStream("repwam", recording_id=title)
        recording.save(partial)
        recording.send_recording_name(title)
        for episode in episodes:
            _send(rr, recording, episode)
            tabs.append(_tab(rr, episode))
        recording.send_blueprint(rr.blueprint.Blueprint(rr.blueprint.Tabs(*tabs)))
        recording.flush()
        recording.disconnect()
    return len(tabs)


def _send(rr: ModuleType, recording: object, episode: ViewedEpisode) -> None:
    def times(steps: np.ndarray) -> list:
        seconds = steps / episode.rate_hz
        return [rr.TimeColumn("step", sequence=steps), rr.TimeColumn("time", duration=seconds)]

    instruction = rr.TextDocument(episode.instruction or "(no instruction)")
    rr.log(_entity(rr, episode, "instruction"), instruction, static=True, recording=recording)
    for name, film in episode.films.items():
        steps = film.first + film.every * np.arange(len(film.frames))
        blobs = [_jpeg(frame) for frame in film.frames]
        columns = rr.EncodedImage.columns(blob=blobs, media_type=["image/jpeg"] * len(blobs))
        rr.send_columns(_entity(rr, episode, name), times(steps), columns, recording=recording)
    for name, values in episode.series.items():
        columns = rr.Scalars.columns(scalars=np.asarray(values, np.float64))
        rr.send_columns(_entity(rr, episode, name), times(np.arange(len(values))), columns, recording=recording)


def _tab(rr: ModuleType, episode: ViewedEpisode) -> object:
    """Films and instruction on the left; on the right a plot for each kind of state and each channel of actions."""
    views, name = rr.blueprint, episode.name
    told = views.TextDocumentView(origin=_entity(rr, episode, "instruction"), name="instruction")
    films = [views.Spatial2DView(origin=_entity(rr, episode, film), name=film) for film in episode.films]
    groups = dict.fromkeys("/".join(series.split("/")[:2]) for series in episode.series)
    groups = dict.fromkeys("state" if group.startswith("state/") else group for group in groups)
    plots = [views.TimeSeriesView(origin=_entity(rr, episode, group), name=group) for group in groups]
    left = views.Vertical(told, views.Grid(*films), row_shares=[1, 6])
    return views.Horizontal(left, views.Grid(*plots), name=name) if plots else views.Vertical(left, name=name)


def _entity(rr: ModuleType, episode: ViewedEpisode, below: str) -> str:
    """The entity path, with what a path may not hold escaped."""
    return str(rr.new_entity_path([episode.name, *below.split("/")]))


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _by_channel(group: str, names: Sequence[str], rows: np.ndarray | None, below: str = "") -> dict[str, np.ndarray]:
    """Columns of `rows` (T, C) as series "group/channel" or "group/channel/below"; a channel's own "/" is none here."""
    if rows is None:
        return {}
    safe = [name.replace("/", "_") for name in names]
    return {f"{group}/{name}{below}": column for name, column in zip(safe, np.asarray(rows).T, strict=True)}


def recorded(reader: LeRobotReader, cameras: Sequence[str], info: EpisodeInfo) -> ViewedEpisode:
    """An episode of a data set: its cameras, states and actions."""
    columns = read_robot_columns(reader, info.index)
    series: dict[str, np.ndarray] = {}
    for group, key in (("state", "observation.state"), ("action", "action")):
        if key in columns:
            series |= _by_channel(group, reader.channel_names(key), columns[key])
    films = {camera: Film(reader.frames(info.index, camera)) for camera in cameras}
    return ViewedEpisode(f"episode {info.index}", info.task, float(reader.fps), films, series)


def driven(result: EpisodeResult, robot: Embodiment) -> ViewedEpisode:
    """A filmed episode of a simulator; states, distances and actions where it was traced."""
    films, series = {}, {}
    if result.frames is not None:
        views = np.split(result.frames, len(robot.cameras), axis=2)  # they were put side by side
        films = {camera: Film(frames) for camera, frames in zip(robot.cameras, views, strict=True)}
    groups = dict.fromkeys(robot.state_channels, "state")
    for name, values in (result.trace or {}).items():
        series[name if name.startswith("action/") else f"{groups.get(name, 'distance (m)')}/{name}"] = values
    outcome = "crashed" if result.crashed else "success" if result.success else "failure"
    name = f"{result.task}, seed {result.seed}: {outcome}"
    return ViewedEpisode(name, result.instruction or "", float(robot.rate_hz), films, series)


def compared(
    reader: LeRobotReader, cameras: Sequence[str], episodes: Sequence[OpenLoopEpisode], names: Sequence[str]
) -> Iterator[ViewedEpisode]:
    """Recorded episodes with the policy's actions beside the recorded ones, and what it imagined of each camera.

    Args:
        reader: the data set.
        cameras: its cameras, in the policy's order.
        episodes: what the policy planned for some of its episodes.
        names: of the action channels.
    """
    infos = {info.index: info for info in reader.episodes}
    for episode in progress(episodes, desc="rerun", unit="episode"):
        base = recorded(reader, cameras, infos[episode.index])
        series = {name: values for name, values in base.series.items() if not name.startswith("action/")}
        series |= _by_channel("action", names, episode.real, "/recorded")
        series |= _by_channel("action", names, episode.predicted, "/predicted")
        films = dict(base.films)
        if episode.frames is not None:
            every = max(1, math.floor(len(episode.real) / episode.frames.shape[1]))
            for kind in ("imagined", "reconstructed"):
                video = getattr(episode, kind)
                films |= {f"{camera}/{kind}": Film(video[i], every, every) for i, camera in enumerate(cameras)}
        yield replace(base, instruction=episode.instruction, films=films, series=series)
