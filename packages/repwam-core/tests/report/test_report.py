"""The report: one HTML file that stands alone, its charts, and what it says of absent or broken data."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from repwam_core.report import (
    ActionTrace,
    ChannelError,
    Count,
    Imagination,
    ImaginedClip,
    LanguageRow,
    LatentActions,
    OpenLoop,
    ReconstructedClip,
    Reconstruction,
    ReportData,
    Rollout,
    RunInfo,
    Stage,
    SuccessRow,
    TransitionPicture,
    render_report,
    report_numbers,
    write_report,
)
from repwam_core.report.data import Curve
from repwam_core.report.page import (
    FORESEEN,
    HEIGHT,
    MAX_POINTS,
    SEEN,
    WIDTH,
    bars,
    binned,
    duration,
    evenly,
    film,
    interval_bar,
    line_chart,
    log_ticks,
    number,
    side_by_side,
    ticks,
)
from repwam_core.sim.results import Likeness, MixUp

VOID = {"img", "meta", "br", "source", "line", "rect", "circle", "polyline", "polygon"}
ANCHORS = (
    "findings",
    "success",
    "language",
    "rollouts",
    "open-loop",
    "reconstruction",
    "latent-actions",
    "imagination",
    "curves",
    "run",
)


class Page(HTMLParser):
    """Checks that tags are balanced and gathers what the page shows and refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.sections: dict[str, str] = {}
        self.current = ""
        self.feed(html)
        assert not self.open_tags

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href", "srcset", "action", "data") if name in values]
        if tag == "section":
            self.current = values["id"]
            self.sections[self.current] = ""
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag
        if tag == "section":
            self.current = ""

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] != "style":
            self.text += data
            if self.current:
                self.sections[self.current] += data


def video(n: int, seed: int = 0, size: int = 64) -> np.ndarray:
    """A smooth moving picture, which compresses like a camera's."""
    y, x = np.mgrid[:size, :size] / size
    frames = [np.stack([x * 200, y * 200, 120 + 100 * np.sin(9 * x + seed + i / 5)], axis=-1) for i in range(n)]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def full_report(instruction: str = "open the window") -> ReportData:
    steps = np.arange(0, 2000)
    return ReportData(
        run=RunInfo(
            title="A run",
            command="repwam quickstart",
            stages=[Stage("collect", 61.0, True, "0123456789abcdef", "30 demonstrations")],
            seeds=[0, 1],
            config_yaml="seed: 0",
            peak_memory_bytes=2**31,
            wall_seconds=700,
        ),
        findings=["Pretraining makes no measurable difference here: 52 of 60 against 53 of 60."],
        success=[
            SuccessRow("policy", {"window-open": Count(18, 20), "button": Count(17, 20)}),
            SuccessRow("random", {"window-open": Count(0, 20)}),
        ],
        language=[LanguageRow("faucet-open", Count(17, 20), Count(2, 20), None)],
        rollouts=[Rollout("window-open", s, s != 1, video(40, s), instruction) for s in range(4)],
        open_loop=OpenLoop(
            [ChannelError("elbow", "rad", 0.031, {"hold the state": 0.05})],
            [ActionTrace("elbow", "rad", steps[:50] / 30, np.sin(steps[:50]), np.cos(steps[:50]))],
        ),
        reconstruction=Reconstruction(
            [ReconstructedClip("clip 0", video(17), video(17, 1), 25.0, 0.9)],
            24.6,
            0.89,
            12,
            {"mean colour": (14.0, None)},
        ),
        latent_actions=LatentActions(
            [TransitionPicture("frame 8", video(1)[0], video(1)[0], video(1, 1)[0], [0.1, -2.0, 0.0, 1.0])],
            0.154,
            0.542,
            0.228,
            {"x": 0.81, "gripper": -0.05},
        ),
        imagination=Imagination(
            [ImaginedClip("episode 3", video(9), video(9, 2), 22.0, 19.0, 1, video(9, 1), 24.0, chunk=4)],
            22.4,
            19.5,
            4,
            {"imagined": ([4, 8], [23.0, 21.0]), "ceiling": ([4, 8], [24.0, 24.1])},
            24.1,
        ),
        curves={
            "RepViTok": {"train/loss": (steps, np.exp(-steps / 300) + 0.01), "val/psnr_db": ([0, 500], [12.0, 24.0])}
        },
    )


