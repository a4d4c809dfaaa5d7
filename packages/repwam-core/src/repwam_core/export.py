"""What a training checkpoint becomes: a model to go on from, a policy that can be run, or what `repwam test` measures.

Folders of the first two stand alone; the last is tested in pixels and units, along recorded episodes, as `repwam
openloop` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from repvitok import RepViTok
from repvitok.data import LatentMeta, LatentShards, LeRobotReader
from repvitok.data.contents import require_recorded
from repvitok.encoding_plan import choose_cameras, infos_of
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer
from repvitok.runtime.checkpointing import is_sharded, read_checkpoint, read_section, stored_by, with_weights
from repvitok.runtime.documents import parse, parse_json
from repvitok.runtime.errors import UserError, require_disk_space
from repvitok.runtime.files import write_json_atomic
from repvitok.runtime.pretrained import CONFIG_FILE, WEIGHTS_FILE, find_device, find_folder, fitted_weights
from repvitok.runtime.progress import card_head, run_record, training_table

from repwam_core.data.datamodule import WAMDataModule
from repwam_core.data.episodes import EpisodeStore, text_cache
from repwam_core.interface import Embodiment
from repwam_core.model.config import LATENT_SPACE, WAMConfig
from repwam_core.model.wam import WorldActionModel
from repwam_core.policy.folder import LoadedPolicy, PolicyManifest, model_bytes, refuse_other_than_policy, write_policy
from repwam_core.policy.openloop import ClipFeatures, OpenLoopResult, evaluate_open_loop, named_clip_features
from repwam_core.policy.policy import BatchedPolicy
from repwam_core.sampling import ChunkSpec, SamplingConfig
from repwam_core.statistics import HEADLINE, Statistics
from repwam_core.text import TextEncoder
from repwam_core.training.finetuning import FineTuning, merge_lora
from repwam_core.training.module import CHECKPOINT_KEY
from repwam_core.training.parallel import read_whole


@dataclass(frozen=True)
class _StoredDataSet:
    """What a checkpoint says of one of its run's data sets."""

    statistics: dict[str, Any]
    latents: dict[str, Any]


