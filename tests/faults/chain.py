"""The pipeline at its smallest: every verb's command, and what an uninterrupted run of it leaves behind."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import runpy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from repvitok.runtime.checkpointing import read_checkpoint
from repvitok.runtime.progress import read_curves

_RUN_VERB = Path(__file__).with_name("run_verb.py")
TIMEOUT_S = 600
# What may differ from run to run: locks, wall times, and the resolved configuration, which names its own folder.
# Which state the one before the last is, the last interruption decides.
_UNCOMPARED = (".lock", "config.yaml", "last.1.ckpt")


@dataclass(frozen=True)
class Verb:
    """A command line that turns earlier verbs' outputs into its own.

    Attributes:
        name: also the folder of its output.
        package: whose command it is.
        command: its arguments, with {root} for the chain's folder, {out} for the output's and __ for a space in one.
        reads: names of the verbs (or "dataset") whose outputs it reads.
        sim: whether it needs the simulator.
        compared: how the names of its files end that two runs write alike; all files where it is empty.
    """

    name: str
    package: str
    command: str
    reads: tuple[str, ...]
    sim: bool = False
    compared: tuple[str, ...] = ()

    def arguments(self, root: Path, out: Path) -> list[str]:
        return [word.replace("__", " ").format(root=root, out=out) for word in self.command.split()]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal), what it wrote, how long it took."""

    code: int | None
    said: str
    seconds: float


@dataclass
class Chain:
    """Reference outputs of every verb, made once, each by a run that nothing disturbed.

    Attributes:
        root: holds one folder per verb, and the data set.
        seconds: how long each reference run took.
        left: what each left, see `contents`.
    """

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    left: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start(VERBS["encode"], self.root, self.root, self.root / "none", ["--version"]).join()  # imports everything

    def reference(self, name: str) -> Path:
        """The undisturbed output of a verb; made, with all it reads, on the first call."""
        out = self.root / name
        if name != "dataset" and name not in self.seconds:
            ended = run(VERBS[name], self.prepare(name), out)
            assert ended.code == 0, f"the undisturbed {name} failed:\n{ended.said}"
            self.seconds[name], self.left[name] = ended.seconds, contents(VERBS[name], out)
        return out

    def prepare(self, name: str) -> Path:
        """Make what a verb reads; returns the chain's folder."""
        for earlier in VERBS[name].reads:
            self.reference(earlier)
        return self.root


def _fit(settings: str) -> str:
    """A training run that resumes, with these settings."""
    return (
        "fit --seed_everything=0 --trainer.accelerator=cpu --trainer.log_every_n_steps=2 --ckpt_path=last "
        "--trainer.default_root_dir={out} " + settings
    )


TOKENIZER_FIT = _fit(
    "--model.tokenizer={{width:__32,depth:__1,heads:__2,latent_dim:__8}} "
    "--model.weights={{l1:__1.0,l2:__1.0,gradient:__0.5,perceptual:__0.0,gan:__0.1,align:__0.0}} "
    "--model.adversary={{start_step:__4,width:__4,layers:__2,warmup_steps:__1}} "
    "--data.folders=[{root}/dataset] --data.size=[32,32] --data.frames=5 --data.batch_size=2 --data.held_out=0.2 "
    "--data.val_clips=2 --trainer.max_steps=24 --trainer.val_check_interval=6 --checkpoint.every_n_steps=4"
)
LAT_FIT = _fit(
    "--model.lat.latent_dim=8 --model.lat.hidden=32 --data.latents={root}/encode --data.batch_size=16 "
    "--data.held_out=0.2 --trainer.max_steps=60 --trainer.val_check_interval=20 --checkpoint.every_n_steps=10"
)
WAM_FIT = _fit(
    "--model.preset=tiny --model.wam={{width:__32,depth:__1,heads:__2,ffn:__64,action_width:__32,action_ffn:__64}} "
    "--model.space=robot --data.space=robot --model.chunk_sizes=[1,2] "
    "--model.plan={{chunk_frames:__1,video_steps:__2,action_steps:__4}} --data.latents={root}/label "
    "--data.transitions=3 --data.batch_size=4 --data.held_out=0.2 --trainer.max_steps=20 "
    "--trainer.val_check_interval=10 --checkpoint.every_n_steps=4"
)
EXPORT_POLICY = "export --ckpt {root}/repwam-fit --tokenizer {root}/repvitok-export --latents {root}/label --out {out}"
ENCODE = "encode --tokenizer {root}/repvitok-export --dataset {root}/dataset --size 32 --batch-size 1 --out {out}"
LABEL = "label --lat {root}/latent-action-export --latents {root}/encode --out {out}"
COLLECT = "collect --tasks button-press-topdown --episodes 3 --workers 1 --out {out}"
ROLLOUT = "rollout --tasks reach push --baseline random --episodes 4 --max-env-steps 60 --workers 1 --out {out}"
QUICKSTART = "quickstart --dataset {root}/dataset --size 32 32 --budget 0.02 --out {out}"

