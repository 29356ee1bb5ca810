"""Memory that runs out: how it is recognised, what is given back, and how a question is cut until it fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["fitting", "in_chunks", "ran_out", "release"]

T = TypeVar("T")

_SIGNS = (  # how allocators and libraries say it in a RuntimeError
    "not enough memory",
    "defaultcpuallocator",
    "out of memory",
    "cannot allocate memory",
    "alloc_failed",
)


def ran_out(error: BaseException | None) -> bool:
    """Say whether an error, or one that it came from, means that there was not enough memory, on any device."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def release() -> None:
    """Give back what a failed attempt has left: graphs in reference cycles, and blocks that a GPU's allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting(ask: Callable[[int], T], size: int) -> T:
    """Return `ask(size)`; with half of the size, again and again, while there is not enough memory.

    Raises:
        Exception: what `ask` raises otherwise, or at a size of 1.
    """
    while True:
        try:
            return ask(size)
        except Exception as error:
            if size <= 1 or not ran_out(error):
                raise
        release()  # not before the error is gone, which holds the frames of the attempt
        size = (size + 1) // 2


def in_chunks(ask: Callable[[slice], Tensor], count: int) -> Tensor:
    """Return the answers about positions 0 .. count - 1, all at once, or in chunks that fit in memory."""
    return fitting(lambda size: torch.cat([ask(slice(a, a + size)) for a in range(0, count, size)]), count)
