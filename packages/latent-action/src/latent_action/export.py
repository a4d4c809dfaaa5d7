"""From a training checkpoint to a folder that `LatentActionTokenizer.from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repvitok.checkpointing import read_checkpoint

from latent_action.config import LatentActionConfig
from latent_action.model import LatentActionTokenizer

CHECKPOINT_KEY = "latent_action"
_PREFIX = "lat."


def export_checkpoint(checkpoint: str | Path, out: str | Path) -> LatentActionTokenizer:
    """Write the LAT of a checkpoint of `latent-action fit`, its averaged weights where the run kept an average.

    Args:
        checkpoint: a .ckpt file.
        out: folder for config.json and model.safetensors.

    Returns:
        The tokenizer that was written, in evaluation mode.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is damaged or of another stage.
    """
    lat = read_tokenizer(read_checkpoint(checkpoint))
    lat.save_pretrained(out)
    return lat


def read_tokenizer(checkpoint: dict[str, Any]) -> LatentActionTokenizer:
    """The LAT in a loaded checkpoint.

    Raises:
        ValueError: the checkpoint is of another stage, or its weights do not fit its config.
    """
    stored = read_stored(checkpoint)
    lat = LatentActionTokenizer(LatentActionConfig.from_dict(stored["config"]))
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    if stored["ema"] is not None:
        weights |= stored["ema"]["average"]
    try:
        lat.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"The checkpoint's weights do not fit its config: {error}") from error
    return lat.eval()


def read_stored(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `LatentActionTraining` adds to a checkpoint: the config and the averaged weights (or None).

    Raises:
        ValueError: the checkpoint is of another stage.
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            "This is no checkpoint of `latent-action fit`: it holds no latent action tokenizer. Give that run's "
            "last.ckpt."
        )
    return checkpoint[CHECKPOINT_KEY]
