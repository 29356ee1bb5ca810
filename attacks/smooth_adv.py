"""SmoothAdv: projected gradient descent on the soft classifier of a vote under Gaussian noise.

Threat: linf, l2, l1. Access: gradients, of the net inside.
Source: Salman, Yang, Li, Zhang, Zhang, Razenshteyn and Bubeck 2019, "Provably Robust Deep Learning via Adversarially
Trained Smoothed Classifiers" (1906.04584).
Departures: each iterate is judged by the deployed vote, and a sample leaves at its first success; random starts and
restarts, each with draws of its own, are optional; other losses than cross-entropy, linf and l1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.iterative import Ascent, Ball, supports_steps
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.insides import Smoothed
from robustbench_lite.core.losses import Loss, loss_named
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat

__all__ = ["SmoothAdv", "SmoothedGradient"]


@dataclass(frozen=True)
class SmoothedGradient:
    """The gradient of a loss of log mean_i softmax(net(x + sigma e_i)), with draws e_i that a sample keeps for good.

    The draws come from the sample's own stream and are made anew at each call, always the same: nothing has to be kept
    between calls, and no more images are alive at a time than the oracle's memory allows (one sample's at least).

    Attributes:
        samples: draws m of a sample.
        run: names the draws; another run has others.

    Raises:
        ValueError: no sample.
    """

    samples: int
    run: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be a whole number of draws, at least 1, got {self.samples!r}")

    @property
    def access(self) -> Access:
        """Gradients."""
        return Access.GRADIENT

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call: a pass a draw, and the judging."""
        return self.samples + oracle.judge_cost

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the gradient (n, C, H, W), and put the points to the oracle as candidates."""
        defense = oracle.inside(Smoothed)  # type: ignore[type-abstract]
        net, part = _Passes(defense.net, self.samples), max(1, oracle.capacity // self.samples)

        def soft(logits: Tensor, goal: Goal) -> Tensor:
            each = logits.log_softmax(dim=1).reshape(-1, self.samples, logits.shape[1])
            return loss(each.logsumexp(dim=1) - math.log(self.samples), goal)

        gradients = []
        for places in torch.split(torch.arange(len(rows), device=rows.device), part):
            noise = streams.take(places).fork(self.run).normal(self.samples, *points.shape[1:], dtype=points.dtype)

            def noisy(images: Tensor, chunk: slice, shift: Tensor = defense.sigma * noise) -> Tensor:
                return (images.unsqueeze(1) + shift[chunk]).flatten(0, 1)

            asked = points[places], rows[places]
            gradients.append(oracle.gradient(*asked, soft, candidate=False, transform=noisy, through=net)[1])
        oracle.judge(points, rows, loss)
        return torch.cat(gradients)


class _Passes(nn.Module):
    """A net that is asked about several copies of an image at a time, and says what that costs."""

    def __init__(self, net: nn.Module, cost: int) -> None:
        super().__init__()
        self.net, self.cost = net, cost

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


@dataclass(frozen=True)
class SmoothAdv(Attack):
    """PGD on the smoothed soft classifier; each sample's draws are fixed for a whole run.

    Attributes:
        steps: gradient steps in each run.
        samples: draws behind each gradient.
        step_size: length of a step in the units of the images; None: `2 * eps / steps`.
        restarts: runs, each with other draws and, at `random_start`, from another start.
        random_start: start uniformly in the ball; False: at the clean image, as the original does.
        loss: "ce", "margin" or "dlr", of the log of the mean softmax.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    needs: ClassVar[type | None] = Smoothed
    steps: int = 50
    samples: int = 32
    step_size: float | str | None = None
    restarts: int = 1
    random_start: bool = False
    loss: str = "ce"

    def __post_init__(self) -> None:
        if not isinstance(self.restarts, int) or self.restarts < 1:
            raise ValueError(f"restarts must be a whole number, at least 1, got {self.restarts!r}")
        self.ascent(0)  # which checks the other fields

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return supports_steps(threat)

    def ascent(self, run: int) -> Ascent:
        """Return the ascent of one run."""
        return Ascent(
            loss_named(self.loss),
            self.steps,
            path=2.0,
            step_size=self.step_size,
            density=0.05,
            random_start=self.random_start,
            estimator=SmoothedGradient(self.samples, run),
        )

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run the ascents on the samples that still stand."""
        for run in range(self.restarts):
            self.ascent(run).search(oracle, cast(Ball, threat), streams)
        return oracle.best
