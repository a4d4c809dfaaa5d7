"""How much of a packed sequence holds no token, on the lengths of Meta-World's expert episodes.

    python benchmarks/packing_waste.py [--episodes 3] [--lengths FILE.json]

Runs the scripted expert of every task without drawing anything, and packs latent frames of 8 environment steps. With
--lengths the environment steps of each episode are read from a JSON list instead, or written there if it is not yet.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from repwam_core.data.packing import PackingSettings, SequencePacker, Source, TokenCost

STEPS_PER_LATENT = 8


def expert_lengths(episodes: int) -> list[int]:
    """Environment steps to success of each task's expert, at most 200."""
    import metaworld
    from metaworld.policies import ENV_POLICY_MAP

    lengths = []
    for task in sorted(ENV_POLICY_MAP):
        benchmark = metaworld.MT1(task, seed=0)
        env, policy = benchmark.train_classes[task](), ENV_POLICY_MAP[task]()
        for number in range(episodes):
            env.set_task(benchmark.train_tasks[number])
            observation, _ = env.reset()
            steps = 0
            for _ in range(200):
                action = np.clip(policy.get_action(observation), -1, 1)
                observation, _, _, _, info = env.step(action)
                steps += 1
                if info["success"]:
                    break
            lengths.append(steps)
        env.close()
    return lengths


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=3, help="per task")
    parser.add_argument("--lengths", type=Path, help="JSON file of environment steps")
    options = parser.parse_args()
    if options.lengths and options.lengths.exists():
        steps = json.loads(options.lengths.read_text())
    else:
        steps = expert_lengths(options.episodes)
        if options.lengths:
            options.lengths.write_text(json.dumps(steps))
    transitions = np.maximum(1, np.array(steps) // STEPS_PER_LATENT)
    print(f"{len(steps)} episodes, {np.min(steps)} to {np.max(steps)} environment steps, median {np.median(steps):.0f}")
    print("| tokens per latent frame | token budget | open sequences | episodes per sequence | waste |")
    print("|---|---|---|---|---|")
    for tokens, budget, opened in itertools.product((16, 64, 256), (8192, 32768, 200_000), (1, 8, 32)):
        cost = TokenCost(video=tokens, vectors=4)
        if cost.of(int(transitions.max())) > budget:
            continue
        settings = PackingSettings(token_budget=budget, open_sequences=opened)
        packer = SequencePacker([Source(np.arange(len(steps)), transitions, cost)], settings)
        packed = list(itertools.islice(packer, 300))
        episodes = np.mean([len(entry.pieces) for entry in packed])
        print(f"| {tokens} | {budget:,} | {opened} | {episodes:.1f} | {100 * packer.waste:.2f} % |")


if __name__ == "__main__":
    main()
