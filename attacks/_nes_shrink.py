"""The ball that shrinks around the clean image, while an attack keeps its target among the classes that are seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustbench_lite.attacks._nes_search import State
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Lp

__all__ = ["FIRST_CUT", "Shown", "Shrink"]

Shown = Callable[[Oracle, Tensor, Tensor, Tensor, bool], Tensor]
"""Points (n, C, H, W), their rows, their targets and whether they are candidates, to bool (n,): the target is seen."""

# Shares of the image range: the first cut of eps that is tried; the least one after a success; the least of all.
FIRST_CUT, NEXT_CUT, LEAST_CUT = 0.5, 0.1, 2e-3


@dataclass(frozen=True)
class Shrink:
    """The search for a step and a smaller ball that keep the target in sight, with one question for each try.

    First shorter steps are tried, down to the least length, then half the cut of eps, and full steps again. A sample
    for which nothing does stays where it is.

    Attributes:
        threshold: eps is cut while the loss is below this.
        conservative: eps is cut by the accepted cut over this.

    Raises:
        ValueError: a setting out of range.
    """

    threshold: float
    conservative: float

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be > 0, got {self.threshold}")
        if not self.conservative >= 1:
            raise ValueError(f"conservative must be at least 1, got {self.conservative}")

    def __call__(
        self, oracle: Oracle, purse: Purse, threat: Lp, rows: Tensor, state: State, step: Tensor, shown: Shown
    ) -> State:
        """Return the state after the search.

        Args:
            oracle: of the whole batch.
            purse: says who can pay.
            threat: an linf ball, of the whole batch.
            rows: int64 (n,).
            state: "points", "target", "value" (the loss), "eps", "goal_eps", "cut", "rate", "least" and "window".
            step: full steps (n, C, H, W).
            shown: asks whether the target is seen.
        """
        state, span = dict(state), threat.bounds[1] - threat.bounds[0]
        due = (state["value"] < self.threshold) & (state["eps"] > state["goal_eps"])
        cut, share = torch.where(due, state["cut"], 0), torch.ones_like(state["eps"])
        pending = torch.arange(len(rows), device=rows.device)
        while True:
            pending = pending[purse.still(rows[pending], oracle.scores_cost)]
            if len(pending) == 0:
                return state
            radius = torch.maximum(state["eps"] - cut, state["goal_eps"])[pending]
            points = state["points"][pending] + _column(share[pending], step) * step[pending]
            points = replace(threat, eps=radius).project(points, oracle.x[rows[pending]])
            inside = radius <= state["goal_eps"][pending]
            good = _ask(oracle, points, rows[pending], state["target"][pending], inside, shown)
            self._accept(state, pending[good], points[good], cut, NEXT_CUT * span)
            pending = pending[~good]
            shorter = ((state["rate"] * share >= 2 * state["least"]) & (state["rate"] > 0))[pending]
            hopeless = ~shorter & (cut[pending] == 0)
            smaller = torch.where(cut[pending] / 2 < LEAST_CUT * span, 0, cut[pending] / 2)
            cut[pending] = torch.where(shorter, cut[pending], smaller)
            share[pending] = torch.where(shorter, share[pending] / 2, 1)
            pending = pending[~hopeless]

    def _accept(self, state: State, at: Tensor, points: Tensor, cut: Tensor, next_cut: float) -> None:
        """Move the samples at these positions; a cut that was made empties the window of losses."""
        made = cut[at]
        fresh = {
            "points": points,
            "eps": torch.maximum(state["eps"][at] - made / self.conservative, state["goal_eps"][at]),
            "cut": torch.where(made > 0, made.clamp_min(next_cut), state["cut"][at]),
            "window": state["window"][at].masked_fill((made > 0).unsqueeze(1), torch.nan),
        }
        state.update({name: state[name].index_copy(0, at, tensor) for name, tensor in fresh.items()})


def _column(share: Tensor, like: Tensor) -> Tensor:
    return share.to(like.dtype).reshape(-1, 1, 1, 1)


def _ask(oracle: Oracle, points: Tensor, rows: Tensor, target: Tensor, inside: Tensor, shown: Shown) -> Tensor:
    """Ask whether targets are seen; points outside the threat are no candidates, and cost less to judge."""
    seen = torch.zeros_like(inside)
    for candidate in (True, False):
        part = (inside == candidate).nonzero().flatten()
        if len(part):
            seen[part] = shown(oracle, points[part], rows[part], target[part], candidate)
    return seen
