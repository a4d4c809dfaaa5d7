"""Charts: coordinates stay inside, long and odd curves are drawn, marks say what the numbers say."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repwam_core.report.data import Count, Curve
from repwam_core.report.page import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    bars,
    binned,
    evenly,
    interval_bar,
    line_chart,
    log_ticks,
    number,
    side_by_side,
    ticks,
)

values = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(values)
def test_every_point_lies_inside_the_chart(ys: list[float]) -> None:
    chart = line_chart({"a": Curve(list(range(len(ys))), ys)}, "step", "loss")
    points = re.findall(r'points="([^"]*)"', chart)
    for x, y in (pair.split(",") for group in points for pair in group.split()):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 9
    assert all(low - 1e-6 * width <= v <= low + width * (1 + 1e-6) for v in found)


def test_long_curves_are_drawn_as_bin_means() -> None:
    x, mean, low, high = binned(Curve(np.arange(10_000), np.tile([0.0, 1.0], 5000)))
    assert len(x) == MAX_POINTS
    assert mean == pytest.approx(0.5, abs=0.02)
    assert set(low) == {0.0}
    assert set(high) == {1.0}


def test_points_that_are_not_finite_are_left_out_and_nothing_finite_is_said() -> None:
    assert len(binned(Curve([0, 1, 2], [1.0, float("nan"), 2.0]))[0]) == 2
    assert "No finite values" in line_chart({"a": Curve([0, 1], [float("nan")] * 2)}, "step", "loss")


def test_mismatched_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        line_chart({"a": Curve([0, 1, 2], [1.0, 2.0])}, "step", "loss")


def test_wide_ranges_get_a_log_axis() -> None:
    assert "log scale" in line_chart({"a": Curve([0, 1], [0.001, 1.0])}, "step", "loss")
    assert "log scale" not in line_chart({"a": Curve([0, 1], [0.5, 1.0])}, "step", "loss")
    assert log_ticks(0.001, 1.0) == pytest.approx([0.001, 0.01, 0.1, 1.0])


def test_interval_bar_spans_the_interval() -> None:
    count = Count(18, 20)
    line = re.search(r'x1="([\d.]+)" x2="([\d.]+)"[^>]*whisker', interval_bar(count))
    assert line is not None
    ends = [(float(v) - 4) / 92 for v in line.groups()]
    assert ends == pytest.approx(count.interval, abs=1e-3)


def test_bars_of_odd_values() -> None:
    widths = re.findall(r"width:([\d.]+)%", bars({"a": 2.0, "b": 1.0, "c": -1.0, "d": float("nan")}))
    assert [float(w) for w in widths] == [100.0, 50.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.15432, "0.154"), (25.04, "25.0"), (-1.5, "−1.50"), (1234.0, "1234"), (2e-6, "2.00e−06")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_names_are_escaped_in_text_and_attributes() -> None:
    chart = line_chart({'<b>"&': Curve([0, 1], [1.0, 2.0]), "other": Curve([0, 1], [2.0, 3.0])}, "<i>", "'<u>'")
    assert not re.search("<[biu]>", chart)
    assert '<span><i class="swatch s0"></i>&lt;b&gt;&#34;&amp;</span>' in chart
    assert 'aria-label="&#39;&lt;u&gt;&#39; against &lt;i&gt;: &lt;b&gt;&#34;&amp;, other"' in chart
    assert "&lt;b&gt;" in bars({"<b>": 1.0}, "<i>")
    assert "<i>" not in bars({"<b>": 1.0}, "<i>")


def test_even_spread_keeps_both_ends() -> None:
    assert evenly(17, 8)[0] == 0
    assert evenly(17, 8)[-1] == 16
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(1, 8) == [0]


def test_strip_keeps_every_pixel() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), dtype=np.uint8)
    picture = side_by_side(frames, gap=2)
    assert picture.shape == (4, 19, 4)
    assert np.array_equal(picture[:, 7:12, :3], frames[1])
    assert not picture[:, 5:7].any()