def test_page_needs_nothing_but_itself() -> None:
    html = render_report(full_report())
    page = Page(html)
    assert page.references
    assert all(ref.startswith(("data:image/webp;base64,", "#")) for ref in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html or "default-src &#x27;none&#x27;" in html


def test_every_section_renders() -> None:
    page = Page(render_report(full_report()))
    assert tuple(page.sections) == ANCHORS
    assert not [name for name, text in page.sections.items() if "Absent from this run" in text]
    assert {f"#{anchor}" for anchor in ANCHORS} <= set(page.references)


def test_absent_sections_are_said_to_be_absent() -> None:
    page = Page(render_report(ReportData(run=RunInfo(title="Nothing", command="repwam quickstart"))))
    assert tuple(page.sections) == ANCHORS
    absent = {name for name, text in page.sections.items() if "Absent from this run" in text}
    assert absent == set(ANCHORS) - {"run"}
    assert "img" not in page.tags
    assert not re.search(r"\d+ ?%|dB", page.text)


def test_counts_come_with_their_interval() -> None:
    text = Page(render_report(full_report())).sections["success"].replace("\u00a0", " ")
    assert "90 %18/20" in text
    assert "70–97 %" in text
    assert "88 %35/40" in text  # pooled
    assert "not run" in text  # random was not run on the second task


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (18, 20, 0.6990, 0.9721),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (53, 60, 0.7782, 0.9423),
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_wilson_interval_against_hand_values(successes: int, episodes: int, low: float, high: float) -> None:
    assert Count(successes, episodes).interval == pytest.approx((low, high), abs=2e-4)


def test_instructions_and_names_are_escaped() -> None:
    attack = '<script>alert("x")</script> & \'quotes\' <img src="http://example.org/a.png">'
    data = full_report(attack)
    html = render_report(data)
    page = Page(html)
    assert "script" not in page.tags
    assert attack in page.text
    assert not [ref for ref in page.references if "example.org" in ref]


def _attacked(value, attack: str):
    """The same data with every text, and every key of a mapping, replaced by hostile text."""
    if isinstance(value, str):
        return attack
    if isinstance(value, dict):
        return {f"{attack}{key}": _attacked(of, attack) for key, of in value.items()}
    if isinstance(value, list):
        return [_attacked(of, attack) for of in value]
    if is_dataclass(value):
        given = {field.name: _attacked(getattr(value, field.name), attack) for field in fields(value)}
        return type(value)(**{**given, **({"measured": value.measured} if isinstance(value, ReportData) else {})})
    return value


def test_no_text_of_the_data_becomes_markup() -> None:
    """Task, channel, stage, clip and curve names, notes, units, commands: whatever is text stays text."""
    attack = "<script>alert(1)</script>'\"><img src=http://example.org/a onerror=x>{{ 7 * 7 }}"
    plain, page = Page(render_report(full_report())), Page(render_report(_attacked(full_report(), attack)))
    assert page.tags.count("img") == plain.tags.count("img")
    assert "script" not in page.tags
    assert not [ref for ref in page.references if "example.org" in ref]
    assert all(attack in page.sections[anchor] for anchor in ANCHORS)


def test_size_is_bounded_for_many_rollouts_and_large_frames() -> None:
    data = full_report()
    many = [Rollout("window-open", s, True, video(200, s)) for s in range(20)]
    large = [ReconstructedClip("large", video(9, size=480), video(9, 1, size=480), 25.0)]
    data = ReportData(run=data.run, rollouts=many, reconstruction=Reconstruction(large, 25.0))
    assert len(render_report(data)) < 6_000_000


def _cards(html: str) -> list[str]:
    """What each film's card says first: who drove, and how it ended."""
    cards = re.findall(r'<figure class="card[^>]*>(.*?)</figure>', html, re.DOTALL)
    texts = [re.sub(r"<[^>]*>", " ", card) for card in cards]
    return [" ".join(text.split()) for text in texts]


def test_a_task_is_a_row_of_expert_policy_success_policy_failure_and_replay() -> None:
    def shown(method: str, success: bool, seed: int = 7) -> Rollout:
        return Rollout("window-open", seed, success, video(4), "", 10, method)

    rollouts = [shown("replay", False), shown("policy", False), shown("policy", True), shown("expert", True)]
    data = ReportData(run=full_report().run, rollouts=rollouts)
    wanted = ["expert success", "policy success", "policy failure", "replay failure"]
    assert [" ".join(card.split()[:2]) for card in _cards(render_report(data))] == wanted


def test_an_outcome_that_never_came_is_said() -> None:
    rollouts = [Rollout("window-open", 7, True, video(4), "", 10)]
    rows = [SuccessRow("policy", {"window-open": Count(20, 20)})]
    data = ReportData(run=full_report().run, rollouts=rollouts, success=rows)
    assert [card.split(" seed")[0] for card in _cards(render_report(data))] == [
        "policy success",
        "policy no failure in 20 episodes",
    ]
    assert _cards(render_report(replace(data, success=())))[1] == "policy no failure filmed"


def test_imagined_films_play_in_step_and_show_where_imagining_begins() -> None:
    clip = full_report().imagination.clips[0]  # type: ignore[union-attr]
    assert [clip.ahead(frame) for frame in range(9)] == [0, 1, 2, 3, 4, 1, 2, 3, 4]
    shown = film(clip, "alt")
    assert list(shown.panes) == ["real", "reconstructed", "imagined"]
    moving = Image.open(io.BytesIO(base64.b64decode(shown.picture.src.split(",")[1])))
    assert moving.n_frames == 9
    last = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.last.split(",")[1]))).convert("RGBA"))
    assert np.array_equal(last[:64, :64, :3], clip.real[-1])
    assert np.array_equal(last[:64, -64:, :3], clip.imagined[-1])
    timeline = last[-1]
    assert tuple(timeline[2][:3]) == SEEN
    assert tuple(timeline[-2][:3]) == FORESEEN
    gaps = np.flatnonzero(timeline[:, 3] == 0)  # one where each of the two chunks begins
    assert len(gaps) == 2
    text = Page(render_report(full_report())).sections["imagination"]
    assert "reconstructed 24.0" in text.replace("\u00a0", " ")
    assert "then 4 imagined at a time" in text


