"""Translation invariance: gradients smoothed in space, which stand for those at shifted copies of the image.

Threat: linf, l2, l1. Access: gradients.
Source: Dong, Pang, Su and Zhu 2019, "Evading Defenses to Transferable Adversarial Examples by Translation-Invariant
Attacks" (1904.02884); momentum 1 is their TI-MIM, `diversity=True` besides that TI-DIM.
Departures: each sample keeps its best iterate and leaves at its first success.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.attacks.difgsm import InputDiversity
from robustbench_lite.attacks.iterative import Ascent, Autograd, Estimator, IterativeAttack
from robustbench_lite.core.losses import Loss, loss_named
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["TIFGSM", "TranslationInvariant"]


@dataclass(frozen=True)
class TranslationInvariant:
    """The gradients of another estimator, smoothed by a Gaussian window, with zeros beyond the border.

    Attributes:
        inner: where the gradients come from.
        kernel_size: pixels along the side of the window, an odd number.
        deviations: standard deviations from the window's centre to the centre of its last pixel.

    Raises:
        ValueError: an even or non-positive kernel size, or deviations that are not positive.
    """

    inner: Estimator = field(default_factory=Autograd)
    kernel_size: int = 15
    deviations: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.kernel_size, int) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number of pixels, got {self.kernel_size!r}")
        if not self.deviations > 0:
            raise ValueError(f"deviations must be > 0, got {self.deviations}")

    @property
    def access(self) -> Access:
        """What the inner estimator needs."""
        return self.inner.access

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of the inner estimator."""
        return self.inner.cost(oracle)

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the smoothed gradient (n, C, H, W)."""
        gradient = self.inner(oracle, points, rows, loss, streams)
        kernel = self.kernel(gradient).reshape(1, 1, -1, 1)
        reach = self.kernel_size // 2
        flat = gradient.reshape(-1, 1, *gradient.shape[-2:])
        flat = F.conv2d(F.conv2d(flat, kernel, padding=(reach, 0)), kernel.mT, padding=(0, reach))
        return flat.reshape(gradient.shape)

    def kernel(self, like: Tensor) -> Tensor:
        """Return the window along one axis, (kernel_size,), which sums to 1."""
        places = torch.linspace(-self.deviations, self.deviations, self.kernel_size, dtype=like.dtype)
        window = torch.exp(-0.5 * places**2) if self.kernel_size > 1 else torch.ones(1, dtype=like.dtype)
        return (window / window.sum()).to(like.device)


@dataclass(frozen=True)
class TIFGSM(IterativeAttack):
    """The translation-invariant iterative fast gradient sign method.

    Attributes:
        steps: gradient steps.
        step_size: length of a step in the units of the images; None: `eps / steps`.
        kernel_size: pixels along the side of the Gaussian window, an odd number; the original's 15 is for images of
            299 pixels.
        momentum: the share of the last direction that is kept.
        diversity: take the gradients at randomly resized and padded copies (`InputDiversity`).
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 10
    step_size: float | str | None = None
    kernel_size: int = 15
    momentum: float = 0.0
    diversity: bool = False
    loss: str = "ce"
    density: float = 0.05

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        inner: Estimator = InputDiversity() if self.diversity else Autograd()
        return Ascent(
            loss_named(self.loss),
            self.steps,
            path=1.0,
            step_size=self.step_size,
            density=self.density,
            momentum=self.momentum,
            estimator=TranslationInvariant(inner, self.kernel_size),
        )
