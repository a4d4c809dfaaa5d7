"""How much of a packed sequence holds no token, on the lengths of a data set's episodes.

    python benchmarks/packing_waste.py --dataset FOLDER [--stride 1]

FOLDER is a LeRobot data set, such as `repwam collect` writes; only its lengths are read. Three sizes of latent frames,
three token budgets, three numbers of open sequences.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from repvitok.data import LeRobotReader
from repwam_core.data.packing import PackingSettings, SequencePacker, Source, TokenCost


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--stride", type=int, default=1)
    options = parser.parse_args()
    reader = LeRobotReader(options.dataset)
    frames = np.array([episode.length for episode in reader.episodes])
    transitions = np.maximum(1, (frames - 1) // (4 * options.stride))
    print(f"{len(frames)} episodes of {frames.min()} to {frames.max()} frames, median {np.median(frames):.0f}")
    print("| tokens per latent frame | token budget | open sequences | episodes per sequence | waste |")
    print("|---|---|---|---|---|")
    for tokens, budget, opened in itertools.product((16, 64, 256), (8192, 32768, 200_000), (1, 8, 32)):
        cost = TokenCost(video=tokens, vectors=4 * options.stride)
        if cost.of(int(transitions.max())) > budget:
            continue
        settings = PackingSettings(token_budget=budget, open_sequences=opened)
        packer = SequencePacker([Source(np.arange(len(frames)), transitions, cost)], settings)
        packed = list(itertools.islice(packer, 300))
        episodes = np.mean([len(entry.pieces) for entry in packed])
        print(f"| {tokens} | {budget:,} | {opened} | {episodes:.1f} | {100 * packer.waste:.2f} % |")


if __name__ == "__main__":
    main()
