"""The page: ReportData to one HTML document that opens offline."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from repvitok.files import write_text_atomic

from repwam_core.report.data import ReportData, RunInfo, Stage
from repwam_core.report.markup import Markup, el, join
from repwam_core.report.results import (
    interval,
    language_table,
    open_loop_section,
    percent,
    rollouts_section,
    success_table,
)
from repwam_core.report.stages import (
    curves_section,
    decibel,
    imagination_section,
    latent_actions_section,
    reconstruction_section,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def duration(seconds: float) -> str:
    """Seconds in words: "48 s", "3 min 20 s", "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s" if seconds < 9.95 else f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


def memory(count: int) -> str:
    return f"{count / 2**30:.1f}\u00a0GiB" if count >= 2**30 else f"{count / 2**20:.0f}\u00a0MiB"


def key_numbers(data: ReportData) -> Markup:
    """The line of headline numbers under the title."""
    facts: list[tuple[str, str, str]] = []
    for index, row in enumerate(data.success):
        count = row.total
        unbroken = interval(count).replace("–", "\u2060–\u2060")
        detail = f"{count.successes}/{count.episodes}, 95\u00a0% interval {unbroken}"
        if index == 0 or "replay" in row.method or "random" in row.method:
            facts.append((percent(count), f"success, {row.method}", detail))
    if data.open_loop and not data.success:
        wins = [c for c in data.open_loop.channels if c.baselines and c.error < min(c.baselines.values())]
        facts.append((f"{len(wins)} of {len(data.open_loop.channels)}", "action channels", "below every baseline"))
    if data.reconstruction:
        facts.append((decibel(data.reconstruction.psnr_db), "reconstruction", f"PSNR on {data.measured} clips"))
    if data.imagination:
        facts.append((decibel(data.imagination.psnr_db), "imagination", "PSNR of imagined video"))
    if data.run.wall_seconds is not None:
        peak = memory(data.run.peak_memory_bytes) if data.run.peak_memory_bytes else None
        facts.append((duration(float(data.run.wall_seconds)), "this run", f"peak memory {peak}" if peak else ""))
    boxes = [el("div", el("b", big), el("span", name), el("small", detail)) for big, name, detail in facts]
    return el("div", *boxes, class_="key")


def findings_section(data: ReportData) -> Markup:
    return el("ul", *[el("li", sentence) for sentence in data.findings], class_="findings")


def stage_table(stages: list[Stage]) -> Markup:
    """Stages with their time as a bar, digest and key result."""
    most = max(float(stage.seconds) for stage in stages) or 1.0
    head = el("tr", *[el("th", name) for name in ("stage", "time", "", "result", "digest")])
    body = []
    for stage in stages:
        fill = el("span", class_="fill main", style=f"width:{100 * float(stage.seconds) / most:.1f}%")
        cached = el("small", "from cache", class_="muted") if stage.cached else None
        body.append(
            el(
                "tr",
                el("th", stage.name, scope="row"),
                el("td", duration(float(stage.seconds)), cached, class_="nowrap"),
                el("td", el("span", fill, class_="bar")),
                el("td", stage.result),
                el("td", el("code", stage.digest[:12])),
            )
        )
    total = sum(float(stage.seconds) for stage in stages)
    foot = el("tr", el("th", "all stages"), el("td", duration(total), class_="nowrap"), el("td"), el("td"), el("td"))
    table = el("table", el("thead", head), el("tbody", *body), el("tfoot", foot), class_="stages")
    note = "A stage from the cache shows the time of the run that made it."
    caption = el("p", note, class_="caption") if any(stage.cached for stage in stages) else None
    return join(el("div", table, class_="scroll", tabindex=0), caption)


def run_section(data: ReportData) -> Markup:
    """Command, hardware, versions, stages and the whole configuration."""
    run = data.run
    peak = memory(run.peak_memory_bytes) if run.peak_memory_bytes else ""
    wall = duration(float(run.wall_seconds)) if run.wall_seconds is not None else ""
    rows = [
        ("command", el("code", run.command)),
        ("commit", el("code", run.commit) if run.commit else None),
        ("date", run.date),
        ("hardware", run.hardware),
        ("seeds" if len(run.seeds) > 1 else "seed", ", ".join(str(seed) for seed in run.seeds)),
        ("wall time", wall),
        ("peak memory", peak),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
    ]
    facts = [join(el("dt", name), el("dd", value)) for name, value in rows if value]
    config = None
    if run.config_yaml:
        config = el("details", el("summary", "Configuration"), el("pre", el("code", run.config_yaml)))
    return join(el("dl", *facts, class_="facts"), stage_table(list(run.stages)) if run.stages else None, config)


def sections(data: ReportData) -> list[tuple[str, str, Markup | str]]:
    """(anchor, title, body) in page order; a body of plain text says that the section is absent and why."""
    return [
        ("findings", "Findings", findings_section(data) if data.findings else "No findings were recorded."),
        ("success", "Closed loop", success_table(data.success) if data.success else "No rollouts were counted."),
        (
            "language",
            "Language",
            language_table(data.language) if data.language else "No pair of tasks with a shared scene was run.",
        ),
        ("rollouts", "Rollouts", rollouts_section(data.rollouts) if data.rollouts else "No rollouts were recorded."),
        (
            "open-loop",
            "Open loop",
            open_loop_section(data.open_loop) if data.open_loop else "Actions were not evaluated open loop.",
        ),
        (
            "reconstruction",
            "Visual tokenizer",
            reconstruction_section(data.reconstruction, data.measured)
            if data.reconstruction
            else "No reconstructions were measured.",
        ),
        (
            "latent-actions",
            "Latent actions",
            latent_actions_section(data.latent_actions) if data.latent_actions else "No latent actions were measured.",
        ),
        (
            "imagination",
            "Imagined futures",
            imagination_section(data.imagination, data.measured) if data.imagination else "No video was imagined.",
        ),
        ("curves", "Training curves", curves_section(data.curves) if data.curves else "No curves were recorded."),
        ("run", "The run", run_section(data)),
    ]


def section(anchor: str, title: str, body: Markup | str) -> Markup:
    if not isinstance(body, Markup):
        text = el("p", f"Absent from this run. {body}", class_="absent")
        return el("section", el("h2", title), text, id=anchor, class_="short")
    return el("section", el("h2", title), body, id=anchor)


def header(run: RunInfo) -> Markup:
    line = " · ".join(part for part in (run.date, run.hardware, f"commit {run.commit}" if run.commit else "") if part)
    return el(
        "header",
        el("p", "RepWAM run report", class_="kicker"),
        el("h1", run.title),
        el("p", run.summary, class_="lead") if run.summary else None,
        el("p", line, class_="muted meta") if line else None,
    )


def render_report(data: ReportData) -> str:
    """The report as one HTML document that needs nothing but itself: no script, no font, no request."""
    listed = sections(data)
    links = [el("a", title, href=f"#{anchor}") for anchor, title, body in listed if isinstance(body, Markup)]
    style = (files("repwam_core.report") / "style.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("title", f"{data.run.title} · RepWAM"),
        el("style", Markup(style)),
    )
    body = el(
        "body",
        el("main", header(data.run), key_numbers(data), el("nav", *links), *[section(*entry) for entry in listed]),
    )
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the report to ``path`` and return it.

    The file appears whole or not at all.
    """
    write_text_atomic(path, render_report(data))
    return Path(path)
