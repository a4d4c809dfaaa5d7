"""A training checkpoint turned into the frozen folder that `RepViTok.from_pretrained` loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repvitok.baselines.features import FeatureTokenizer
from repvitok.model import RepViTok
from repvitok.runtime.checkpointing import read_checkpoint, read_section, stored_by, with_weights
from repvitok.runtime.pretrained import save_exported
from repvitok.runtime.progress import card_head, run_record, training_table


def export_checkpoint(
    path: str | Path, out: str | Path, averaged: bool = True, license: str | None = None, half: bool = False
) -> RepViTok:
    """Writes config.json, model.safetensors and a model card README.md into `out`; returns the tokenizer.

    Args:
        path: a checkpoint written by `repvitok fit`.
        out: the folder.
        averaged: take the moving average of the weights, what validation measured; else the last step's weights.
        license: of the weights, for the model card: "apache-2.0".
        half: store the weights in float16. The tokenizer returned is that of the folder: rounded, in float32.
    """
    checkpoint, where = read_checkpoint(path), str(path)
    kind = FeatureTokenizer if FeatureTokenizer.format in checkpoint else RepViTok
    stored = stored_by("repvitok fit", kind.format, checkpoint, where)
    with torch.device("meta"):
        tokenizer = kind(kind.config_class.from_dict(dict(read_section(stored, where, "config"))))
    tokenizer = with_weights(tokenizer, "tokenizer.", checkpoint, stored, where, averaged=averaged)

    def card(model: RepViTok) -> str:
        return model_card(model, checkpoint, averaged, Path(path).parent, license)

    return save_exported(tokenizer, out, card, half)


def trained_size(run: str | Path) -> tuple[int, int] | None:
    """Height and width in pixels that a run's clips had; None where its folder does not say."""
    size = run_record(run)[0].get("data", {}).get("size")
    return (int(size[0]), int(size[1])) if size else None


def model_card(
    tokenizer: RepViTok, checkpoint: Mapping[str, Any], averaged: bool, run: str | Path, license: str | None = None
) -> str:
    """The README.md of an exported tokenizer: what it is, how to use it, on what it was trained, what it reaches.

    Args:
        tokenizer: the model.
        checkpoint: what it was exported from.
        averaged: whether the weights are the moving average.
        run: the run's folder, whose config.yaml and metrics.csv say the rest.
        license: of the weights.
    """
    config = tokenizer.config
    fields = "\n".join(f"| {name} | {value} |" for name, value in config.to_dict().items())
    parameters = sum(p.numel() for p in tokenizer.parameters())
    recorded, reached = run_record(run)
    data = recorded.get("data", {})
    frames = data.get("frames") or 1 + 4 * config.tubelet_frames
    height, width = trained_size(run) or (256, 256)
    kind, home = ("RepViTok", "repvitok") if type(tokenizer) is RepViTok else ("FeatureTokenizer", "repvitok.baselines")
    return f"""{card_head(kind, "repvitok", "video, tokenizer", license)}
A video tokenizer of {parameters:,} parameters
({"moving average of the weights" if averaged else "weights of the last step"}).
Digest `{tokenizer.digest()[:16]}`: latents carry it, and other packages refuse latents of another tokenizer.

```python
import torch
from {home} import {kind}

tokenizer = {kind}.from_pretrained("this/folder")
video = torch.zeros(1, 3, {frames}, {height}, {width})  # (B, 3, T, H, W) in [-1, 1]; T = 1 + {config.tubelet_frames} n
z = tokenizer.encode(video)  # (B, T', L, {config.latent_dim})
video_hat = tokenizer.decode(z, ({height}, {width}))
```

## Training

{training_table(checkpoint, _trained_on(data, checkpoint), reached, license)}

{_MEASURED if data else _UNKNOWN}

## Settings

| setting | value |
|---|---|
{fields}
"""


_MEASURED = (
    "Numbers are of held-out clips of these data alone: measure it on yours with `repvitok test`. Other sizes and "
    "longer clips than these were never seen."
)
_UNKNOWN = "Its run's config.yaml was not beside the checkpoint: data, size and length of the clips are not known."


def _trained_on(data: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, object]:
    """What a run's configuration and checkpoint say of its clips."""
    if not data:
        return {}
    height, width = data["size"]
    names = Counter(Path(folder).name for folder in data["folders"])
    rates = (checkpoint.get("ClipDataModule") or {}).get("rates_hz")
    return {
        "data sets": ", ".join(name if times == 1 else f"{name} ({times} times)" for name, times in names.items()),
        "size, pixels": f"{height} x {width}",
        "length of a clip, frames": data["frames"],
        "rate of the videos, Hz": ", ".join(f"{rate:g}" for rate in rates) if rates else None,
        "rate of the clips": f"{data['rate_hz']} Hz" if data.get("rate_hz") else f"every {data['stride']}. frame"
        if data["stride"] != 1 else "all frames",
    }  # fmt: skip
