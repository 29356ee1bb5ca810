"""The nearest adversarial example of a 1-nearest-neighbour classifier, by small quadratic programmes.

Threat: l2, with a budget, or without (as near as possible). Access: the inside of a defense that compares the images
themselves with training samples (`core.insides.Neighbours` with k = 1 and pixels as its only embedding).
Source: the programmes are those of Yang, Rashtchian, Wang and Chaudhuri 2019, "Robustness for Non-Parametric
Classification: A Generic Attack and Defense" (1906.03310); the order in which they are solved, and which ones are not,
follow Wang, Liu, Yi, Zhou and Hsieh 2019, "Evaluating the Robustness of Nearest Neighbor Classifiers: A Primal-Dual
Perspective" (1906.03972).
The images that are nearer to a sample o of another class than to any sample s of the true one are a convex cell: the
half-spaces |x' - o|^2 <= |x' - s|^2. The nearest of them solves a quadratic programme, and the nearest adversarial
example is the nearest over all o. One half-space alone, that of the nearest s, bounds the distance to a cell from
below: cells are tried in the order of this bound, and left out once it exceeds what was found.
Departures: half-spaces come in as the point violates them; accelerated projected ascent of the dual, all samples at
once, with the image bounds kept in closed form; what is left of violations is removed by a step towards o, along which
all constraints are linear. Exact up to that step, if as many cells are tried as the bound leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._nearest_cells import Cells, Distances, nearest_point
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.insides import Neighbours
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["NearestNeighbourAttack"]

LEADS = (2e-5, 2e-4, 2e-3)  # by how much o must be nearer than any s: the first that survives float32 rounding
BLOCK = 2**22  # distances alive at a time


@dataclass(frozen=True)
class NearestNeighbourAttack(Attack):
    """Project on the cells of samples of other classes, nearest cells first. Deterministic.

    Attributes:
        cells: cells tried for each sample, at most.
        rounds: times that violated half-spaces are added to a programme; one forward pass each.
        added: half-spaces added each time.
        ascents: steps on the dual each time.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    needs: ClassVar[type | None] = Neighbours
    cells: int = 16
    rounds: int = 6
    added: int = 8
    ascents: int = 60

    def __post_init__(self) -> None:
        for name in ("cells", "rounds", "added", "ascents"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {getattr(self, name)!r}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an l2 ball; it needs no budget."""
        return isinstance(threat, Lp) and threat.norm == "l2"

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Try the cells of each sample, a block of samples at a time.

        Raises:
            NotApplicableError: more neighbours than one vote, or what they compare are not the images.
        """
        inside = oracle.inside(Neighbours)  # type: ignore[type-abstract]
        if inside.k != 1 or len(inside.references) != 1 or inside.references[0].shape[1] != x[0].numel():
            raise NotApplicableError(
                "NearestNeighbourAttack attacks one nearest neighbour among images; DeepKNNAttack attacks the others"
            )
        ask = Distances(cast(nn.Module, inside))
        size = max(1, BLOCK // len(inside.reference_labels))
        for rows in torch.split(torch.arange(len(x), device=x.device), size):
            self._search(oracle, rows, ask, inside)
        return oracle.best

    def _search(self, oracle: Oracle, rows: Tensor, ask: Distances, inside: Neighbours) -> None:
        rows = rows[oracle.still(rows, 1 + self._price(oracle))]
        if len(rows) == 0:
            return
        x = oracle.x[rows]
        wanted = _wanted(oracle.goal.take(rows), inside.reference_labels)
        far = ask.of(oracle, x, rows)
        cells = Cells.around(x, inside.references[0], wanted, far, self.cells)
        for number in range(cells.centres.shape[1]):
            keep = oracle.still(rows, self._price(oracle))
            keep = keep[cells.bounds[keep, number] < self._limit(oracle, rows[keep])]
            if len(keep):
                self._try(oracle, rows[keep], ask, far[keep], cells.take(keep), number)

    def _limit(self, oracle: Oracle, rows: Tensor) -> Tensor:
        """Return the distances (n,) at or beyond which a cell is of no use: the best so far, or the budget."""
        threat, x = cast(Lp, oracle.threat).take(rows), oracle.x[rows]
        best = torch.where(oracle.found.fallen[rows], threat.distance(oracle.best[rows], x), torch.inf)
        if threat.eps is None:
            return best
        return torch.minimum(best, threat.radius(x.double()).reshape(-1).expand(len(x)))

    def _try(self, oracle: Oracle, rows: Tensor, ask: Distances, far: Tensor, cells: Cells, number: int) -> None:
        """Look for the nearest point of one cell of each image; `far` are the squared distances of the images."""
        shape, dtype = oracle.x[rows].shape, oracle.x.dtype
        programme = cells.programme(number, cast(Lp, oracle.threat).bounds)
        for _ in range(self.rounds):
            programme = nearest_point(programme.with_nearest(far, cells.wanted, self.added), self.ascents)
            far = ask.of(oracle, programme.point.to(dtype).reshape(shape), rows)
        wanted = cells.wanted
        for lead in LEADS:
            oracle.judge(programme.inside(far, wanted, lead).to(dtype).reshape(-1, *shape[1:]), rows)
            missed = (~oracle.verdict).nonzero().flatten()
            missed = missed[oracle.still(rows[missed], oracle.judge_cost)]
            if len(missed) == 0:
                return
            rows, programme, far, wanted = rows[missed], programme.take(missed), far[missed], wanted[missed]

    def _price(self, oracle: Oracle) -> int:
        """Forward passes of a cell with one verdict."""
        return self.rounds + oracle.judge_cost


def _wanted(goal: Goal, labels: Tensor) -> Tensor:
    """Return which training samples (n, N) a point should be nearest to."""
    same = labels.unsqueeze(0) == goal.labels.unsqueeze(1)
    return same if isinstance(goal, Targeted) else ~same