def test_numbers_are_strict_json_beside_the_page(tmp_path) -> None:
    data = full_report()
    broken = replace(data.latent_actions, forward_loss=float("nan"), probe_r2={"x": float("inf")})
    path = write_report(replace(data, latent_actions=broken, protocol={"seeds": [7]}), tmp_path / "report.html")
    text = path.with_suffix(".json").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (told["format"], told["format_version"]) == ("repwam-report", 1)
    assert told["command"] == "repwam quickstart"
    assert told["stages"][0] | {"name": "collect", "seconds": 61.0, "cached": True} == told["stages"][0]
    policy = told["closed_loop"]["methods"]["policy"]
    assert policy["tasks"]["window-open"] == [18, 20]
    assert policy["intervals"]["window-open"] == pytest.approx(Count(18, 20).interval)
    assert policy["all episodes"]["successes"] == 35
    assert told["closed_loop"]["protocol"] == {"seeds": [7]}
    assert told["language"][0]["none"] is None
    assert told["open_loop"]["channels"][0]["baselines"] == {"hold the state": 0.05}
    assert told["reconstruction"]["psnr_db"] == 24.6
    assert told["latent_actions"]["forward_loss"] is None
    assert told["latent_actions"]["probe_r2"] == {"x": None}
    assert told["imagination"]["reconstructed_psnr_db"] == 24.1
    assert told["imagination"]["by_horizon"]["ceiling"] == {"steps": [4, 8], "values": [24.0, 24.1], "unit": ""}
    assert set(told["imagination"]["clips"][0]) == {
        *("name", "psnr_db", "copy_psnr_db", "observed", "reconstructed_psnr_db", "chunk", "frame_rate_hz")
    }
    assert told["curves"]["RepViTok"]["val/psnr_db"]["values"] == [12.0, 24.0]


