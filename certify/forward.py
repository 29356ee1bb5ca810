"""Forward passes that may not touch the images they are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_lite.core.checks import check_untouched

__all__: list[str] = []


def answer(ask: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return what a model, or its `predict`, answers about a copy of images `x`.

    Raises:
        ValueError: it changes its input in place.
    """
    with torch.inference_mode(False):  # inference tensors do not count their changes
        images = x.clone()
    version = images._version
    found = ask(images)
    check_untouched(images, version)
    return found
