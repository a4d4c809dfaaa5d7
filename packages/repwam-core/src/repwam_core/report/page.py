"""The page: ReportData to one HTML document that opens offline, by `template.html`, frames and charts inside it."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_text_atomic

from repwam_core.report.data import Curve, Curves, ImaginedClip, Number, ReportData, Rollout, as_curve
from repwam_core.report.numbers import report_numbers
from repwam_core.sim.results import SuccessRate

MAX_HEIGHT = 144  #: pixels stored per frame; larger frames are reduced with a box filter
STRIP_WIDTH = 1060  #: CSS pixels a strip may take on a desktop screen
GAP = 4  #: CSS pixels between the frames of a strip
MAX_ANIMATION_FRAMES = 60
HOLD_S = 1.2  #: how long an animation rests on its last frame
SLOWED_HZ = 8  #: films of imagined frames play no faster, so that one sees where they begin anew
TIMELINE, SEEN, FORESEEN = 3, (128, 128, 128), (214, 122, 38)  #: pixels high; colours of observed and imagined frames


class Picture(NamedTuple):
    """What an `img` needs; width and height in CSS pixels."""

    src: str
    alt: str
    width: int
    height: int


class Strips(NamedTuple):
    """Rows of frames under each other, and the indices of the frames, each so wide and with so much after it."""

    rows: list[tuple[str, Picture]]
    indices: list[int]
    width: int
    gap: int


class Animation(NamedTuple):
    """A looping picture, its last frame for readers who ask their system for less motion, and what plays in it."""

    picture: Picture
    last: str
    panes: Sequence[str] = ()
    pane_width: int = 0
    frames: int = 0


def reduce(frames: np.ndarray) -> np.ndarray:
    """Frames (n, H, W, 3) no higher than MAX_HEIGHT."""
    height, width = frames.shape[1:3]
    if height <= MAX_HEIGHT:
        return frames
    size = (max(1, round(width * MAX_HEIGHT / height)), MAX_HEIGHT)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in frames])


def zoom(height: int, target: int) -> int:
    """The whole number by which pixels are enlarged so that a frame is about `target` CSS pixels high."""
    return max(1, round(target / height))


def evenly(n: int, most: int) -> list[int]:
    """At most `most` indices of range(n), evenly spread, first and last included."""
    return [int(i) for i in np.linspace(0, n - 1, min(n, most)).round()]


def data_uri(image: Image.Image, **options: object) -> str:
    """The image as a WebP data URI; lossless unless the options say otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", **({"lossless": True, "method": 4} | options))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def still(image: np.ndarray, alt: str, target: int = 128) -> Picture:
    """One image (H, W, 3), enlarged by a whole number to about `target` CSS pixels."""
    image = reduce(image[None])[0]
    height, width = image.shape[:2]
    scale = zoom(height, target)
    return Picture(data_uri(Image.fromarray(image)), alt, width * scale, height * scale)


def side_by_side(frames: np.ndarray, gap: int) -> np.ndarray:
    """Frames (n, H, W, 3) in one RGBA picture (H, n W + (n-1) gap, 4), transparent between them."""
    n, height, width = frames.shape[:3]
    picture = np.zeros((height, n * (width + gap) - gap, 4), dtype=np.uint8)
    for i, frame in enumerate(frames):
        start = i * (width + gap)
        picture[:, start : start + width, :3] = frame
        picture[:, start : start + width, 3] = 255
    return picture


