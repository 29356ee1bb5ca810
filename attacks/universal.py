"""Universal perturbations: one change that fools a model on most images, seen or not.

Threat: linf, l2, l1, of one eps for all images. Access: gradients to fit; labels to apply.
Source: Shafahi, Najibi, Xu, Dickerson, Davis and Goldstein 2018, "Universal Adversarial Training" (1811.11304):
ascent on the loss clipped at beta, batch by batch. Universal perturbations are due to Moosavi-Dezfooli, Fawzi, Fawzi
and Frossard 2016 (1610.08401).
Departures: images are clipped to the bounds when the perturbation is applied, and entries that were clipped give no
gradient; the step shrinks linearly to 0; a share of the images is held out, and success is reported on both parts; the
best of several starts, by success on the images it was fitted to, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.checks import check_images, check_labels
from robustbench_lite.core.goals import Goal, as_goal
from robustbench_lite.core.losses import Loss, loss_named
from robustbench_lite.core.models import Model
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["AdamUpdate", "FixedPerturbation", "Perturbation", "SteepestUpdate", "UniversalPerturbation", "Update"]

NORMS = ("linf", "l2", "l1")


class Perturbation(nn.Module):
    """A change (C, H, W) as a buffer: stored results name it by its fingerprint, as they name a model."""

    delta: Tensor

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.register_buffer("delta", delta.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x + delta, (B, C, H, W), not clipped.

        Raises:
            ValueError: images of another shape.
        """
        if x.shape[1:] != self.delta.shape:
            raise ValueError(f"this perturbation is for images {tuple(self.delta.shape)}, got {tuple(x.shape[1:])}")
        return x + self.delta.to(x)


@dataclass(frozen=True)
class FixedPerturbation(Attack):
    """Adds one perturbation to every image, and projects on the threat: one query.

    >>> attack = FixedPerturbation(Perturbation(torch.full((1, 2, 2), 0.25)))
    >>> x, label = torch.full((1, 1, 2, 2), 0.3), torch.tensor([0])
    >>> brightness = lambda x: torch.stack([torch.full((len(x),), 0.5), x.mean((1, 2, 3))], dim=1)
    >>> attack(brightness, x, label, Lp("linf", 0.25)).success.item()
    True

    Attributes:
        perturbation: the change.
        training_success: share of the images it was fitted to that it fools, those wrong without it included; None
            where it was not fitted.
        held_out_success: the same on images that were held out.
    """

    perturbation: Perturbation
    training_success: float | None = field(default=None, repr=False)
    held_out_success: float | None = field(default=None, repr=False)

    @property
    def access(self) -> Access:
        """Labels are enough."""
        return Access.LABEL

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball; without a budget the change is applied whole."""
        return isinstance(threat, Lp) and threat.norm in NORMS

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Try the perturbation."""
        points = self.perturbation(x)
        points = points.clamp(*threat.bounds) if threat.size is None else threat.project(points, x)
        rows = oracle.standing(oracle.judge_cost)
        if len(rows):
            oracle.judge(points[rows], rows)
        return oracle.best


Direction = Callable[[Tensor], Tensor]
"""The mean gradient (1, C, H, W) to a direction, about as long as the unit ball is wide; it may keep a state."""


class Update(Protocol):
    """How steps are made of gradients: settings, from which each run starts a `Direction` of its own."""

    def start(self, ball: Lp) -> Direction:
        """Return the direction of one run in `ball`."""


@dataclass(frozen=True)
class SteepestUpdate:
    """Steps along the ball's steepest direction: the sign for linf, the normalised gradient for l2.

    Attributes:
        density: for l1, the share of the entries that a step moves.
    """

    density: float = 0.05

    def start(self, ball: Lp) -> Direction:
        """Return the direction of one run in `ball`."""
        return lambda gradient: ball.steepest(gradient, self.density)


@dataclass(frozen=True)
class AdamUpdate:
    """Adam on the entries of the perturbation (Kingma and Ba 2014, 1412.6980), with its usual constants.

    For linf: it moves all entries alike, which spends an l2 or l1 budget badly.

    Raises:
        ValueError: on the start of a run in an l2 or l1 ball.
    """

    def start(self, ball: Lp) -> Direction:
        """Return the direction of one run in `ball`."""
        if ball.norm != "linf":
            raise ValueError(f"AdamUpdate is for linf, got {ball.norm}: use SteepestUpdate")
        mean, square, count = torch.zeros(()), torch.zeros(()), 0

        def direction(gradient: Tensor) -> Tensor:
            nonlocal mean, square, count
            count += 1
            mean = 0.9 * mean.to(gradient) + 0.1 * gradient
            square = 0.999 * square.to(gradient) + 0.001 * gradient.square()
            root = (square / (1 - 0.999**count)).sqrt()
            return mean / (1 - 0.9**count) / (root + torch.finfo(root.dtype).tiny)

        return direction


