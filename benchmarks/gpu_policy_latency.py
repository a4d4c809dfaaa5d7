"""How long does a robot wait for a chunk? The 1.3 B model in bf16, random weights, one and three cameras of 256 x 256.

A step in the steady state: two observed latent frames and the executed actions go into the full ring (window 32), then
a chunk of two latent frames is planned with 5 video and 10 action steps. Pixels to latents is not in it. Measured for
`joint`, `joint` without imagined video (action-only) and `sequential`, each eager, compiled, and compiled with CUDA
graphs. Targets on an H200: 90 ms for `joint` and 50 ms for `sequential`, one camera.

    uv run python benchmarks/gpu_policy_latency.py [--preset 1.3b] [--cameras 1 3] [--modes eager compiled graphs]

`--preset tiny --device cpu --modes eager --grid 2 2 --repetitions 3` runs anywhere, to see that it works.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.rollout import Rollout, Run
from repwam_core.model.wam import WorldActionModel

CHUNK, VECTORS, CHANNELS, TEXT_TOKENS = 2, 4, 14, 24
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "graphs": {"mode": "reduce-overhead"},
}


def build(preset: str, coupling: str, device: torch.device) -> WorldActionModel:
    """A model with random weights, made where it will run."""
    space = ActionSpace(channels=CHANNELS, vectors_per_transition=VECTORS)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        wam = WorldActionModel(WAMConfig.preset(preset, coupling=coupling, spaces={"robot": space}))
    return wam.to(dtype).eval()


def steady(wam: WorldActionModel, grid: tuple[int, int, int], mode: str, batch: int) -> Rollout:
    """A rollout whose ring is full; `grid` is cameras, rows and columns of a latent frame."""
    options = MODES[mode]
    run: Run | None = None
    if options is not None:
        torch.compiler.reset()
        run = torch.compile(wam.run, fullgraph=True, dynamic=False, **options)
    weight = wam.video_in.weight
    text = torch.randn(batch, TEXT_TOKENS, wam.config.text_dim, device=weight.device, dtype=weight.dtype)
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=weight.device)
    rollout = Rollout(
        wam, space="robot", grid=grid, text=text, text_mask=mask, chunk_frames=CHUNK,
        static_shapes=True, run=run,
    )  # fmt: skip
    if mode == "graphs":
        for keys, values in rollout.cache.layers:  # written in place: a graph may do so only at a fixed address
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)
    observe(rollout, 1)
    while rollout.frame <= wam.config.window + CHUNK:
        observe(rollout, CHUNK)
    return rollout


def observe(rollout: Rollout, frames: int) -> None:
    """Show the rollout random frames and actions."""
    weight = rollout.wam.video_in.weight
    kind = {"device": weight.device, "dtype": weight.dtype}
    latents = torch.randn(rollout.batch, frames, rollout.cache.tokens, rollout.wam.config.latent_dim, **kind)
    rollout.observe(latents, None, torch.randn(rollout.batch, frames, VECTORS, CHANNELS, **kind))


def latencies_ms(rollout: Rollout, video: str, warmup: int, repetitions: int) -> list[float]:
    """Wall time of observing and planning, to the last kernel."""
    spent = []
    for number in range(warmup + repetitions):
        synchronise(rollout.device)
        started_s = time.perf_counter()
        observe(rollout, CHUNK)
        rollout.plan(video=video)
        synchronise(rollout.device)
        if number >= warmup:
            spent.append(1e3 * (time.perf_counter() - started_s))
    return spent


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16], help="rows and columns of a camera's tokens")
    parser.add_argument("--batch", type=int, default=1, help="episodes in step")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{options.preset}, batch {options.batch}, {name}, torch {torch.__version__}\n")
    print(
        "| coupling | video | cameras | run | median ms | 95th percentile ms | peak GB |\n|---|---|---|---|---|---|---|"
    )
    for coupling, videos in (("joint", ("imagine", "skip")), ("sequential", ("imagine",))):
        wam = build(options.preset, coupling, device)
        for cameras in options.cameras:
            for mode in options.modes:
                rollout = steady(wam, (cameras, *options.grid), mode, options.batch)
                for video in videos:
                    spent = sorted(latencies_ms(rollout, video, options.warmup, options.repetitions))
                    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
                    median, high = statistics.median(spent), spent[math.ceil(0.95 * len(spent)) - 1]
                    cells = (coupling, video, cameras, mode, f"{median:.1f}", f"{high:.1f}", f"{peak:.1f}")
                    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
