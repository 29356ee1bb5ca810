"""The inner maximum of divergence-regularised training: the inputs whose prediction lies farthest from the clean one.

An attack's loss is a function of logits and goal, so the clean logits travel in the goal: it is cut to rows and chunks
with the labels, and nothing outlives the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from robustbench_lite.attacks.iterative import Ascent, Ball, IterativeAttack
from robustbench_lite.core.goals import Goal, Untargeted

if TYPE_CHECKING:
    from robustbench_lite.core.oracle import Oracle
    from robustbench_lite.core.rng import Streams
    from robustbench_lite.core.threats import Threat

__all__ = ["DivergenceAscent", "FarFrom", "kl_divergence"]


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(softmax(p) || softmax(q)), (B,), of logits (B, K)."""
    log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


@dataclass(frozen=True, eq=False)
class FarFrom(Untargeted):
    """Be far from what the clean images were answered. No label is a success: the largest divergence is what counts.

    Attributes:
        clean: logits (B, K) of the clean images.
    """

    clean: Tensor

    def achieved(self, prediction: Tensor, rejects: bool = False) -> Tensor:
        """Return bool (B,), False."""
        return torch.zeros_like(prediction, dtype=torch.bool)

    def take(self, keep: Tensor | slice) -> FarFrom:
        """Return the goal of these rows."""
        return FarFrom(self.labels[keep], self.clean[keep])


def _divergence(logits: Tensor, goal: Goal) -> Tensor:
    return kl_divergence(cast(FarFrom, goal).clean, logits)


@dataclass(frozen=True)
class DivergenceAscent(IterativeAttack):
    """Projected ascent of KL(p(x) || p(x')) for the goal `FarFrom`, from a small normal start.

    The divergence has a minimum, and so no gradient, at the clean image itself.

    Attributes:
        steps: gradient steps.
        step_size: length of a step in the units of the images; None: 2.5 * eps / steps.
        sigma: standard deviation of the start, in the units of the images.
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 10
    step_size: float | str | None = None
    sigma: float = 1e-3
    density: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma is the standard deviation of the start, > 0, got {self.sigma:g}")

    def ascent(self) -> Ascent:
        """Return the ascent of one run."""
        return Ascent(_divergence, self.steps, path=2.5, step_size=self.step_size, density=self.density)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Ascend from the start, once."""
        noise = self.sigma * streams.normal(*x.shape[1:], dtype=x.dtype)
        self.ascent()(oracle, cast(Ball, threat), oracle.standing(), threat.project(x + noise, x), streams)
        return oracle.best