@dataclass(frozen=True)
class _StoredRun:
    """What a checkpoint says of its run, as JSON."""

    config: dict[str, Any]
    space: str
    text_encoder: str
    plan: SamplingConfig
    data_sets: list[dict[str, Any]]
    channels: list[str]
    state_channels: list[str]
    chunks: ChunkSpec | None = None  # version 0.1 did not say
    finetuning: FineTuning | None = None  # of runs that train parts of their model


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint of `repwam fit` holds, ready to export: averaged weights, and the data they were trained on.

    Attributes:
        run: its step, and what it says of its run's command and hours.
        sources: names of all data sets of the run.
    """

    wam: WorldActionModel
    space: str
    statistics: Statistics
    latents: LatentMeta
    text_encoder: str
    plan: SamplingConfig
    chunks: ChunkSpec | None = None
    tuned: dict[str, torch.Tensor] | None = None  # the tokenizer's weights that were trained with it
    run: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


def read_trained(checkpoint: str | Path, data_set: int | None = None) -> TrainedModel:
    """Rebuild the model of a checkpoint, a file or a sharded run's folder, with its averaged weights.

    Args:
        checkpoint: what to read.
        data_set: of a run on several data sets, the number of the one whose robot the model is for: its action space
            then has that robot's channels alone. None keeps the layout that all robots share.
    """
    sharded, where = is_sharded(checkpoint), str(checkpoint)
    content = read_whole(checkpoint) if sharded else read_checkpoint(checkpoint)
    if sharded and CHECKPOINT_KEY in content:  # the average lies among the ranks' parts
        content[CHECKPOINT_KEY] = {**content[CHECKPOINT_KEY], "ema": {"average": content["ema_average"]}}
    section = stored_by("repwam fit", CHECKPOINT_KEY, content, where)
    stored = parse(parse_json(section.get("json"), f"{where}, its JSON"), _StoredRun, where, unknown=True)
    with torch.device("meta"):
        wam = WorldActionModel(WAMConfig.from_dict(stored.config))
    if stored.finetuning is not None:
        stored.finetuning.apply(wam)
    wam = with_weights(wam, "wam.", content, section, where)
    merge_lora(wam)
    number = data_set or 0
    if not 0 <= number < len(stored.data_sets):
        raise UserError(f"{checkpoint} was trained on {len(stored.data_sets)} data sets, it has no number {number}")
    described = parse(stored.data_sets[number], _StoredDataSet, f"{where}, data set {number}", unknown=True)
    statistics = Statistics.from_dict(described.statistics, f"{where}, statistics")
    if data_set is not None:
        own_states = statistics.state.channels if statistics.state is not None else ()
        if lacking := set(statistics.actions.channels) - set(stored.channels) | set(own_states) - set(
            stored.state_channels
        ):
            raise UserError(f"{where} is damaged: its layout lacks the channels {sorted(lacking)}")
        actions = [stored.channels.index(name) for name in statistics.actions.channels]
        wam = narrowed(wam, stored.space, actions, [stored.state_channels.index(name) for name in own_states])
    wam.set_look_ahead(0)  # training's alone
    return TrainedModel(
        wam=wam.eval(),
        space=stored.space,
        statistics=statistics,
        latents=LatentMeta.from_dict(described.latents, f"{where}, latents"),
        text_encoder=stored.text_encoder,
        plan=stored.plan,
        chunks=stored.chunks,
        tuned=dict(read_section(section, where, "tokenizer", "average")) if "tokenizer" in section else None,
        run={name: content.get(name) for name in ("global_step", "run")},
        sources=tuple(str(data["latents"].get("source")) for data in stored.data_sets),
    )


def narrowed(wam: WorldActionModel, space: str, actions: list[int], states: list[int]) -> WorldActionModel:
    """The same model with some channels of an action space: the function of the whole one where the others are zero.

    Args:
        wam: the model.
        space: the action space to narrow.
        actions: numbers of the action channels to keep, in order.
        states: the same of the state.
    """
    old = wam.config.space(space)
    if actions == list(range(old.channels)) and states == list(range(old.state_channels)):
        return wam
    new = replace(old, channels=len(actions), state_channels=len(states) if old.state_channels else 0)
    with torch.device("meta"):
        model = WorldActionModel(replace(wam.config, spaces={**wam.config.spaces, space: new}))
    tensors, prefix = dict(wam.state_dict()), f"spaces.{space}."
    tensors[f"{prefix}action_in.weight"] = tensors[f"{prefix}action_in.weight"][:, actions]
    for leaf in ("weight", "bias"):
        tensors[f"{prefix}action_out.{leaf}"] = tensors[f"{prefix}action_out.{leaf}"][actions]
    if f"{prefix}state_in.weight" in tensors:
        tensors[f"{prefix}state_in.weight"] = tensors[f"{prefix}state_in.weight"][:, states]
        if not states:
            del tensors[f"{prefix}state_in.weight"], tensors[f"{prefix}state_in.bias"]
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def export_wam(checkpoint: str | Path, out: str | Path, license: str | None = None) -> Path:
    """Write the averaged weights of a checkpoint as a model folder, for `init_from` of the next stage."""
    trained = read_trained(checkpoint)
    out = Path(out)
    require_disk_space(out, model_bytes(trained.wam), "export")
    use = """from repwam_core import WorldActionModel

wam = WorldActionModel.from_pretrained("this/folder")  # or the start of a training: --model.init_from this/folder"""
    head = card_head("World action model", "repwam-core", "robotics, world model", license)
    trained.wam.save_pretrained(out, readme=_card(head, use, trained, Path(checkpoint).parent, {}, license))
    return out


