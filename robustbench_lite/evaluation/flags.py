"""Flags: reasons to doubt a result, each a pure function that returns its evidence and a remedy, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

__all__ = ["Flag", "non_finite", "probabilities", "randomised", "zero_gradients"]


@dataclass(frozen=True)
class Flag:
    """A reason to doubt.

    Attributes:
        id: its name in tables.
        evidence: what was seen.
        remedy: what to do about it.
    """

    id: str
    evidence: str
    remedy: str


def probabilities(outputs: Tensor) -> Flag | None:
    """Raised if every finite row of the model's outputs (B, K) lies in [0, 1] and sums to 1.

    The softmax saturates: attacks on the cross-entropy of a softmax of a softmax see vanishing gradients.
    """
    rows = outputs[outputs.isfinite().all(dim=1)].double()
    if len(rows) == 0 or rows.shape[1] < 2:
        return None
    if bool(((rows >= 0) & (rows <= 1)).all()) and float((rows.sum(dim=1) - 1).abs().max()) < 1e-4:
        evidence = f"all {len(rows)} outputs looked at lie in [0, 1] and sum to 1"
        return Flag(
            "probabilities", evidence, "return logits, before the softmax; or attack the logarithm of the outputs"
        )
    return None


def randomised(first: Tensor, second: Tensor, declared: bool) -> Flag | None:
    """Raised if two calls on the same images gave outputs (B, K) apart by more than rounding, undeclared."""
    if declared:
        return None
    apart = (first.double() - second.double()).abs().nan_to_num(0.0)
    rows = (apart > 1e-4 * first.double().abs().nan_to_num(1.0).clamp_min(1)).any(dim=1)
    if not bool(rows.any()):
        return None
    evidence = f"two calls differ for {int(rows.sum())} of {len(rows)} images, by up to {float(apart.max()):.3g}"
    return Flag(
        "randomised", evidence, "set stochastic = True on the model: success is then a majority over fresh draws"
    )


def zero_gradients(gradients: Tensor) -> Flag | None:
    """Raised if the margin's gradient (B, C, H, W) is exactly zero, or not finite, for more than 5 % of the images."""
    rows = gradients.flatten(1)
    dead = (rows == 0).all(dim=1) | ~rows.isfinite().all(dim=1)
    if float(dead.double().mean()) <= 0.05:
        return None
    evidence = f"the gradient is zero or not finite for {int(dead.sum())} of {len(rows)} clean images"
    return Flag("zero_gradients", evidence, "give the defense an attack_view (BPDA), or attack without gradients")


def non_finite(records: pd.DataFrame) -> Flag | None:
    """Raised if the model answered a finite input with NaN or infinity; such answers count as broken."""
    bad = records[(records["prediction"] == -2).fillna(False) & (records["kind"] != "certifier")]
    if len(bad) == 0:
        return None
    counts = ", ".join(f"{name}: {count}" for name, count in bad["method"].value_counts(sort=False).items())
    evidence = f"outputs are not finite for {bad['sample_hash'].nunique()} samples ({counts})"
    return Flag("non_finite", evidence, "find the overflow or the division by zero; until then these count as errors")