VERBS: Mapping[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("repvitok-fit", "repvitok", TOKENIZER_FIT, ("dataset",)),
        Verb("repvitok-export", "repvitok", "export --ckpt {root}/repvitok-fit --out {out}", ("repvitok-fit",)),
        Verb("encode", "repvitok", ENCODE, ("repvitok-export", "dataset")),
        Verb("latent-action-fit", "latent_action", LAT_FIT, ("encode",)),
        Verb(
            "latent-action-export",
            "latent_action",
            "export --ckpt {root}/latent-action-fit --out {out}",
            ("latent-action-fit",),
        ),
        Verb("label", "latent_action", LABEL, ("latent-action-export", "encode")),
        Verb("repwam-fit", "repwam_core", WAM_FIT, ("label",)),
        Verb("repwam-export", "repwam_core", EXPORT_POLICY, ("repwam-fit", "repvitok-export", "label")),
        Verb("collect", "repwam_core", COLLECT, (), sim=True),
        Verb("rollout", "repwam_core", ROLLOUT, (), sim=True),
        # Its notes and its report say how long each stage took.
        Verb("quickstart", "repwam_core", QUICKSTART, ("dataset",), compared=(".safetensors", ".tar", ".ckpt")),
    )
}


def context() -> Any:
    """Processes that begin with the packages imported, so that a kill falls into the verb's own work."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        [
            "torch",
            "lightning.pytorch.cli",
            "repvitok.training.module",
            "latent_action.training",
            "repwam_core.training.module",
        ]
    )
    return made


def start(verb: Verb, root: Path, out: Path, said: Path, arguments: list[str] | None = None) -> Any:
    """Begin a verb in a process of its own."""
    arguments = verb.arguments(root, out) if arguments is None else arguments
    globals_ = {"package": verb.package, "arguments": arguments, "stderr": str(said)}
    process = context().Process(target=runpy.run_path, args=(str(_RUN_VERB), globals_))
    process.start()
    return process


def run(verb: Verb, root: Path, out: Path) -> Ended:
    """Run a verb to its end."""
    with tempfile.TemporaryDirectory() as folder:  # not beside the output, whose disk may be full
        said, begun_s = Path(folder) / "said", time.monotonic()
        process = start(verb, root, out, said)
        process.join(TIMEOUT_S)
        seconds = time.monotonic() - begun_s
        text = said.read_text(errors="replace") if said.exists() else ""
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{verb.name} hangs:\n{text[-4000:]}")
    return Ended(process.exitcode, text, seconds)


def contents(verb: Verb, out: Path) -> dict[str, str]:
    """What a run left: a digest of every file by its name; of checkpoints and curves, of what they say."""
    found: dict[str, str] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.name in _UNCOMPARED or not (path.name.endswith(verb.compared) or not verb.compared):
            continue
        if path.suffix == ".ckpt":
            found[name] = _digest(_plain(read_checkpoint(path)))
        elif path.name == "metrics.csv":
            rows = {key: value for key, value in read_curves(path.parent).items() if not key.startswith("cost/")}
            found[name] = _digest({key: value.tolist() for key, value in rows.items()})
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _plain(value: Any) -> Any:
    """A checkpoint as JSON: tensors by their bytes; without the loops' and the curves' record of where they stand.

    Of a run that was killed in its last validation, and then makes up for it, no step is left to save after.
    """
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, Mapping):
        standing = ("loops", "epoch", "run", "callbacks")
        return {str(key): _plain(item) for key, item in value.items() if key not in standing}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """In words, what a run left otherwise than the undisturbed one; empty where nothing."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    other = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    parts = {"missing": missing, "left over": extra, "different": other}
    return "; ".join(f"{what} {names}" for what, names in parts.items() if names)