def test_a_report_of_nothing_has_the_same_fields() -> None:
    empty, full = (report_numbers(data) for data in (ReportData(run=RunInfo("t", "c")), full_report()))
    assert set(empty) == set(full)
    assert empty["closed_loop"] is None


def test_rendering_is_deterministic() -> None:
    assert render_report(full_report()) == render_report(full_report())


def test_write_replaces_the_whole_file(tmp_path: os.PathLike) -> None:
    path = tmp_path / "deep" / "report.html"  # type: ignore[operator]
    assert write_report(full_report(), path) == path
    first = path.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    write_report(ReportData(run=RunInfo(title="Second", command="c")), path)
    assert "Second" in path.read_text(encoding="utf-8")
    assert sorted(os.listdir(path.parent)) == ["report.html", "report.json"]


def test_a_failed_write_keeps_the_old_report(tmp_path: os.PathLike, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"  # type: ignore[operator]
    write_report(ReportData(run=RunInfo(title="First", command="c")), path)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_report(ReportData(run=RunInfo(title="Second", command="c")), path)
    assert "First" in path.read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    "frames",
    [np.zeros((4, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((0, 64, 64, 3), np.uint8)],
)
def test_wrong_frames_are_refused_with_what_came(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match=re.escape(str(frames.shape))):
        Rollout("window-open", 7, True, frames)


def test_pairs_must_have_one_shape() -> None:
    with pytest.raises(ValueError, match="expected reconstruction"):
        ReconstructedClip("a", video(9), video(5), 20.0)
    with pytest.raises(ValueError, match="imagined"):
        ImaginedClip("a", video(9), video(5), 20.0)


def test_impossible_counts_are_refused() -> None:
    for successes, episodes in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="successes"):
            Count(successes, episodes)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.7, "1 min 00 s"), (61, "1 min 01 s"), (3700, "1 h 01 min")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(float(seconds)).replace("\u00a0", " ") == text


def many_tasks() -> ReportData:
    """Nine tasks in two groups; the policy solves task i in i of 10 episodes."""
    tasks = [f"task-{number}" for number in range(9)]
    film = Rollout("task-1", 7, False, video(8), distances={"hand to object": ([0.0, 0.1], [30.0, 4.0])})
    return ReportData(
        run=RunInfo(title="Many", command="repwam quickstart --preset mt50"),
        success=[
            SuccessRow("policy", {task: Count(number, 10) for number, task in enumerate(tasks)}),
            SuccessRow("expert", {task: Count(10, 10) for task in tasks[1:]}),
        ],
        groups={"easy": tasks[:3], "hard": tasks[3:]},
        endings={"task-1": {"object not moved": 6, "object not at the goal": 3}},
        likeness=Likeness(30, 36, [MixUp("task-2", "task-7", 5), MixUp("task-3", "task-1", 1)]),
        rollouts=[film],
    )


def test_many_tasks_are_rows_sorted_by_success_with_both_aggregates():
    told = Page(render_report(many_tasks())).sections["success"]
    places = [told.index(f"task-{number}") for number in range(8, -1, -1)]
    assert places == sorted(places)
    # 3 of 30 and 33 of 60 episodes; all 36 of 90; mean of 10 % and 55 %
    for said in ("3/30", "33/60", "36/90", "32.5", "6 object not moved, 3 object not at the goal", "30 of"):
        assert said in told, said
    assert "not run" in told  # the expert at task 0
    mixed = told[told.index("Tasks mixed up") :]
    assert "task-7" in mixed
    assert "task-1" not in mixed  # one episode alone is chance


def test_a_failure_s_distances_are_drawn_beside_its_film():
    page = Page(render_report(many_tasks()))
    assert "distance (cm)" in page.sections["rollouts"]


def test_few_tasks_keep_their_columns():
    told = Page(render_report(full_report())).sections["success"]
    assert "Task by task" not in told


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