def _card(
    head: str, use: str, trained: TrainedModel, run: Path, rows: Mapping[str, object], license: str | None
) -> str:
    """The README.md of a model or a policy: what it is, how it is used, on what it was trained, what it reached."""
    latents, reached = trained.latents, run_record(run)[1]
    data = {
        **rows,
        "data sets": ", ".join(trained.sources),
        "cameras": ", ".join(latents.cameras),
        "tokens of a frame and camera, rows x columns": f"{latents.grid[1]} x {latents.grid[2]}",
        "rate of the frames, Hz": f"{latents.frame_rate_hz:g}, every {latents.stride}. taken",
        "actions": trained.space,
        "text encoder": trained.text_encoder,
        "visual tokenizer": f"`{latents.tokenizer_digest[:16]}`",
    }
    return f"""{head}
{sum(p.numel() for p in trained.wam.parameters()):,} parameters. Digest `{trained.wam.digest()[:16]}`.

```python
{use}
```

## Training

{training_table(trained.run, data, reached, license)}

Losses are of held-out episodes of these data. They say little of success: try it in closed loop, or against recordings.
"""


def export_policy(
    checkpoint: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    *,
    lat: str | Path | None = None,
    shards: str | Path | None = None,
    name: str | None = None,
    plan: Mapping[str, Any] | None = None,
    data_set: int = 0,
    license: str | None = None,
) -> Path:
    """Write one folder from which `Policy.from_pretrained` drives the robot.

    Args:
        checkpoint: last.ckpt of an adaptation run (a robot's action space).
        tokenizer: the tokenizer that made the latents, as `load_tokenizer` takes it.
        out: the folder to write; it appears whole or not at all. An earlier policy folder there is replaced.
        lat: folder of the latent action tokenizer, copied along.
        shards: the latent shards that were trained on; their embedded instructions are copied along.
        name: the embodiment's name; the data set's when None.
        plan: how to plan where not as in validation: values of `SamplingConfig` by name.
        data_set: of a run on several data sets, the number of the one whose robot is to be driven.
        license: of the weights, for the model card.
    """
    refuse_other_than_policy(Path(out))  # before the work
    trained, out = read_policy(checkpoint, data_set), Path(out)
    model = read_tokenizer(tokenizer, trained)
    manifest = make_manifest(trained, model, name, plan)
    if lat is not None:
        lat = find_folder(lat, (CONFIG_FILE, WEIGHTS_FILE))
        from latent_action import LatentActionTokenizer  # of those alone who have one

        labelled, found = trained.latents.lat_digest, LatentActionTokenizer.from_pretrained(lat).digest()
        if labelled is not None and found != labelled:
            raise UserError(
                f"{lat}: this latent action tokenizer is {found[:16]}, the latents were labelled by {labelled[:16]}; "
                "give the one that labelled them"
            )
        manifest.digests["lat"] = found
    if shards is not None:
        LatentShards(shards, expect_digest=trained.latents.tokenizer_digest)
    sources = {"lat": Path(lat)} if lat is not None else {}
    cache = None if shards is None else text_cache(Path(shards), trained.text_encoder)
    robot = manifest.embodiment
    use = """from repwam_core import Policy

policy = Policy.from_pretrained("this/folder", device="cuda")
policy.reset("what to do")
chunk = policy.act(observation)  # repwam_core.Observation, every frame since the last call"""
    rows = {
        "robot": robot.name,
        "size, pixels": f"{manifest.size[0]} x {manifest.size[1]}",
        "channels": ", ".join(
            f"{name} ({unit})" for name, unit in zip(robot.action_names, robot.action_units, strict=True)
        ),
    }
    head = card_head(f"Policy for {robot.name}", "repwam-core", "robotics", license)
    readme = _card(head, use, trained, Path(checkpoint).parent, rows, license)
    write_policy(out, trained.wam, model, trained.statistics, manifest, sources, cache, readme)
    return out


