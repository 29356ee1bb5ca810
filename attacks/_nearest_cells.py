"""Cells of nearest neighbours, and the nearest point of a cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._neighbours import squared_distances
from robustbench_lite.core.goals import Goal, Untargeted
from robustbench_lite.core.insides import Neighbours
from robustbench_lite.core.oracle import Oracle

NEAR, TINY = 32, 1e-12

__all__ = ["Cells", "Distances", "Programme", "nearest_point"]


class Distances(nn.Module):
    """The squared distances (n, N) of images to all training samples, as one question to an oracle; one forward pass.

    Args:
        defense: a `Neighbours` with one embedding.
    """

    def __init__(self, defense: nn.Module) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        """Return the squared distances (n, N) of images (n, C, H, W)."""
        inside = cast(Neighbours, self.defense)
        return squared_distances(inside.embed(x.detach())[0], inside.references[0])

    def of(self, oracle: Oracle, points: Tensor, rows: Tensor) -> Tensor:
        """Return the squared distances (n, N) of points (n, C, H, W); the oracle is paid."""
        count = len(cast(Neighbours, self.defense).reference_labels)
        answers = torch.empty(len(points), count, dtype=points.dtype, device=points.device)

        def keep(values: Tensor, numbers: Goal) -> Tensor:
            answers[numbers.labels] = values.detach()
            return values[:, 0]

        numbers = Untargeted(torch.arange(len(points), device=points.device))
        oracle.gradient(points, rows, keep, numbers, candidate=False, through=self)
        return answers


@dataclass(frozen=True, eq=False)
class Programme:
    """n quadratic programmes: the nearest point to `x` with `normals` . point <= `offsets`, within image bounds.

    All float64: x, point, centre (n, D); normals (n, w, D), unit vectors from o to s; offsets, weights (n, w), the
    multipliers of the half-spaces.
    """

    x: Tensor
    point: Tensor
    centre: Tensor
    normals: Tensor
    offsets: Tensor
    weights: Tensor
    references: Tensor
    bounds: tuple[float, float]

    def take(self, keep: Tensor) -> Programme:
        """Return the programmes of these rows."""
        names = ("x", "point", "centre", "normals", "offsets", "weights")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})

    def with_nearest(self, far: Tensor, wanted: Tensor, count: int) -> Programme:
        """Return the programmes with the half-spaces of the samples nearest to the points: those most violated.

        Args:
            far: squared distances (n, N) of the points to all training samples.
            wanted: bool (n, N), the samples that bring no half-space.
            count: half-spaces to add.
        """
        rows, there = _nearest_others(far, wanted, count)
        others = self.references[rows].double()
        across = (others - self.centre.unsqueeze(1)) * there.unsqueeze(2)
        lengths = across.norm(dim=2)
        known = lengths > 0  # not so for a twin of o with another label: no point is nearer to o
        normals = across / torch.where(known, lengths, 1).unsqueeze(2)
        middles = (others + self.centre.unsqueeze(1)) / 2
        offsets = (normals * middles).sum(dim=2)
        return replace(
            self,
            normals=torch.cat([self.normals, normals], dim=1),
            offsets=torch.cat([self.offsets, offsets], dim=1),
            weights=torch.cat([self.weights, torch.zeros_like(offsets)], dim=1),
        )

    def inside(self, far: Tensor, wanted: Tensor, lead: float) -> Tensor:
        """Return the points moved towards o until o is nearer than all s: |x'-s|^2 - |x'-o|^2 >= 2 lead |x'-s|.

        Along the way both sides of the half-spaces are linear; only samples about as near as o can be in the way.

        Args:
            far: squared distances (n, N) of the points to all training samples.
            wanted: bool (n, N), the samples that are no s.
            lead: by how much o is to be nearer, in units of distance.
        """
        rows, there = _nearest_others(far, wanted, NEAR)
        others = self.references[rows].double()
        to_point = (others - self.point.unsqueeze(1)).square().sum(dim=2)
        to_centre = (others - self.centre.unsqueeze(1)).square().sum(dim=2)
        here = to_point - (self.point - self.centre).square().sum(dim=1, keepdim=True)
        share = (2 * lead * to_point.sqrt() - here) / (to_centre - here).clamp_min(TINY)
        share = torch.where(there & (to_centre > 0), share, 0).amax(dim=1, keepdim=True).clamp(0, 1)
        return self.point + share * (self.centre - self.point)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells to try around n images, nearest first.

    Attributes:
        x: images (n, D).
        references: all training samples (N, D).
        wanted: bool (n, N), the samples whose cells count.
        centres: numbers (n, c) of samples.
        bounds: float64 (n, c), lower bounds of the distances to their cells, ascending.
    """

    x: Tensor
    references: Tensor
    wanted: Tensor
    centres: Tensor
    bounds: Tensor

    @classmethod
    def around(cls, x: Tensor, references: Tensor, wanted: Tensor, far: Tensor, count: int) -> Cells:
        """Return the `count` nearest cells; `far` are the squared distances (n, N)."""
        own = far.masked_fill(wanted, torch.inf).argmin(dim=1)
        across = squared_distances(references[own], references).double().sqrt()
        lead = far.double() - far.gather(1, own.unsqueeze(1)).double()
        bounds = (lead / (2 * across.clamp_min(TINY))).masked_fill(~wanted, torch.inf)
        nearest = bounds.topk(min(count, bounds.shape[1]), dim=1, largest=False)
        return cls(x.flatten(1), references, wanted, nearest.indices, nearest.values)

    def take(self, keep: Tensor) -> Cells:
        """Return the cells of these images."""
        return Cells(self.x[keep], self.references, self.wanted[keep], self.centres[keep], self.bounds[keep])

    def programme(self, number: int, bounds: tuple[float, float]) -> Programme:
        """Return the programmes of one cell each, without any half-space yet."""
        x, centre = self.x.double(), self.references[self.centres[:, number]].double()
        none = x.new_zeros(len(x), 0)
        return Programme(
            x, x, centre, none.unsqueeze(2).expand(-1, -1, x.shape[1]), none, none, self.references, bounds
        )


