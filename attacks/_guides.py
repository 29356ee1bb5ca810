"""Guides of an attack on neighbours: training samples that a point is pulled to or pushed from, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._neighbours import blocks, squared_distances
from robustbench_lite.core.goals import Goal, Targeted, Untargeted
from robustbench_lite.core.insides import Neighbours
from robustbench_lite.core.oracle import Oracle

__all__ = ["Embedding", "Guides", "Survey"]

SLACK = 1e-5  # of the hinges


class Embedding(nn.Module):
    """The embeddings of all layers side by side, (n, sum of D), as one question to an oracle; one forward pass.

    Args:
        defense: a `Neighbours`.
    """

    def __init__(self, defense: nn.Module) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings of images (n, C, H, W)."""
        return torch.cat(cast(Neighbours, self.defense).embed(x), dim=1)


class Survey(nn.Module):
    """What a point has around it: radii of its neighbourhoods, and the nearest training samples of each class.

    Nearness is the sum of the squared distances in all layers. One forward pass, with the search that it ends in.

    Args:
        defense: a `Neighbours`.
        half: samples of each class.
    """

    def __init__(self, defense: nn.Module, half: int) -> None:
        super().__init__()
        self.defense = defense
        inside = cast(Neighbours, defense)
        self._labels = inside.reference_labels
        self._classes = inside.num_classes
        self._half = half

    def forward(self, x: Tensor) -> Tensor:
        """Return for each image, side by side in float64, what `guides` reads.

        The squared distance to the k-th neighbour in each layer; the mean nearness of each class's samples; their
        numbers, class by class, -1 where there are fewer.
        """
        inside = cast(Neighbours, self.defense)
        embedded, found = inside.embed(x.detach()), []
        lengths = [references.square().sum(dim=1) for references in inside.references]
        for part in blocks(len(x), len(self._labels)):
            total, radii = torch.zeros((), device=x.device), []
            for points, references, sizes in zip(embedded, inside.references, lengths, strict=True):
                distances = squared_distances(points[part], references, sizes)
                radii.append(distances.kthvalue(inside.k, dim=1).values)
                total = total + distances
            found.append(torch.cat([torch.stack(radii, dim=1).double(), *self._nearest(total)], dim=1))
        return torch.cat(found)

    def _nearest(self, total: Tensor) -> tuple[Tensor, Tensor]:
        means, numbers = [], []
        for label in range(self._classes):
            members = (self._labels == label).nonzero().flatten()
            count = min(self._half, len(members))
            near = total[:, members].topk(count, dim=1, largest=False)
            none = near.values.new_full((len(total), 1), torch.inf)
            means.append(near.values.mean(dim=1, keepdim=True) if count else none)
            numbers.append(nn.functional.pad(members[near.indices], (0, self._half - count), value=-1))
        return torch.cat(means, dim=1).double(), torch.cat(numbers, dim=1).double()

    def guides(
        self, oracle: Oracle, points: Tensor, rows: Tensor, pulled: Tensor | None, rank: int
    ) -> tuple[Guides, Tensor]:
        """Return the guides of points (n, C, H, W), and the classes (n,) they pull to; one forward pass.

        Args:
            oracle: is asked, and paid.
            points: (n, C, H, W).
            rows: int64 (n,).
            pulled: classes chosen earlier, int64 (n,); None: choose the `rank`-th nearest other class.
            rank: from 0; past the last class that has samples it begins anew.
        """
        inside, layers = cast(Neighbours, self.defense), len(cast(Neighbours, self.defense).references)
        width = layers + self._classes * (1 + self._half)
        answers = torch.empty(len(points), width, dtype=torch.float64, device=points.device)

        def keep(values: Tensor, numbers: Goal) -> Tensor:
            answers[numbers.labels] = values.detach()
            return values[:, 0]

        numbers = torch.arange(len(points), device=points.device)
        oracle.gradient(points, rows, keep, Untargeted(numbers), candidate=False, through=self)
        radii, means, samples = torch.split(answers, [layers, self._classes, self._classes * self._half], dim=1)
        pushed, pulled = _classes(oracle.goal.take(rows), means, pulled, rank)
        samples = samples.long().reshape(len(points), self._classes, self._half)
        chosen = torch.cat([samples[numbers, pushed], samples[numbers, pulled]], dim=1)
        embedded = [references[chosen.clamp_min(0)] for references in inside.references]
        lengths = [part.square().sum(dim=2) for part in embedded]
        return Guides(embedded, lengths, radii.to(points.dtype), chosen >= 0), pulled


@dataclass(frozen=True, eq=False)
class Guides:
    """For each of n points the guides, those that push before as many that pull.

    Attributes:
        embedded: for each layer (n, m, D).
        lengths: their squared lengths, for each layer (n, m).
        radii: squared distances to the k-th neighbour in each layer (n, L).
        known: bool (n, m), False where a class had no more samples.
    """

    embedded: list[Tensor]
    lengths: list[Tensor]
    radii: Tensor
    known: Tensor

    def take(self, keep: Tensor) -> Guides:
        """Return the guides of these points."""
        embedded, lengths = ([part[keep] for part in whole] for whole in (self.embedded, self.lengths))
        return Guides(embedded, lengths, self.radii[keep], self.known[keep])

    def slope(self, oracle: Oracle, points: Tensor, rows: Tensor, halves: Tensor, embedding: Embedding) -> Tensor:
        """Return the gradient (n, C, H, W) of the sum of hinges; one forward pass.

        Args:
            oracle: is asked, and paid.
            points: (n, C, H, W).
            rows: int64 (n,).
            halves: int64 (n,), how many guides of each kind count, nearest first.
            embedding: of the same defense.
        """
        half = self.known.shape[1] // 2
        order = torch.arange(half, device=points.device).repeat(2)
        used = (self.known & (order < halves.unsqueeze(1))).to(points.dtype)
        signs = torch.tensor([-1.0, 1.0], device=points.device, dtype=points.dtype).repeat_interleave(half)

        def hinges(values: Tensor, numbers: Goal) -> Tensor:
            whole = len(numbers.labels) == len(points)
            pick = slice(None) if whole else numbers.labels
            total, sizes = values.new_zeros(len(values)), [part.shape[2] for part in self.embedded]
            for layer, found in enumerate(torch.split(values, sizes, dim=1)):
                products = torch.bmm(self.embedded[layer][pick], found.unsqueeze(2)).squeeze(2)
                distances = found.square().sum(dim=1, keepdim=True) + self.lengths[layer][pick] - 2 * products
                beyond = signs * (distances - self.radii[pick, layer : layer + 1]) + SLACK
                total = total + (used[pick] * beyond.clamp_min(0)).sum(dim=1)
            return total

        numbers = Untargeted(torch.arange(len(points), device=points.device))
        return oracle.gradient(points, rows, hinges, numbers, candidate=False, through=embedding)[1]


def _classes(goal: Goal, means: Tensor, pulled: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return the classes (n,) that guides push from and pull to, from the classes' mean nearness (n, K)."""
    own = goal.labels.unsqueeze(1)
    others = means.scatter(1, own, torch.inf)
    order = others.argsort(dim=1)
    if isinstance(goal, Targeted):
        return order[:, 0], goal.labels
    if pulled is None:
        count = others.isfinite().sum(dim=1, keepdim=True).clamp_min(1)
        pulled = order.gather(1, rank % count).squeeze(1)
    return goal.labels, pulled