@dataclass(frozen=True)
class UniversalPerturbation:
    """Fits a universal perturbation; the attack is the `FixedPerturbation` that `fit` returns.

    Attributes:
        epochs: passes over the images.
        batch_size: images in each step.
        path: total length of the steps as a multiple of eps; they shrink linearly to 0.
        update: how steps are made of gradients.
        loss: "ce", "margin" or "dlr".
        beta: where the loss of an image is clipped, so that no few images rule the step.
        held_out: share of the images that is kept to report on.
        starts: runs from random points of the ball; 1: one run from 0.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    epochs: int = 10
    batch_size: int = 100
    path: float = 5.0
    update: Update = field(default_factory=SteepestUpdate)
    loss: str = "ce"
    beta: float = 9.0
    held_out: float = 0.2
    starts: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "starts"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not self.path > 0:
            raise ValueError(f"path must be > 0, got {self.path}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        loss_named(self.loss)

    def clipped_loss(self) -> Loss:
        """Return the loss that is ascended: min(loss, beta) for each image."""
        loss = loss_named(self.loss)
        return lambda logits, goal: loss(logits, goal).clamp_max(self.beta)

    def fit(
        self,
        model: Model,
        images: Tensor,
        labels: Goal | Tensor,
        threat: Threat,
        *,
        view: Model | None = None,
        generator: torch.Generator | None = None,
        memory_budget: int | None = None,
    ) -> FixedPerturbation:
        """Fit on all images but those held out.

        The model is frozen as in an attack, and left as it was found.

        Args:
            model: images (B, C, H, W) to logits (B, K).
            images: (N, C, H, W).
            labels: the goal, or the true labels int64 (N,).
            threat: an linf, l2 or l1 ball with one eps.
            view: a differentiable stand-in to take gradients from.
            generator: the source of randomness, one draw; None: a fresh one with seed 0.
            memory_budget: bytes that questions to the model may take, as for an attack.

        Returns:
            The attack, with its success on both parts; `held_out_success` is None where nothing was held out.

        Raises:
            ValueError: another threat, no image left to fit to, or images or labels out of range.
        """
        goal = as_goal(labels)
        if not (isinstance(threat, Lp) and threat.norm in NORMS and isinstance(threat.eps, float)):
            raise ValueError(f"a universal perturbation needs an linf, l2 or l1 ball with one eps, got {threat}")
        check_images(images, threat.bounds)
        check_labels(goal.labels, images)
        threat.check_fits(images)
        kept = len(images) - round(self.held_out * len(images))
        if kept < 1:
            raise ValueError(f"no image is left to fit to: {len(images)} images with held_out={self.held_out}")
        streams = Streams.from_generator(generator, torch.zeros(1, dtype=torch.int64), images.device)
        order = _shuffled(len(images), streams)
        fitted, rest = order[:kept], order[kept:]
        x, goal_fitted = images[fitted].detach(), goal.take(fitted)
        tries = []
        for _ in range(self.starts):
            with Oracle(model, x, goal_fitted, threat, view=view, memory_budget=memory_budget) as oracle:
                attack = FixedPerturbation(Perturbation(self._ascend(oracle, threat, streams)))
            tries.append((_success(attack, model, x, goal_fitted, threat, memory_budget), attack))
        success, attack = max(tries, key=lambda pair: pair[0])
        if len(rest) == 0:
            return FixedPerturbation(attack.perturbation, success)
        held_out = _success(attack, model, images[rest], goal.take(rest), threat, memory_budget)
        return FixedPerturbation(attack.perturbation, success, held_out)

    def _ascend(self, oracle: Oracle, threat: Lp, streams: Streams) -> Tensor:
        """Run over the batches of the oracle's images, and return the perturbation (C, H, W)."""
        x = oracle.x
        ball = Lp(threat.norm, threat.eps, (threat.bounds[0] - threat.bounds[1], threat.bounds[1] - threat.bounds[0]))
        zero = torch.zeros_like(x[:1])
        delta = zero if self.starts == 1 else ball.random_point(zero, streams)
        direction, loss = self.update.start(ball), self.clipped_loss()
        total, done = self.epochs * math.ceil(len(x) / self.batch_size), 0
        for _ in range(self.epochs):
            for rows in torch.split(_shuffled(len(x), streams), self.batch_size):
                moved = x[rows] + delta
                points = moved.clamp(*threat.bounds)
                gradient = oracle.gradient(points, rows, loss, candidate=False)[1]
                mean = (gradient * (points == moved)).mean(dim=0, keepdim=True)
                length = 2 * self.path * ball.radius(x) / total * (1 - (done + 0.5) / total)
                delta = ball.project(delta + length * direction(mean), zero)
                done += 1
        return delta[0]


def _shuffled(count: int, streams: Streams) -> Tensor:
    return streams.uniform(count, dtype=torch.float64)[0].argsort()


def _success(
    attack: FixedPerturbation, model: Model, images: Tensor, goal: Goal, threat: Threat, memory_budget: int | None
) -> float:
    """Return the share of images that the attack fools, those wrong without it included."""
    return attack(model, images, goal, threat, memory_budget=memory_budget).success.double().mean().item()
