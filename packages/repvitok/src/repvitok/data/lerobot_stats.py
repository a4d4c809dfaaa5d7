"""Statistics of a LeRobot data set: per column and camera, per episode and over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

Statistics = dict[str, Any]


def column_statistics(values: np.ndarray) -> Statistics:
    """min, max, mean and std over the rows of one column, as JSON lists, with count = [rows]."""
    rows = values.reshape(len(values), -1) if values.ndim == 1 else values
    exact = rows.astype(np.int64 if rows.dtype.kind in "iub" else np.float64)
    return {
        "min": exact.min(0).tolist(),
        "max": exact.max(0).tolist(),
        "mean": exact.mean(0).tolist(),
        "std": exact.std(0).tolist(),
        "count": [len(rows)],
    }


def image_statistics(frames: UInt8[np.ndarray, "n h w 3"]) -> Statistics:
    """Per colour over a sample of frames, in [0, 1], shaped (3, 1, 1); count = [frames sampled].

    As LeRobot does: n**0.75 frames, at least 100, evenly spread.
    """
    count = min(len(frames), max(100, int(len(frames) ** 0.75)))
    sample = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    colours = [np.bincount(sample[..., colour].ravel(), minlength=256) for colour in range(3)]
    described = [_of_histogram(histogram) for histogram in colours]
    return {
        **{key: [[[numbers[key]]] for numbers in described] for key in ("min", "max", "mean", "std")},
        "count": [count],
    }


def pooled_statistics(parts: Sequence[Mapping[str, Any]]) -> Statistics:
    """The statistics of several parts together, from each part's own.

    mean = sum n_i m_i / n and var = sum n_i (var_i + (m_i - mean)^2) / n.
    """
    counts = np.array([part["count"][0] for part in parts], dtype=np.float64)
    means = np.array([part["mean"] for part in parts], dtype=np.float64)
    weight = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weight * means).sum(0)
    variance = (weight * (np.square([part["std"] for part in parts]) + np.square(means - mean))).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], 0).tolist(),
        "max": np.max([part["max"] for part in parts], 0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
    }


def _of_histogram(counts: np.ndarray) -> dict[str, float]:
    """Statistics in [0, 1] of bytes, from how often each of the 256 values occurs."""
    values, present = np.arange(256) / 255.0, np.flatnonzero(counts)
    share = counts / counts.sum()
    mean = float(share @ values)
    std = float(np.sqrt(share @ np.square(values - mean)))
    return {"min": float(values[present[0]]), "max": float(values[present[-1]]), "mean": mean, "std": std}
