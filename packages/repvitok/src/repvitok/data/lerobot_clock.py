"""Which frame of a video belongs to which row of a LeRobot table: decided by time, never by number.

A row's time is its `timestamp`, seconds from its episode's start, as the table has it; without that column, its
number over info.json's fps. A frame's time is its presentation time in the container's clock, edit lists applied.
In v3.0 an episode starts at its `from_timestamp`, in v2 at 0, even where a video's first frame is shown later: as
LeRobot's own loader has it. Each row takes the frame shown nearest, among the frames of its episode, and all rows of an
episode must have one within half a frame (`VideoFile.tolerance_s`), or none is read.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64

from repvitok.data.lerobot_tables import is_list
from repvitok.data.video import VideoFile
from repvitok.errors import UserError

RATE_TOLERANCE = 0.15
"""How far the rows' own rate may be from info.json's, and by one row more: clocks drift and are rounded, but 25 rows a
second are not 30."""


def row_times_s(timestamps: pa.ChunkedArray | None, rows: int, fps: float, source: str) -> Float64[np.ndarray, " rows"]:
    """When each row of an episode was recorded, in seconds from the episode's start.

    Args:
        timestamps: the column of the episode's rows; None where the table has none: row / fps.
        rows: how many rows the episode has.
        fps: info.json's rows per second.
        source: what an error should call the episode.

    Raises:
        UserError: not one number a row, a number that is missing or not finite, one not later than the row's before, or
            another rate than `fps`.
    """
    if timestamps is None:
        with np.errstate(all="ignore"):
            times = np.arange(rows) / np.float64(fps)
    else:
        values = timestamps.combine_chunks()
        while is_list(values.type):  # of one number each
            values = values.flatten()
        stored = values.to_numpy(zero_copy_only=False)
        if stored.dtype.kind not in "fiu" or len(stored) != rows:
            raise UserError(
                f"{source}: column 'timestamp' should hold one number a row, seconds from the episode's start, in "
                f"{rows} rows; got {len(stored)} of {timestamps.type}"
            )
        times = stored.astype(np.float64)
    wrong = ~np.isfinite(times)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{source}, row {row}: expected a timestamp in seconds, got {times[row]}")
    wrong = np.diff(times) <= 0
    if wrong.any():
        row = int(wrong.argmax()) + 1
        raise UserError(
            f"{source}, row {row}: timestamps must grow from row to row, got {times[row]:.6g} s after "
            f"{times[row - 1]:.6g} s"
        )
    if len(times) > 1:
        # Rows that were dropped widen the mean, times that were rounded shift the median: another rate shows in both.
        steps = np.array([np.median(np.diff(times)), (times[-1] - times[0]) / (len(times) - 1)])
        if (np.abs(steps * fps - 1) > RATE_TOLERANCE + 1 / (len(times) - 1)).all():
            raise UserError(
                f"{source}: its rows are {steps[0]:.4g} s apart by their timestamps, {1 / steps[0]:.4g} a second, and "
                f"info.json's fps says {fps:.4g}: correct the one that is wrong"
            )
    return times


def pair_rows(
    video: VideoFile,
    times_s: Float64[np.ndarray, " rows"],
    fps: float,
    start_s: float,
    next_start_s: float | None,
    source: str,
) -> range | Int64[np.ndarray, " rows"]:
    """The frame of each row of one episode.

    Args:
        video: holds the episode.
        times_s: of the rows, from the episode's start.
        fps: info.json's rows per second.
        start_s: where the episode starts in the video.
        next_start_s: where the next episode in the same file starts, whose frames are not this one's; None: none does.
        source: what an error should call the episode.

    Returns:
        One number a row, none smaller than the one before: a `range` where they are evenly spaced. Rows that come
        faster than the video's frames share them.

    Raises:
        UserError: a row has no frame within half a frame, or two rows share one though the video has as many frames a
            second as rows; the message names row, time and frame.
    """
    first = int(video.nearest(start_s))
    last = len(video) if next_start_s is None else max(int(video.nearest(next_start_s)), first + 1)
    shown_s = start_s + times_s
    frames = video.nearest(shown_s, range(first, last))
    wrong = ~(np.abs(video.times_s[frames] - shown_s) <= video.tolerance_s)  # also where start_s is no number
    if wrong.any():
        row, others = int(wrong.argmax()), f" ({wrong.sum()} of {len(wrong)} rows)" if wrong.sum() > 1 else ""
        raise UserError(
            f"{source}, row {row}{others}: no frame of {video.name} is within {video.tolerance_s:.4f} s of "
            f"{shown_s[row]:.4f} s (the episode's start, {start_s:.4f} s, and the row's timestamp, "
            f"{times_s[row]:.4f} s); the nearest of the episode's frames {first}..{last - 1} is {frames[row]} at "
            f"{video.times_s[frames[row]]:.4f} s; table and video disagree about the time: correct the timestamps, or "
            "leave the episode or the camera out"
        )
    steps = np.diff(frames)
    if not video.is_slower_than(fps) and (steps == 0).any():
        row = int((steps == 0).argmax()) + 1
        raise UserError(
            f"{source}: rows {row - 1} and {row} ({times_s[row - 1]:.4f} s, {times_s[row]:.4f} s) are both nearest "
            f"to frame {frames[row]} of {video.name}, which has {1 / video.spacing_s:.4g} frames a second for "
            f"{fps:.4g} rows: correct the timestamps, or leave the episode or the camera out"
        )
    if len(steps) and steps[0] > 0 and (steps == steps[0]).all():
        return range(int(frames[0]), int(frames[-1]) + 1, int(steps[0]))
    return frames
