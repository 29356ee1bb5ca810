"""Exact search for nearest neighbours, in chunks, on the device of the points."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks", "nearest", "squared_distances"]

DISTANCES = 2**24  # alive at a time: 64 MiB in float32


def squared_distances(queries: Tensor, references: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Return the squared l2 distances (n, N) of queries (n, D) to references (N, D), by one matrix product.

    Differentiable in the queries. Rounding: some 1e-6 of the squared lengths in float32; what decides by small
    differences computes them again from the points.

    Args:
        queries: (n, D).
        references: (N, D).
        sizes: (N,) squared lengths of the references, if they are known.
    """
    lengths = references.square().sum(dim=1) if sizes is None else sizes
    products = torch.addmm(lengths, queries, references.T, alpha=-2)
    return (products + queries.square().sum(dim=1, keepdim=True)).clamp_min(0)


def blocks(count: int, references: int) -> Iterator[slice]:
    """Yield the slices of `count` queries whose distances to so many references may be alive at a time."""
    size = max(1, DISTANCES // max(references, 1))
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


@torch.no_grad()
def nearest(queries: Tensor, references: Tensor, k: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the squared distances, ascending, and the positions of the k nearest references, each (n, k).

    Which of several references at the same distance count is left open.
    """
    lengths = references.square().sum(dim=1) if sizes is None else sizes
    found = [
        torch.topk(squared_distances(queries[part], references, lengths), k, dim=1, largest=False)
        for part in blocks(len(queries), len(references))
    ]
    if not found:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=queries.device)
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
