"""Sections on what each stage learned: reconstruction, latent actions, imagination, curves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from repwam_core.report.charts import bars, line_chart
from repwam_core.report.data import (
    Curve,
    Curves,
    Imagination,
    LatentActions,
    Number,
    Reconstruction,
    TransitionPicture,
    as_curve,
)
from repwam_core.report.figures import still, strips
from repwam_core.report.markup import Markup, el, join


def decibel(value: Number) -> str:
    return f"{value:.1f}\u00a0dB"


def clip_title(name: str, *facts: str | None) -> Markup:
    return el("h3", name, el("small", " · ".join(f for f in facts if f)))


def mean_over(count: int | None, measured: str) -> str:
    return f"Mean over {count} {measured} clips. " if count else ""


def reconstruction_section(data: Reconstruction, measured: str = "held-out") -> Markup:
    """Original against reconstructed frames, and what trivial predictions reach."""
    rows = {"RepViTok": (data.psnr_db, data.ssim), **data.baselines}
    head = el("tr", el("th"), el("th", "PSNR (dB)"), el("th", "SSIM"))
    body = [
        el(
            "tr",
            el("th", name, scope="row"),
            el("td", f"{psnr:.2f}"),
            el("td", f"{ssim:.3f}" if ssim is not None else "not run"),
            class_="ours" if index == 0 else None,
        )
        for index, (name, (psnr, ssim)) in enumerate(rows.items())
    ]
    table = el("div", el("table", el("thead", head), el("tbody", *body), class_="numbers"), class_="scroll")
    clips = []
    for clip in data.clips:
        ssim = f"SSIM {clip.ssim:.3f}" if clip.ssim is not None else None
        pictures = strips([("original", clip.original), ("reconstructed", clip.reconstructed)], clip.name)
        clips.append(join(clip_title(clip.name, decibel(clip.psnr_db), ssim), pictures))
    note = mean_over(data.num_clips, measured) + "Higher is better. Numbers under the strips are frame indices."
    return join(table, *clips, el("p", note, class_="caption"))


def transition_card(picture: TransitionPicture) -> Markup:
    views = [("frame", picture.frame), ("where it acts", picture.drawn), ("next frame", picture.next_frame)]
    images = [
        el("div", still(image, f"{picture.name}: {label}"), el("small", label), class_="view")
        for label, image in views
        if image is not None
    ]
    numbers = None
    if picture.latent_action is not None:
        values = ", ".join(f"{v:+.2f}".replace("-", "−") for v in np.asarray(picture.latent_action).ravel())
        numbers = el("code", f"({values})")
    caption = el("figcaption", picture.name, numbers)
    return el("figure", el("div", *images, class_="views"), caption, class_="transition")


def probe_table(data: LatentActions) -> Markup:
    """R^2 of decoding robot actions from frozen latent actions, beside its controls."""
    rows = {"latent actions": data.probe_r2, **data.probe_controls}
    channels = list(data.probe_r2)
    head = el("tr", el("th"), *[el("th", name) for name in channels])
    body = []
    for index, (name, values) in enumerate(rows.items()):
        cells = [el("td", f"{values[c]:.2f}".replace("-", "−") if c in values else "not run") for c in channels]
        body.append(el("tr", el("th", name, scope="row"), *cells, class_="ours" if index == 0 else None))
    table = el("table", el("thead", head), el("tbody", *body), class_="numbers")
    note = (
        "R² of robot actions decoded from frozen latent actions on what was held out. 1 is exact, 0 is no better than "
        "the mean action."
    )
    return join(
        el("h3", "Robot actions decoded from latent actions"),
        el("div", table, class_="scroll", tabindex=0),
        el("p", note, class_="caption"),
    )


def latent_actions_section(data: LatentActions) -> Markup:
    """Where latent actions act, what they explain beyond the controls, and the probe."""
    losses = {
        "with the latent action": data.forward_loss,
        "with a zero action": data.zero_action_loss,
        "copy of the current latents": data.copy_loss,
    }
    known = {name: float(value) for name, value in losses.items() if value is not None}
    pictures = el("div", *[transition_card(p) for p in data.pictures], class_="transitions")
    heat = (
        "The heat map shows where the next latents predicted with this latent action differ from those predicted with "
        "the latent action of a still frame. The arrows show how far the transport operator has moved the content."
    )
    note = "Lower is better. Only what is gained over the zero action is the action's own."
    return join(
        pictures if data.pictures else None,
        el("p", heat, class_="caption") if data.pictures else None,
        el("h3", "Error of the predicted next latents", el("small", "mean squared, held-out")),
        bars(known) if known else el("p", "Nothing was held out to measure it on.", class_="absent"),
        el("p", note, class_="caption") if known else None,
        probe_table(data) if data.probe_r2 else None,
    )


def imagination_section(data: Imagination, measured: str = "held-out") -> Markup:
    """Imagined against real future frames."""
    told = {"imagined": float(data.psnr_db)}
    if data.copy_psnr_db is not None:
        told["last observed frame repeated"] = float(data.copy_psnr_db)
    clips = []
    for clip in data.clips:
        copy = f"repeating the last frame {decibel(clip.copy_psnr_db)}" if clip.copy_psnr_db is not None else None
        given = f"observed frames: the first {clip.observed}" if clip.observed else None
        pictures = strips([("real future", clip.real), ("imagined", clip.imagined)], clip.name)
        clips.append(join(clip_title(clip.name, decibel(clip.psnr_db), copy, given), pictures))
    horizon = None
    if data.by_horizon:
        chart = line_chart(data.by_horizon, "frames ahead", "PSNR (dB)")
        horizon = el("div", el("figure", el("figcaption", "PSNR by horizon"), chart), class_="charts horizon")
    note = mean_over(data.num_clips, measured) + "PSNR over the imagined frames; higher is better."
    return join(bars(told, "dB"), *clips, horizon, el("p", note, class_="caption"))


def grouped(curves: Curves) -> dict[str, dict[str, Curve]]:
    """Curves by chart: "train/loss" and "val/loss" become lines "train" and "val" of the chart "loss"."""
    charts: dict[str, dict[str, Curve]] = {}
    for metric, curve in curves.items():
        line, _, chart = metric.rpartition("/")
        charts.setdefault(chart, {})[line or chart] = as_curve(curve)
    return charts


def curves_section(stages: Mapping[str, Curves]) -> Markup:
    """One row of small charts per stage."""
    parts = []
    for stage, curves in stages.items():
        figures = []
        for chart, lines in grouped(curves).items():
            title, unit = (chart.removesuffix("_db"), "dB") if chart.endswith(("_db", "psnr")) else (chart, "")
            unit = unit or next((line.unit for line in lines.values() if line.unit), "")
            label = f"{title} ({unit})" if unit else title
            title, label = title.replace("_", " "), label.replace("_", " ")
            only = next(iter(lines)) if len(lines) == 1 else ""
            caption = el("figcaption", title, el("small", only) if only and only != chart else None)
            figures.append(el("figure", caption, line_chart(lines, "optimizer step", label)))
        parts.append(join(el("h3", stage), el("div", *figures, class_="charts")))
    note = "A line is the mean of neighbouring steps, the band behind it their range."
    return join(*parts, el("p", note, class_="caption"))
