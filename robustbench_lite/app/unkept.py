"""What cannot be written: an error of its own for a full disk, a note where the store is only meant to be read."""

from __future__ import annotations

import errno

__all__ = ["is_read_only", "unkept"]

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_read_only(error: OSError) -> bool:
    """Whether the place may be read but not written, so that nothing that was there is lost."""
    return error.errno in _READ_ONLY


def unkept(what: str, error: OSError) -> str:
    """Return the message for something that could not be written."""
    return f"{what} could not be kept: {error.strerror or error}"
