"""Line charts and interval bars as small inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup
from repvitok.runtime.errors import UserError

from repwam_core.report.data import Count, Curve, Curves, as_curve

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


def interval_bar(count: Count) -> Markup:
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
