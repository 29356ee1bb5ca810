"""Mixed-integer linear programmes with bounded variables, solved by HiGHS; lower bounds keep its tolerances off.

What HiGHS tolerates, and what is done about it:

- A row or an integrality that is violated by up to 2e-8 (`FEASIBILITY`) makes the set of points larger, so a minimum
  smaller: sound.
- A dual bound may have reduced costs with the wrong sign, by 2e-9 at most (`DUAL`). The bound is too high by at most
  that times the widths of the variables and of the rows, which are all finite here: so much is taken off it.
- Coefficients up to 1e-9 are dropped (`SMALL`): they are dropped here first, and their rows made as much wider.

Beyond that, HiGHS is trusted.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeWarning, milp

from robustbench_lite.certify._affine import Affine

__all__: list[str] = []

Floats = NDArray[np.float64]

FEASIBILITY = 2e-8  # of rows and integrality; at 1e-8 HiGHS has to mend points, and says so on stdout
DUAL = 2e-9  # HiGHS takes a tenth of FEASIBILITY in mixed-integer programmes
GAP = 1e-8  # absolute gap at which HiGHS calls an incumbent optimal
SMALL = 1e-9
LARGEST = 1e6  # false answers were seen from values of 1e10 on, none at 1e8
OPTIMAL, LIMIT, INFEASIBLE = 0, 1, 2  # the statuses of scipy.optimize.milp


@dataclass(frozen=True)
class Solution:
    """What one call of the solver found.

    Attributes:
        lower: no point of the programme has a smaller value; -inf where the solver did not say.
        point: values of all variables at the best point found; None where there is none.
        finished: it stopped of itself, not at the time limit.
    """

    lower: float
    point: Floats | None
    finished: bool


class Programme:
    """Variables between finite bounds, and rows `value <= 0` over them."""

    def __init__(self) -> None:
        self.lower: Floats = np.empty(0)
        self.upper: Floats = np.empty(0)
        self._integral: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        self._rows: list[tuple[Any, Floats, Floats]] = []
        self._row_widths = 0.0
        self._constraint: LinearConstraint | None = None

    @property
    def is_box(self) -> bool:
        """Whether there are no rows: then `range` is exact."""
        return not self._rows

    def variables(self, lower: Floats, upper: Floats, *, integral: bool = False) -> Affine:
        """Add variables between these bounds, (n,) each, and return them."""
        first, count = len(self.lower), len(lower)
        self._constraint = None
        self.lower = np.concatenate([self.lower, lower])
        self.upper = np.concatenate([self.upper, upper])
        self._integral = np.concatenate([self._integral, np.full(count, integral, dtype=np.uint8)])
        places = (np.arange(count), first + np.arange(count))
        matrix = sparse.csr_array((np.ones(count), places), shape=(count, first + count))
        return Affine(matrix, np.zeros(count))

    def require(self, value: Affine, *, equal: bool = False) -> None:
        """Add the rows value <= 0, or value = 0."""
        self._constraint = None
        matrix = value.matrix.tocsr(copy=True)
        small = np.abs(matrix.data) <= SMALL
        dropped = sparse.csr_array((np.where(small, np.abs(matrix.data), 0.0), matrix.indices, matrix.indptr),
                                   shape=matrix.shape)  # fmt: skip
        columns = matrix.shape[1]
        slack = dropped @ np.maximum(np.abs(self.lower), np.abs(self.upper))[:columns]
        matrix.data[small] = 0.0
        matrix.eliminate_zeros()
        self._row_widths += float(np.abs(matrix) @ (self.upper - self.lower)[:columns] @ np.ones(len(slack)))
        lower = -value.offset - slack if equal else np.full(len(slack), -np.inf)
        self._rows.append((matrix, lower, slack - value.offset))

    @property
    def is_reliable(self) -> bool:
        """Whether all values suit HiGHS's absolute tolerances: with larger ones it calls sound rows infeasible."""
        return bool(max(np.abs(self.lower).max(initial=0.0), np.abs(self.upper).max(initial=0.0)) <= LARGEST)

    def range(self, value: Affine) -> tuple[Floats, Floats]:
        """Return bounds of each entry by the bounds of the variables alone."""
        columns = value.matrix.shape[1]
        lower, upper = self.lower[:columns], self.upper[:columns]
        centre = value.matrix @ ((lower + upper) / 2) + value.offset
        radius = np.abs(value.matrix) @ ((upper - lower) / 2)
        return centre - radius, centre + radius

    @property
    def room(self) -> float:
        """What is taken off every lower bound for HiGHS's dual tolerance."""
        return DUAL * (float((self.upper - self.lower).sum()) + self._row_widths)

    def minimise(
        self,
        value: Affine,
        *,
        relaxed: bool = False,
        seconds: float = math.inf,
        gap: float = 0.0,
        ceiling: float = math.inf,
    ) -> Solution:
        """Minimise a single entry.

        Args:
            value: of one entry.
            relaxed: whether integers may be fractions: a linear programme.
            seconds: time limit.
            gap: relative gap between the best point and the bound at which to stop.
            ceiling: look for points at or below this value only. Where there are none, it is the lower bound. To
                decide whether any exist is far quicker than to find the minimum.
        """
        if seconds <= 0:
            return Solution(-math.inf, None, False)
        value = value.widened(len(self.lower))
        integral = np.zeros_like(self._integral) if relaxed else self._integral
        rows = [part for part in (self._constraints(), _at_most(value, ceiling)) if part is not None]
        found = _solve(value.matrix.toarray()[0], integral, Bounds(self.lower, self.upper), rows, seconds, gap)
        shift, bounds = float(value.offset[0]), []
        if found.status == OPTIMAL:
            bounds.append(found.fun + shift - GAP - gap * abs(found.fun))
        if found.status == INFEASIBLE and ceiling < math.inf:  # without one, the programme contradicts itself
            bounds.append(ceiling)
        if found.mip_dual_bound is not None:
            bounds.append(found.mip_dual_bound + shift)
        lower = min(bounds, default=-math.inf) - self.room
        point = None if found.x is None else np.clip(found.x, self.lower, self.upper)
        return Solution(lower if math.isfinite(lower) else -math.inf, point, found.status != LIMIT)

    def _constraints(self) -> LinearConstraint | None:
        if self._constraint is None and self._rows:
            columns = len(self.lower)
            blocks = [Affine(rows, upper).widened(columns).matrix for rows, _, upper in self._rows]
            ends = [np.concatenate([row[end] for row in self._rows]) for end in (1, 2)]
            self._constraint = LinearConstraint(sparse.vstack(blocks, format="csc"), *ends)
        return self._constraint


def _at_most(value: Affine, ceiling: float) -> LinearConstraint | None:
    return LinearConstraint(value.matrix, -np.inf, ceiling - value.offset) if ceiling < math.inf else None


def _solve(
    cost: Floats, integral: NDArray[np.uint8], bounds: Bounds, rows: list[LinearConstraint], seconds: float, gap: float
) -> Any:
    options: dict[str, Any] = {
        "time_limit": min(seconds, 1e9),
        "mip_rel_gap": gap,
        "mip_abs_gap": GAP,
        "mip_feasibility_tolerance": FEASIBILITY,
        "primal_feasibility_tolerance": DUAL,
        "dual_feasibility_tolerance": DUAL,
    }
    solve: Any = milp  # its stubs know only the options that SciPy documents
    with warnings.catch_warnings():
        # SciPy warns that it hands the others on "verbatim"; an option that HiGHS itself does not know is an error.
        warnings.filterwarnings("ignore", "Unrecognized options detected.*verbatim", RuntimeWarning)
        warnings.filterwarnings("error", category=OptimizeWarning)
        return solve(cost, integrality=integral, bounds=bounds, constraints=rows, options=options)
