"""Balls of one norm inside balls of another."""

from __future__ import annotations

__all__: list[str] = []

ORDER = {"linf": 0.0, "l2": 0.5, "l1": 1.0}  # 1 / p


def inclusion(outer: str, inner: str, dimension: int) -> float:
    """Return the radius of the largest ball in the norm `inner` that lies in the unit ball of the norm `outer`.

    |d|_p <= |d|_q for q <= p, and |d|_p <= dimension^(1/p - 1/q) |d|_q for q >= p (Hoelder).
    """
    return float(dimension ** -max(0.0, ORDER[outer] - ORDER[inner]))
