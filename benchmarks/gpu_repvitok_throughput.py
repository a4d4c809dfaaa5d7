"""How fast does RepViTok train and encode on one GPU: clips per second, memory, share of the peak it reaches (MFU)?

    uv run python benchmarks/gpu_repvitok_throughput.py --out benchmarks/results/repvitok_throughput_GPU_YYYYMM.md

One row per setting, 17x256x256 clips, the paper's size, random weights and clips. A training step is encode, decode,
L1, backward, gradient clip and AdamW (fused) under bf16 autocast, without teacher, LPIPS and adversary, whose cost
depends on which are chosen. Operations are counted by `repvitok.model`: three times the forward pass for a step, the
recomputed one left out, so that recomputing lowers MFU. --peak-tflops is the GPU's dense bf16 peak: 989 for H100 and
H200, 312 for A100, 148 for H20. On a machine without a GPU: --device cpu --tiny --steps 1, to see that it runs, all but
FlexAttention's backward pass, which a CPU does not have.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from repvitok import RepViTok, RepViTokConfig
from repvitok.model import decode_flops, encode_flops

FRAMES, SIDE = 17, 256
TINY = {"width": 48, "depth": 1, "heads": 4}


def main() -> None:
    """Measure every setting and write the table; one that the device cannot do is a row that says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file (default: print only)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model and clips that a CPU takes")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--kernels", nargs="+", choices=["frames", "flex"], default=["frames", "flex"])
    parser.add_argument("--compile", type=int, nargs="+", choices=[0, 1], default=[0, 1])
    parser.add_argument("--checkpointing", type=int, nargs="+", choices=[0, 1], default=[0, 1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows = [
        "| what | batch | attention | compiled | recomputed | clips/s | ms | memory, GB | MFU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for batch, kernel, compiled in itertools.product(options.batch_sizes, options.kernels, options.compile):
        for again in options.checkpointing:
            rows.append(_row(options, "train", batch, kernel, bool(compiled), bool(again)))
            print(rows[-1], flush=True)
        rows.append(_row(options, "encode", batch, kernel, bool(compiled), False))
        print(rows[-1], flush=True)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    text = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m')}\n\n" + "\n".join(rows) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


def _row(options: argparse.Namespace, what: str, batch: int, kernel: str, compiled: bool, again: bool) -> str:
    told = f"| {what} | {batch} | {kernel} | {'yes' if compiled else 'no'} | {'yes' if again else 'no'} |"
    side, frames = (64, 5) if options.tiny else (SIDE, FRAMES)
    config = RepViTokConfig(**TINY) if options.tiny else RepViTokConfig()
    torch.manual_seed(0)
    torch.compiler.reset()
    try:
        tok = RepViTok(config).to(options.device)
        tok.attention_kernel, tok.gradient_checkpointing = kernel, again
        video = torch.rand(batch, 3, frames, side, side, device=options.device) * 2 - 1
        step = (_training if what == "train" else _encoding)(tok, video, compiled)
        seconds, memory_gb = _measure(step, options.steps, options.device)
    except torch.cuda.OutOfMemoryError:
        return f"{told} out of memory | | | |"
    except NotImplementedError:
        return f"{told} not on this device | | | |"
    shape = (config, frames, (side, side))
    once = encode_flops(*shape) + (decode_flops(*shape) if what == "train" else 0)
    mfu = batch * once * (3 if what == "train" else 1) / seconds / (options.peak_tflops * 1e12)
    return f"{told} {batch / seconds:.1f} | {1e3 * seconds:.1f} | {memory_gb:.1f} | {mfu:.1%} |"


def _training(tok: RepViTok, video: torch.Tensor, compiled: bool) -> Callable[[], object]:
    """A whole training step of the plain reconstruction."""
    optimizer = torch.optim.AdamW(tok.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(tok) if compiled else tok

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(video):
            video_hat, _ = forward(video)
            loss = (video_hat - video).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tok.parameters(), 2.0)
        optimizer.step()

    return step


def _encoding(tok: RepViTok, video: torch.Tensor, compiled: bool) -> Callable[[], object]:
    tok.eval()
    encode = torch.compile(tok.encode) if compiled else tok.encode

    def step() -> object:
        with torch.no_grad(), _autocast(video):
            return encode(video)

    return step


def _autocast(video: torch.Tensor) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if video.is_cuda else nullcontext()


def _measure(step: Callable[[], object], steps: int, device: str) -> tuple[float, float]:
    """Median seconds of a step after three to warm up, and the most memory allocated, in GB."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(steps + 3):
        begun = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begun)
    return statistics.median(times), torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0


if __name__ == "__main__":
    main()
