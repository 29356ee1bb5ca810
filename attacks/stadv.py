"""stAdv: spatially transformed adversarial examples, by a penalty on how rough the flow is.

Threat: deformations, with or without a budget. Access: gradients.
Source: Xiao, Zhu, Li, He, Liu and Song 2018, "Spatially Transformed Adversarial Examples" (1801.02612). The flow loss
is the paper's, sum_p sum_{q next to p} sqrt(||flow_p - flow_q||^2 + 1e-8) over the 4 neighbours, so each pair counts
twice (implementations with diagonal neighbours, or with one root over the whole field, are other losses).
Departures: Adam in place of L-BFGS, whose curvature pairs and line search would have to be kept for each sample; the
penalty is on the flow, which a smooth threat already smooths; under a budget each iterate is projected on it, and a
sample leaves at its first success. Without a budget all steps are taken, and the nearest success is kept: once a sample
has fallen by more than kappa only the penalty acts, and draws it back to the boundary.
tau weighs pixels against logits. On a net with small margins the paper's 0.05 fells few samples, which says little
about the net: try a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import margin
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import Deformation
from robustbench_lite.core.threats import Threat

__all__ = ["FLOW_LOSSES", "STAdv", "paper_flow_loss"]

KEEP, KEEP_SQUARE = 0.9, 0.999  # Adam's shares of the running means (Kingma and Ba 2014, 1412.6980)


def paper_flow_loss(flow: Tensor) -> Tensor:
    """Return the roughness (B,) of flows (B, 2, H, W): the lengths of their differences between neighbours, summed."""
    return 2 * (_lengths(flow.diff(dim=2)) + _lengths(flow.diff(dim=3)))


def _lengths(difference: Tensor) -> Tensor:
    return (difference.square().sum(dim=1) + 1e-8).sqrt().flatten(1).sum(dim=1)


FLOW_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"paper": paper_flow_loss}


@dataclass(frozen=True)
class STAdv(Attack):
    """Minimise max(-margin, -kappa) + tau * flow loss over the raw field, from no change.

    Attributes:
        steps: steps of Adam.
        step_size: Adam's step in pixels.
        tau: weight of the flow loss.
        kappa: margin beyond which the attack loss asks for no more.
        flow_loss: "paper", the form of the flow loss.

    Raises:
        ValueError: a setting out of range.
    """

    steps: int = 100
    step_size: float | str = 0.2
    tau: float = 0.05
    kappa: float = 0.0
    flow_loss: str = "paper"

    def __post_init__(self) -> None:
        lookup(self.flow_loss, FLOW_LOSSES, "flow loss")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")
        if not parse_number(self.step_size) > 0:
            raise ValueError(f"step_size must be > 0 pixels, got {self.step_size}")
        for name in ("tau", "kappa"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is a deformation."""
        return isinstance(threat, Deformation)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Take the steps, each sample with running means of its own."""
        assert isinstance(threat, Deformation)
        rows = oracle.standing(oracle.gradient_cost)
        raw = threat.origin(x[rows])
        mean, square = torch.zeros_like(raw), torch.zeros_like(raw)
        for step in range(1, self.steps + 1):
            if (step - 1) % oracle.compact_every == 0:
                keep = oracle.still(rows, oracle.gradient_cost)
                rows, raw, mean, square = rows[keep], raw[keep], mean[keep], square[keep]
            if len(rows) == 0:
                return oracle.best
            slope = self._penalty_slope(threat, raw) - oracle.gradient(raw, rows, self._loss)[1]
            mean = KEEP * mean + (1 - KEEP) * slope
            square = KEEP_SQUARE * square + (1 - KEEP_SQUARE) * slope.square()
            spread = (square / (1 - KEEP_SQUARE**step)).sqrt() + 1e-8
            raw = raw - parse_number(self.step_size) / (1 - KEEP**step) * mean / spread
            raw = raw if threat.size is None else threat.project(raw, x[rows])
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(raw[keep], rows[keep], self._loss)
        return oracle.best

    def _loss(self, logits: Tensor, goal: Goal) -> Tensor:
        return margin(logits, goal).clamp_max(self.kappa)

    def _penalty_slope(self, threat: Deformation, raw: Tensor) -> Tensor:
        leaf = raw.detach().requires_grad_()
        with torch.enable_grad():
            penalty = self.tau * FLOW_LOSSES[self.flow_loss](threat.flow(leaf)).sum()
        return torch.autograd.grad(penalty, leaf)[0]
