"""Switch off what would make a bound coarser than its dtype: autocast, and TF32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__: list[str] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run without autocast and, on CUDA, without TF32 (10 bits of mantissa); settings are restored.

    Convolutions use TF32 by default there, which puts float32 bounds off by 1e-3 of their size. A backward pass that
    runs after the block is not covered: gradients need no soundness.
    """
    if device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        yield
        return
    cudnn: Any = torch.backends.cudnn  # stubs do not know its `conv`
    settings = (cudnn.conv, torch.backends.cuda.matmul) if device.type == "cuda" else ()
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
