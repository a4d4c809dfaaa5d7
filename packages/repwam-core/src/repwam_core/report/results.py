"""Sections on how the policy acts: success table, language table, rollouts, open-loop errors."""

from __future__ import annotations

from collections.abc import Sequence

from repwam_core.report.charts import interval_bar, line_chart, number
from repwam_core.report.data import ChannelError, Count, Curve, LanguageRow, OpenLoop, Rollout, SuccessRow
from repwam_core.report.figures import animation
from repwam_core.report.markup import Markup, el, join


def percent(count: Count) -> str:
    return f"{100 * count.rate:.0f}\u00a0%"


def interval(count: Count) -> str:
    low, high = count.interval
    return f"{100 * low:.0f}–{100 * high:.0f}\u00a0%"


def count_cell(count: Count | None, class_: str = "") -> Markup:
    """Rate, counts, interval bar and interval of one cell; a dash where nothing was run."""
    if count is None:
        return el("td", el("span", "not run", class_="muted"), class_=class_ or None)
    return el(
        "td",
        el("div", el("b", percent(count)), el("span", f"{count.successes}/{count.episodes}", class_="muted")),
        interval_bar(count),
        el("small", interval(count), class_="muted"),
        class_=f"count {class_}".strip(),
    )


def success_table(rows: Sequence[SuccessRow]) -> Markup:
    """Methods against tasks, the pooled count last."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.counts))
    head = el("tr", el("th"), *[el("th", task) for task in tasks], el("th", "all tasks"))
    body = []
    for index, row in enumerate(rows):
        name = el("th", row.method, el("small", row.note) if row.note else None, scope="row")
        cells = [count_cell(row.counts.get(task)) for task in tasks]
        body.append(el("tr", name, *cells, count_cell(row.total, "total"), class_="ours" if index == 0 else None))
    table = el(
        "table",
        el("thead", head),
        el("tbody", *body),
        class_="counts",
        style=f"min-width:{112 + 128 * (len(tasks) + 1)}px",
    )
    note = (
        "Successes over episodes on scenes that no demonstration was recorded in. The bar runs from 0 to 100 %: "
        "the dot is the rate, the line its 95 % interval (Wilson). The last column pools the tasks."
    )
    return join(el("div", table, class_="scroll", tabindex=0), el("p", note, class_="caption"))


def language_table(rows: Sequence[LanguageRow]) -> Markup:
    """Tasks that share a scene against the instruction given."""
    heads = ("right instruction", "the other task's instruction", "no instruction")
    head = el("tr", el("th"), *[el("th", text) for text in heads])
    body = [
        el("tr", el("th", row.task, scope="row"), count_cell(row.right), count_cell(row.other), count_cell(row.none))
        for row in rows
    ]
    table = el("table", el("thead", head), el("tbody", *body), class_="counts", style="min-width:500px")
    note = (
        "These tasks share one scene, so that only the instruction tells them apart. Success is always counted for the "
        "task named in the row: a policy that follows language succeeds in the first column and not in the second."
    )
    return join(el("div", table, class_="scroll", tabindex=0), el("p", note, class_="caption"))


def counted(count: int, noun: str, plural: str) -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def rollout_card(rollout: Rollout) -> Markup:
    verdict = "success" if rollout.success else "failure"
    alt = f"{rollout.task}, seed {rollout.seed}: {verdict}"
    if rollout.method != "policy":
        alt = f"{rollout.method}, {alt}"
    return el(
        "figure",
        animation(rollout.frames, float(rollout.frame_rate_hz), alt),
        el(
            "figcaption",
            el("span", verdict, class_=f"verdict {verdict}"),
            el("span", f"seed {rollout.seed}", class_="muted"),
            el("span", rollout.method, class_="muted") if rollout.method != "policy" else None,
            el("q", rollout.instruction) if rollout.instruction else el("em", "no instruction", class_="muted"),
        ),
        class_=f"card {verdict}",
    )


def rollouts_section(rollouts: Sequence[Rollout]) -> Markup:
    """Rollouts by task, each a looping animation."""
    parts: list[Markup] = []
    for task in dict.fromkeys(r.task for r in rollouts):
        mine = [r for r in rollouts if r.task == task]
        good = sum(r.success for r in mine)
        shown = f"{len(mine)} shown: {counted(good, 'success', 'es')}, {counted(len(mine) - good, 'failure', 's')}"
        title = el("h3", task, el("small", shown))
        parts.append(join(title, el("div", *[rollout_card(r) for r in mine], class_="cards")))
    note = "What the policy's camera saw, in real time; each animation rests on its last frame before it starts again."
    return join(*parts, el("p", note, class_="caption"))


def error_table(channels: Sequence[ChannelError]) -> Markup:
    names = list(dict.fromkeys(name for channel in channels for name in channel.baselines))
    head = el("tr", el("th", "channel"), el("th", "unit"), el("th", "policy"), *[el("th", name) for name in names])
    body = []
    for channel in channels:
        values = [channel.error, *[channel.baselines.get(name) for name in names]]
        best = min(v for v in values if v is not None)
        cells = [
            el("td", el("b", number(v)) if v == best else number(v)) if v is not None else el("td", "not run")
            for v in values
        ]
        body.append(el("tr", el("th", channel.name, scope="row"), el("td", channel.unit), *cells))
    return el("table", el("thead", head), el("tbody", *body), class_="numbers")


def open_loop_section(open_loop: OpenLoop) -> Markup:
    """Errors per channel against baselines, and a few channels over time."""
    note = "Mean absolute error of the predicted actions; the smallest of each row is bold. " + open_loop.note
    better = [c for c in open_loop.channels if c.baselines and c.error < min(c.baselines.values())]
    told = f"The policy's error is the smallest on {len(better)} of {len(open_loop.channels)} channels."
    table = error_table(open_loop.channels)
    if len(open_loop.channels) > 8:
        table = el("details", el("summary", "Every channel"), el("div", table, class_="scroll"), open=False)
    else:
        table = el("div", table, class_="scroll", tabindex=0)
    charts = [
        el(
            "figure",
            el("figcaption", trace.name),
            line_chart(
                {"recorded": Curve(trace.time_s, trace.real), "predicted": Curve(trace.time_s, trace.predicted)},
                "time (s)",
                trace.unit,
            ),
        )
        for trace in open_loop.traces
    ]
    return join(
        el("p", told), el("div", *charts, class_="charts") if charts else None, table, el("p", note, class_="caption")
    )
