"""Shards: which samples of an evaluation each of several processes takes.

The unit is a batch, cut at fixed indices as blocks are (`cells.batch_of`): what a sample meets does not depend on who
computes it. Each shard takes batches that follow each other, so that most blocks have one writer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from robustbench_lite.evaluation.cells import BLOCK, batch_of, block_of

__all__ = ["check_shard", "check_shards", "share"]


def check_shards(shards: Any) -> None:
    """Refuse what is no number of shards.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ValueError(f"shards must be a whole number of at least 1, got {shards!r}")


def check_shard(shard: Any, shards: int) -> None:
    """Refuse what is no number of a shard.

    Raises:
        ValueError: not a whole number from 0 to shards - 1.
    """
    if isinstance(shard, bool) or not isinstance(shard, int) or not 0 <= shard < shards:
        raise ValueError(f"with shards={shards} a shard is a whole number from 0 to {shards - 1}, got {shard!r}")


def share(
    indices: np.ndarray[Any, Any], shard: int, shards: int, batch_size: int
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which samples belong to a shard, bool (N,); none where there are fewer batches than shards before it.

    Args:
        indices: dataset indices of all samples of the evaluation, int64 (N,).
        shard: from 0 to shards - 1.
        shards: how many there are.
        batch_size: of the evaluation.
    """
    units, unit = np.unique(block_of(indices) * BLOCK + batch_of(indices, batch_size), return_inverse=True)
    mine: np.ndarray[Any, np.dtype[np.bool_]] = unit * shards // len(units) == shard
    return mine
