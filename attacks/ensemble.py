"""Several nets as one: what an attack that must transfer is crafted on.

Source: Liu, Chen, Liu and Song 2016, "Delving into Transferable Adversarial Examples and Black-box Attacks"
(1611.02770), who average probabilities; Dong et al. 2017, "Boosting Adversarial Attacks with Momentum" (1710.06081),
who compare that with averages of logits and of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite.core.errors import suggest
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import Loss, margin
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.threats import Threat

__all__ = ["Ensemble"]

COMBINATIONS = ("logits", "probabilities", "losses")


class Ensemble(nn.Module):
    """A weighted average of nets, from images (B, C, H, W) to logits (B, K).

    - "logits": the average of the logits.
    - "probabilities": the logarithm of the averaged softmax, so that its cross-entropy is -log of the mean probability.
    - "losses": no logits have the average of the nets' losses as their loss. The logits are then the average of the
      nets' log-probabilities, and `oracle` gives an oracle whose losses are averaged over the nets, exactly.

    Args:
        members: nets with the same classes.
        combine: one of the three.
        weights: one positive number a net, scaled to sum 1; None: equal ones.

    Raises:
        ValueError: no nets, an unknown combination, or weights that are not one positive number a net.
        TypeError: a member is no `nn.Module`.
    """

    def __init__(
        self, members: Sequence[nn.Module], combine: str = "logits", weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if combine not in COMBINATIONS:
            raise ValueError(suggest(combine, COMBINATIONS, "combination of surrogates"))
        if not members:
            raise ValueError("an ensemble needs at least one net")
        for member in members:
            if not isinstance(member, nn.Module):
                raise TypeError(f"the nets of an ensemble must be nn.Modules, got {type(member).__name__}")
        given = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(members) or not all(weight > 0 and math.isfinite(weight) for weight in given):
            raise ValueError(f"weights must be one positive number for each of the {len(members)} nets, got {weights}")
        self.members, self.combine = nn.ModuleList(members), combine
        self.weights = [weight / sum(given) for weight in given]

    def forward(self, x: Tensor) -> Tensor:
        """Return the combined logits (B, K)."""
        return self.combined(self.answers(x))

    def answers(self, x: Tensor) -> list[Tensor]:
        """Return the logits (B, K) of each net.

        Raises:
            ValueError: nets with different numbers of classes.
        """
        answers = [member(x) for member in self.members]
        if len({answer.shape for answer in answers}) > 1:
            raise ValueError(f"the nets must have the same classes, got {[tuple(a.shape) for a in answers]} logits")
        return answers

    def combined(self, answers: Sequence[Tensor]) -> Tensor:
        """Return the combined logits of the nets' logits, (B, K) each."""
        if self.combine == "logits":
            return self.average(answers)
        logs = [answer.log_softmax(dim=1) for answer in answers]
        if self.combine == "losses":
            return self.average(logs)
        shifted = [log + math.log(weight) for log, weight in zip(logs, self.weights, strict=True)]
        return torch.stack(shifted).logsumexp(dim=0)

    def average(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the weighted average of one tensor a net."""
        return sum((w * part for w, part in zip(self.weights, parts, strict=True)), torch.zeros_like(parts[0]))

    def oracle(self, x: Tensor, goal: Goal, threat: Threat, **settings: Any) -> Oracle:
        """Return an oracle about this ensemble; with "losses", each loss is averaged over the nets.

        Args:
            x: clean images (B, C, H, W).
            goal: what counts as success: on the combined logits.
            threat: where points must lie.
            settings: as of `Oracle`.
        """
        kind = _MeanLossOracle if self.combine == "losses" else Oracle
        model = _SideBySide(self) if self.combine == "losses" else self
        return kind(model, x, goal, threat, **settings)


class _SideBySide(nn.Module):
    """The combined logits, and beside them each net's: (B, K + M K).

    Each net's logits are shifted below the largest combined one, which no loss notices that is a function of
    differences of logits (all of ours are), so that the largest of all is still the answer of the ensemble.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Tensor) -> Tensor:
        answers = self.ensemble.answers(x)
        combined = self.ensemble.combined(answers)
        top = combined.detach().amax(dim=1, keepdim=True)
        shifted = [answer - (answer.detach().amax(dim=1, keepdim=True) - top + 1) for answer in answers]
        return torch.cat([combined, *shifted], dim=1)


class _MeanLossOracle(Oracle):
    """Averages losses over the nets of a `_SideBySide`; an attack that asks for logits gets the combined ones."""

    @property
    def _ensemble(self) -> Ensemble:
        assert isinstance(self._model, _SideBySide)
        return self._model.ensemble

    def _own(self, side_by_side: Tensor) -> Tensor:
        """Return the combined logits (n, K) alone."""
        return side_by_side[:, : side_by_side.shape[1] // (len(self._ensemble.members) + 1)]

    def _loss(self, loss: Loss) -> Loss:
        def averaged(logits: Tensor, goal: Goal) -> Tensor:
            parts = logits.chunk(len(self._ensemble.members) + 1, dim=1)[1:]
            return self._ensemble.average([loss(part, goal) for part in parts])

        return averaged

    def gradient(self, points: Tensor, rows: Tensor, loss: Loss, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return super().gradient(points, rows, self._loss(loss), *args, **more)

    def curvature(self, points: Tensor, rows: Tensor, loss: Loss, directions: Tensor) -> Tensor:
        return super().curvature(points, rows, self._loss(loss), directions)

    def pullback(
        self, points: Tensor, rows: Tensor, loss: Loss = margin, **more: Any
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        logits, pull = super().pullback(points, rows, self._loss(loss), **more)

        def pull_combined(weights: Tensor) -> Tensor:
            others = logits.shape[1] - weights.shape[1]
            return pull(torch.nn.functional.pad(weights, (0, others)))

        return self._own(logits), pull_combined

    def _scores(self, points: Tensor, rows: Tensor, loss: Loss, *args: Any, **more: Any) -> Tensor:
        return self._own(super()._scores(points, rows, self._loss(loss), *args, **more))
