"""A training checkpoint turned into the frozen folder that `RepViTok.from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from repvitok.baselines.features import FeatureTokenizer
from repvitok.model import RepViTok
from repvitok.runtime.checkpointing import read_checkpoint, read_section, stored_by, with_weights
from repvitok.runtime.progress import run_record


def export_checkpoint(path: str | Path, out: str | Path, averaged: bool = True) -> RepViTok:
    """Writes config.json, model.safetensors and a model card README.md into `out`; returns the tokenizer.

    Args:
        path: a checkpoint written by `repvitok fit`.
        out: the folder.
        averaged: take the moving average of the weights, what validation measured; else the last step's weights.
    """
    checkpoint, where = read_checkpoint(path), str(path)
    kind = FeatureTokenizer if FeatureTokenizer.format in checkpoint else RepViTok
    stored = stored_by("repvitok fit", kind.format, checkpoint, where)
    with torch.device("meta"):
        tokenizer = kind(kind.config_class.from_dict(dict(read_section(stored, where, "config"))))
    tokenizer = with_weights(tokenizer, "tokenizer.", checkpoint, stored, where, averaged=averaged)
    steps = int(checkpoint.get("global_step") or 0)
    tokenizer.save_pretrained(out, readme=model_card(tokenizer, steps, averaged, Path(path).parent))
    return tokenizer


def trained_size(run: str | Path) -> tuple[int, int] | None:
    """Height and width in pixels that a run's clips had; None where its folder does not say."""
    size = run_record(run)[0].get("data", {}).get("size")
    return (int(size[0]), int(size[1])) if size else None


def model_card(tokenizer: RepViTok, steps: int, averaged: bool, run: str | Path) -> str:
    """The README.md of an exported tokenizer: what it is, how to use it, on what it was trained, what it reaches.

    Args:
        tokenizer: the model.
        steps: how long it was trained.
        averaged: whether the weights are the moving average.
        run: the run's folder, whose config.yaml and metrics.csv say the rest.
    """
    config = tokenizer.config
    fields = "\n".join(f"| {name} | {value} |" for name, value in config.to_dict().items())
    parameters = sum(p.numel() for p in tokenizer.parameters())
    recorded, reached = run_record(run)
    data = recorded.get("data", {})
    frames = data.get("frames") or 1 + 4 * config.tubelet_frames
    height, width = trained_size(run) or (256, 256)
    kind, home = ("RepViTok", "repvitok") if type(tokenizer) is RepViTok else ("FeatureTokenizer", "repvitok.baselines")
    return f"""---
library_name: repvitok
tags: [video, tokenizer]
---
# {kind}

A video tokenizer of {parameters:,} parameters, trained for {steps:,} steps
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

{_training(data, reached)}

## Settings

| setting | value |
|---|---|
{fields}
"""


def _training(data: dict[str, Any], reached: dict[str, float]) -> str:
    """What a run's configuration and curves say of its data and of what it reached on the held-out part of them."""
    if not data:
        return "Its run's config.yaml was not beside the checkpoint: data, size and length of the clips are not known."
    height, width = data["size"]
    lines = [
        f"| data sets | {', '.join(Path(folder).name for folder in data['folders'])} |",
        f"| size, pixels | {height} x {width} |",
        f"| length of a clip, frames | {data['frames']} |",
        f"| frames taken | every {data['stride']}. |" if data["stride"] > 1 else "| frames taken | all |",
        *(f"| {name} | {value:.4g} |" for name, value in reached.items()),
    ]
    told = "\n".join(["| | |", "|---|---|", *lines])
    return (
        f"{told}\n\nNumbers are of held-out clips of these data alone: measure it on yours with `repvitok test`. Other "
        "sizes and longer clips than these were never seen."
    )
