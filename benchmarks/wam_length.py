"""What a training step of the tiny model costs on a CPU against the sequence's length, blocked and dense attention.

    python benchmarks/wam_length.py [--tokens 1000 2000 ...] [--dense-up-to 4000] [--repeats 3]

One packed sequence of equal episodes, forward and backward, no optimizer; process time, the median of repetitions taken
in turn. Also how long the masks of a 200 K sequence take to make, the least of three times.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from repwam_core.estimate import DocumentCosts
from repwam_core.model.attention import block_plan, flex_block_mask, make_attention
from repwam_core.model.config import ActionSpace, WAMConfig
from repwam_core.model.sequence import TokenLayout, WAMInputs, concat, training_layout
from repwam_core.model.wam import WorldActionModel

GRID, VECTORS, CHUNK = (1, 4, 4), 4, 2
SPACE = ActionSpace(channels=4, vectors_per_transition=VECTORS)


def sequence(tokens: int, transitions: int) -> TokenLayout:
    """Equal episodes of at most `transitions` transitions that hold about `tokens` tokens."""
    per_transition = 2 * (GRID[1] * GRID[2] + VECTORS)
    transitions = min(transitions, tokens // per_transition) // CHUNK * CHUNK
    episode = training_layout(transitions + 1, (CHUNK,) * (transitions // CHUNK), GRID, VECTORS)
    return concat([episode] * max(1, round(tokens / len(episode))))


def random_inputs(config: WAMConfig, layout: TokenLayout) -> WAMInputs:
    """Tensors of the right shapes."""
    documents = layout.documents
    return WAMInputs(
        layout=layout,
        video=torch.randn(1, len(layout.video), config.latent_dim),
        actions=torch.randn(1, len(layout.actions), SPACE.channels),
        states=None,
        times=torch.rand(1, len(layout.levels)),
        text=torch.randn(1, documents, 8, config.text_dim),
        text_mask=torch.ones(1, documents, 8, dtype=torch.bool),
        space="robot",
    )


def step_s(wam: WorldActionModel, inputs: WAMInputs, backend: str) -> float:
    """Process seconds of one forward and backward pass, the attention's plan included."""
    wam.zero_grad()
    start_s = time.process_time()
    velocities = wam(inputs, make_attention(inputs.layout, wam.config.coupling, wam.config.window, backend))
    (velocities.video.square().mean() + velocities.actions.square().mean()).backward()
    return time.process_time() - start_s


def process_s(make: Callable[..., object], layout: TokenLayout) -> float:
    """Process seconds of making a plan or a mask."""
    start_s = time.process_time()
    make(layout, "joint", 32)
    return time.process_time() - start_s


def mask_times() -> None:
    """Process seconds of the masks of 200 K tokens."""
    print("\n| 200 K tokens | tokens | plan, s | FlexAttention's mask, s |\n|---|---|---|---|")
    for name, episode, copies in (
        ("20 episodes of 20 frames, 256 tokens each", training_layout(20, (2,) * 9 + (1,), (1, 16, 16), 4), 20),
        ("1 episode of 385 frames, 256 tokens each", training_layout(385, (4,) * 96, (1, 16, 16), 4), 1),
        ("1 episode of 5,001 frames, 16 tokens each", training_layout(5001, (4,) * 1250, (1, 4, 4), 4), 1),
        ("250 episodes of 21 frames, 16 tokens each", training_layout(21, (2,) * 10, (1, 4, 4), 4), 250),
    ):
        layout, spent = concat([episode] * copies).streams, []
        for make in (block_plan, flex_block_mask):
            spent.append(min(process_s(make, layout) for _ in range(3)))
        print(f"| {name} | {len(layout):,} | {spent[0]:.2f} | {spent[1]:.2f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 2000, 4000, 8000, 16000, 32000])
    parser.add_argument("--transitions", type=int, default=400, help="of an episode, at most")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--dense-up-to", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = WAMConfig.preset("tiny", window=options.window, spaces={"robot": SPACE})
    wam = WorldActionModel(config)
    print("| tokens | episodes | blocked, s | dense, s | ratio | blocked, us per token | GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        layout = sequence(tokens, options.transitions)
        inputs, backends = random_inputs(config, layout), ["blocked"]
        if tokens <= options.dense_up_to:
            backends.append("dense")
        spent = {name: [] for name in backends}
        for _ in range(options.repeats + 1):
            for name in backends:
                spent[name].append(step_s(wam, inputs, name))
        median = {name: statistics.median(values[1:]) for name, values in spent.items()}  # the first one warms up
        blocked, dense = median["blocked"], median.get("dense")
        chunks = (CHUNK,) * (int(layout.frame.max()) // CHUNK)
        costs = DocumentCosts(config, "robot", GRID[1] * GRID[2], VECTORS, text=8)
        rate = layout.documents * costs.of(chunks).training_flops / blocked / 1e9
        compared = f"{dense:.2f} | {dense / blocked:.1f}" if dense else "not run | "
        row = (f"{len(layout):,}", layout.documents, f"{blocked:.2f}", compared)
        print(f"| {' | '.join(map(str, row))} | {1e6 * blocked / len(layout):.0f} | {rate:.0f} |", flush=True)
    mask_times()


if __name__ == "__main__":
    main()
