"""What does a training step of the quickstart's world action model cost on a CPU, here and in another checkout?

The quickstart's shapes: width 128, depth 4, 8 segments of 6 transitions, 16 tokens a latent frame, chunks of one frame,
window 1; loss, backward, gradient clip, AdamW and the average of the weights. Random data. Each checkout runs in a
process of its own; they take turns, so that other load on the machine falls on all alike. Losses are printed too: they
must agree.

    uv run python benchmarks/wam_step.py [--against OTHER_CHECKOUT] [--look-ahead 1 3] [--threads 1] [--rounds 5]
        [--steps 4]

`--look-ahead` measures this checkout with so many look-ahead layers, too (docs/decisions/081).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def step_forever(threads: int, look_ahead: int) -> None:
    """Answer each line N on standard input with N steps: their process and wall seconds, the last loss, and memory."""
    import torch
    from repvitok.runtime.training import ExponentialMovingAverage, build_optimizer
    from repwam_core.data.batches import SegmentBatch
    from repwam_core.model.config import ActionSpace, WAMConfig
    from repwam_core.model.wam import WorldActionModel
    from repwam_core.training.losses import LossSettings, wam_loss

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    b, transitions, tokens = 8, 6, 16
    space = ActionSpace(channels=4, vectors_per_transition=4, state_channels=4)
    config = WAMConfig.preset("tiny", window=1, action_history=False, state_token=True, spaces={"robot": space})
    wam = WorldActionModel(config).train()
    if look_ahead:
        wam.set_look_ahead(look_ahead)
    batch = SegmentBatch(
        latents=torch.randn(b, transitions + 1, tokens, 96),
        actions=torch.randn(b, transitions, 4, 4),
        state=torch.randn(b, transitions + 1, 4),
        text=torch.randn(b, 12, 384),
        text_mask=torch.rand(b, 12) < 0.8,
        valid=torch.ones(b, transitions, dtype=torch.bool),
        channel_mask=torch.ones(b, 4, dtype=torch.bool),
        episode=torch.zeros(b, dtype=torch.long),
        start=torch.zeros(b, dtype=torch.long),
    )
    optimizer, average = build_optimizer(wam, "adamw", lr=1e-3), ExponentialMovingAverage(wam, 0.99)
    generator, settings = torch.Generator().manual_seed(1), LossSettings(video_shift=1.0, video_noise_prob=0.3)
    for line in sys.stdin:
        spent, loss = [], torch.zeros(())
        for _ in range(int(line)):
            before = time.process_time(), time.perf_counter()
            loss = wam_loss(
                wam, batch, space="robot", chunk_sizes=(1,) * transitions, grid=(1, 4, 4), settings=settings,
                generator=generator,
            ).total  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(wam.parameters(), 2.0)
            optimizer.step()
            average.update(wam)
            spent.append((time.process_time() - before[0], time.perf_counter() - before[1]))
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"spent_s": spent, "loss": loss.item(), "most_mib": most}), flush=True)


class Worker:
    """A process that steps on demand with the packages of one checkout."""

    def __init__(self, checkout: Path, threads: int, look_ahead: int = 0) -> None:
        names = ("repvitok", "latent-action", "repwam-client", "repwam-core")
        sources = [str(checkout / "packages" / name / "src") for name in names]
        command = [sys.executable, __file__, "--worker", "--threads", str(threads), "--look-ahead", str(look_ahead)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources)}
        self.name = ("this" if checkout == HERE else "the other") + (f", {look_ahead} ahead" if look_ahead else "")
        self.spent_s, self.loss, self.most_mib = [], float("nan"), 0.0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.step(3)
        self.spent_s = []

    def step(self, count: int) -> None:
        """Take some steps and remember what they cost."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        self.spent_s += told["spent_s"]
        self.loss, self.most_mib = told["loss"], told["most_mib"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--look-ahead", type=int, nargs="*", default=[], help="numbers of look-ahead layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round and checkout")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        step_forever(options.threads, *options.look_ahead)
        return
    workers = [Worker(path, options.threads) for path in (HERE, options.against) if path is not None]
    workers += [Worker(HERE, options.threads, layers) for layers in options.look_ahead]
    for _ in range(options.rounds):
        for worker in workers:
            worker.step(options.steps)
    print("| checkout | process ms, least | median | wall ms, least | median | most memory, MiB | loss |")
    print("|---|---|---|---|---|---|---|")
    for worker in workers:
        process, wall = ([1e3 * pair[kind] for pair in worker.spent_s] for kind in (0, 1))
        numbers = [min(process), statistics.median(process), min(wall), statistics.median(wall)]
        cells = [worker.name, *(f"{number:.0f}" for number in [*numbers, worker.most_mib]), f"{worker.loss:.6f}"]
        print("| " + " | ".join(cells) + " |")
        worker.close()


if __name__ == "__main__":
    main()
