"""What a transition costs: parameters, process time and peak memory of the LAT at 64, 256 and 1,024 tokens.

    python benchmarks/latent_action_cost.py [--batch 16] [--repeat 5]

The paper's sizes (d 96, hidden 256, four layers, d_l 4). Times are process seconds of one thread, the smallest of
--repeat turns, divided by the batch. Memory is how much the peak resident size of a forked process grows over one call,
divided by the batch. "matrix" forms K_t (`lat.transition`) and multiplies; "decode" never does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

import torch
from latent_action.config import LatentActionConfig
from latent_action.model import LatentActionTokenizer, transition_losses


def calls(lat: LatentActionTokenizer, tokens: int, batch: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    z = torch.randn(batch, 2, tokens, lat.config.latent_dim)
    action = torch.randn(batch, lat.config.action_dim)

    def matrix() -> object:
        transport, residual = lat.transition(z[:, 0], action)
        return transport @ z[:, 0] + residual

    def train() -> None:
        losses = transition_losses(lat, z[:, 0], z[:, 1])
        (losses.forward + losses.consistency).backward()

    return {
        "encode": torch.no_grad()(lambda: lat.encode(z)),
        "decode": torch.no_grad()(lambda: lat.decode(z[:, 0], action)),
        "matrix": torch.no_grad()(matrix),
        "train": train,
    }


def seconds(call: Callable[[], object], repeat: int) -> float:
    """The fastest of `repeat` turns, after one that does not count."""
    call()
    times = []
    for _ in range(repeat):
        start_s = time.process_time()
        call()
        times.append(time.process_time() - start_s)
    return min(times)


def grown_bytes(call: Callable[[], object]) -> int:
    """Growth of the peak resident size over one call, in a forked process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        # The peak counts from the fork on: touch it once before, so that only the call's own growth is seen.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        theirs.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    process = context.Process(target=work)
    process.start()
    grown = ours.recv()
    process.join()
    return grown


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lat = LatentActionTokenizer(LatentActionConfig(antisymmetric=True))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in lat.named_children()}
    print(f"parameters: {sum(counts.values()):,} {counts}\n")
    for call in calls(lat, 16, 1).values():
        call()  # libraries load their kernels on first use: not to be counted below
    work = {(n, name): call for n in (64, 256, 1024) for name, call in calls(lat, n, options.batch).items()}
    # Before anything is timed: memory that a larger call has freed would hide what a later one needs.
    memory = {key: grown_bytes(call) / options.batch / 1e6 for key, call in work.items()}
    print("| tokens | call | ms a transition | MB a transition |")
    print("|---|---|---|---|")
    for (tokens, name), call in work.items():
        milliseconds = 1e3 * seconds(call, options.repeat) / options.batch
        print(f"| {tokens} | {name} | {milliseconds:.2f} | {memory[tokens, name]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