def read_policy(checkpoint: str | Path, data_set: int = 0) -> TrainedModel:
    """`read_trained` of a checkpoint that drives a robot."""
    trained = read_trained(checkpoint, data_set)
    if trained.space == LATENT_SPACE:
        raise UserError(f"{checkpoint} acts in latent actions; adapt it to a robot first, or export it with --wam-only")
    return trained


def read_tokenizer(source: str | Path, trained: TrainedModel) -> VideoTokenizer:
    """The tokenizer that made the latents, as `load_tokenizer` gives it, with the weights that were tuned on them."""
    tokenizer, latents = load_tokenizer(source), trained.latents
    if (found := tokenizer.digest()) != latents.tokenizer_digest:
        raise UserError(
            f"{source}: this tokenizer is {found[:16]}, the latents that were trained on come from "
            f"{latents.tokenizer_digest[:16]}; give the tokenizer that encoded them, or encode and train again"
        )
    if trained.tuned is not None:
        assert isinstance(tokenizer, RepViTok)  # no other is tuned
        expected = {name: weight for name, weight in tokenizer.state_dict().items() if name in trained.tuned}
        tokenizer.load_state_dict(fitted_weights(trained.tuned, expected, "the tuned tokenizer"), strict=False)
    return tokenizer


def make_manifest(
    trained: TrainedModel, tokenizer: VideoTokenizer, name: str | None = None, plan: Mapping[str, Any] | None = None
) -> PolicyManifest:
    """The policy.json of a trained model and the tokenizer that made its latents; arguments as of `export_policy`."""
    _, rows, columns = trained.latents.grid
    patch, statistics = tokenizer.config.patch_size, trained.statistics
    planned = replace(trained.plan, **(plan or {}))
    if trained.chunks is not None:
        trained.chunks.require(planned.chunk_frames)
    return PolicyManifest(
        space=trained.space,
        embodiment=Embodiment.from_names(
            name or trained.latents.source,
            statistics.actions.channels,
            statistics.state.channels if statistics.state is not None else (),
            trained.latents.cameras,
            trained.latents.frame_rate_hz,
            units=statistics.actions.units,
        ),
        size=(rows * patch, columns * patch),  # pixels of a camera as the tokenizer saw it
        latents=trained.latents,
        text_encoder=trained.text_encoder,
        plan=planned,
        chunks=trained.chunks,
        digests={
            "tokenizer": trained.latents.tokenizer_digest if trained.tuned is None else tokenizer.digest(),
            "wam": trained.wam.digest(),
            "statistics": statistics.digest,
        },
    )


def parts_of_checkpoint(
    checkpoint: str | Path, tokenizer: str | Path, device: str = "cpu", instructions: frozenset[str] = frozenset()
) -> LoadedPolicy:
    """What `export_policy` would write of a checkpoint, in memory; arguments and errors as there.

    Args:
        checkpoint, tokenizer: as there.
        device: where the models go.
        instructions: those that it was trained on.
    """
    trained, device = read_policy(checkpoint), str(find_device(device))
    video = read_tokenizer(tokenizer, trained)
    manifest = make_manifest(trained, video)
    text = TextEncoder(manifest.text_encoder, device=device)
    return LoadedPolicy(manifest, trained.wam.to(device), video.to(device), trained.statistics, text, instructions)


