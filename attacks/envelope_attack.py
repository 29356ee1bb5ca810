"""Minimum-norm attack on analysis by synthesis whose latents follow the image.

Threat: linf, l2, l1, l0; with a budget, or without (as near as possible). Access: gradients; the defense must be
`Explaining`.
Source: the defense is that of Schott, Rauber, Bethge and Brendel 2018, "Towards the First Adversarially Robust Neural
Network Model on MNIST" (1805.09190); the walk is `FMN`'s (Pintor, Roli, Brendel and Biggio 2021, 2102.12827). The
gradient is that of the envelope theorem: at the best latents the derivative by them vanishes, so they are held fixed.
A step moves the image a little, and the best latents with it. To go on from the latents of the step before takes a
tenth of the time of a search. They are searched for anew every few steps, and where the defense denies a success that
they show: it alone decides.

An image that is cut to 0 and 1 before it is explained (`BinaryABS`) changes by whole pixels. With latents held fixed
the margin is a sum over pixels, each of which adds what it adds whatever the others do. The points are then the clean
image with those pixels moved across the cut that gain most for what they cost, by gains averaged over the steps; the
search starts from the widest ball, and goes through narrower ones and back until a first success. The gains are exact
where all classes weigh the same (`factors`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._closing_in import Search, soft_margin
from robustbench_lite.attacks.fmn import FMN
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.insides import Explaining
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.models import answers_of, forward_passes
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["EnvelopeAttack"]

BEYOND = 1e-4  # how far a pixel goes past the cut, in the units of the images
KEPT = 0.5  # of the gains of the steps before
QUICKER = 4  # times the share by which radii change: each point is chosen anew, and starts far away
NARROWER, WIDTHS = 0.8, 4.0  # ratio of a radius to the one before, and of the widest to the narrowest, until a success
ROUNDING = 2e-7  # share of a radius: a downward pixel that stops short of the cut has not crossed it
WORTH = 0.02  # share by which a success must be nearer at first to be put to the defense
POWERS = {"l2": 2, "l1": 1, "l0": 0}  # of a pixel's move, which add up


@dataclass(frozen=True)
class EnvelopeAttack(FMN):
    """Steps along envelope gradients at latents that follow, in a ball whose radius closes in on the boundary.

    Deterministic. A step counts as one forward and one backward pass, though it takes a fraction of the time. Of what
    is adversarial the nearest is kept; the last point is judged too.

    Attributes:
        steps: gradient steps.
        alpha_init, alpha_final: as in `FMN`; without effect where images are cut.
        gamma_init, gamma_final: as in `FMN`; four times as much, at most 0.5, where images are cut.
        follow: steps of the latents for each.
        renew: steps between two searches for the latents.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    needs: ClassVar[type | None] = Explaining

    steps: int = 200
    follow: int = 1
    renew: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("follow", "renew"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Search each sample's nearest adversarial example from the clean image."""
        inside = oracle.inside(Explaining)  # type: ignore[type-abstract]
        latents = _Following(inside, self.follow)
        once = forward_passes(latents)
        cost = 2 * once + oracle.judge_cost
        rows = oracle.standing(cost)
        ball = cast(Lp, threat).take(rows)
        search = Search.start(x[rows], ball) if inside.cut is None else _AcrossTheCut.begin(x[rows], ball, inside.cut)
        for step in range(self.steps):
            keep = oracle.still(rows, cost)
            rows, search = rows[keep], search.take(keep)
            if len(rows) == 0:
                break
            share = (1 + math.cos(math.pi * step / self.steps)) / 2
            loss = partial(soft_margin, temperature=share)
            value, slope = latents.ask(oracle, search.points, rows, loss, anew=step % self.renew == 0)
            seeming = latents.fooled(oracle, rows)
            fooled = self._confirmed(oracle, search, rows, seeming, WORTH * share)
            denied = (seeming & ~fooled).nonzero().flatten()
            denied = denied[oracle.still(rows[denied], once)]
            if len(denied):
                value[denied], slope[denied] = latents.ask(oracle, search.points[denied], rows[denied], loss, anew=True)
            search = search.step(fooled, value, slope, *self._sizes(share, search))
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(search.points[keep], rows[keep])
        return oracle.best

    @staticmethod
    def _confirmed(oracle: Oracle, search: Search, rows: Tensor, seeming: Tensor, worth: float) -> Tensor:
        """Return which points count as successes; the defense is asked about those nearer than the best by `worth`."""
        x, threat = oracle.x[rows], cast(Lp, oracle.threat).take(rows)
        best = torch.where(oracle.found.fallen[rows], threat.distance(oracle.best[rows], x), torch.inf)
        ask = (seeming & (threat.distance(search.points, x) < (1 - worth) * best)).nonzero().flatten()
        if len(ask) == 0:
            return seeming
        oracle.judge(search.points[ask], rows[ask])
        return seeming.index_copy(0, ask, oracle.verdict)


class _Following(nn.Module):
    """The logits of a defense at latents that follow the images of a batch, as a question to an oracle.

    Args:
        inside: the defense.
        steps: of the latents, a question.
    """

    cost = 1
    latents: Tensor
    logits: Tensor

    def __init__(self, inside: Explaining, steps: int) -> None:
        super().__init__()
        self.inside, self.steps, self.started = inside, steps, False

    def ask(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, *, anew: bool) -> tuple[Tensor, Tensor]:
        """Return the loss (n,) and its gradient at points whose latents are searched for `anew`, or follow."""

        def told(images: Tensor, part: slice) -> Tensor:
            self.rows, self.anew, self.batch = rows[part], anew, len(oracle.x)
            return images

        return oracle.gradient(points, rows, loss, candidate=False, transform=told, through=self)

    def fooled(self, oracle: Oracle, rows: Tensor) -> Tensor:
        """Return bool (n,) which rows reached the goal when last asked about, by these latents."""
        return oracle.goal.take(rows).achieved(answers_of(self.logits[rows]), oracle.rejects)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, K); the latents are held fixed."""
        images = x.detach()
        if self.anew:
            found = self.inside.explain(images)
        else:
            found = self.inside.follow(images, self.latents[self.rows], self.steps)
        logits = self.inside.logits_at(x, found)
        if not self.started:
            self.latents = found.latents.new_zeros(self.batch, *found.latents.shape[1:])
            self.logits, self.started = logits.new_zeros(self.batch, logits.shape[1]), True
        self.latents[self.rows], self.logits[self.rows] = found.latents, logits.detach()
        return logits


@dataclass(frozen=True, eq=False)
class _AcrossTheCut(Search):
    """Searches among images whose pixels are where they were, or just across the cut.

    `gains` (n, C, H, W) are the averaged slopes of the loss along each pixel.
    """

    gains: Tensor
    cut: float

    @classmethod
    def begin(cls, x: Tensor, threat: Lp, cut: float) -> _AcrossTheCut:
        """Return the search at the clean images, with the widest ball to search next."""
        start = Search.start(x, threat)
        return cls(threat, x, x, start.widest / NARROWER, start.nearest, start.widest, torch.zeros_like(x), cut)

    def take(self, keep: Tensor) -> _AcrossTheCut:
        """Return the searches at these positions."""
        return replace(super().take(keep), gains=self.gains[keep])

    @torch.no_grad()
    def step(
        self, fooled: Tensor, value: Tensor, gradient: Tensor, length: float | Tensor, share: float
    ) -> _AcrossTheCut:
        """Return the searches with another radius, and other pixels within it."""
        share = min(QUICKER * share, 0.5)
        distance = self.threat.distance(self.points, self.x).to(self.radius.dtype)
        nearest = torch.where(fooled, torch.minimum(self.nearest, distance), self.nearest)
        narrower = torch.where(self.radius < self.widest / WIDTHS, self.widest, NARROWER * self.radius)
        if self.threat.norm == "l0":
            radius = torch.where(nearest.isfinite(), self._pixels(fooled, nearest, share), narrower)
        else:
            radius = self._radius(fooled, nearest, share, narrower / (1 + share))
        gains = KEPT * self.gains + gradient
        moved = replace(self, gains=gains, radius=torch.minimum(radius, self.widest), nearest=nearest)
        return replace(moved, points=moved._chosen())

    def _chosen(self) -> Tensor:
        """Return the clean images with those pixels across the cut that gain most for their cost, within the radius."""
        edge = self.x.new_tensor(self.cut)
        up = self.x <= edge
        there = torch.where(up, edge + BEYOND, edge).clamp(*self.threat.bounds)
        gain, way = torch.where(up, self.gains, -self.gains).clamp_min(0).flatten(1), (there - self.x).abs().flatten(1)
        radius = self.radius.unsqueeze(1) * (1 + ROUNDING)
        if self.threat.norm == "linf":
            affordable = way <= radius
        elif self.threat.norm == "l0" and self.threat.per == "pixel":
            pixels = gain.view(len(gain), self.x.shape[1], -1).sum(dim=1)
            affordable = _best_buys(pixels, torch.ones_like(pixels), radius).repeat(1, self.x.shape[1])
        else:
            power = POWERS[self.threat.norm]
            affordable = _best_buys(gain, way**power, radius ** max(1, power))
        return torch.where((affordable & (gain > 0)).view_as(self.x), there, self.x)


def _best_buys(gain: Tensor, cost: Tensor, purse: Tensor) -> Tensor:
    """Return bool (n, m): the entries of most gain for their cost, as many as the purse (n, 1) pays for."""
    order = (gain / cost.clamp_min(BEYOND)).argsort(dim=1, descending=True, stable=True)
    paid = cost.gather(1, order).cumsum(dim=1) <= purse
    return torch.zeros_like(paid).scatter(1, order, paid)
