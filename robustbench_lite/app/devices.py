"""The device of a command: understood before torch is imported, and looked for afterwards."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["check_device", "require_device"]


def check_device(device: Any) -> None:
    """Refuse what names no device.

    Raises:
        ValueError: neither "auto" nor a name such as "cpu", "cuda", "cuda:1" or "mps".
    """
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", str(device)):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:<number>, mps or xpu, got {device!r}")


def require_device(device: str) -> None:
    """Refuse a GPU that this machine does not have.

    Raises:
        ValueError: there is none of this kind, or not as many.
    """
    kind, _, number = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    import torch

    kinds = getattr(torch, kind)
    there_is = torch.backends.mps.is_available() if kind == "mps" else kinds.is_available()
    count = kinds.device_count() if there_is else 0
    if int(number or 0) >= count:
        there = f"PyTorch finds {count} of this kind" if count else f"PyTorch finds no {kind} device on this machine"
        raise ValueError(f"device={device}: {there}; device=cpu runs anywhere, device=auto takes what there is")
