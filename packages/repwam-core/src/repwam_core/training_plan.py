"""`repwam plan`: what training a preset on so many devices would take, before a device is asked for. No torch."""

from __future__ import annotations

import argparse
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import get_args

from repvitok.commands import number, whole_number
from repvitok.config import RepViTokConfig
from repvitok.errors import UserError

from repwam_core.model.config import Recompute, WAMConfig
from repwam_core.sizing import (
    DEVICES,
    SequenceCounts,
    activation_bytes,
    document_counts,
    offloaded_bytes,
    parameter_counts,
    state_bytes,
    training_flops,
)

GIB = 2**30
MOST_TOKENS = 10**18
FITTING_SHARE = 0.9
"""Of a device's memory: the rest is for what is not counted, and for fragments."""
ENCODE_FLOPS_PER_TOKEN = 259e9 / 1280
"""FLOPs of RepViTok's encoder per latent token: 259 GFLOP for a clip of 17 x 256 x 256, which has 5 x 256 tokens."""
RAW_FRAMES_PER_LATENT = RepViTokConfig().tubelet_frames
DECODE_FRAMES_PER_CORE_S = 500.0
"""Frames of video that a core decodes in a second, between PyAV's 299 and 702 at 256 pixels (benchmarks)."""


def tokens_of(text: str) -> int:
    """The argument type of a number of tokens: 160000, 160k, 0.2m or 100g.

    Raises:
        argparse.ArgumentTypeError: something else, or not within 1 to `MOST_TOKENS`.
    """
    factors = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    letter = text[-1:].lower()
    digits = text[:-1] if letter in factors else text
    try:
        value = float(digits) * factors.get(letter, 1.0)
    except ValueError:
        value = math.nan
    if not 1 <= value <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 160k or 100g, got {text!r}")
    return round(value)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked.

    Attributes:
        preset: of `WAMConfig`.
        gpus: devices; one packed sequence each per step.
        tokens: of a packed sequence.
        gpu: a name of `sizing.DEVICES`.
        total_tokens: of the run.
        mfu: share of the device's peak that training reaches: an assumption, to be replaced by a measurement.
        shard_size: devices over which a copy of the model is spread.
        recompute: as in `ScaleSettings`.
        grid: (views, rows, columns) of a latent frame.
        transitions: of an episode.
        chunk: latent frames of a chunk.
        vectors: action vectors per transition.
        passes: how often training goes through the data.
    """

    preset: str = "5b"
    gpus: int = 128
    tokens: int = 160_000
    gpu: str = "h20"
    total_tokens: int = 100_000_000_000
    mfu: float = 0.4
    shard_size: int = 8
    recompute: Recompute = "full"
    grid: tuple[int, int, int] = (1, 16, 16)
    transitions: int = 96
    chunk: int = 2
    vectors: int = 4
    passes: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens", "total_tokens", "shard_size", "transitions", "chunk", "vectors", "passes"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(self, name)}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu: expected a share in (0, 1], got {self.mfu}")
        if self.gpu not in DEVICES:
            raise UserError(f"--gpu: expected one of {sorted(DEVICES)}, got {self.gpu!r}")
        if self.gpus % self.shard_size:
            raise UserError(f"--shard-size: expected a divisor of --gpus {self.gpus}, got {self.shard_size}")


@dataclass(frozen=True)
class TrainingPlan:
    """The answers; bytes and seconds are per device unless they say otherwise.

    Attributes:
        counts: of one sequence.
        parameters: of the video and of the action expert.
        state: bytes of parameters, gradients, moments and averages on one device.
        activations: bytes kept for the backward pass, by `recompute`.
        offloaded: bytes of the host's memory that recompute "offload" takes.
        flops: of a step, forward and backward, recomputation counted not at all.
        step_s: of a step, at the assumed share of the peak.
        steps: of the run.
        days: of the run.
        latents_bytes: of the data's latents in float16, over all.
        encode_gpu_hours, decode_core_hours: of making them, over all.
    """

    counts: SequenceCounts
    parameters: dict[str, int]
    state: float
    activations: dict[Recompute, float]
    offloaded: int
    flops: float
    step_s: float
    steps: float
    days: float
    latents_bytes: float
    encode_gpu_hours: float
    decode_core_hours: float


def make_plan(request: PlanRequest) -> TrainingPlan:
    """Answer a request."""
    config, device = WAMConfig.preset(request.preset), DEVICES[request.gpu]
    counts = packed_counts(config, request)
    flops = training_flops(config, [counts], next(iter(config.spaces.values())))
    recomputed = {"none": 0.0, "selective": 0.3, "full": 1 / 3, "offload": 1 / 3}[request.recompute]
    step_s = flops * (1 + recomputed) / (device.peak_flops * request.mfu)
    steps = request.total_tokens / (counts.tokens * request.gpus)
    frame_tokens = request.grid[0] * request.grid[1] * request.grid[2]
    latent_tokens = request.total_tokens * counts.clean_video / counts.tokens / request.passes
    raw_frames = latent_tokens / frame_tokens * request.grid[0] * RAW_FRAMES_PER_LATENT
    return TrainingPlan(
        counts=counts,
        parameters=parameter_counts(config),
        state=state_bytes(config).total / request.shard_size,
        activations={name: activation_bytes(config, counts, name) for name in get_args(Recompute)},
        offloaded=offloaded_bytes(config, counts),
        flops=flops,
        step_s=step_s,
        steps=steps,
        days=steps * step_s / 86400,
        latents_bytes=latent_tokens * config.latent_dim * 2,
        encode_gpu_hours=latent_tokens * ENCODE_FLOPS_PER_TOKEN / (device.peak_flops * request.mfu) / 3600,
        decode_core_hours=raw_frames / DECODE_FRAMES_PER_CORE_S / 3600,
    )


def packed_counts(config: WAMConfig, request: PlanRequest) -> SequenceCounts:
    """A sequence of equal episodes, as many as fit the token budget; of a piece of one where not even one fits.

    Raises:
        ValueError: not even one chunk fits.
    """

    def episode(chunks: int, copies: int = 1) -> SequenceCounts:
        tokens = request.grid[0] * request.grid[1] * request.grid[2]
        return document_counts(config, (request.chunk,) * chunks, tokens, request.vectors, copies=copies)

    largest = max(1, request.transitions // request.chunk)
    fitting = bisect_right(range(1, largest + 1), request.tokens, key=lambda chunks: episode(chunks).tokens)
    chunks = max(1, fitting)
    copies = request.tokens // episode(chunks).tokens
    if not copies:
        raise UserError(f"--tokens: not even one chunk of {episode(1).tokens} tokens fits {request.tokens}")
    return episode(chunks, copies)


def plan_lines(request: PlanRequest, plan: TrainingPlan) -> list[str]:
    """The plan in words, one fact a line, with what it rests on."""
    counts = plan.counts
    each = ", ".join(f"{name} {value / GIB:,.0f} GiB" for name, value in plan.activations.items())
    return [
        f"{request.preset} on {request.gpus} x {request.gpu}, {request.shard_size} to a copy, recompute "
        f"{request.recompute}, {request.mfu:.0%} of the peak assumed",
        f"parameters: video {plan.parameters['video'] / 1e9:.3f} B, action {plan.parameters['action'] / 1e6:.0f} M",
        f"sequence: {counts.tokens:,} tokens in {counts.documents} episodes ({counts.video:,} video, {counts.side:,} "
        f"action), {counts.pairs / counts.tokens:,.0f} visible keys per token",
        f"state per device: {plan.state / GIB:.1f} GiB (float32 parameters, gradients, moments, average)",
        f"activations per device, by recompute: {each}",
        _memory_line(request, plan),
        f"step: {plan.flops / 1e15:.1f} PFLOP per device, {plan.step_s:.1f} s, "
        f"{counts.tokens * request.gpus / plan.step_s:,.0f} tokens/s over all",
        f"run: {request.total_tokens / 1e9:,.0f} G tokens, {plan.steps:,.0f} steps, {plan.days:.1f} days",
        f"data: {plan.latents_bytes / 1e12:.2f} TB of float16 latents, {plan.encode_gpu_hours:,.0f} GPU hours to "
        f"encode, {plan.decode_core_hours:,.0f} core hours to decode",
    ]


def _memory_line(request: PlanRequest, plan: TrainingPlan) -> str:
    """Whether a step fits a device; if not, whether it would with its layers' inputs on the host."""
    device = DEVICES[request.gpu]
    needed = {name: plan.state + activations for name, activations in plan.activations.items()}
    fits = {name: memory < FITTING_SHARE * device.memory for name, memory in needed.items()}
    line = f"memory: {needed[request.recompute] / GIB:.0f} of {device.memory / GIB:.0f} GiB"
    host = f"{plan.offloaded / GIB:.0f} GiB of the host's per device"
    if request.recompute == "offload":
        line += f" and {host}"
    if fits[request.recompute]:
        return f"{line}, fits"
    if fits["offload"]:
        return f"{line}, does not fit; with recompute offload {needed['offload'] / GIB:.0f} GiB and {host} would"
    return f"{line}, does not fit; take fewer tokens or more devices per copy"


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `repwam plan`."""
    default = PlanRequest()
    parser.add_argument("--preset", choices=["tiny", "1.3b", "5b"], default=default.preset, help="model size")
    parser.add_argument(
        "--gpus", type=whole_number(1, 10**6), default=default.gpus, help="devices (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=tokens_of, default="160k", help="of a packed sequence, such as 160k")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default=default.gpu, help="device (default: %(default)s)")
    parser.add_argument("--total-tokens", type=tokens_of, default="100g", help="of the run (100g)")
    parser.add_argument(
        "--mfu", type=number(0, 1, above=True), default=default.mfu, help="assumed share of the peak (%(default)s)"
    )
    parser.add_argument(
        "--shard-size", type=whole_number(1, 10**6), default=default.shard_size, help="devices per copy (%(default)s)"
    )
    parser.add_argument("--recompute", choices=get_args(Recompute), default=default.recompute)
    parser.add_argument(
        "--grid", type=whole_number(1, 4096), nargs=3, default=default.grid, metavar=("VIEWS", "H", "W")
    )
    parser.add_argument(
        "--transitions", type=whole_number(1, 100_000), default=default.transitions, help="of an episode (%(default)s)"
    )
    parser.add_argument(
        "--chunk", type=whole_number(1, 1024), default=default.chunk, help="latent frames (%(default)s)"
    )
    parser.add_argument(
        "--vectors", type=whole_number(1, 10_000), default=default.vectors, help="actions per transition (%(default)s)"
    )
    parser.add_argument(
        "--passes", type=number(0, 10**6, above=True), default=default.passes, help="through the data (%(default)s)"
    )


def run_plan(options: argparse.Namespace) -> None:
    """Print a plan."""
    names = PlanRequest.__dataclass_fields__
    values = {name: getattr(options, name) for name in names}
    request = PlanRequest(**{**values, "grid": tuple(options.grid)})
    print("\n".join(plan_lines(request, make_plan(request))))