def strips(rows: Sequence[tuple[str, np.ndarray]], alt: str, target: int = 128) -> Strips:
    """Rows of frames, the same frames of each.

    Args:
        rows: (label, frames (n, H, W, 3)) of one shape. At most as many frames as fit a desktop line are shown.
        alt: what the pictures show, for readers who do not see them.
        target: height of a frame in CSS pixels.
    """
    frames = [(label, reduce(array)) for label, array in rows]
    n, height, width = frames[0][1].shape[:3]
    scale = zoom(height, target)
    gap = max(1, GAP // scale)
    shown = evenly(n, max(4, (STRIP_WIDTH + gap * scale) // ((width + gap) * scale)))
    pictures = []
    for label, array in frames:
        picture = side_by_side(array[shown], gap)
        size = (picture.shape[1] * scale, height * scale)
        pictures.append((label, Picture(data_uri(Image.fromarray(picture)), f"{alt}: {label}", *size)))
    return Strips(pictures, shown, width * scale, gap * scale)


def animation(rollout: Rollout, alt: str, target: int = 192) -> Animation:
    """A rollout's frames as a looping picture in real time, resting on the last frame."""
    frames = reduce(rollout.frames)
    shown = evenly(len(frames), MAX_ANIMATION_FRAMES)
    images = [Image.fromarray(frames[i]) for i in shown]
    moving = _moving(images, 1000 * len(frames) / len(shown) / rollout.frame_rate_hz)
    height, width = frames.shape[1:3]
    scale = zoom(height, target)
    return Animation(Picture(moving, alt, width * scale, height * scale), data_uri(images[-1]))


def film(clip: ImaginedClip, alt: str, target: int = 192) -> Animation:
    """A clip's rows of frames side by side in one looping picture, in step, over a timeline.

    The timeline is grey where frames were given and coloured where they were imagined, with a gap wherever imagining
    began anew; what has been played is opaque. A long clip is shown from its beginning, its frames all there.
    """
    rows = [(label, reduce(frames[:MAX_ANIMATION_FRAMES])) for label, frames in clip.rows]
    n, height, width = rows[0][1].shape[:3]
    scale = zoom(height, target)
    gap = max(1, GAP // scale)
    images = []
    for i in range(n):
        panes = side_by_side(np.stack([frames[i] for _, frames in rows]), gap)
        below = np.zeros((1 + TIMELINE, panes.shape[1], 4), dtype=np.uint8)
        edges = np.linspace(0, panes.shape[1], n + 1).round().astype(int)
        for k in range(n):
            begins = edges[k] + (clip.ahead(k) == 1)  # one column left free
            below[1:, begins : edges[k + 1]] = (*(FORESEEN if clip.ahead(k) else SEEN), 255 if k <= i else 80)
        images.append(Image.fromarray(np.concatenate([panes, below])))
    moving = _moving(images, 1000 / min(clip.frame_rate_hz, SLOWED_HZ))
    size = (images[0].width * scale, images[0].height * scale)
    return Animation(Picture(moving, alt, *size), data_uri(images[-1]), [label for label, _ in rows], width * scale, n)


def _moving(images: Sequence[Image.Image], step_ms: float) -> str:
    """Images in turn, for ever, as a data URI."""
    return data_uri(
        images[0],
        lossless=False,
        quality=82,
        save_all=True,
        append_images=images[1:],
        duration=[max(20, round(step_ms))] * (len(images) - 1) + [round(1000 * HOLD_S)],
        loop=0,
    )


def duration(seconds: Number) -> str:
    """Seconds in words: "48 s", "3 min 20 s", "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s" if seconds < 9.95 else f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


def memory(count: int) -> str:
    return f"{count / 2**30:.1f}\u00a0GiB" if count >= 2**30 else f"{count / 2**20:.0f}\u00a0MiB"


def decibel(value: Number) -> str:
    return f"{value:.1f}\u00a0dB"


def percent(count: SuccessRate) -> str:
    return f"{100 * count.rate:.0f}\u00a0%"


def interval(count: SuccessRate) -> str:
    low, high = count.interval
    return f"{100 * low:.0f}–{100 * high:.0f}\u00a0%"


def vector(values: Sequence[Number] | np.ndarray) -> str:
    return ", ".join(f"{v:+.2f}".replace("-", "−") for v in np.asarray(values).ravel())


def keys(rows: Sequence, mapping: str) -> list[str]:
    """The keys of that mapping of every row, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in getattr(row, mapping)))


def by_rate(tasks: Sequence[str], counts: Mapping[str, SuccessRate]) -> list[str]:
    """Tasks by falling success rate; those that were not run come last."""
    return sorted(tasks, key=lambda task: -counts[task].rate if task in counts else 1.0)


def by_chart(curves: Curves) -> Iterator[tuple[str, str, dict[str, Curve]]]:
    """(title, unit, lines): "train/loss" and "val/loss" become lines "train" and "val" of the chart "loss"."""
    charts: dict[str, dict[str, Curve]] = {}
    for metric, curve in curves.items():
        line, _, chart = metric.rpartition("/")
        charts.setdefault(chart, {})[line or chart.replace("_", " ")] = as_curve(curve)
    for chart, lines in charts.items():
        unit = (
            "dB" if chart.endswith(("_db", "psnr")) else next((line.unit for line in lines.values() if line.unit), "")
        )
        yield chart.removesuffix("_db").replace("_", " "), unit, lines


def render_report(data: ReportData) -> str:
    """The report as one HTML document that needs nothing but itself: no script, no font, no request."""
    page = Environment(
        loader=PackageLoader("repwam_core", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    measures = (duration, memory, decibel, percent, interval, vector, keys, by_rate, number)
    page.filters |= {measure.__name__: measure for measure in measures} | {"charts": by_chart}
    drawings = (line_chart, interval_bar, bars, still, strips, animation, film)
    page.globals |= {drawing.__name__: drawing for drawing in drawings} | {"data": data}
    return page.get_template("template.html").render().lstrip()


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the report to `path`, its numbers beside it as JSON (report.html: report.json), and return `path`.

    Each file appears whole or not at all.
    """
    write_text_atomic(path, render_report(data))
    numbers = json.dumps(report_numbers(data), indent=1, allow_nan=False)
    write_text_atomic(Path(path).with_suffix(".json"), numbers)
    return Path(path)


WIDTH, HEIGHT = 340, 214
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 36
MAX_POINTS = 120  #: a longer curve is drawn as the means of that many equal bins, with their range behind it


def number(value: float) -> str:
    """Three significant digits, without exponents in the ordinary range, with a true minus sign."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if 1e-4 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.replace("-", "−")
    return f"{value:.2e}".replace("-", "−")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]; the powers alone where the range is wide."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 2
    values = [m * 10.0**p for p in powers for m in ((1,) if wide else (1, 2, 5))]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


def tick_label(value: float) -> str:
    """A tick's number, short enough for the margin: 0.25, 1500, 5e−4."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def binned(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, minima and maxima of at most MAX_POINTS bins of the curve's finite points."""
    steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
    if steps.shape != values.shape or steps.ndim != 1:
        raise UserError(f"expected steps and values of one length, got shapes {steps.shape} and {values.shape}")
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    parts = [p for p in np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS) or 1) if len(p)]
    reduce = [(steps[p].mean(), values[p].mean(), values[p].min(), values[p].max()) for p in parts]
    table = np.asarray(reduce, dtype=float).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


class Axes:
    """Data coordinates to the chart's pixels, the vertical axis logarithmic where values span a factor of 20."""

    def __init__(self, x: np.ndarray, y: np.ndarray, zero: bool = False) -> None:
        self.x_low, self.x_high = spread(float(x.min()), float(x.max()))
        low, high = float(y.min()), float(y.max())
        self.log = low > 0 and high / low > 20 and not zero
        if self.log:
            self.y_low, self.y_high = low / 1.1, high * 1.1
        else:
            pad = 0.06 * (high - low)
            self.y_low, self.y_high = spread(low - pad, high + pad)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.y_low)) / (scale(self.y_high) - scale(self.y_low))
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    def path(self, x: np.ndarray, y: np.ndarray) -> str:
        return " ".join(f"{self.x(a)},{self.y(b)}" for a, b in zip(x, y, strict=True))


