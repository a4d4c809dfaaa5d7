"""Tokens per second, share of peak and memory of training steps on one GPU, at the paper's sizes and sequence lengths.

    python benchmarks/gpu_wam_train.py [--preset 1.3b] [--tokens 64000 200000] [--recompute full] [--compile]

One packed sequence of synthetic episodes per step: forward, backward, gradient clip and Muon with AdamW, bf16 autocast
over float32 weights, FlexAttention. The target is 45 % of the peak with recomputation counted once. `--device cpu
--preset tiny --grid 1 4 4 --tokens 2000 --newton-schulz float32` runs anywhere, to see that the script works.
"""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import time
from typing import get_args

import torch
from repvitok.optim import build_optimizer
from repwam_core.estimate import DocumentCosts, SequenceCost, activation_bytes, meta_model, peak_flops, state_bytes
from repwam_core.model.attention import make_attention
from repwam_core.model.config import ActionSpace, Recompute, WAMConfig
from repwam_core.model.sequence import TokenLayout, WAMInputs, concat, training_layout
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.parallel import ScaleSettings, prepare_layers

VECTORS = 4
LENGTHS = (96, 48, 24, 12, 6)
"""Transitions of an episode."""
SPACE = ActionSpace(channels=16, vectors_per_transition=VECTORS)


def sequence(config: WAMConfig, tokens: int, grid: tuple[int, int, int]) -> tuple[TokenLayout, SequenceCost]:
    """Episodes of 96, 48 and 24 transitions in turn, shorter ones where these do not fit, in chunks of two."""
    layouts, cost, left = [], SequenceCost(), tokens
    costs = DocumentCosts(config, "robot", math.prod(grid), VECTORS)
    for number in itertools.count():
        fitting = [layout for size in LENGTHS if len(layout := _episode(size, grid)) <= left]
        if not fitting:
            break
        layouts.append(fitting[number % 3] if len(fitting) == len(LENGTHS) else fitting[0])
        left -= len(layouts[-1])
        chunks = (2,) * (int(layouts[-1].frame.max()) // 2)
        cost += costs.of(chunks)
    if not layouts:
        raise SystemExit(f"no episode fits {tokens} tokens; choose a smaller --grid or more --tokens")
    return concat(layouts), cost


def _episode(transitions: int, grid: tuple[int, int, int]) -> TokenLayout:
    return training_layout(transitions + 1, (2,) * (transitions // 2), grid, VECTORS)


def inputs_of(config: WAMConfig, layout: TokenLayout, device: str) -> WAMInputs:
    """Random tensors of the right shapes."""
    documents = layout.documents
    return WAMInputs(
        layout=layout,
        video=torch.randn(1, len(layout.video), config.latent_dim, device=device),
        actions=torch.randn(1, len(layout.actions), SPACE.channels, device=device),
        states=None,
        times=torch.rand(1, len(layout.levels), device=device),
        text=torch.randn(1, documents, 16, config.text_dim, device=device),
        text_mask=torch.ones(1, documents, 16, dtype=torch.bool, device=device),
        space="robot",
    )


def measure(options: argparse.Namespace, tokens: int) -> dict[str, object]:
    """Train a few steps on sequences of one length."""
    config = WAMConfig.preset(options.preset, spaces={"robot": SPACE})
    torch.manual_seed(0)
    wam = WorldActionModel(config).to(options.device)
    prepare_layers(wam, ScaleSettings(recompute=options.recompute, compile=options.compile))
    optimizer = build_optimizer(wam, "muon", lr=1e-3, newton_schulz_dtype=options.newton_schulz)
    layout, cost = sequence(config, tokens, tuple(options.grid))
    inputs, cuda = inputs_of(config, layout, options.device), options.device == "cuda"
    planned_s, spent_s = [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps):
        start_s = time.perf_counter()
        attend = make_attention(layout, config.coupling, config.window, "auto", options.device)
        planned_s.append(time.perf_counter() - start_s)
        with torch.autocast(options.device, torch.bfloat16, enabled=cuda):
            velocities = wam(inputs, attend)
        (velocities.video.square().mean() + velocities.actions.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(wam.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        spent_s.append(time.perf_counter() - start_s)
    step_s = statistics.median(spent_s[options.steps // 2 :])  # the first ones compile
    flops = cost.training_flops
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    planned = activation_bytes(config, cost, options.recompute, bf16=cuda) + state_bytes(meta_model(config))
    return {
        "preset": options.preset,
        "tokens": len(layout),
        "documents": layout.documents,
        "recompute": options.recompute,
        "compile": options.compile,
        "first_step_s": round(spent_s[0], 2),
        "step_s": round(step_s, 4),
        "mask_s": round(statistics.median(planned_s), 4),
        "tokens_per_s": round(len(layout) / step_s),
        "mfu": round(flops / step_s / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        "planned_gib": round(planned / 2**30, 1),
    }


def main() -> None:
    """Print one JSON line per length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64_000, 200_000])
    parser.add_argument("--grid", type=int, nargs=3, default=[1, 16, 16])
    parser.add_argument("--recompute", choices=get_args(Recompute), default="full")
    parser.add_argument("--newton-schulz", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for tokens in options.tokens:
        try:
            print(json.dumps(measure(options, tokens)), flush=True)
        except torch.OutOfMemoryError as error:
            print(json.dumps({"tokens": tokens, "failed": str(error).splitlines()[0]}), flush=True)
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
