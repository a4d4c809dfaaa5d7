"""The run report: plain data in, one self-contained HTML file out (numpy and Pillow only, no torch)."""

from repwam_core.report.data import (
    ActionTrace,
    ChannelError,
    Count,
    Curve,
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
)
from repwam_core.report.page import render_report, write_report

__all__ = [
    "ActionTrace",
    "ChannelError",
    "Count",
    "Curve",
    "Imagination",
    "ImaginedClip",
    "LanguageRow",
    "LatentActions",
    "OpenLoop",
    "ReconstructedClip",
    "Reconstruction",
    "ReportData",
    "Rollout",
    "RunInfo",
    "Stage",
    "SuccessRow",
    "TransitionPicture",
    "render_report",
    "write_report",
]
