"""Video files: frame-exact reading of any codec PyAV knows, and writing H.264."""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from jaxtyping import Float64, Int64, UInt8

from repvitok.data.images import HOW_TO_ASK, DepthCodes, deep_grey, depth_to_rgb
from repvitok.runtime.documents import DepthRange, refuse_lfs_pointer
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file

PIXEL_FORMATS = ("yuv420p", "yuv444p")
"""How `write_video` stores colour: at half of both sides, or whole."""


class VideoFile:
    """One video file, readable at any frame.

    Opening scans the packets once (no decoding), so that frame i is the i-th frame shown, whatever the codec, the
    B-frames or the clock of the container. Nothing stays open between calls: the object can be pickled and forked.
    A film turned by its container's display matrix (a phone held upright) is read upright, as players show it.

    Args:
        path: the file.
        span: (first byte, length) of the video where `path` holds more than the video: a member of a tar.
        name: what errors call the video; the path when None.

    Attributes:
        fps: frames per second, on average; 0 where a single frame has no rate.
        codec: the codec's name, such as "h264".
        pixel_format: FFmpeg's name of how pixels are stored, such as "yuv420p"; empty where the file does not say.
    """

    def __init__(
        self, path: str | os.PathLike[str], span: tuple[int, int] | None = None, name: str | None = None
    ) -> None:
        self.path, self.span = Path(path), span
        self.name = name or str(self.path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.name}: no such video file")
        with self._open() as (container, stream):
            self._stored_size = stream.codec_context.height, stream.codec_context.width
            self.codec = stream.codec_context.codec.canonical_name
            self.pixel_format: str = stream.codec_context.pix_fmt or ""
            self._rate_hz = float(stream.average_rate or stream.guessed_rate or 0)
            self._time_base = Fraction(stream.time_base or 1)
            packets = [packet for packet in container.demux(stream) if packet.pts is not None and packet.size]
            promised, present = stream.frames, sum(not packet.is_corrupt for packet in packets)
        if present < promised:  # cut off, or left out by the edit list
            with self._open({"ignore_editlist": "1"}) as (container, stream):
                present = sum(bool(packet.size) and not packet.is_corrupt for packet in container.demux(stream))
        if present < promised:
            raise UserError(
                f"{self.name}: the file is truncated: its header promises {promised} frames, {present} are there; "
                "copy or record it again"
            )
        shown = sorted(
            (packet.pts or 0, packet.dts or 0, packet.is_keyframe) for packet in packets if not packet.is_discard
        )
        if not shown:
            raise UserError(f"{self.name}: no video frames in this file; is it empty or truncated?")
        self._pts = [pts for pts, _, _ in shown]
        # An edit list may cut the first key frame off: the first frame shown is then reached by seeking to itself.
        keyframes = {0: shown[0][1]}
        keyframes |= {index: dts for index, (_, dts, key) in enumerate(shown) if key}
        self._keyframes, self._keyframe_dts = list(keyframes), list(keyframes.values())
        self.fps = self._rate_hz or (1 / self.spacing_s if self.spacing_s else 0.0)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self._pts)

    @property
    def height(self) -> int:
        """Pixel rows of a frame as it is shown."""
        return self._stored_size[self._quarter_turns % 2]

    @property
    def width(self) -> int:
        """Pixel columns of a frame as it is shown."""
        return self._stored_size[1 - self._quarter_turns % 2]

    @cached_property
    def times_s(self) -> np.ndarray:
        """(frames,) float64: when each frame is shown, in seconds of the container's clock."""
        return np.array(self._pts, dtype=np.float64) * float(self._time_base)

    @cached_property
    def spacing_s(self) -> float:
        """Seconds from one frame to the next, by the median; 0 for a single frame without a rate."""
        steps = np.diff(self.times_s)
        if (steps > 0).any():
            return float(np.median(steps[steps > 0]))
        return 1 / self._rate_hz if self._rate_hz > 0 else 0.0

    @property
    def tolerance_s(self) -> float:
        """How far from a frame a time may lie: half a frame, and what clocks are rounded by.

        That is the container's tick or LeRobot's tolerance (1e-4 s), whichever is longer, but no more than a
        twentieth of a frame.
        """
        rounding_s = min(max(1e-4, float(self._time_base)), 0.05 * self.spacing_s)
        return max(0.5 * self.spacing_s + rounding_s, 1e-4)

    def is_slower_than(self, rate_hz: float) -> bool:
        """Whether fewer frames are shown a second, by more than clocks are rounded by."""
        return (self.spacing_s - float(self._time_base)) * rate_hz > 1.0005

    def nearest(
        self, times_s: float | Float64[np.ndarray, " ..."], among: range | None = None
    ) -> Int64[np.ndarray, " ..."]:
        """Index of the frame shown nearest to each time, however far; the earlier one of two equally near.

        Equally is up to the rounding of float32, in which tables keep their times: rows at twice the rate of the frames
        would else jump to and fro between two.

        Args:
            times_s: seconds of the container's clock.
            among: which frames may be the answer, at least one; None: all.
        """
        among = range(len(self)) if among is None else among
        shown, wanted = self.times_s[among.start : among.stop], np.asarray(times_s, dtype=np.float64)
        after = np.searchsorted(shown, wanted).clip(0, len(shown) - 1)
        before = (after - 1).clip(0)
        rounding_s = 5e-7 + np.spacing(np.abs(wanted).astype(np.float32))
        earlier = wanted - shown[before] <= shown[after] - wanted + rounding_s
        return np.asarray(among.start + np.where(earlier, before, after))

    def read(
        self,
        frames: Sequence[int] | None = None,
        depth_range: DepthRange | None = None,
        *,
        is_depth: bool = False,
        codes: DepthCodes | None = None,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Decodes exactly these frames, in the order asked for; None for all.

        Neighbouring frames are decoded in one go; a gap is skipped by seeking to the key frame before the next one.

        Args:
            frames: their numbers.
            depth_range: what becomes black and what white where the pixels are one channel of more than 8 bits.
            is_depth: the video is known to be a depth map: with a range, its first plane (grey or luma, in the
                numbers stored) is scaled whatever its bits.
            codes: what its numbers stand for, which is what the range then is of; None: themselves.

        Returns:
            (n, H, W, 3) uint8 RGB.
        """
        if deep_grey(self.pixel_format) and depth_range is None:
            raise UserError(
                f"{self.name}: pixels of more than 8 bits in one channel ({self.pixel_format}), as of a depth map, and "
                f"no colour; {HOW_TO_ASK}"
            )

        def to_rgb(frame: av.VideoFrame) -> np.ndarray:
            if depth_range is None or not (is_depth or deep_grey(self.pixel_format)):
                return frame.to_ndarray(format="rgb24")
            stored = self._first_plane(frame)
            return depth_to_rgb(stored if codes is None else codes.depth(stored), depth_range)

        wanted = range(len(self)) if frames is None else [int(frame) for frame in frames]
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise UserError(
                f"{self.name}: asked for frames {min(wanted)}..{max(wanted)}, the file has frames 0..{len(self) - 1}"
            )
        needed = sorted(set(wanted))
        pixels = np.empty((len(needed), *self._stored_size, 3), dtype=np.uint8)
        decoded, quarter_turns = self._decode_into(pixels, needed, to_rgb)
        if decoded < len(needed):
            raise UserError(
                f"{self.name}: only {decoded} of {len(needed)} frames could be decoded (frame {needed[decoded]} "
                "could not); the file is truncated or damaged"
            )
        if quarter_turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, quarter_turns, axes=(1, 2)))
        if list(wanted) == needed:
            return pixels
        return pixels[np.searchsorted(needed, np.asarray(wanted, dtype=np.int64))]

    @cached_property
    def _quarter_turns(self) -> int:
        """By how many quarters, counterclockwise, a stored frame is turned to be shown."""
        with self._open() as (container, stream):
            try:
                return self._turns_of(next(container.decode(stream)))
            except (FFmpegError, StopIteration) as error:
                raise UserError(f"{self.name}: its first frame cannot be decoded; the file is damaged") from error

    def _turns_of(self, frame: av.VideoFrame) -> int:
        """What the display matrix says; ValueError where the film is to be shown at another angle."""
        quarters, rest = divmod(round(frame.rotation), 90)
        if rest:
            raise UserError(f"{self.name}: to be shown turned by {frame.rotation} degrees; expected a multiple of 90")
        return quarters % 4

    def _decode_into(
        self, pixels: np.ndarray, needed: Sequence[int], to_rgb: Callable[[av.VideoFrame], np.ndarray]
    ) -> tuple[int, int]:
        """Fills `pixels` with the sorted frames `needed`, turned as they are stored.

        Returns:
            How many came before the first failure, and the quarter turns they are to be shown with.
        """
        done = turns = 0
        with self._open() as (container, stream):
            stream.thread_type = "AUTO" if len(needed) > 8 else "SLICE"
            while done < len(needed):
                before = done
                for index, frame in self._frames_from(container, stream, needed[done]):
                    if index == needed[done]:
                        pixels[done] = to_rgb(frame)
                        turns = self._turns_of(frame)
                        done += 1
                        if done == len(needed):
                            break
                        # A key frame before the next target, more than a few frames on: seeking there is faster.
                        if self._keyframes[bisect.bisect_right(self._keyframes, needed[done]) - 1] > index + 4:
                            break
                    elif index > needed[done]:
                        return done, turns
                if done == before:
                    return done, turns
        return done, turns

    def _frames_from(
        self, container: InputContainer, stream: VideoStream, start: int
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) from the key frame at or before `start` onwards, until the file or its good part ends.

        Some containers seek by presentation time, others by decoding time, so that the first try can land behind
        `start`; the second is by decoding time, the last from further back.
        """
        number = bisect.bisect_right(self._keyframes, start) - 1
        dts = self._keyframe_dts[number]
        for position in (self._pts[self._keyframes[number]], dts, dts - round(1 / self._time_base)):
            try:
                container.seek(position, stream=stream, backward=True)
                frames = self._numbered(container, stream)
                first = next(frames, None)
            except FFmpegError:
                continue
            if first is not None and first[0] <= start:
                yield first
                yield from frames
                return

    def _numbered(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) of what is decoded from here on."""
        try:
            for frame in container.decode(stream):
                index = bisect.bisect_left(self._pts, frame.pts) if frame.pts is not None else len(self)
                if index < len(self) and self._pts[index] == frame.pts:
                    yield index, frame
        except FFmpegError:
            return  # the caller counts what came and raises with that count

    def _first_plane(self, frame: av.VideoFrame) -> np.ndarray:
        """(H, W) grey or luma of a frame: the numbers stored where they have more than 8 bits, else 0..255."""
        name = frame.format.name
        if frame.format.components[0].bits <= 8:
            return frame.to_ndarray(format="gray")
        if not name.startswith(("gray", "yuv")):
            raise UserError(f"{self.name}: expected a depth map's pixels in a gray or yuv format, got {name}")
        kind = (">" if name.endswith("be") else "<") + ("f4" if "f32" in name else "f2" if "f16" in name else "u2")
        plane = np.frombuffer(memoryview(frame.planes[0]), dtype=kind)  # pyright: ignore[reportArgumentType]
        return plane.reshape(frame.height, -1)[:, : frame.width]

    @contextmanager
    def _open(self, options: dict[str, str] | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
        try:
            file = str(self.path) if self.span is None else io.BytesIO(self._member())
            container = av.open(file, "r", options=options)
        except FFmpegError as error:
            refuse_lfs_pointer(self.name, None if self.span is None else self._member())
            reason = str(error).split("]")[-1].split(":")[0].strip()
            raise UserError(f"{self.name}: not a readable video ({reason}); is it truncated?") from error
        with container:
            if not container.streams.video:
                raise UserError(f"{self.name}: the file has no video stream")
            try:
                yield container, container.streams.video[0]
            except FFmpegError as error:
                raise UserError(f"{self.name}: the video is damaged ({error}); copy or record it again") from error

    def _member(self) -> bytes:
        """The bytes of the span."""
        assert self.span is not None
        with open(self.path, "rb") as file:
            file.seek(self.span[0])
            return file.read(self.span[1])


def write_video(
    path: str | os.PathLike[str],
    frames: UInt8[np.ndarray, "n h w 3"],
    fps: float | int,
    *,
    crf: int = 18,
    gop: int = 8,
    pix_fmt: str = "yuv420p",
) -> None:
    """Writes RGB frames as H.264 mp4: the same bytes for the same frames, whole or not at all.

    Args:
        path: the file, .mp4; its folder is created.
        frames: (n, H, W, 3) uint8; H and W even in yuv420p.
        fps: frames per second.
        crf: x264's quality, 0 (lossless luma) to 51; 18 is hard to tell from the original.
        gop: frames between key frames; a random read decodes half of it on average.
        pix_fmt: "yuv420p" halves both sides of the colour planes and plays everywhere; "yuv444p" keeps them whole,
            which small frames need, and some players (browsers among them) do not show it.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"{path}: expected at least one frame (n, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    height, width = frames.shape[1:3]
    if pix_fmt not in PIXEL_FORMATS:
        raise UserError(f"{path}: pix_fmt must be one of {PIXEL_FORMATS}, got {pix_fmt!r}")
    if pix_fmt == "yuv420p" and (height % 2 or width % 2):
        raise UserError(f"{path}: H.264 in yuv420p needs an even height and width, got {height}x{width}")
    rate = Fraction(fps).limit_denominator(65535)
    with (
        atomic_file(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # Without x264's look ahead at macroblocks (mbtree), with which 5 of 319 files of the same frames differed.
        options = {"crf": str(crf), "g": str(gop), "bf": "0", "threads": "1", "preset": "veryfast", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def concatenate_videos(paths: Sequence[Path], path: Path, lengths: Sequence[int], fps: float | int) -> None:
    """Joins videos of one codec, size and frame rate by copying their packets: nothing is decoded or lost.

    Clip i starts exactly at sum(lengths[:i]) / fps.

    Args:
        paths: the clips, in order.
        path: the file to write, whole or not at all.
        lengths: frames of each clip.
        fps: frames per second of all clips.
    """
    rate = Fraction(fps).limit_denominator(65535)
    first_frame = 0
    with atomic_file(path) as partial, av.open(str(partial), "w", format="mp4") as output:
        stream = None
        for clip, length in zip(paths, lengths, strict=True):
            with av.open(str(clip)) as source:
                origin = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(origin)
                copied, shift = 0, round(first_frame / rate / (origin.time_base or 1))
                for packet in source.demux(origin):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    output.mux(packet)
                    copied += 1
            if copied != length:
                raise UserError(f"{clip}: expected {length} frames, found {copied}; write the episode again")
            first_frame += length
