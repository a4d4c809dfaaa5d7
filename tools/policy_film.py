"""A film for the README: a policy drives unseen scenes, and below each what it imagined before it acted.

    uv run python tools/policy_film.py --policy POLICY --tasks button-press-topdown window-open --out film.webp

Upper row: what the simulator's camera shows while the policy drives. Lower row: what the model imagined of these frames
before their actions were carried out; each chunk is imagined after the frames that were seen up to there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from repvitok.data.transforms import to_frames
from repvitok.runtime.errors import run_cli
from repwam_core.interface import Observation
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.sim.base import evaluation_seeds, find_suite

SCALE, MARGIN = 2, 14
"""Screen pixels of a pixel, and the height of a line of text."""


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Drive each task once and write the film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", required=True, help="policy folder")
    add("--tasks", nargs="+", required=True, help="of Meta-World, side by side")
    add("--seed", type=int, default=0, help="number of the unseen scene (default: 0)")
    add("--act-repeat", type=int, default=2)
    add("--same-scene", nargs="*", default=(), metavar="TASK", help="tasks that share a scene, as in the training")
    add("--execute-frames", type=int, help="latent frames carried out of each chunk (default: as the policy says)")
    add("--every", type=int, default=2, help="frames of the film are every so many steps (default: 2)")
    add("--out", type=Path, required=True, help="file to write: .webp or .gif")
    options = parser.parse_args(argv)
    plan = {} if options.execute_frames is None else {"execute_frames": options.execute_frames}
    policy = BatchedPolicy.from_pretrained(options.policy, video="imagine", **plan)
    suite: Any = find_suite("metaworld")
    same = [options.same_scene] if options.same_scene else []
    settings = suite.from_dict(
        {"size": list(policy.parts.manifest.size), "act_repeat": options.act_repeat, "same_scene": same}, complete=False
    )
    seed = evaluation_seeds(options.seed + 1)[-1]
    films = []
    for name in options.tasks:
        real, imagined, solved = drive(policy, settings, name, seed)
        print(f"{name}, seed {seed}: {'solved' if solved else 'not solved'} after {len(real) - 1} steps")
        films.append((name, real[:: options.every], imagined[:: options.every]))
    milliseconds = round(1000 * options.every / settings.embodiment.rate_hz)
    pictures = [draw(films, step) for step in range(max(len(real) for _, real, _ in films))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    times = [milliseconds] * (len(pictures) - 1) + [1500]
    saving: dict[str, Any] = {"quality": 70, "method": 6} if options.out.suffix == ".webp" else {"optimize": True}
    pictures[0].save(options.out, save_all=True, append_images=pictures[1:], duration=times, loop=0, **saving)
    print(f"{options.out}: {len(pictures)} frames, {options.out.stat().st_size / 1000:.0f} kB")
    return 0


def drive(policy: BatchedPolicy, settings: Any, name: str, seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """One episode: frames seen, (n, H, W, 3), frames imagined of the same moments, and whether it was solved."""
    size = policy.parts.manifest.size
    stream = policy.parts.tokenizer.stream(window=policy.parts.manifest.latents.window)

    def decoded(latents: Any) -> np.ndarray:
        return to_frames(stream.decode(latents.contiguous(), size)[0])

    with settings.make_task(settings.task_name(name), settings.make_renderer()) as task:
        policy.reset([settings.instruction(task.name, seed)], [seed])
        observation = task.reset(seed)
        camera = observation.cameras[0]
        real = [observation.frames(camera)]
        imagined = [real[0]]
        while not task.done:
            chunk = policy.act([observation])[0]
            decoded(policy.observed_latents())
            kept = stream.state
            future = decoded(policy.imagined_latents())
            stream.state = kept
            seen = []
            for action in chunk.actions:
                seen.append(task.step(action))
                if task.done:
                    break
            observation = joined(seen)
            real.append(observation.frames(camera))
            imagined.append(future[: len(seen)])
        return np.concatenate(real), np.concatenate(imagined), task.success


def joined(observations: Sequence[Observation]) -> Observation:
    """Observations of consecutive steps as one."""
    first = observations[0]
    images = {camera: np.concatenate([o.frames(camera) for o in observations]) for camera in first.cameras}
    states = [state for o in observations if (state := o.states()) is not None]
    return Observation(images=images, state=np.concatenate(states) if states else None)


def draw(films: list[tuple[str, np.ndarray, np.ndarray]], step: int) -> Image.Image:
    """One picture: tasks from left to right, seen above imagined; ended ones keep their last frame."""
    height, width = (SCALE * side for side in films[0][1].shape[1:3])
    sheet = Image.new("RGB", (len(films) * (width + 4) - 4, 2 * (height + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, *rows) in enumerate(films):
        for row, (frames, told) in enumerate(zip(rows, (name, "imagined"), strict=True)):
            at = (column * (width + 4), row * (height + MARGIN))
            pen.text(at, told, fill="black")
            picture = Image.fromarray(frames[min(step, len(frames) - 1)])
            sheet.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (at[0], at[1] + MARGIN))
    return sheet


if __name__ == "__main__":
    raise SystemExit(main())
