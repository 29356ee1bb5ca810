"""What has to hold before votes are taken or read."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.models import Model
from robustbench_lite.core.threats import TOLERANCE, Lp

if TYPE_CHECKING:
    from robustbench_lite.certify.smoothing_certifier import SmoothingCertifier

__all__: list[str] = []


def check_settings(certifier: SmoothingCertifier) -> None:
    """Check the numbers that all certificates by votes have in common, and that every float is a number.

    Raises:
        ValueError: one that makes no sense.
    """
    for name in ("n0", "n"):
        check_count(name, getattr(certifier, name), "draws")
    for field in fields(certifier):
        value = getattr(certifier, field.name)
        if field.type == "float" and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"{field.name} must be a number, got {value!r}")
    if not 0 < certifier.alpha < 1:
        raise ValueError(
            f"alpha must lie in (0, 1), got {certifier.alpha}: it is the probability of a wrong certificate"
        )
    if certifier.memory_budget is not None and certifier.memory_budget < 1:
        raise ValueError(f"a memory budget is a number of bytes, at least 1, got {certifier.memory_budget}")


def check_count(name: str, value: object, what: str) -> None:
    """Check that `value` is a whole number, at least 1.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of {what}, at least 1, got {value!r}")


def check_finite(model: Model) -> None:
    """Check that all parameters of a module are finite: the votes of a broken net would count against every class.

    Raises:
        ValueError: one is not.
    """
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise ValueError(f"the parameter {name!r} of the model holds NaN or infinity: it cannot be certified")


def check_votes(certifier: SmoothingCertifier, votes: Votes, threat: Lp) -> Tensor:
    """Check that a certifier can read votes for a threat, and return stand-ins (B, C, H, W) for the images.

    Raises:
        ValueError: a threat that the certifier does not support or that does not fit the images, or votes on copies
            that were corrupted with something else.
    """
    if not certifier.supports(threat):
        raise ValueError(f"{certifier} does not support the threat {threat}")
    if votes.source != certifier.source:
        raise ValueError(f"{certifier} reads votes under {certifier.source}, got votes under {votes.source}")
    blank = torch.zeros((), dtype=torch.float64, device=votes.counts.device)
    images = blank.expand(len(votes.counts), *votes.shape)  # of one value: no memory
    threat.check_fits(images)
    return images


def budget(threat: Lp, count: int) -> NDArray[np.float64]:
    """Return eps, float64 (B,); l0 counts whole pixels, with the tolerance that decides membership in the threat."""
    eps = threat.eps.double().cpu().numpy() if isinstance(threat.eps, Tensor) else np.float64(threat.eps or 0.0)
    eps = np.broadcast_to(eps, count)
    return np.array(np.floor(eps + TOLERANCE * np.maximum(eps, 1)) if threat.norm == "l0" else eps)
