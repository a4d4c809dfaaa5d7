"""A policy folder in memory: model, tokenizer, text encoder and statistics, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repvitok import RepViTok
from repvitok.devices import find_device
from repvitok.errors import UserError
from repvitok.files import readable

from repwam_core.export import PolicyManifest, make_manifest, read_policy
from repwam_core.model.wam import WorldActionModel
from repwam_core.statistics import Statistics
from repwam_core.text import TextEncoder


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
    tokenizer: RepViTok
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
        tokenizer = RepViTok.from_pretrained(folder / "tokenizer")
        statistics = Statistics.load(folder / "statistics.json")
        found = {"wam": wam.digest(), "tokenizer": tokenizer.digest(), "statistics": statistics.digest}
        for part, digest in found.items():
            if digest != manifest.digests[part]:
                raise UserError(
                    f"{folder / part}: expected {manifest.digests[part][:16]} as policy.json says, got {digest[:16]}; "
                    "a part was exchanged: export the policy again"
                )
        text = TextEncoder(manifest.text_encoder, device=device)
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
        manifest = make_manifest(trained, tokenizer)
        text = TextEncoder(manifest.text_encoder, device=device)
        models = trained.wam.to(device), RepViTok.from_pretrained(tokenizer).to(device)
        return cls(manifest, *models, trained.statistics, text, instructions)
