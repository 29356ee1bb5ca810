"""What each sample has spent: forward and backward passes."""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_lite.core.checks import version_of

__all__ = ["Ledger"]


class Ledger:
    """Counts passes for each sample of a batch; payments on behalf of the same rows are summed, and booked together.

    A search asks about the same rows again and again: booking each question cost a tenth of the time of a small net's
    forward pass.

    Args:
        count: samples in the batch.
        device: where the counts live.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._forwards = torch.zeros(count, dtype=torch.int64, device=device)
        self._backwards = self._forwards.clone()
        self._rows, self._version = self._forwards[:0], 0
        self._owed = [0, 0]  # forward and backward passes of each of `_rows` that are not booked yet

    @property
    def forwards(self) -> Tensor:
        """Forward passes spent on each sample, int64 (B,)."""
        self._book()
        return self._forwards

    @property
    def backwards(self) -> Tensor:
        """Backward passes spent on each sample, int64 (B,)."""
        self._book()
        return self._backwards

    def pay(self, rows: Tensor, forwards: int, backwards: int = 0) -> None:
        """Count passes for `rows`, int64 (n,); a row may come several times.

        Raises:
            ValueError: the rows of an earlier payment were changed in place before it was booked.
        """
        version = version_of(rows)
        if rows is not self._rows or version is None or version != self._version:
            self._book()
            self._rows, self._version = rows, -1 if version is None else version
        self._owed[0] += forwards
        self._owed[1] += backwards
        if version is None:
            self._book()

    def _book(self) -> None:
        owed, self._owed = self._owed, [0, 0]
        if self._version >= 0 and any(owed) and version_of(self._rows) != self._version:
            raise ValueError("the rows of a question were changed in place: ask about a new tensor")
        for total, passes in zip((self._forwards, self._backwards), owed, strict=True):
            if passes:
                total.index_add_(0, self._rows, torch.full_like(self._rows, passes))
