"""Success against delay: a policy in closed loop while planning takes 0, 1, 2 or 4 control steps.

    uv run python benchmarks/delayed_execution.py --policy policy --tasks reach push --out delays \
        [--suite metaworld] [--settings JSON] [--episodes 50] [--delays 0 1 2 4] [--device cuda]

The simulator is held to the delay: between what a policy saw and the first action that follows from it so many control
steps pass, in which the robot holds still ("wait"), or carries out the chunk before, and then the new one as it was
planned ("naive"), averaged with the one before ("ensemble"), or planned to follow what was committed ("regrounded",
docs/decisions/070). Every execution replans after the same number of actions and is driven on the same unseen seeds.
Prints a table; each cell's episodes are in a folder of their own below --out, and a run that was cut off goes on. A
cell is a dash where a chunk is too short for its delay: one chunk is planned at a time, and the robot moves on what is
left of the last one. So a policy needs chunks of two latent frames to move while it plans (--model.chunk_sizes).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from repwam_core.policy.execution import EXECUTIONS
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.sim.base import evaluation_seeds, find_suite
from repwam_core.sim.evaluate import evaluate
from repwam_core.sim.results import SuccessRate


def main(argv: Sequence[str] | None = None) -> None:
    """Drive every execution at every delay and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--suite", default="metaworld")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="settings of the suite, as of its demonstrations"
    )
    parser.add_argument("--episodes", type=int, default=50, help="per task")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 4], help="control steps")
    parser.add_argument("--executions", nargs="+", choices=EXECUTIONS, default=list(EXECUTIONS))
    parser.add_argument(
        "--execute", type=int, help="actions between two requests (default: half a chunk, in whole latent frames)"
    )
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    settings = find_suite(options.suite).from_dict(options.settings, complete=False)
    policy = BatchedPolicy.from_pretrained(options.policy, options.device, execute_frames=None)
    rate_hz = settings.embodiment.rate_hz
    chunk = policy.plan.chunk_frames * policy.frames_per_latent
    execute = options.execute or policy.frames_per_latent * max(1, policy.plan.chunk_frames // 2)
    print("| execution | " + " | ".join(f"{n} steps ({1e3 * n / rate_hz:.0f} ms)" for n in options.delays) + " |")
    print("|---" * (len(options.delays) + 1) + "|")
    for execution in options.executions:
        cells = []
        for delay in options.delays:
            if delay > (execute if execution == "wait" else min(execute, chunk - execute)):
                cells.append("-")
                continue
            results = evaluate(
                policy,
                options.tasks,
                evaluation_seeds(options.episodes),
                settings=settings,
                execute=execute,
                execution=execution,
                delay=delay,
                workers=options.workers,
                out=options.out / f"{execution}-{delay}",
                about={"policy": str(options.policy), "digests": policy.parts.manifest.digests},
            )
            rate = SuccessRate.of(results)
            low, high = rate.interval
            cells.append(f"{rate.successes}/{rate.episodes} ({low:.2f} to {high:.2f})")
        print(f"| {execution} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
