"""From a training checkpoint to folders that stand alone: a model to go on from, and a policy that can be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from repvitok.data import LatentMeta, LatentShards
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer
from repvitok.runtime.checkpointing import is_sharded, read_checkpoint, stored_by, with_weights
from repvitok.runtime.curves import card_head, run_record, training_table
from repvitok.runtime.documents import parse, parse_json
from repvitok.runtime.errors import UserError, require_disk_space
from repvitok.runtime.pretrained import CONFIG_FILE, WEIGHTS_FILE, find_device, find_folder

from repwam_core.data.episodes import text_cache
from repwam_core.interface import Embodiment
from repwam_core.model.config import LATENT_SPACE, WAMConfig
from repwam_core.model.wam import WorldActionModel
from repwam_core.policy.folder import LoadedPolicy, PolicyManifest, model_bytes, refuse_other_than_policy, write_policy
from repwam_core.sampling import ChunkSpec, SamplingConfig
from repwam_core.statistics import Statistics
from repwam_core.text import TextEncoder
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
    wam = with_weights(wam, "wam.", content, section, where)
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
    return TrainedModel(
        wam=wam.eval(),
        space=stored.space,
        statistics=statistics,
        latents=LatentMeta.from_dict(described.latents, f"{where}, latents"),
        text_encoder=stored.text_encoder,
        plan=stored.plan,
        chunks=stored.chunks,
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
    model = read_tokenizer(tokenizer, trained.latents)
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


def read_tokenizer(source: str | Path, latents: LatentMeta) -> VideoTokenizer:
    """The tokenizer that made the latents, as `load_tokenizer` gives it."""
    tokenizer = load_tokenizer(source)
    if (found := tokenizer.digest()) != latents.tokenizer_digest:
        raise UserError(
            f"{source}: this tokenizer is {found[:16]}, the latents that were trained on come from "
            f"{latents.tokenizer_digest[:16]}; give the tokenizer that encoded them, or encode and train again"
        )
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
            "tokenizer": trained.latents.tokenizer_digest,
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
    video = read_tokenizer(tokenizer, trained.latents)
    manifest = make_manifest(trained, video)
    text = TextEncoder(manifest.text_encoder, device=device)
    return LoadedPolicy(manifest, trained.wam.to(device), video.to(device), trained.statistics, text, instructions)
