"""What does the cache of a rollout save against computing the history again in every Euler step?

One chunk of two latent frames is planned after a full window of history, at the quickstart's width and depth:

- recomputed: each of the passes holds the whole history and the noisy chunk
- cached: the history's keys and values are in the ring; observing two new frames is counted in
- cached, sequential: video steps and action steps apart, so that ten action steps carry action tokens only

Prints process seconds (the best of some repetitions, taken in turn) and checks that both give the same velocities.

    uv run python benchmarks/rollout_cache.py [--windows 6 30] [--tokens 16] [--batch 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.rollout import Rollout
from repwam_core.model.sequence import TokenLayout, WAMInputs, training_layout
from repwam_core.model.wam import WorldActionModel
from torch import Tensor

CHUNK, VECTORS, CHANNELS = 2, 4, 4
VIDEO_STEPS, ACTION_STEPS = 5, 10


class Episode:
    """A model and an episode whose history fills the window."""

    def __init__(self, window: int, coupling: str, tokens: int, batch: int) -> None:
        space = ActionSpace(channels=CHANNELS, vectors_per_transition=VECTORS)
        config = WAMConfig.preset("tiny", window=window, coupling=coupling, spaces={"robot": space})
        generator = torch.Generator().manual_seed(0)
        self.wam = WorldActionModel(config).eval()
        with torch.no_grad():
            for parameter in self.wam.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.frames, self.grid = window + 1, (1, 1, tokens)  # frame 0, then a whole number of chunks

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator)

        self.latents, self.actions = draw(self.frames, tokens, 96), draw(self.frames - 1, VECTORS, CHANNELS)
        self.video, self.action = draw(CHUNK, tokens, 96), draw(CHUNK, VECTORS, CHANNELS)
        self.text, self.mask = draw(12, 384), torch.ones(batch, 12, dtype=torch.bool)

    def observed(self) -> Rollout:
        """A rollout that has seen all but the last chunk of the history."""
        rollout = Rollout(
            self.wam, space="robot", grid=self.grid, text=self.text, text_mask=self.mask, chunk_frames=CHUNK
        )
        rollout.observe(self.latents[:, :1])
        for first in range(1, self.frames - CHUNK, CHUNK):
            self.observe(rollout, first)
        return rollout

    def observe(self, rollout: Rollout, first: int) -> None:
        """Show the rollout the chunk that begins at frame `first`."""
        last = first + CHUNK
        rollout.observe(self.latents[:, first:last], None, self.actions[:, first - 1 : last - 1])

    def plan(self, rollout: Rollout) -> None:
        """Refine one chunk."""
        rollout.plan(
            video_steps=VIDEO_STEPS, action_steps=ACTION_STEPS, video_noise=self.video, action_noise=self.action
        )

    def recompute(self, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Velocities of the noisy chunk at noise time 0 from one pass over history and chunk."""
        times = torch.ones(len(self.text), len(layout.levels))
        times[:, layout.levels.noisy] = 0.0
        output = self.wam(
            WAMInputs(
                layout=layout,
                video=torch.cat([self.latents, self.video], dim=1).flatten(1, 2),
                actions=torch.cat([self.actions, self.action], dim=1).flatten(1, 2),
                states=None,
                times=times,
                text=self.text[:, None],
                text_mask=self.mask[:, None],
                space="robot",
            )
        )
        return output.video, output.actions

    def layout(self) -> TokenLayout:
        """All of the history clean, and the next chunk noisy."""
        chunks = (CHUNK,) * (self.frames // CHUNK + 1)
        whole = training_layout(self.frames + CHUNK, chunks, self.grid, VECTORS)
        last = whole.chunk == len(chunks)
        return whole.take((whole.noisy == last).nonzero()[:, 0])


def best_s(run: Callable[[], object], repetitions: int) -> float:
    """The least process time of some runs, after one that is not counted."""
    run()
    spent = []
    for _ in range(repetitions):
        started = time.process_time()
        run()
        spent.append(time.process_time() - started)
    return min(spent)


@torch.no_grad()
def measure(window: int, tokens: int, batch: int, repetitions: int) -> None:
    """Print one row per way of planning."""
    joint, sequential = (Episode(window, coupling, tokens, batch) for coupling in ("joint", "sequential"))
    layout = joint.layout()
    rollout = joint.observed()
    joint.observe(rollout, joint.frames - CHUNK)
    cached = rollout.velocities(joint.video, joint.action)
    for ours, expected in zip(cached, joint.recompute(layout), strict=True):
        torch.testing.assert_close(ours.flatten(1, 2), expected, atol=1e-4, rtol=1e-3)

    def step(episode: Episode) -> Callable[[], None]:
        before = episode.observed()

        def run() -> None:
            episode.observe(before, episode.frames - CHUNK)
            episode.plan(before)

        return run

    passes = max(VIDEO_STEPS, ACTION_STEPS)
    recomputed = passes * best_s(lambda: joint.recompute(layout), repetitions)
    print(f"| {window} | recomputed, joint | {1e3 * recomputed:.0f} | 1.0 |")
    for name, episode in (("cached, joint", joint), ("cached, sequential", sequential)):
        spent = best_s(step(episode), repetitions)
        print(f"| {window} | {name} | {1e3 * spent:.0f} | {recomputed / spent:.1f} |", flush=True)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, nargs="+", default=[6, 30])
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a latent frame")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| window, latent frames | chunk planned | process ms | times faster |\n|---|---|---|---|")
    for window in options.windows:
        measure(window, options.tokens, options.batch, options.repetitions)


if __name__ == "__main__":
    main()
