"""Expectation over transformation: against a randomised model, gradients that are averages over its draws.

Source: Athalye, Engstrom, Ilyas and Kwok 2017, "Synthesizing Robust Adversarial Examples" (1707.07397); the need for it
against randomised defenses: Athalye, Carlini and Wagner 2018 (1802.00420). `EOT` averages what the model says and has
one loss of it; `ExpectedGradient` averages losses, as the `rand` version of AutoAttack does (2003.01690).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustbench_lite.core.errors import lookup
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.models import Model, forward_passes
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["EOT", "ExpectedGradient"]


def _mean_logits(logits: Tensor) -> Tensor:
    return logits.mean(dim=0)


def _mean_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))


AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {"logits": _mean_logits, "probabilities": _mean_probabilities}


def _check_samples(samples: int) -> None:
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number of draws, at least 1, got {samples!r}")


class EOT(nn.Module):
    """A randomised model averaged over draws: a `view` for any attack.

        PGD()(defense, x, y, threat, view=EOT(defense, samples=30))

    Args:
        model: images (B, C, H, W) to logits (B, K); each call draws afresh.
        samples: draws in one call, all in one graph.
        average: "probabilities" gives the log of the mean probabilities, the soft classifier of a majority vote;
            "logits" the mean logits.

    Attributes:
        cost: the forward passes of one call: `samples` times those of the model.

    Raises:
        ValueError: no sample, or an unknown average.
    """

    def __init__(
        self, model: Model, samples: int = 30, average: Literal["probabilities", "logits"] = "probabilities"
    ) -> None:
        super().__init__()
        _check_samples(samples)
        self._average = lookup(average, AVERAGES, "average")
        self.model, self.samples, self.cost = model, samples, samples * forward_passes(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the averaged logits (B, K)."""
        return self._average(torch.stack([self.model(x) for _ in range(self.samples)]))


@dataclass(frozen=True)
class ExpectedGradient:
    """The mean gradient over draws of a randomised model: that of the expected loss. An estimator for `PGD`.

    Attributes:
        samples: draws for one gradient; only one draw's graph is alive at a time.

    Raises:
        ValueError: no sample.
    """

    samples: int = 20

    def __post_init__(self) -> None:
        _check_samples(self.samples)

    @property
    def access(self) -> Access:
        """Gradients."""
        return Access.GRADIENT

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call."""
        return oracle.gradient_cost + (self.samples - 1) * oracle.probe_cost

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the mean gradient (n, ...); the first draw also judges the points."""
        _, gradient = oracle.gradient(points, rows, loss)
        keep = oracle.still(rows, (self.samples - 1) * oracle.probe_cost)
        for _ in range(self.samples - 1 if len(keep) else 0):
            more = oracle.gradient(points[keep], rows[keep], loss, candidate=False)[1]
            gradient = gradient.index_add(0, keep, more)  # not in place: it can be an expanded tensor
        return gradient / self.samples
