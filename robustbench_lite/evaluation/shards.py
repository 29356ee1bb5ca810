"""Shards: which samples of an evaluation each of several processes takes.

They are dealt out by batches, in a cascade by units of work (`Samples.in_batches`): what a sample meets does not depend
on who computes it. Each shard takes batches that follow each other, so that most files are read by one shard alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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


def share(pieces: np.ndarray[Any, Any], shard: int, shards: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which samples belong to a shard, bool (N,); none for some shards where there are fewer pieces.

    Args:
        pieces: the batch, or unit, of each sample of the evaluation, int64 (N,).
        shard: from 0 to shards - 1.
        shards: how many there are.
    """
    numbers, number = np.unique(pieces, return_inverse=True)
    mine: np.ndarray[Any, np.dtype[np.bool_]] = number * shards // len(numbers) == shard
    return mine
