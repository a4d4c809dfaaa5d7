"""A policy folder in memory: model, tokenizer, text encoder and statistics, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repvitok.devices import find_device
from repvitok.errors import UserError
from repvitok.files import readable
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer

from repwam_core.export import PolicyManifest, make_manifest, read_policy, read_tokenizer
from repwam_core.model.wam import WorldActionModel
from repwam_core.statistics import Statistics
from repwam_core.text import TextEncoder

TEXT_CACHE_BYTES = 32 * 2**20
"""Hidden states of instructions that a policy keeps beside those it was trained on: 2,000 sentences of ten words by
MiniLM, the least recently used leave first. A server hears new ones for as long as it runs."""


@dataclass(frozen=True)
class PolicyParts:
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

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> PolicyParts:
        """Load a folder written by `repwam export`.

        Raises:
            FileNotFoundError: when it is no policy folder.
            ValueError: when a part is not the one that policy.json names.
        """
        folder, device = readable(folder), str(find_device(device))
        manifest = PolicyManifest.load(folder)
        wam = WorldActionModel.from_pretrained(folder / "wam")
        tokenizer = load_tokenizer(folder / "tokenizer")
        statistics = Statistics.load(folder / "statistics.json")
        found = {"wam": wam.digest(), "tokenizer": tokenizer.digest(), "statistics": statistics.digest}
        for part, digest in found.items():
            if digest != manifest.digests[part]:
                raise UserError(
                    f"{folder / part}: expected {manifest.digests[part][:16]} as policy.json says, got {digest[:16]}; "
                    "a part was exchanged: export the policy again"
                )
        text = TextEncoder(manifest.text_encoder, device=device, cache_bytes=TEXT_CACHE_BYTES)
        if (folder / "text.safetensors").exists():
            text.load_cache(folder / "text.safetensors")
        told = frozenset(text.known)
        return cls(manifest, wam.to(device), tokenizer.to(device), statistics, text, told)

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: str | Path,
        tokenizer: str | Path,
        device: str = "cpu",
        instructions: frozenset[str] = frozenset(),
    ) -> PolicyParts:
        """What `repwam export` would write of a checkpoint, without writing it; errors as there."""
        trained, device = read_policy(checkpoint), str(find_device(device))
        video = read_tokenizer(tokenizer, trained.latents)
        manifest = make_manifest(trained, video)
        text = TextEncoder(manifest.text_encoder, device=device)
        return cls(manifest, trained.wam.to(device), video.to(device), trained.statistics, text, instructions)
