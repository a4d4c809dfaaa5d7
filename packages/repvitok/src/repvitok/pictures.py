"""Reconstructions beside their originals, as one PNG a person looks at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from repvitok.files import atomic_file
from repvitok.metrics import to_unit


def reconstruction_sheet(
    video: Float[Tensor, "b 3 T H W"], video_hat: Float[Tensor, "b 3 T H W"], clips: int = 4
) -> UInt8[np.ndarray, "height width 3"]:
    """Lays out clips in pairs of rows, original above reconstruction, time from left to right.

    Args:
        video: originals in [-1, 1].
        video_hat: reconstructions.
        clips: how many of the batch to show.
    """
    both = [rearrange(to_unit(v[:clips]), "b c T H W -> b H (T W) c") for v in (video, video_hat)]
    rows = [row.cpu().numpy() for pair in zip(*both, strict=True) for row in pair]
    return (np.concatenate(rows) * 255).round().astype(np.uint8)


def save_png(path: str | Path, pixels: UInt8[np.ndarray, "height width 3"]) -> Path:
    """Writes an image, creating its folder."""
    path = Path(path)
    with atomic_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
    return path


def log_picture(loggers: Iterable[Any], name: str, pixels: UInt8[np.ndarray, "height width 3"], step: int) -> None:
    """Hands an image to those of Lightning's loggers that take images: Weights & Biases and its like, TensorBoard."""
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[pixels], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