def spread(low: float, high: float) -> tuple[float, float]:
    """The range itself, widened where it is empty so that it can be divided by."""
    if high > low:
        return low, high
    half = abs(low) * 0.05 or 0.5
    return low - half, high + half


def line_chart(series: Curves, x_label: str, y_label: str) -> Markup:
    """All series of one quantity in one chart, with axis labels, ticks and a legend when there are several.

    Args:
        series: name -> curve. Points that are not finite are left out.
        x_label: with unit.
        y_label: with unit.
    """
    lines = {name: binned(as_curve(curve)) for name, curve in series.items()}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        return Markup('<p class="absent">No finite values of {}.</p>').format(y_label)
    axes = Axes(
        np.concatenate([line[0] for line in lines.values()]),
        np.concatenate([np.concatenate([line[2], line[3]]) for line in lines.values()]),
    )
    keys = [Markup('<span><i class="swatch s{}"></i>{}</span>').format(i % 5, name) for i, name in enumerate(lines)]
    legend = Markup('<div class="legend">{}</div>').format(Markup().join(keys)) if len(lines) > 1 else Markup()
    drawn = Markup().join(draw_line(axes, line, index % 5) for index, line in enumerate(lines.values()))
    label = f"{y_label} against {x_label}: {', '.join(lines)}"
    svg = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>')
    return legend + svg.format(WIDTH, HEIGHT, label, draw_grid(axes, x_label, y_label), drawn)


