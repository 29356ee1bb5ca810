"""Security curves: the error under attack as the budget grows, in one pass over all budgets.

Source: Biggio and Roli 2017, "Wild Patterns" (1712.03141), for the curves; Demontis et al. 2018, "Why Do Adversarial
Attacks Transfer?" (1809.02861), for the mean error as their summary.
A sample leaves at the first budget that breaks it: the same point breaks it at every larger one, so the curve is
monotone, and each budget is paid for by the samples that still stand. Every budget starts afresh: an attack knows no
warm start, and random starts in the larger ball serve it better than a point that has just failed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.goals import Goal, as_goal
from robustbench_lite.core.models import Model
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Threat

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SecurityCurve", "security_curve"]


@dataclass(frozen=True, eq=False)
class SecurityCurve:
    """The outcome of one attack at n budgets, the first of them 0: the clean error.

    Attributes:
        eps: float64 (n,) the budgets, ascending from 0, in the units of the threat.
        smallest: float64 (B,) the smallest budget that broke each sample; +inf where none did.
        x_adv: (B, C, H, W) the inputs that did; the clean ones where none did.
        forwards: int64 (n, B) forward passes spent at each budget.
        backwards: int64 (n, B) backward passes spent at each budget.
    """

    eps: Tensor
    smallest: Tensor
    x_adv: Tensor
    forwards: Tensor
    backwards: Tensor

    @property
    def success(self) -> Tensor:
        """Whether each sample is broken at each budget, bool (n, B)."""
        return self.smallest <= self.eps.unsqueeze(1)

    @property
    def error(self) -> Tensor:
        """The share of broken samples at each budget, float64 (n,); NaN without samples."""
        return self.success.double().mean(dim=1)

    @property
    def robust_accuracy(self) -> Tensor:
        """The share of samples that stand at each budget, float64 (n,); clean accuracy first."""
        return 1 - self.error

    @property
    def mean_error(self) -> float:
        """The area under the error over [0, largest eps], by trapezoids, divided by the largest eps."""
        if len(self.eps) == 1:
            return float(self.error[0])
        return float(torch.trapezoid(self.error, self.eps) / self.eps[-1])

    def table(self, confidence: float = 0.95) -> pd.DataFrame:
        """Return one row a budget: eps, samples, broken, error, its exact interval, and passes spent.

        Args:
            confidence: of the two-sided Clopper-Pearson interval (low, high) of the error.
        """
        import pandas as pd
        from scipy.stats import binomtest

        broken, count = self.success.sum(dim=1).tolist(), len(self.smallest)
        ranges = [binomtest(k, count).proportion_ci(confidence) if count else (0.0, 1.0) for k in broken]
        return pd.DataFrame(
            {
                "eps": self.eps.tolist(),
                "samples": count,
                "broken": broken,
                "error": self.error.tolist(),
                "low": [float(low) for low, _ in ranges],
                "high": [float(high) for _, high in ranges],
                "forwards": self.forwards.sum(dim=1).tolist(),
                "backwards": self.backwards.sum(dim=1).tolist(),
            }
        )


def security_curve(
    attack: Attack,
    model: Model,
    x: Tensor,
    y: Goal | Tensor,
    threat: Threat,
    eps: Sequence[float | str],
    *,
    max_queries: int | None = None,
    view: Model | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> SecurityCurve:
    """Attack at each budget in turn, from small to large, the samples that still stand.

    Args:
        attack: any attack that supports the threat with a budget.
        model: images (B, C, H, W) to logits (B, K).
        x: clean images (B, C, H, W), within the threat's bounds.
        y: labels int64 (B,), or a goal.
        threat: its own budget is not used, but for rotations and translations, whose budgets are multiples of it.
        eps: the budgets, strictly ascending, numbers or text such as "8/255", in the unit of the threat's `size` (of a
            deformation pixels); 0 is added in front.
        max_queries: forward passes that each sample may spend at each budget.
        view: a differentiable stand-in to take gradients from.
        indices: the samples' names for their random streams, int64 (B,); default 0 .. B - 1.
        generator: the source of randomness, one draw a budget; None: a fresh one with seed 0.
        memory_budget: bytes that questions to the model may take, as for an attack.

    Raises:
        TypeError: images or labels of the wrong type.
        ValueError: budgets that are negative or not ascending, a threat that has no other budgets or that the attack
            does not support, or unfit images, labels or indices.
    """
    budgets = _ascending(eps)
    threats = [threat.resized(budget) for budget in budgets]
    goal, names = as_goal(y), torch.arange(len(x)) if indices is None else indices
    attack._check(x, goal, threats[-1], max_queries, "success", indices)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    smallest = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    x_adv = x.detach().clone()
    forwards = torch.zeros((len(budgets), len(x)), dtype=torch.int64, device=x.device)
    backwards = forwards.clone()
    with Oracle(model, x.detach(), goal, threats[0], memory_budget=memory_budget) as oracle:
        if len(x):
            oracle.judge_clean()
        smallest[oracle.found.fallen], forwards[0] = 0, oracle.forwards
    for i, (budget, sized) in enumerate(zip(budgets[1:], threats[1:], strict=True), start=1):
        rows = smallest.isinf().nonzero().flatten()
        result = attack(
            model,
            x[rows],
            goal.take(rows),
            sized,
            view=view,
            max_queries=max_queries,
            indices=names[rows.to(names.device)],
            generator=source,
            memory_budget=memory_budget,
        )
        fallen = rows[result.success]
        smallest[fallen], x_adv[fallen] = budget, result.x_adv[result.success]
        forwards[i, rows], backwards[i, rows] = result.forwards, result.backwards
    return SecurityCurve(
        torch.tensor(budgets, dtype=torch.float64, device=x.device), smallest, x_adv, forwards, backwards
    )


def _ascending(eps: Sequence[float | str]) -> list[float]:
    budgets = [parse_number(budget) for budget in ([eps] if isinstance(eps, str | float | int) else eps)]
    budgets = budgets if budgets[:1] == [0.0] else [0.0, *budgets]
    if any(not low < high for low, high in itertools.pairwise(budgets)):
        raise ValueError(f"eps must be >= 0 and strictly ascending, got {list(eps)}")
    return budgets
