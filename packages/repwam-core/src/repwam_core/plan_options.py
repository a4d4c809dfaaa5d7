"""The options of `PlanSettings`, shared by all verbs that drive a policy."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from repvitok.runtime.commands import MANY, number, whole_number

from repwam_core.planning import MOST_STEPS, PlanSettings


def add_plan_arguments(parser: argparse.ArgumentParser, otherwise: str = "as the policy folder says") -> None:
    """Declare the options of `PlanSettings`; `otherwise` is what holds where one is not given."""
    plan = parser.add_argument_group("planning", f"how chunks are planned; {otherwise} unless given here")
    steps, above_0, from_0 = whole_number(1, MOST_STEPS), number(0, MANY, above=True), number(0, MANY)
    plan.add_argument("--chunk-frames", type=steps, metavar="N", help="latent frames planned at a time")
    plan.add_argument("--execute-frames", type=steps, metavar="N", help="how many of them are carried out")
    plan.add_argument("--video", choices=["imagine", "skip"], help="refine the video with the actions, or leave it out")
    plan.add_argument("--video-steps", type=steps, metavar="N", help="Euler steps of the video")
    plan.add_argument("--action-steps", type=steps, metavar="N", help="Euler steps of the actions")
    plan.add_argument("--video-shift", type=above_0, metavar="X", help="bends the time grid of the video")
    plan.add_argument("--action-shift", type=above_0, metavar="X", help="bends the time grid of the actions")
    plan.add_argument("--guidance", type=from_0, metavar="X", help="classifier-free guidance of the video; 1 is off")
    plan.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, help="keep actions inside the range that the data set recorded"
    )


def given_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Those settings that the command line gave, by the names of `PlanSettings`."""
    named = {field.name: getattr(options, field.name) for field in fields(PlanSettings)}
    return {name: value for name, value in named.items() if value is not None}