def draw_line(axes: Axes, line: tuple, colour: int) -> Markup:
    """The means, as a line where there are several, over the range of each bin."""
    x, mean, low, high = line
    dot = Markup('<circle class="dot s{}" cx="{}" cy="{}" r="{}"/>')
    if len(x) == 1:
        return dot.format(colour, axes.x(x[0]), axes.y(mean[0]), 3)
    drawn = Markup()
    if np.any(high > low):
        outline = axes.path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))
        drawn += Markup('<polygon class="band s{}" points="{}"/>').format(colour, outline)
    drawn += Markup('<polyline class="line s{}" points="{}"/>').format(colour, axes.path(x, mean))
    if len(x) <= 12:
        drawn += Markup().join(dot.format(colour, axes.x(a), axes.y(b), 2.2) for a, b in zip(x, mean, strict=True))
    return drawn


def draw_grid(axes: Axes, x_label: str, y_label: str) -> Markup:
    """Horizontal grid lines, ticks with their numbers, and what the axes are."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    row = Markup(
        '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text x="{3}" y="{4}" text-anchor="end">{5}</text>'
    )
    column = Markup(
        '<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/><text x="{0}" y="{3}" text-anchor="middle">{4}</text>'
    )
    axis = Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, right, bottom)
    label = Markup('<text class="label" transform="translate({} {}) rotate({})" text-anchor="middle">{}</text>')
    parts: list[Markup] = []
    for value in log_ticks(axes.y_low, axes.y_high) if axes.log else ticks(axes.y_low, axes.y_high):
        y = axes.y(value)
        parts.append(row.format(LEFT, right, y, LEFT - 6, y + 3.5, tick_label(value)))
    for value in ticks(axes.x_low, axes.x_high):
        parts.append(column.format(axes.x(value), bottom, bottom + 4, bottom + 15, tick_label(value)))
    parts.append(axis + label.format((LEFT + right) / 2, HEIGHT - 4, 0, x_label))
    parts.append(label.format(10, (TOP + bottom) / 2, -90, y_label + (", log scale" if axes.log else "")))
    return Markup().join(parts)


def interval_bar(count: SuccessRate) -> Markup:
    """A success rate as a dot on a 0 to 100 % track, its 95 % interval as a thicker line."""
    low, high, rate = (round(4 + 92 * share, 1) for share in (*count.interval, count.rate))
    return Markup(
        '<svg class="interval" viewBox="0 0 100 10" aria-hidden="true">'
        '<line x1="4" x2="96" y1="5" y2="5" class="track"/>'
        '<line x1="{}" x2="{}" y1="5" y2="5" class="whisker"/><circle cx="{}" cy="5" r="3.2" class="dot"/></svg>'
    ).format(low, high, rate)


def bars(values: Mapping[str, float | None], unit: str = "") -> Markup:
    """Horizontal bars from zero, one per name that has a value, each with its number; negative values get no bar."""
    known = {name: float(value) for name, value in values.items() if value is not None}
    most = max([v for v in known.values() if math.isfinite(v)] + [1e-12])
    row = Markup(
        '<div><span class="bar-name">{}</span><span class="bar">'
        '<span class="fill{}" style="width:{:.1f}%"></span></span><b>{}</b></div>'
    )
    rows = []
    for name, value in known.items():
        share = max(0.0, min(1.0, value / most)) if math.isfinite(value) else 0.0
        rows.append(
            row.format(name, "" if rows else " main", 100 * share, number(value) + (f" {unit}" if unit else ""))
        )
    return Markup('<div class="bars">{}</div>').format(Markup().join(rows))
