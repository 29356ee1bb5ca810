"""Bandits with priors: a gradient that is learnt from two queries a step, and remembered from step to step, in tiles.

Threat: linf, l2. Access: scores.
Source: Ilyas, Engstrom and Madry 2018, "Prior Convictions: Black-Box Adversarial Attacks with Bandits and Priors"
(1807.07978). The defaults are the authors' settings for ImageNet, pixels in [0, 1]: finite differences of l2 length
0.1 (linf) or 0.01 (l2), exploration 1 or 0.01, online rate 100 or 0.1, image steps of 0.01 at linf eps 0.05 and of 0.5
at l2 eps 5 (here shares of eps: 1/5, 1/10), 50 tiles along a side (4.5 to 6 pixels each; here 4 pixels).
Departures: tiles at the right and lower edge are cut to the image; losses are computed in float64; the check of the new
point, which the original does not count, is a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import cross_entropy
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Bandits"]

PUBLISHED = {  # finite difference, exploration, online rate, image step as a share of eps
    "linf": {"fd_eta": 0.1, "exploration": 1.0, "online_lr": 100.0, "share": 0.2},
    "l2": {"fd_eta": 0.01, "exploration": 0.01, "online_lr": 0.1, "share": 0.1},
}
ALMOST_ONE = 1 - 1e-6  # a prior of exactly 1 could never turn back


@dataclass(frozen=True)
class Bandits(Attack):
    """Steps along a prior of the gradient, which two mirrored queries a step correct.

    Attributes:
        tile: side of the prior's tiles, in pixels; 1: no data prior.
        fd_eta: l2 length of the finite differences, in the units of the images; None: 0.1 for linf, 0.01 for l2, which
            is for bounds (0, 1).
        exploration: length of the noise around the prior; None: 1 for linf, 0.01 for l2.
        online_lr: learning rate of the prior; None: 100 for linf (exponentiated gradient), 0.1 for l2 (gradient).
        image_lr: length of an image step in the threat's norm, in the units of the images; None: eps / 5 for linf,
            eps / 10 for l2.
        queries: most forward passes for a sample, the clean check aside.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    tile: int = 4
    fd_eta: float | str | None = None
    exploration: float | None = None
    online_lr: float | None = None
    image_lr: float | str | None = None
    queries: int = 10_000

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or self.tile < 1:
            raise ValueError(f"tile must be a whole number of pixels, at least 1, got {self.tile!r}")
        for name in ("fd_eta", "exploration", "online_lr", "image_lr"):
            value = getattr(self, name)
            if value is not None and not parse_number(value) > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if not isinstance(self.queries, int) or self.queries < 4:
            raise ValueError(f"queries must be a whole number, at least 4, got {self.queries!r}")

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf or l2 ball with a budget."""
        return isinstance(threat, Lp) and threat.norm in PUBLISHED and threat.eps is not None

    @torch.no_grad()
    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Correct the prior by two queries, step along it, and judge the new point."""
        threat, cost, purse = cast(Lp, threat), 2 + oracle.scores_cost, Purse(oracle, self.queries)
        rows = purse.standing(cost)
        points, prior = x[rows], _tiled_zeros(x[rows], self.tile)
        for step in range(self.queries // cost):
            if step % purse.compact_every == 0:
                keep = purse.still(rows, cost)
                if len(keep) < len(rows):
                    rows, points, prior = rows[keep], points[keep], prior[keep]
            if len(rows) == 0:
                break
            noise = streams.take(rows).normal(*prior.shape[1:], dtype=x.dtype)
            prior = self._correct(oracle, threat.norm, points, rows, prior, noise / prior.shape[1:].numel() ** 0.5)
            ball = threat.take(rows)
            length = self._image_step(ball, points)
            points = ball.project(points + length * ball.steepest(_untile(prior, points, self.tile)), x[rows])
            oracle.scores(points, rows, cross_entropy)
        return oracle.best

    def _correct(self, oracle: Oracle, norm: str, points: Tensor, rows: Tensor, prior: Tensor, noise: Tensor) -> Tensor:
        """Return the prior after a step along its noise, by the difference of the loss on both sides of the prior."""
        fd_eta, exploration = self._setting("fd_eta", norm), self._setting("exploration", norm)
        up, down = (self._probe(oracle, points, rows, prior + side * exploration * noise, fd_eta) for side in (1, -1))
        slope = ((up - down) / (fd_eta * exploration)).nan_to_num(0, 0, 0).to(prior.dtype).reshape(-1, 1, 1, 1)
        step = self._setting("online_lr", norm) * slope * exploration * noise
        if norm == "l2":
            return prior + step
        # Exponentiated gradient on [-1, 1]: (1 + p) / (1 - p) grows by exp(2 * step).
        return torch.tanh(torch.atanh(prior.clamp(-ALMOST_ONE, ALMOST_ONE)) + step)

    def _probe(self, oracle: Oracle, points: Tensor, rows: Tensor, direction: Tensor, fd_eta: float) -> Tensor:
        """Return the loss (n,), in float64, at l2 length `fd_eta` from the points along a prior."""
        image = _untile(direction, points, self.tile)
        length = image.flatten(1).norm(dim=1).clamp_min(torch.finfo(image.dtype).tiny).reshape(-1, 1, 1, 1)
        logits = oracle.scores(points + fd_eta * image / length, rows, candidate=False)
        return cross_entropy(logits.double(), oracle.goal.take(rows))

    def _setting(self, name: str, norm: str) -> float:
        value = getattr(self, name)
        return PUBLISHED[norm][name] if value is None else parse_number(value)

    def _image_step(self, ball: Lp, points: Tensor) -> Tensor:
        if self.image_lr is None:
            return ball.radius(points) * PUBLISHED[ball.norm]["share"]
        return torch.full_like(points[:1, :1, :1, :1], parse_number(self.image_lr))


def _tiled_zeros(images: Tensor, tile: int) -> Tensor:
    """Return zeros, one for each tile of images (n, C, H, W)."""
    count, channels, height, width = images.shape
    return images.new_zeros(count, channels, -(-height // tile), -(-width // tile))


def _untile(tiles: Tensor, images: Tensor, tile: int) -> Tensor:
    """Return (n, C, H, W): each pixel has the value of its tile."""
    height, width = images.shape[2:]
    return tiles.repeat_interleave(tile, dim=2)[:, :, :height].repeat_interleave(tile, dim=3)[:, :, :, :width]
