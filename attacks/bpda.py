"""BPDA: a step of a defense that has no useful gradient borrows one from a stand-in.

Source: Athalye, Carlini and Wagner 2018, "Obfuscated Gradients Give a False Sense of Security" (1802.00420).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BPDA"]

Step = Callable[[Tensor], Tensor]


class BPDA(nn.Module):
    """Backward pass differentiable approximation: computes `forward`, differentiates `backward`.

    Put it where the step stands, and give the whole to an attack as its `view`:

        view = nn.Sequential(BPDA(quantise), net)
        PGD()(defense, x, y, threat, view=view)

    Args:
        forward: the step as deployed.
        backward: a differentiable function close to it, of the same output shape; None: the identity.

    Raises:
        TypeError: a function that cannot be called.
    """

    def __init__(self, forward: Step, backward: Step | None = None) -> None:
        super().__init__()
        for what, step in (("forward", forward), ("backward", backward)):
            if step is not None and not callable(step):
                raise TypeError(f"{what} must be a function of images, got {type(step).__name__}")
        self.exact, self.smooth = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        """Return `forward(x)`, with the gradient of `backward`.

        Raises:
            ValueError: the two answers differ in shape.
        """
        with torch.no_grad():
            value = self.exact(x)
        stand_in = x if self.smooth is None else self.smooth(x)
        if value.shape != stand_in.shape:
            raise ValueError(
                f"BPDA: forward gives shape {tuple(value.shape)}, backward {tuple(stand_in.shape)}; they must agree"
            )
        substituted: Tensor = _Substitute.apply(value, stand_in)
        return substituted


class _Substitute(torch.autograd.Function):
    """The first value, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.to(stand_in.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        return None, slopes[0]
