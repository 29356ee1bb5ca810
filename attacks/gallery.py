"""A gallery: labelled images of the attacker's own, for attacks that start from an image of another class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._decision import search_start
from robustbench_lite.attacks._purse import Purse
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
        """Draw images of a wanted class until the model agrees, one query each; each sample sees no image twice.

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
        asked = torch.zeros(len(oracle.x), len(self.images), dtype=torch.bool, device=oracle.x.device)

        def draw(rows: Tensor, own: Streams, number: int) -> tuple[Tensor, Tensor]:
            fits = self._wanted(oracle.goal.take(rows)) & ~asked[rows]
            chosen = (own.uniform(len(self.images)) * fits).argmax(dim=1)
            asked[rows, chosen] = True
            return self.images.to(oracle.x)[chosen], fits.gather(1, chosen.unsqueeze(1)).squeeze(1)

        return search_start(oracle, purse, oracle.standing(), streams, draws, draw)

    def _wanted(self, goal: Goal) -> Tensor:
        """Say which images have the target's class, or another one than the true one: bool (n, N)."""
        labels, wanted = self.labels.to(goal.labels.device), goal.labels.unsqueeze(1)
        return labels == wanted if isinstance(goal, Targeted) else labels != wanted
