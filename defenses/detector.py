"""The base of defenses that refuse what looks suspicious."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.core.models import ABSTAIN, INVALID, labels_of
from robustbench_lite.defenses.base import TrainingData, Wrapper

__all__ = ["Detector"]

CHUNK = 500  # images scored at a time while the threshold is set


class Detector(Wrapper):
    """A wrapper that answers `ABSTAIN` where the suspicion score of an input exceeds a threshold.

    A subclass writes `answer`, and `learn` if it has anything to learn before the threshold is set.

    Args:
        net: the net inside.
        fpr: share of clean held-out inputs that may be rejected; `calibrate` sets the threshold by it.

    Attributes:
        threshold: the largest score that is accepted, a scalar; NaN until `fit` or `calibrate`.

    Raises:
        ValueError: fpr outside (0, 1).
    """

    rejects: ClassVar[bool] = True
    threshold: Tensor

    def __init__(self, net: nn.Module, fpr: float = 0.05) -> None:
        super().__init__()
        if not 0 < fpr < 1:
            raise ValueError(f"fpr is the share of clean inputs that may be rejected, in (0, 1), got {fpr:g}")
        self.net, self.fpr = net, fpr
        self.register_buffer("threshold", torch.tensor(torch.nan))

    @abstractmethod
    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and suspicion scores (B,), larger for what looks less like data."""

    def learn(self, data: TrainingData) -> None:
        """Learn from the training data what the score needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K).

        Raises:
            ValueError: the threshold was never set.
        """
        if not torch.compiler.is_compiling():
            self._require_threshold()
        return self.answer(x)[0]

    def predict(self, x: Tensor) -> Tensor:
        """Return labels, int64 (B,): `ABSTAIN` where the score exceeds the threshold, `INVALID` where not finite.

        Raises:
            ValueError: the threshold was never set.
        """
        self._require_threshold()
        logits, score = self._checked(self.answer, x)
        labels = torch.where(score > self.threshold, ABSTAIN, labels_of(logits))
        return torch.where(score.isfinite() & logits.isfinite().all(dim=1), labels, INVALID)

    def fit(self, data: TrainingData, calibration: TrainingData | None) -> None:
        """Learn from `data`, then set the threshold by `calibration`.

        Raises:
            ValueError: no calibration samples, or too few for the rate.
        """
        if calibration is None:
            raise ValueError(f"{type(self).__name__} sets its threshold by held-out samples: give calibration=...")
        self.learn(data)
        self.calibrate(calibration)

    @torch.no_grad()
    def calibrate(self, data: TrainingData, fpr: float | None = None) -> None:
        """Set the threshold so that at most the share `fpr` (default: the detector's own) of `data` is rejected.

        Raises:
            ValueError: too few samples to tell the rate.
        """
        rate, device = self.fpr if fpr is None else fpr, self.threshold.device
        allowed = math.floor(rate * len(data.images))
        if allowed < 1:
            raise ValueError(
                f"a false-positive rate of {rate:g} needs at least {math.ceil(1 / rate)} calibration samples, got "
                f"{len(data.images)}"
            )
        scores = torch.cat([self.answer(part.to(device))[1] for part in torch.split(data.images, CHUNK)])
        self.threshold.copy_(scores.sort(descending=True).values[allowed])

    def _require_threshold(self) -> None:
        if self.threshold.isnan():
            raise ValueError(f"{type(self).__name__} has no threshold yet: call fit(data, calibration) first")