class RecordedEpisodes(L.Callback):
    """After `repwam test`, plans along recorded episodes, logs the errors and writes openloop.json to the run's folder.

    Logged for tasks that the run was trained on, `test/seen/`, and for others, `test/unseen/`: PSNR in dB, SSIM and,
    with a network, the Frechet distance of imagined video, beside the PSNR of what the tokenizer makes of the true
    latents and of repeating the last frame; the open-loop score's headline variant (`ols_0.1`, ...); the mean absolute
    error of each action channel in its unit (`x_mae_si`).

    Args:
        dataset: LeRobot data set, with the cameras and channels of the run's (first) data set; None for no such test.
        tokenizer: folder of the video tokenizer that made the latents.
        episodes: "held_out", those that the run held out, where `dataset` is what its latents were made of; of another
            data set "all", or numbers and ranges like "0-9,12".
        cameras: the data set's cameras that stand for those trained on, in that order; None where they are called so.
        clip_features: as of `repwam openloop --clip-features`; None for no Frechet distance.
    """

    def __init__(
        self,
        dataset: str | Path | None = None,
        tokenizer: str | Path | None = None,
        episodes: list[int] | int | str = "held_out",
        cameras: list[str] | None = None,
        clip_features: list[str] | None = None,
    ) -> None:
        if (dataset is None) != (tokenizer is None):
            raise UserError("recorded: expected both --recorded.dataset and --recorded.tokenizer, got one of them")
        self.dataset, self.tokenizer, self.clip_features = dataset, tokenizer, clip_features
        self.episodes, self.cameras = episodes, cameras

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open what is needed, so that a mistake shows before the test."""
        del pl_module, stage
        if self.dataset is None:
            return
        store = _store(trainer)
        held_out = _held_out(store)
        if self.episodes == "held_out" and not held_out:
            raise UserError(
                "recorded: the run holds out no whole episodes; hold some out (data.held_out), or name those to plan "
                "along (--recorded.episodes)"
            )
        self._network = named_clip_features(self.clip_features)
        self._reader = LeRobotReader(self.dataset, depth_range=store.meta.depth_range)
        self._chosen = {"held_out": held_out, "all": None}.get(str(self.episodes), self.episodes)
        cameras = choose_cameras(self._reader, self.cameras or store.meta.cameras)
        require_recorded(self._reader, cameras, [info.index for info in infos_of(self._reader, self._chosen)])

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One process plans; the others go on."""
        if self.dataset is None or not trainer.is_global_zero:
            return
        result = evaluate_open_loop(self._policy(trainer, pl_module), self._reader, self._chosen, cameras=self.cameras)
        write_json_atomic(Path(trainer.default_root_dir) / "openloop.json", result.to_dict(self._network))
        groups = {name: _numbers(part, self._network) for name, part in result.groups().items()}
        rows = {f"test/{group}/{name}": value for group, part in groups.items() for name, value in part.items()}
        pl_module.log_dict(rows, rank_zero_only=True)

    def _policy(self, trainer: L.Trainer, module: L.LightningModule) -> BatchedPolicy:
        store = _store(trainer)
        told = frozenset(store.tasks[row] for row in store.train_episodes)
        checkpoint, tokenizer = str(trainer.ckpt_path), str(self.tokenizer)
        parts = parts_of_checkpoint(checkpoint, tokenizer, str(module.device), told)
        if (cache := text_cache(store.shards.root, store.text_encoder)).exists():
            parts.text.load_cache(cache)
        return BatchedPolicy(parts)


def _store(trainer: L.Trainer) -> EpisodeStore:
    data: WAMDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data.store


def _held_out(store: EpisodeStore) -> list[int]:
    """Recorded episodes of which training has seen nothing: not an only one, whose end is held out."""
    sides = (store.val_episodes, store.train_episodes)
    kept, trained = ({store.infos[row].episode_index for row in rows} for rows in sides)
    return sorted(kept - trained)


def _numbers(part: OpenLoopResult, network: ClipFeatures | None) -> dict[str, float]:
    errors = {f"{channel}_mae_si": error for channel, error in part.errors()["policy"].items()}
    scores = {f"ols_{threshold:g}": share for threshold, share in part.open_loop_scores()[str(HEADLINE)].items()}
    video, reconstructed, copied = part.video(network), part.video(of="reconstructed"), part.video(of="copied")
    if video is None or reconstructed is None or copied is None:
        return {**scores, **errors}
    numbers = {"psnr_db": video.psnr_db, "ssim": video.ssim}
    if video.frechet is not None:
        numbers[video.frechet_name] = video.frechet
    numbers |= {"psnr_db_reconstructed": reconstructed.psnr_db, "psnr_db_copied": copied.psnr_db}
    return {**numbers, **scores, **errors}
