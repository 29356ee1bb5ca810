"""Ramps of training: how far a hyper-parameter has come from its start to its end."""

from __future__ import annotations

__all__ = ["check_ramp", "ramp"]


def ramp(progress: float, warmup: float, length: float) -> float:
    """Return 0 up to `warmup`, then rise linearly over `length` to 1, and stay there.

    Args:
        progress: share of the training done, in [0, 1].
        warmup: share of the training before the rise.
        length: share of the training that the rise takes; 0 is a jump.

    >>> [ramp(t, 0.25, 0.5) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    if progress < warmup:
        return 0.0
    return min(1.0, (progress - warmup) / length) if length > 0 else 1.0


def check_ramp(warmup: float, length: float) -> None:
    """Check that warm-up and ramp are shares of the training that end within it.

    Raises:
        ValueError: one is negative or NaN, or together they take more than the whole training.
    """
    if not (warmup >= 0 and length >= 0 and warmup + length <= 1):  # so written, NaN is refused
        raise ValueError(
            f"warmup and ramp are shares of the training, >= 0 and together <= 1, got {warmup:g} and {length:g}; "
            "divide numbers of steps by the number of all steps"
        )
