"""Input diversity: gradients at randomly resized and padded copies, which transfer better to other models.

Threat: linf, l2, l1. Access: gradients.
Source: Xie, Zhang, Zhou, Bai, Wang, Ren and Yuille 2018, "Improving Transferability of Adversarial Examples with Input
Diversity" (1803.06978): with probability 0.5 an image is resized to a random side in 299 .. 329 and padded at random
to 330; with momentum 1 this is their M-DI2-FGSM.
Departures: the padded image is resized back, so that nets of a fixed input size can be attacked (both resizings are one
bilinear sampling; the original's is nearest-neighbour). Padding is the middle of the image bounds: 0 in the original's
[-1, 1]. Each sample has draws of its own, keeps its best iterate as the deployed model judges it unchanged, and leaves
at its first success.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_lite.attacks.iterative import Ascent, IterativeAttack
from robustbench_lite.core.losses import Loss, loss_named
from robustbench_lite.core.oracle import Access, Oracle, Transform
from robustbench_lite.core.rng import Streams

__all__ = ["DIFGSM", "InputDiversity", "resize_and_pad"]


@dataclass(frozen=True)
class InputDiversity:
    """The gradient at a randomly resized and padded copy of each image.

    Attributes:
        probability: how often a copy is changed at all.
        scale: side of the padded image over that of the image; 330 / 299 in the original.

    Raises:
        ValueError: a probability outside [0, 1], or a scale below 1.
    """

    probability: float = 0.5
    scale: float = 1.1

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")
        if not (math.isfinite(self.scale) and self.scale >= 1):
            raise ValueError(f"scale must be at least 1, got {self.scale}")

    @property
    def access(self) -> Access:
        """Gradients."""
        return Access.GRADIENT

    def cost(self, oracle: Oracle) -> int:
        """Return the forward passes of one call: the point is judged as it is, its copy is a probe."""
        return oracle.judge_cost + oracle.probe_cost

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        """Return the gradient (n, C, H, W) at the copies, 0 for samples that fall at the point itself."""
        draws = streams.uniform(4, dtype=points.dtype)
        oracle.judge(points, rows, loss)
        keep = oracle.still(rows, oracle.probe_cost)
        gradient = torch.zeros_like(points)
        if len(keep):
            _, slope = oracle.gradient(
                points[keep], rows[keep], loss, candidate=False, transform=self._transform(oracle, draws[keep])
            )
            gradient[keep] = slope
        return gradient

    def _transform(self, oracle: Oracle, draws: Tensor) -> Transform:
        middle = sum(oracle.threat.bounds) / 2

        def transform(images: Tensor, part: slice) -> Tensor:
            changed = (draws[part, :1] < self.probability).reshape(-1, 1, 1, 1)
            return torch.where(changed, resize_and_pad(images, draws[part, 1:], self.scale, middle), images)

        return transform


def resize_and_pad(x: Tensor, draws: Tensor, scale: float, padding: float) -> Tensor:
    """Resize images, pad them to `scale` times their size, and resize that back; differentiable in `x`.

    Args:
        x: images (n, C, H, W).
        draws: (n, 3) in [0, 1): the new height, which is whole and below that of the padded image (the width keeps the
            proportions), then the shares of the padding below and to the right.
        scale: size of the padded image over that of the image; rounded up to whole pixels.
        padding: the value around the image.
    """
    sides = x.new_tensor([x.shape[-2], x.shape[-1]])
    canvas = (sides * scale - 1e-6).ceil()
    height = sides[0] + (draws[:, 0] * (canvas[0] - sides[0])).floor()
    resized = torch.stack([height, height * sides[1] / sides[0]], dim=1)
    offset = (draws[:, 1:] * (canvas - resized + 1).clamp_min(1)).floor()
    places = []
    for axis in range(2):
        centre = torch.arange(int(sides[axis]), dtype=x.dtype, device=x.device) + 0.5
        ratio = (canvas[axis] / resized[:, axis]).unsqueeze(1)
        start = (offset[:, axis] * sides[axis] / resized[:, axis]).unsqueeze(1)
        places.append(2 * (centre * ratio - start) / sides[axis] - 1)
    rows, columns = places
    grid = torch.stack(
        [columns.unsqueeze(1).expand(-1, x.shape[-2], -1), rows.unsqueeze(2).expand(-1, -1, x.shape[-1])], dim=-1
    )
    return F.grid_sample(x - padding, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + padding


@dataclass(frozen=True)
class DIFGSM(IterativeAttack):
    """The diverse-inputs iterative fast gradient sign method.

    Attributes:
        steps: gradient steps.
        step_size: length of a step in the units of the images; None: `1.25 * eps / steps`, which at 20 steps and eps
            16/255 is the original's 1/255.
        probability: how often an image is changed before its gradient is taken.
        scale: side of the padded image over that of the image.
        momentum: the share of the last direction that is kept; 1 for M-DI2-FGSM.
        loss: "ce", "margin" or "dlr".
        density: for l1, the share of the coordinates that a step moves.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 20
    step_size: float | str | None = None
    probability: float = 0.5
    scale: float = 1.1
    momentum: float = 0.0
    loss: str = "ce"
    density: float = 0.05

    def ascent(self) -> Ascent:
        """Return the ascent that this attack runs."""
        return Ascent(
            loss_named(self.loss),
            self.steps,
            path=1.25,
            step_size=self.step_size,
            density=self.density,
            momentum=self.momentum,
            estimator=InputDiversity(self.probability, self.scale),
        )
