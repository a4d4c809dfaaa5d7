"""Makes files.tar.xz, the files that tests/test_files_of_0_1.py reads, with version 0.1.0 of the three packages.

    git worktree add OLD e68f103 && cd OLD && uv sync --locked
    .venv/bin/python make.py files.tar.xz

This script is of 0.1.0 too: the modules and class paths that it names stay as they were then.

The files are made by the commands that a user of 0.1.0 typed, with paths relative to one folder, so that none of them
names the machine. Sizes are the smallest that those commands take. `expected.npz` holds what 0.1.0 computed with them.
They are one archive so that no search and replace over the sources ever touches them.
"""

import contextlib
import importlib
import io
import os
import pkgutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

RUN = {
    "seed_everything": 0,
    "trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1},
}
TOKENIZER = {
    "model": {
        "tokenizer": {
            "patch_size": 2, "width": 12, "depth": 1, "heads": 2, "mlp_ratio": 1.0, "latent_dim": 4, "window": 2,
            "episode_window": 2,
        },
        "weights": {"l1": 1.0, "l2": 1.0, "gradient": 0.5, "perceptual": 0.0, "gan": 0.1, "align": 0.1},
        "teacher": {"class_path": "repvitok.teacher.HOGTeacher"},
        "adversary": {"start_step": 0, "width": 2, "layers": 2, "warmup_steps": 1},
        "optimizer": {"name": "adamw", "lr": 3e-3, "warmup_steps": 1},
        "ema_decay": 0.5,
        "pictures_every_n_validations": 0,
    },
    "data": {
        "folders": ["dataset"], "size": [8, 8], "frames": 9, "batch_size": 1, "held_out": 0.3, "val_clips": 2,
    },
}  # fmt: skip
LAT = {
    "model": {
        "lat": {"latent_dim": 4, "hidden": 8, "layers": 2, "transport_rank": 2, "position_frequencies": 1},
        "optimizer": {"name": "adamw", "lr": 1e-3, "warmup_steps": 1},
        "ema_decay": 0.5,
    },
    "data": {"latents": "latents", "batch_size": 4, "held_out": 0.3, "val_transitions": 4},
}
WAM = {
    "model": {
        "preset": "tiny",
        "chunk_sizes": [1, 2],
        "optimizer": {"name": "muon", "lr": 1e-2, "warmup_steps": 1, "newton_schulz_dtype": "float32"},
        "plan": {"chunk_frames": 2, "execute_frames": 1, "video_steps": 2, "action_steps": 3},
        "ema_decay": 0.5,
    },
    "data": {"latents": "labelled", "transitions": 2, "batch_size": 2, "held_out": 0.3, "val_segments": 2},
}  # fmt: skip
WAM_SIZE = {
    "width": 8, "depth": 1, "heads": 1, "ffn": 8, "action_width": 8, "action_ffn": 8, "window": 2, "state_token": True,
}  # fmt: skip
TASKS = ("go left", "go up")
CAMERA = "observation.images.top"


def main(archive: Path) -> None:
    archive = archive.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make()
        files = sorted(path for path in Path().rglob("*") if path.is_file() or path.is_symlink())
        machine = folder.encode(), os.fsencode(Path.home())
        told = [path for path in files if path.is_file() and any(name in path.read_bytes() for name in machine)]
        if told:
            raise SystemExit(f"files that name this machine: {told}")
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for path in files:
                tar.add(path, filter=_anonymous)
        os.chdir(archive.parent)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def make() -> None:
    if not (Path(sys.prefix).parent / "packages/repvitok/src/repvitok/types.py").exists():
        raise SystemExit("make.py makes files of 0.1.0: run it with the environment of commit e68f103")
    from latent_action.cli import main as latent_action
    from repvitok.cli import main as repvitok
    from repwam_core.cli import main as repwam

    write_dataset(Path("dataset"), "v2.1", episodes=4)
    write_dataset(Path("dataset_v3"), "v3.0", episodes=2)

    fit(repvitok, "tokenizer_run", TOKENIZER)
    run(repvitok, "export --ckpt tokenizer_run/last.ckpt --out tokenizer")
    run(repvitok, "encode --tokenizer tokenizer --dataset dataset --out latents --size 8x8")
    fit(latent_action, "lat_run", LAT)
    run(latent_action, "export --ckpt lat_run/last.ckpt --out lat")
    run(latent_action, "label --lat lat --latents latents --out labelled")
    write_text(Path("labelled"))
    fit(repwam, "pretrain_run", WAM, model={"wam": WAM_SIZE, "space": "latent"}, data={"space": "latent"})
    run(repwam, "export --ckpt pretrain_run/last.ckpt --out wam --wam-only")
    fit(repwam, "adapt_run", WAM, model={"init_from": "wam", "space": "robot"}, data={"space": "robot"})
    run(repwam, "export --ckpt adapt_run/last.ckpt --out policy --tokenizer tokenizer --lat lat --latents labelled")
    sharded = {"class_path": "repwam_core.training.parallel.ShardedStrategy"}
    fit(
        repwam, "sharded_run", WAM, model={"init_from": "wam", "space": "robot", "scale": {"init": "per_parameter"}},
        data={"space": "robot"}, trainer={"strategy": sharded, "inference_mode": False},
    )  # fmt: skip
    print_configs(repvitok, latent_action, repwam)
    Path("class_paths.txt").write_text("\n".join(sorted(class_paths())))
    np.savez_compressed("expected.npz", **expected())
    Path("pretrain_run/last.ckpt").unlink()  # as adapt_run's, but for the space


