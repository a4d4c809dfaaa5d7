"""Policy folders: everything that turns camera frames into actions, written whole, and loaded without training's code.

Each part is named by its digest:

    policy.json       what it is: spaces, cameras, sizes, latents' moments, how to plan, digests of the parts
    wam/ tokenizer/   the models (config.json + model.safetensors); lat/ the latent action tokenizer, if given
    statistics.json   scaling of actions and states
    text.safetensors  hidden states of the training instructions, so that these need no text model

`repwam_core.export` makes one of a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from repvitok.data.latents import LatentMeta
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer
from repvitok.runtime.documents import Digest, Size, load_json, parse, require_format
from repvitok.runtime.errors import UserError, require_disk_space
from repvitok.runtime.files import atomic_folder, readable, refuse_foreign
from repvitok.runtime.pretrained import (
    DIFFUSERS_WEIGHTS_FILE,
    MODEL_FILES,
    README_FILE,
    converted,
    copy_model,
    find_device,
    find_folder,
)

from repwam_core.interface import Embodiment
from repwam_core.model.cache import Run
from repwam_core.model.wam import WorldActionModel, compiled_run
from repwam_core.sampling import ChunkSpec, SamplingConfig
from repwam_core.statistics import Statistics
from repwam_core.text import TextEncoder

POLICY_FORMAT = "repwam-policy"
FORMAT_VERSION = 1
POLICY_FILES = (
    *(f"{part}/{name}" for part in ("wam", "tokenizer", "lat") for name in MODEL_FILES),
    f"tokenizer/{DIFFUSERS_WEIGHTS_FILE}",
    "statistics.json",
    "text.safetensors",
    README_FILE,
    "policy.json",
)
"""All that a policy folder may hold."""
TEXT_CACHE_BYTES = 32 * 2**20
"""Hidden states of instructions that a policy keeps beside those it was trained on: 2,000 sentences of ten words by
MiniLM, the least recently used leave first. A server hears new ones for as long as it runs."""


@dataclass(frozen=True)
class PolicyManifest:
    """What policy.json says.

    Attributes:
        space: the action space the policy acts in.
        embodiment: the robot: channels, cameras, control rate in Hz.
        size: height and width, in pixels, to which every camera is resized.
        latents: of the shards the model was trained on: moments, grid, stride, window, frame rate.
        text_encoder: name of the text encoder.
        plan: how actions are planned, unless asked otherwise.
        digests: part -> sha256: "tokenizer", "wam", "statistics", and "lat" if there is one.
        chunks: those that the model was trained on; None where version 0.1 wrote the folder.
    """

    space: str
    embodiment: Embodiment
    size: tuple[int, int]
    latents: LatentMeta
    text_encoder: str
    plan: SamplingConfig
    digests: dict[str, str]
    chunks: ChunkSpec | None = None

    def save(self, folder: Path) -> None:
        """Write policy.json."""
        values = {
            "format": POLICY_FORMAT,
            "format_version": FORMAT_VERSION,
            "space": self.space,
            "embodiment": self.embodiment.to_dict(),
            "size": list(self.size),
            "latents": self.latents.to_dict(),
            "text_encoder": self.text_encoder,
            "plan": asdict(self.plan),
            "digests": self.digests,
            "chunks": None if self.chunks is None else self.chunks.to_dict(),
        }
        (folder / "policy.json").write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> PolicyManifest:
        """Read policy.json.

        Raises:
            FileNotFoundError: when `folder` is no policy folder.
            ValueError: when policy.json is of another format, or a key is missing or unknown.
        """
        path = readable(folder) / "policy.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is no policy folder: it has no policy.json; write one with `repwam export`"
            )
        values = require_format(load_json(path), POLICY_FORMAT, FORMAT_VERSION, str(path))
        stored = parse(values, _StoredManifest, str(path))
        latents = LatentMeta.from_dict(stored.latents, f"{path}, field 'latents'")
        if latents.cameras != stored.embodiment.cameras:
            raise UserError(
                f"{path}: the embodiment's cameras {stored.embodiment.cameras} are not the latents' {latents.cameras}"
            )
        return cls(**{**vars(stored), "latents": latents})


@dataclass(frozen=True)
class _StoredManifest:
    """`PolicyManifest` as policy.json has it."""

    space: str
    embodiment: Embodiment
    size: tuple[Size, Size]
    latents: dict[str, Any]
    text_encoder: str
    plan: SamplingConfig
    digests: dict[str, Digest]
    chunks: ChunkSpec | None = None

    def __post_init__(self) -> None:
        if lacking := {"tokenizer", "wam", "statistics"} - set(self.digests):
            raise UserError(f"digests: expected those of the parts {sorted(lacking)}, too")


@dataclass(frozen=True)
class LoadedPolicy:
    """What a policy folder holds, loaded and checked against each other.

    Attributes:
        manifest: policy.json.
        wam, tokenizer: the models.
        statistics: scaling of actions and states.
        text: the text encoder.
        instructions: those the policy was trained on; empty where the folder does not tell.
    """

    manifest: PolicyManifest
    wam: WorldActionModel
    tokenizer: VideoTokenizer
    statistics: Statistics
    text: TextEncoder
    instructions: frozenset[str] = frozenset()

    @cached_property
    def compiled(self) -> Run:
        """`wam.run` with compiled layers, one for all policies of these parts: they are compiled once."""
        return compiled_run(self.wam)

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str = "cpu",
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> LoadedPolicy:
        """Load a folder written by `repwam export`.

        Args:
            source: the folder; or, as of `repvitok.runtime.pretrained.PretrainedModel.from_pretrained`, the name of an
                installed policy, or a hub id.
            device: where the models go.
            dtype: a floating type for the weights of the world action model; the tokenizer keeps its own, in which the
                latents that were trained on were made.
            revision, local_files_only: as there.

        Raises:
            FileNotFoundError: when it is no policy folder.
            ValueError: when a part is not the one that policy.json names.
        """
        device = str(find_device(device))
        if Path(source).is_dir():
            folder = readable(source)
        else:
            hub = {"revision": revision, "local_files_only": local_files_only}
            folder = find_folder(source, ("policy.json",), more=POLICY_FILES, **hub)
        manifest = PolicyManifest.load(folder)
        wam = WorldActionModel.from_pretrained(folder / "wam", verify=False)  # by its digest, below
        tokenizer = load_tokenizer(folder / "tokenizer")
        statistics = Statistics.load(folder / "statistics.json")
        found = {"wam": wam.digest(), "tokenizer": tokenizer.digest(), "statistics": statistics.digest}
        for part, digest in found.items():
            if digest != manifest.digests[part]:
                raise UserError(
                    f"{folder / part}: expected {manifest.digests[part][:16]} as policy.json says, got {digest[:16]}; "
                    "a part was exchanged or damaged: export the policy again, or copy it again"
                )
        text = TextEncoder(manifest.text_encoder, device=device, cache_bytes=TEXT_CACHE_BYTES)
        if (folder / "text.safetensors").exists():
            text.load_cache(folder / "text.safetensors")
        told = frozenset(text.known)
        wam = converted(wam, dtype)
        return cls(manifest, wam.to(device), tokenizer.to(device), statistics, text, told)


def write_policy(
    out: Path,
    wam: WorldActionModel,
    tokenizer: VideoTokenizer,
    statistics: Statistics,
    manifest: PolicyManifest,
    sources: dict[str, Path],
    text: Path | None = None,
    readme: str | None = None,
) -> None:
    """Write a policy folder, whole or not at all (`repvitok.runtime.files.atomic_folder`).

    Args:
        out: the folder; an earlier policy there is replaced.
        wam, tokenizer, statistics, manifest: what to write.
        sources: model folders copied along, by the name of their part.
        text: file of embedded instructions to copy, if it is there.
        readme: the model card.
    """
    refuse_other_than_policy(out)
    if text is not None and text.exists():
        TextEncoder(manifest.text_encoder).load_cache(text)  # a damaged one is refused here, not on the robot
    copied = sum(file.stat().st_size for source in sources.values() for file in source.iterdir() if file.is_file())
    require_disk_space(out, copied + model_bytes(wam) + model_bytes(tokenizer), "export")
    with atomic_folder(out, POLICY_FILES) as fresh:
        for part, model in (("wam", wam), ("tokenizer", tokenizer)):
            (fresh / part).mkdir()
            model.write_into(fresh / part)
        for part, source in sources.items():
            copy_model(source, fresh / part)
        statistics.save(fresh / "statistics.json")
        if readme is not None:
            (fresh / README_FILE).write_text(readme, encoding="utf-8")
        if text is not None and text.exists():
            shutil.copyfile(text, fresh / "text.safetensors")
        manifest.save(fresh)


def refuse_other_than_policy(out: Path) -> None:
    """Stop before a policy is written over something else."""
    if not (readable(out) / "policy.json").exists():
        refuse_foreign(out, (), "policy")


def model_bytes(model: torch.nn.Module | VideoTokenizer) -> int:
    """Bytes that a model's parameters take, on disk as in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
