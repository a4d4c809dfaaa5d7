"""Video files: frame-exact reading of any codec PyAV knows, and writing H.264."""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from jaxtyping import UInt8

from repvitok.errors import UserError
from repvitok.files import atomic_file


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
        fps: frames per second, on average.
        codec: the codec's name, such as "h264".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no readable video, or fewer frames than its header promises.
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
            self.fps = float(stream.average_rate or stream.guessed_rate or 0)
            self._time_base = Fraction(stream.time_base or 1)
            packets = [packet for packet in container.demux(stream) if packet.pts is not None and packet.size]
            self._refuse_truncated(stream.frames, sum(not packet.is_corrupt for packet in packets))
            shown = sorted((packet.pts or 0, packet.is_keyframe) for packet in packets if not packet.is_discard)
        self._pts = [pts for pts, _ in shown]
        self._keyframes = [index for index, (_, key) in enumerate(shown) if key] or [0]

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

    def frame_at(self, time_s: float | int, tolerance_s: float | None = None) -> int:
        """Index of the frame shown nearest to `time_s`.

        Raises:
            ValueError: none lies within `tolerance_s` (default: half a frame).
        """
        tolerance_s = 0.5 / self.fps if tolerance_s is None else tolerance_s
        index = int(np.abs(self.times_s - time_s).argmin())
        if abs(self.times_s[index] - time_s) > tolerance_s:
            raise UserError(
                f"{self.name}: no frame within {tolerance_s:.4f} s of {time_s:.4f} s; the nearest is frame {index} "
                f"at {self.times_s[index]:.4f} s of {len(self)} frames"
            )
        return index

    def read(self, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """Decodes exactly these frames, in the order asked for; None for all.

        Neighbouring frames are decoded in one go; a gap is skipped by seeking to the key frame before the next one.

        Returns:
            (n, H, W, 3) uint8 RGB.

        Raises:
            ValueError: a frame lies outside the file, or the file is damaged and fewer could be decoded.
        """
        wanted = range(len(self)) if frames is None else [int(frame) for frame in frames]
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < len(self):
            raise UserError(
                f"{self.name}: asked for frames {min(wanted)}..{max(wanted)}, the file has frames 0..{len(self) - 1}"
            )
        needed = sorted(set(wanted))
        pixels = np.empty((len(needed), *self._stored_size, 3), dtype=np.uint8)
        decoded, quarter_turns = self._decode_into(pixels, needed)
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

    def _refuse_truncated(self, promised: int, present: int) -> None:
        if not present:
            raise UserError(f"{self.name}: no video frames in this file; is it empty or truncated?")
        if present < promised:
            raise UserError(
                f"{self.name}: the file is truncated: its header promises {promised} frames, {present} are there; "
                "copy or record it again"
            )

    def _decode_into(self, pixels: np.ndarray, needed: Sequence[int]) -> tuple[int, int]:
        """Fills `pixels` with the sorted frames `needed`, as stored.

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
                        pixels[done] = frame.to_ndarray(format="rgb24")
                        turns = self._turns_of(frame)
                        done += 1
                        if done == len(needed) or self._better_to_seek(index, needed[done]):
                            break
                    elif index > needed[done]:
                        return done, turns
                if done == before:
                    return done, turns
        return done, turns

    def _frames_from(
        self, container: InputContainer, stream: VideoStream, start: int
    ) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) from the key frame at or before `start` onwards, until the file or its good part ends."""
        key = self._keyframes[max(bisect.bisect_right(self._keyframes, start) - 1, 0)]
        container.seek(self._pts[key], stream=stream, backward=True)
        try:
            for frame in container.decode(stream):
                index = bisect.bisect_left(self._pts, frame.pts) if frame.pts is not None else len(self)
                if index < len(self) and self._pts[index] == frame.pts:
                    yield index, frame
        except FFmpegError:
            return  # the caller counts what came and raises with that count

    def _better_to_seek(self, position: int, target: int) -> bool:
        """Whether a key frame lies between the decoder and its next target, and more than a few frames are saved."""
        key = self._keyframes[max(bisect.bisect_right(self._keyframes, target) - 1, 0)]
        return key > position + 4

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        try:
            container = av.open(str(self.path) if self.span is None else io.BytesIO(self._member()), "r")
        except FFmpegError as error:
            reason = str(error).split("]")[-1].split(":")[0].strip()
            raise UserError(f"{self.name}: not a readable video ({reason}); is it truncated?") from error
        with container:
            if not container.streams.video:
                raise UserError(f"{self.name}: the file has no video stream")
            yield container, container.streams.video[0]

    def _member(self) -> bytes:
        """The bytes of the span."""
        assert self.span is not None
        with open(self.path, "rb") as file:
            file.seek(self.span[0])
            return file.read(self.span[1])


PIXEL_FORMATS = ("yuv420p", "yuv444p")
"""How `write_video` stores colour: at half of both sides, or whole."""


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

    Raises:
        ValueError: no frames, an unknown pix_fmt, or a shape or dtype that cannot be written.
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
        options = {"crf": str(crf), "g": str(gop), "bf": "0", "threads": "1", "preset": "veryfast"}
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

    Raises:
        ValueError: a clip holds another number of frames than `lengths` says.
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
                copied = _copy_packets(source, origin, output, stream, first_frame / rate)
            if copied != length:
                raise UserError(f"{clip}: expected {length} frames, found {copied}; write the episode again")
            first_frame += length


def _copy_packets(
    source: InputContainer, origin: VideoStream, output: OutputContainer, stream: VideoStream, later_s: Fraction
) -> int:
    """Moves every packet of one clip into the output, `later_s` seconds later; returns how many."""
    copied, shift = 0, round(later_s / (origin.time_base or 1))
    for packet in source.demux(origin):
        if packet.dts is None or packet.pts is None:
            continue
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        packet.stream = stream
        output.mux(packet)
        copied += 1
    return copied
