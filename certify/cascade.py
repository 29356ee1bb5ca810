"""A cascade of bounds, from cheap to dear: each sees only what the ones before it left undecided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustbench_lite.certify.alpha_crown import AlphaCROWN
from robustbench_lite.certify.crown import least_of
from robustbench_lite.certify.falsifier import Falsifier, falsified
from robustbench_lite.certify.ibp import IBP
from robustbench_lite.certify.ir import Graph
from robustbench_lite.certify.linear_bounds import LinearBounds
from robustbench_lite.certify.margin_certifier import Findings
from robustbench_lite.certify.region import Region
from robustbench_lite.core.models import ABSTAIN
from robustbench_lite.core.results import Status
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

__all__ = ["Cascade"]

Improve = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps samples (n,), their specification (n, S, K) and bounds (n, S) to better bounds."""


@dataclass(frozen=True)
class Cascade(AlphaCROWN):
    """IBP, then CROWN-IBP, CROWN and alpha-CROWN, each on the samples that are still undecided.

    A sample leaves when all its margins are proven by one method or by several (bounds of one margin from different
    methods hold together), or when the falsifier, which comes after IBP, finds it an adversarial example. So the set of
    certified samples contains those of all four methods. Sources: see the methods.

    Where the smallest margin of a sample resists a method, its others are left as the methods before bound them; those
    of the true label, where the prediction is another, are interval bounds.

    Attributes:
        most_neurons: undecided hidden neurons above which an image gets no more than CROWN-IBP: CROWN walks from each,
            and alpha-CROWN builds on it (20,000 take seconds on a CPU); None: no limit.
        falsifier: an attack such as a short PGD; None: nothing is falsified.
    """

    most_neurons: int | None = 20_000
    falsifier: Falsifier | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_neurons is not None and self.most_neurons < 0:
            raise ValueError(f"most_neurons must be >= 0, or None for no limit, got {self.most_neurons}")

    def findings(
        self, model: nn.Module, x: Tensor, label: Tensor, threat: Lp, streams: Streams, num_classes: int
    ) -> Findings:
        """Return the margins, and the samples that the falsifier felled."""
        margins = self.losing(model, x, threat, label, num_classes)
        rows = ((margins <= self.tolerance).any(dim=1) & (label >= 0)).nonzero().flatten()
        status = torch.full_like(label, int(Status.UNKNOWN))
        aim = torch.full_like(label, ABSTAIN).index_copy(0, rows, label[rows])
        points, fallen = falsified(self.falsifier, model, x, aim, threat, streams)
        status[fallen] = int(Status.FALSIFIED)
        rows = rows[~fallen[rows]]
        asked = margins[rows] <= self.tolerance
        linear = self.margins(model, x[rows], threat.take(rows), label[rows], num_classes, asked)
        margins[rows] = torch.where(asked, torch.maximum(margins[rows], linear), margins[rows])
        return Findings(margins, status, points)

    def losing(self, model: nn.Module, x: Tensor, threat: Lp, label: Tensor, num_classes: int) -> Tensor:
        """Return interval bounds (B, K) of the margins of `label`; -inf where there are none."""
        intervals = IBP(self.tolerance)
        if intervals.supports(threat):
            return intervals.margins(model, x, threat, label, num_classes)
        margins = torch.full((len(x), num_classes), -torch.inf, dtype=torch.float64, device=x.device)
        rows = (label >= 0).nonzero().flatten()
        return margins.index_put((rows, label[rows]), margins.new_tensor(torch.inf))

    def least(self, graph: Graph, model: nn.Module, region: Region, C: Tensor) -> Tensor:
        """Return lower bounds (B, S) of C z over a region by CROWN-IBP, CROWN and alpha-CROWN."""
        cheap = LinearBounds(graph, model, region, C, tighten=False, memory_budget=self.memory_budget)

        def by_crown_ibp(rows: Tensor, C: Tensor, lower: Tensor) -> Tensor:
            return least_of(cheap.take(rows), C, lower)

        found = self._worst_first(cheap.final.lower, C, by_crown_ibp)
        rows = self._undecided(found, C)
        if self.most_neurons is not None:
            rows = rows[cheap.undecided()[rows] <= self.most_neurons]
        if len(rows):
            net = LinearBounds(graph, model, region.take(rows), C[rows], memory_budget=self.memory_budget)

            def by_ascent(rows: Tensor, C: Tensor, lower: Tensor) -> Tensor:
                return self.improved(net.take(rows), C, lower)

            lower = torch.maximum(found[rows], net.final.lower)
            lower = least_of(net, self._unproven(lower, C[rows]), lower)
            found[rows] = self._worst_first(lower, C[rows], by_ascent)
        return found

    def _worst_first(self, lower: Tensor, C: Tensor, improve: Improve) -> Tensor:
        """Return bounds (B, S) improved where they prove nothing; all but the worst only where that could be proven."""
        rows, lower = self._undecided(lower, C), lower.clone()
        worst = lower[rows].masked_fill((C[rows] == 0).all(dim=-1), torch.inf).argmin(dim=1)
        first = improve(rows, C[rows, worst].unsqueeze(1), lower[rows, worst].unsqueeze(1)).squeeze(1)
        lower[rows, worst] = first
        rows = rows[first > self.tolerance]
        lower[rows] = improve(rows, self._unproven(lower[rows], C[rows]), lower[rows])
        return lower

    def _unproven(self, lower: Tensor, C: Tensor) -> Tensor:
        """Return the specification with zeros in the place of what is proven."""
        return C * (lower <= self.tolerance).unsqueeze(2)

    def _undecided(self, lower: Tensor, C: Tensor) -> Tensor:
        own = (C != 0).any(dim=-1)
        return ((lower <= self.tolerance) & own).any(dim=1).nonzero().flatten()
