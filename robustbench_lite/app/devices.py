"""The device of a command: understood before torch is imported, and looked for afterwards."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["check_device", "require_device", "use_own_gpu"]


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


def use_own_gpu(device: str, number: int) -> None:
    """Make one GPU of several on this machine the current one of the process, in turn by the number of its job.

    Nothing changes where the device is named by number, and where the launcher has left one visible GPU to each job,
    as Ray and Slurm do.

    Args:
        device: as configured; it exists.
        number: of the job.
    """
    if device not in ("auto", "cuda"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 1:
        torch.cuda.set_device(number % count)
