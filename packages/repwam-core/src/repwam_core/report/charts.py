"""Line charts and interval bars as small inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from repvitok.errors import UserError

from repwam_core.report.data import Count, Curve, Curves, as_curve
from repwam_core.report.markup import Markup, el, join

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
    """Round numbers (1, 2, 5 times a power of ten) inside [low, high], about ``count`` of them."""
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
        return el("p", f"No finite values of {y_label}.", class_="absent")
    axes = Axes(
        np.concatenate([line[0] for line in lines.values()]),
        np.concatenate([np.concatenate([line[2], line[3]]) for line in lines.values()]),
    )
    drawn = [draw_line(axes, line, index) for index, line in enumerate(lines.values())]
    svg = el(
        "svg",
        draw_grid(axes, x_label, y_label),
        *drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{y_label} against {x_label}: {', '.join(lines)}",
        class_="chart",
    )
    return join(legend(list(lines)) if len(lines) > 1 else None, svg)


def draw_line(axes: Axes, line: tuple, index: int) -> Markup:
    x, mean, low, high = line
    band = None
    if np.any(high > low):
        band = el(
            "polygon",
            points=axes.path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])),
            class_=f"band s{index % 5}",
        )
    if len(x) == 1:
        return el("circle", cx=axes.x(x[0]), cy=axes.y(mean[0]), r=3, class_=f"dot s{index % 5}")
    sparse = len(x) <= 12
    dots = [
        el("circle", cx=axes.x(a), cy=axes.y(b), r=2.2, class_=f"dot s{index % 5}")
        for a, b in zip(x, mean, strict=True)
    ]
    return join(band, el("polyline", points=axes.path(x, mean), class_=f"line s{index % 5}"), *(dots if sparse else ()))


def draw_grid(axes: Axes, x_label: str, y_label: str) -> Markup:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[Markup] = []
    for value in log_ticks(axes.y_low, axes.y_high) if axes.log else ticks(axes.y_low, axes.y_high):
        y = axes.y(value)
        parts.append(el("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(el("text", tick_label(value), x=LEFT - 6, y=y + 3.5, text_anchor="end"))
    for value in ticks(axes.x_low, axes.x_high):
        x = axes.x(value)
        parts.append(el("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(el("text", tick_label(value), x=x, y=bottom + 15, text_anchor="middle"))
    parts.append(el("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(el("text", x_label, x=(LEFT + right) / 2, y=HEIGHT - 4, text_anchor="middle", class_="label"))
    middle = (TOP + bottom) / 2
    turned = f"translate(10 {middle}) rotate(-90)"
    name = y_label + (", log scale" if axes.log else "")
    parts.append(el("text", name, transform=turned, text_anchor="middle", class_="label"))
    return join(*parts)


def legend(names: list[str]) -> Markup:
    keys = [el("span", el("i", class_=f"swatch s{i % 5}"), name) for i, name in enumerate(names)]
    return el("div", *keys, class_="legend")


def interval_bar(count: Count) -> Markup:
    """A success rate as a dot on a 0 to 100 % track, its 95 % interval as a thicker line."""
    low, high = count.interval
    at = [round(4 + 92 * share, 1) for share in (low, high, count.rate)]
    return el(
        "svg",
        el("line", x1=4, x2=96, y1=5, y2=5, class_="track"),
        el("line", x1=at[0], x2=at[1], y1=5, y2=5, class_="whisker"),
        el("circle", cx=at[2], cy=5, r=3.2, class_="dot"),
        viewBox="0 0 100 10",
        class_="interval",
        aria_hidden="true",
    )


def bars(values: Mapping[str, float], unit: str = "") -> Markup:
    """Horizontal bars from zero, one per name, each with its number; negative values get no bar."""
    most = max([v for v in values.values() if math.isfinite(v)] + [1e-12])
    rows = []
    for index, (name, value) in enumerate(values.items()):
        share = max(0.0, min(1.0, value / most)) if math.isfinite(value) else 0.0
        fill = el("span", class_=f"fill {'main' if index == 0 else ''}".strip(), style=f"width:{100 * share:.1f}%")
        text = el("b", number(value) + (f" {unit}" if unit else ""))
        rows.append(el("div", el("span", name, class_="bar-name"), el("span", fill, class_="bar"), text))
    return el("div", *rows, class_="bars")
