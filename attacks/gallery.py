"""A gallery: labelled images of the attacker's own, for attacks that start from an image of another class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._decision import Purse
from robustbench_lite.core.checks import check_images
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams

__all__ = ["Gallery"]


@dataclass(frozen=True, eq=False, repr=False)
class Gallery:
    """Images that an attacker has, and their labels.

    Attributes:
        images: (N, C, H, W).
        labels: int64 (N,).

    Raises:
        ValueError: no image at all, or shapes that do not fit each other.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                "a gallery has images (N, C, H, W) and labels (N,), got shapes "
                f"{tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            )
        if len(self.images) == 0:
            raise ValueError("a gallery needs at least one image")
        if not bool(self.images.isfinite().all()):
            raise ValueError("the images of a gallery must be finite")

    def __repr__(self) -> str:
        return f"Gallery({len(self.images)} images)"

    def start(self, oracle: Oracle, purse: Purse, streams: Streams, draws: int) -> tuple[Tensor, Tensor]:
        """Draw images of a wanted class until the model agrees, one query each.

        Returns:
            The rows that have such an image, int64 (n,), and the images (n, C, H, W).

        Raises:
            ValueError: images of another shape than the oracle's, or outside its bounds.
        """
        check_images(self.images, oracle.threat.bounds)
        if self.images.shape[1:] != oracle.x.shape[1:]:
            raise ValueError(
                f"the gallery's images must have shape {tuple(oracle.x.shape[1:])}, got {tuple(self.images.shape[1:])}"
            )
        starts, found = oracle.x.clone(), torch.zeros_like(oracle.found.fallen)
        rows = oracle.standing()
        for _ in range(draws):
            rows = rows[purse.still(rows)]
            points, wanted = self._draw(oracle.goal.take(rows), oracle.x, streams.take(rows))
            rows, points = rows[wanted], points[wanted]
            if len(rows) == 0:
                break
            oracle.labels(points, rows)
            hit = oracle.verdict
            starts[rows[hit]], found[rows[hit]] = points[hit], True
            rows = rows[~hit]
        rows = found.nonzero().flatten()
        rows = rows[purse.still(rows)]
        return rows, starts[rows]

    def _draw(self, goal: Goal, like: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Draw an image of the target, or of a class other than the true one, and say whether there is any."""
        labels, wanted = self.labels.to(like.device), goal.labels.unsqueeze(1)
        fits = labels == wanted if isinstance(goal, Targeted) else labels != wanted
        chosen = (streams.uniform(len(labels)) * fits).argmax(dim=1)
        return self.images.to(like)[chosen], fits.gather(1, chosen.unsqueeze(1)).squeeze(1)