def run(command, arguments: str) -> None:
    if code := command(arguments.split()):
        raise SystemExit(f"{arguments}: {code}")


def fit(command, folder: str, recipe: dict, **changes: dict) -> None:
    values = {**RUN, **{section: {**recipe[section], **changes.get(section, {})} for section in ("model", "data")}}
    values["trainer"] = {**RUN["trainer"], "default_root_dir": folder, **changes.get("trainer", {})}
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(values))
    run(command, f"fit -c {path}")
    path.unlink()


def write_dataset(root: Path, version: str, episodes: int) -> None:
    """Two-channel states and three-channel actions beside 14 to 17 frames of a bright square."""
    from repvitok.data import LeRobotWriter

    writer = LeRobotWriter(
        root, version=version, fps=20, cameras={CAMERA: (16, 16)}, state_names=["px", "py"],
        action_names=["x", "y", "z"], robot_type="arm",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for index in range(episodes):
        length = 14 + index
        frames = np.full((length, 16, 16, 3), 40, np.uint8)
        for frame in range(length):
            column = (frame + index) % 10
            frames[frame, 4:10, column : column + 6] = (220, 60, 30)
        state = rng.normal(size=(length, 2)).astype(np.float32)
        action = rng.normal(size=(length, 3)).astype(np.float32)
        writer.add_episode(index, frames={CAMERA: frames}, state=state, action=action, task=TASKS[index % 2])
    writer.finalize()


def write_text(latents: Path) -> None:
    """Hidden states of eight numbers a token for the instructions, in place of a language model's 384."""
    from repwam_core.text import TextEncoder

    encoder = TextEncoder("minilm")
    for row, text in enumerate(("", *TASKS)):
        encoder._cache[text] = torch.randn(row + 2, 8, generator=torch.Generator().manual_seed(row))
    encoder.save_cache(latents / "text-minilm.safetensors")


def print_configs(repvitok, latent_action, repwam) -> None:
    """configs/: the recipes of 0.1.0 as `fit --print_config` resolved them; what a config.yaml of theirs held."""
    recipes = Path(sys.prefix).parent / "recipes"
    Path("configs").mkdir()
    for name, command, arguments in (
        ("tokenizer", repvitok, "fit -c 1_repvitok/base.yaml --data.folders=[videos]"),
        ("latent_action", latent_action, "fit -c 2_latent_action/base.yaml --data.latents=latents"),
        ("lapa", latent_action, "lapa fit -c 2_latent_action/lapa_tiny.yaml --data.latents=x --data.dataset=y"),
        ("sharded", repwam, "fit -c 3_repwam/base.yaml -c 3_repwam/sharded.yaml --data.latents=latents"),
    ):
        words = [str(recipes / word) if word.endswith(".yaml") else word for word in arguments.split()]
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            command([*words, "--print_config"])
        Path(f"configs/{name}.yaml").write_text(text.getvalue())


def class_paths() -> set[str]:
    """What a recipe of 0.1.0 could name as a class_path: teachers, networks of losses and metrics, strategies, ..."""
    import latent_action
    import repvitok
    import repwam_core
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy
    from repvitok.features import FeatureNetwork
    from repvitok.losses import PerceptualLoss
    from repvitok.teacher import Teacher

    kinds, found = (Teacher, FeatureNetwork, PerceptualLoss, Strategy, Logger), set()
    for package in (repvitok, latent_action, repwam_core):
        for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, type) and issubclass(value, kinds) and value.__module__ == name:
                    found.add(f"{name}.{value.__qualname__}")
    return found


def expected() -> dict[str, np.ndarray]:
    """What 0.1.0 computed from these files; the test computes the same with today's code."""
    from latent_action import LatentActionTokenizer
    from repvitok import RepViTok
    from repvitok.data import LatentShards, LeRobotReader
    from repwam_core.interface import Observation
    from repwam_core.model.wam import WorldActionModel
    from repwam_core.policy import Policy

    found: dict[str, np.ndarray] = {}
    reader = LeRobotReader("dataset")
    video = np.stack(reader.frames(0, CAMERA, range(9)))
    clip = torch.from_numpy(video).permute(3, 0, 1, 2)[None, :, :, ::2, ::2].float() / 127.5 - 1
    with torch.no_grad():
        tokenizer = RepViTok.from_pretrained("tokenizer").eval()
        latents = tokenizer.encode(clip)
        found |= {"clip": clip.numpy(), "tokenizer_latents": latents.numpy()}
        found["tokenizer_video"] = tokenizer.decode(latents, clip.shape[-2:]).numpy()
        lat = LatentActionTokenizer.from_pretrained("lat").eval()
        z = lat.standardise(latents)
        found["lat_actions"] = lat.encode(z).numpy()
        found["lat_next"] = lat.decode(z[:, 0], lat.encode(z)[:, 0]).numpy()
    for episode in LatentShards("labelled"):
        for name in ("latents", "state", "actions", "latent_actions"):
            found[f"episode_{episode.episode_index}_{name}"] = np.asarray(getattr(episode, name))
    policy = Policy.from_pretrained("policy", clip=False)
    policy.reset("go up", 3)
    state = reader.episode(1)["observation.state"].astype(np.float32)
    for name, first, last in (("policy_first", 0, 1), ("policy_second", 1, 5)):
        images = {CAMERA: np.stack(reader.frames(1, CAMERA, range(first, last)))}
        found[name] = policy.act(Observation(images=images, state=state[first:last])).actions
    wam = WorldActionModel.from_pretrained("wam")
    found["digests"] = np.array([tokenizer.digest(), lat.digest(), wam.digest()])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