def _nearest_others(far: Tensor, wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the numbers (n, c) of the nearest samples that are not wanted, and which of them there are, bool (n, c).

    c does not depend on the batch: a sample of a rare class must not cut what the others get.
    """
    rows = far.masked_fill(wanted, torch.inf).topk(min(count, far.shape[1]), dim=1, largest=False).indices
    return rows, ~wanted.gather(1, rows)


def nearest_point(programme: Programme, steps: int) -> Programme:
    """Return the programmes after accelerated projected ascent of the dual.

    At multipliers w >= 0 the point is x less the sum of w_i normals_i, clipped to the image bounds; the dual's gradient
    is how far it violates each half-space. Source: Beck and Teboulle 2009 (SIAM Journal on Imaging Sciences 2(1)), with
    restarts where the momentum points downhill (O'Donoghue and Candes 2012, 1204.3982).
    """
    normals, offsets, (low, high) = programme.normals, programme.offsets, programme.bounds
    steep = torch.bmm(normals, normals.transpose(1, 2)).abs().sum(dim=2).amax(dim=1, keepdim=True).clamp_min(TINY)
    weights, ahead = programme.weights, programme.weights
    age = torch.ones_like(steep)

    def point(at: Tensor) -> Tensor:
        return (programme.x - torch.bmm(at.unsqueeze(1), normals).squeeze(1)).clamp(low, high)

    for _ in range(steps):
        slope = torch.bmm(normals, point(ahead).unsqueeze(2)).squeeze(2) - offsets
        new = (ahead + slope / steep).clamp_min(0)
        back = ((ahead - new) * (new - weights)).sum(dim=1, keepdim=True) > 0
        older = torch.where(back, 1.0, (1 + (1 + 4 * age.square()).sqrt()) / 2)
        ahead = torch.where(back, new, new + (age - 1) / older * (new - weights))
        weights, age = new, older
    return replace(programme, weights=weights, point=point(weights))
