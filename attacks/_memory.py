"""What an attack may hold under the memory budget of its oracle, besides probes (`Oracle.capacity`)."""

from __future__ import annotations

from robustbench_lite.core.oracle import Oracle

__all__ = ["budget", "graphs"]


def budget(oracle: Oracle) -> int:
    """Return the bytes of the budget: the user's, or the default."""
    return oracle._memory.budget


def graphs(oracle: Oracle) -> int:
    """Return the number of points whose graphs for gradients may be alive at a time; 2^62 without a user's budget."""
    return oracle._memory.graphs
