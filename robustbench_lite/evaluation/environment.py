"""Under which versions a result came about. Recorded with every file, never part of an identity."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

__all__ = ["environment"]

_PACKAGES = ("robustbench_lite", "torch", "torchvision", "numpy", "scipy", "foolbox")


@cache
def environment() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on; imports none of them."""
    return {"python": platform.python_version(), "machine": platform.machine()} | {p: _version(p) for p in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
