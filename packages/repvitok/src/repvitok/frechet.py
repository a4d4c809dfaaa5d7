"""The Frechet distance between two sets of features: the core of FID, FVD and their stand-ins."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repvitok.errors import UserError


def frechet_distance(
    mean_a: Float[Tensor, " d"],
    covariance_a: Float[Tensor, "d d"],
    mean_b: Float[Tensor, " d"],
    covariance_b: Float[Tensor, "d d"],
) -> float:
    """d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) between two Gaussians, in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2): those of C_a C_b, of a
    symmetric matrix. So fewer samples than dimensions (singular covariances) need no added diagonal.

    Returns:
        The squared distance, at least 0, in squared units of the features.
    """
    mean_a, covariance_a, mean_b, covariance_b = (x.double() for x in (mean_a, covariance_a, mean_b, covariance_b))
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    middle = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp_min(0)
    traces = covariance_a.trace() + covariance_b.trace() - 2 * middle.sqrt().sum()
    return max(0.0, ((mean_a - mean_b).square().sum() + traces).item())


class FrechetStatistics:
    """Mean and covariance of feature vectors that come in batches, in float64 and without keeping the vectors.

    Batches are merged by Chan's formula, which does not cancel when the mean is large beside the deviation; the result
    does not depend on how the vectors were batched.

    Attributes:
        count: vectors seen, N.
        mean: their mean, (d,).
        scatter: sum of (x - mean) (x - mean)^T, (d, d).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        """Starts with no vectors of `dim` numbers."""
        if dim < 1:
            raise UserError(f"expected features of 1 or more numbers, got dim={dim}")
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def dim(self) -> int:
        """Numbers in a feature vector."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased covariance, scatter / (N - 1); ValueError below two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs two or more feature vectors, got {self.count}: use more clips")
        return self.scatter / (self.count - 1)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "n d"]) -> FrechetStatistics:
        """Adds a batch of feature vectors; returns itself.

        Raises:
            ValueError: if their length is not `dim`, or one is not finite.
        """
        if features.shape[1] != self.dim:
            raise UserError(f"expected features of {self.dim} numbers, got {features.shape[1]}")
        if not torch.isfinite(features).all():
            raise UserError("a feature vector is not finite: look at the feature network and its input")
        batch = FrechetStatistics(self.dim, self.mean.device)
        if len(features):
            values = features.to(self.mean)
            batch.count, batch.mean = len(values), values.mean(dim=0)
            batch.scatter = (values - batch.mean).mT @ (values - batch.mean)
        return self.merge(batch)

    def merge(self, other: FrechetStatistics) -> FrechetStatistics:
        """Adds all vectors that another one saw, on another rank for example; returns itself."""
        if other.dim != self.dim:
            raise UserError(f"expected statistics of {self.dim} numbers, got {other.dim}")
        total = self.count + other.count
        if other.count:
            shift = other.mean.to(self.mean) - self.mean
            self.mean = self.mean + shift * (other.count / total)
            between = torch.outer(shift, shift) * (self.count * other.count / total)
            self.scatter = self.scatter + other.scatter.to(self.scatter) + between
        self.count = total
        return self

    def distance(self, other: FrechetStatistics) -> float:
        """`frechet_distance` to another set of features; ValueError below two vectors on either side."""
        return frechet_distance(self.mean, self.covariance, other.mean.to(self.mean), other.covariance.to(self.mean))
