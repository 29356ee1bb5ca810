"""What attacks and certifiers answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

__all__ = ["AttackResult", "Certificate", "Status"]


@dataclass(frozen=True, eq=False)
class AttackResult:
    """The outcome of one attack on a batch.

    Attributes:
        x_adv: (B, C, H, W) the best input found; the clean input where nothing feasible was found.
        success: bool (B,) the goal is achieved on `x_adv`, not rejected, and `x_adv` lies in the threat.
        distance: float64 (B,) distance to the clean input in the threat's measure; +inf where `success` is False.
        forwards: int64 (B,) forward passes spent on each sample, those that check success included.
        backwards: int64 (B,) backward passes spent on each sample.
        first_success: int64 (B,) forward passes spent when the sample first fell; -1 where it never did.
        parameters: for a parametric threat, the parameters (B, ...) that `x_adv` is rendered from.
    """

    x_adv: Tensor
    success: Tensor
    distance: Tensor
    forwards: Tensor
    backwards: Tensor
    first_success: Tensor
    parameters: Tensor | None = None


class Status(IntEnum):
    """What a certifier found out about a sample's prediction."""

    UNKNOWN = 0
    VERIFIED = 1
    FALSIFIED = 2
    ABSTAINED = 3
    TIMEOUT = 4


@dataclass(frozen=True, eq=False)
class Certificate:
    """The outcome of one certifier on a batch.

    Attributes:
        status: int64 (B,) of `Status`; like `radius` it concerns `prediction`.
        certified: bool (B,) status is VERIFIED, `kind` is not "estimate", and the prediction is the true label.
        radius: float64 (B,) the largest eps this call proved, in the threat's norm; 0 where nothing is proven.
        prediction: int64 (B,) the deployed model's answer on the clean input.
        kind: "deterministic", "probabilistic" (holds with probability `confidence`) or "estimate" (a heuristic).
        confidence: 1 for a deterministic certificate, 1 - alpha for a probabilistic one.
        samples: int64 (B,) random draws spent on each sample.
        estimate: (B,) the radius of a certificate of kind "estimate".
        margins: (B, K) lower bounds of z_y - z_j over the threat; +inf at j = y.
        counterexample: (B, C, H, W) where status is FALSIFIED, an input that shows it.
    """

    status: Tensor
    certified: Tensor
    radius: Tensor
    prediction: Tensor
    kind: str
    confidence: float
    samples: Tensor
    estimate: Tensor | None = None
    margins: Tensor | None = None
    counterexample: Tensor | None = None
