"""A differentiable stand-in for the votes of nearest neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._neighbours import squared_distances

if TYPE_CHECKING:
    from robustbench_lite.defenses.deep_knn import DeepKNN

__all__ = ["SoftNeighbours"]

RANGE = 10.0  # of the logits of one image, at most: a cross-entropy of larger ones has no gradient in float32
SPREAD = 0.5  # of the k nearest's distances: the k-th votes exp(-2) of the nearest


class SoftNeighbours(nn.Module):
    """Votes that fade with the distance, in place of votes of the k nearest that count fully.

    In each layer a training sample at squared distance d has the weight exp(-d / t), where t is a share of the distance
    from the nearest to the k-th nearest, for each input. The logits are the sums over the layers of the logarithms of
    the classes' shares, scaled down where they differ by more than 10.
    Source of the idea: the soft votes of Sitawarin and Wagner 2019 (1903.08333); logarithms keep their gradients where
    a class has no neighbour at all.

    Args:
        defense: whose neighbours vote.
    """

    def __init__(self, defense: DeepKNN) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W)."""
        inside = self.defense
        members = [(inside.reference_labels == label).nonzero().flatten() for label in range(inside.num_classes)]
        total = x.new_zeros(len(x), inside.num_classes)
        for points, references, sizes in zip(inside.embed(x), inside.references, inside.sizes, strict=True):
            distances = squared_distances(points, references, sizes)
            energy = -distances / _temperature(distances.detach(), inside.k)
            nobody = energy.detach().amin(dim=1) - 10  # of a class without training samples
            votes = [energy[:, rows].logsumexp(dim=1) if len(rows) else nobody for rows in members]
            total = total + torch.stack(votes, dim=1).log_softmax(dim=1)
        return total * (RANGE / (total.amax(dim=1) - total.amin(dim=1)).detach().clamp_min(RANGE)).unsqueeze(1)


def _temperature(distances: Tensor, k: int) -> Tensor:
    """Return (B, 1) from squared distances (B, N): how fast votes fade."""
    found = distances.topk(k, dim=1, largest=False).values
    return (found[:, -1:] - found[:, :1]).clamp_min(1e-6) * SPREAD
