"""The loop that NES and SPSA share: judge the point, estimate the gradient there, take a step, each on its own budget.

A sample's state (momenta, step sizes, windows of losses) is a dictionary of tensors with one row a sample; the frozen
`Update` says how a step follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks._score_estimator import ScoreEstimator
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.losses import Loss
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

__all__ = ["Adam", "PlateauSteps", "State", "Update", "check_queries", "check_rates", "climb", "take"]

State = dict[str, Tensor]


class Update(Protocol):
    """A rule for steps."""

    def start(self, x: Tensor, threat: Lp) -> State:
        """Return the state of samples at the beginning."""

    def __call__(
        self, state: State, points: Tensor, value: Tensor, gradient: Tensor, threat: Lp
    ) -> tuple[State, Tensor]:
        """Return the next state and the step (n, C, H, W), from points, their loss (n,) and its gradient."""


def take(keep: Tensor, rows: Tensor, state: State) -> tuple[Tensor, State]:
    """Return the rows and the state at these positions; all of them, as they are, where none has left."""
    if len(keep) == len(rows):
        return rows, state
    return rows[keep], {name: tensor[keep] for name, tensor in state.items()}


def climb(
    oracle: Oracle,
    threat: Lp,
    streams: Streams,
    *,
    loss: Loss,
    estimator: ScoreEstimator,
    update: Update,
    queries: int,
) -> None:
    """Climb from the clean images until each sample has fallen or has spent its budget; the oracle keeps what is found.

    Args:
        oracle: of the whole batch.
        threat: an Lp ball with a budget.
        streams: of the whole batch.
        loss: the function to ascend.
        estimator: where gradients come from.
        update: how a step follows from them.
        queries: forward passes that each sample may spend here.
    """
    purse, probes = Purse(oracle, queries), estimator.probes(oracle)
    rows = oracle.standing(oracle.scores_cost)
    state = update.start(oracle.x[rows], threat.take(rows)) | {"points": oracle.x[rows]}
    while True:
        rows, state = take(purse.still(rows, oracle.scores_cost), rows, state)
        if len(rows) == 0:
            return
        state["value"] = estimator.judge(oracle, state["points"], rows, loss)
        rows, state = take(purse.still(rows, probes), rows, state)
        if len(rows) == 0:
            return
        points, value, ball = state["points"], state["value"], threat.take(rows)
        gradient = estimator.estimate(oracle, points, rows, loss, value, streams.take(rows))
        state, step = update(state, points, value, gradient, ball)
        state["points"] = ball.project(points + step, oracle.x[rows])


@dataclass(frozen=True)
class PlateauSteps:
    """Momentum and steepest steps, whose length is cut whenever the loss has not risen over a window of steps.

    Attributes:
        lr: length of the first steps, in the units of the images; None: a fifth of eps.
        min_lr: length below which it is not cut; None: the share `floor` of eps.
        momentum: share of the old direction in the new one.
        plateau_length: losses in a window.
        plateau_drop: what the length is divided by.
        floor: the default of min_lr, as a share of eps.
    """

    lr: float | str | None
    min_lr: float | str | None
    momentum: float
    plateau_length: int
    plateau_drop: float
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_rates(self.lr, self.min_lr)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not isinstance(self.plateau_length, int) or self.plateau_length < 2:
            raise ValueError(f"plateau_length must be a whole number, at least 2, got {self.plateau_length!r}")
        if not self.plateau_drop > 1:
            raise ValueError(f"plateau_drop must be > 1, got {self.plateau_drop}")

    def start(self, x: Tensor, threat: Lp) -> State:
        """Return no direction, full steps and empty windows."""
        radius = threat.radius(x).reshape(-1).expand(len(x)).double()
        return {
            "velocity": torch.zeros_like(x),
            "rate": radius / 5 if self.lr is None else torch.full_like(radius, parse_number(self.lr)),
            "least": radius * self.floor if self.min_lr is None else torch.full_like(radius, parse_number(self.min_lr)),
            "window": radius.new_full((len(x), self.plateau_length), torch.nan),
        }

    def __call__(
        self, state: State, points: Tensor, value: Tensor, gradient: Tensor, threat: Lp
    ) -> tuple[State, Tensor]:
        """Return a step of the norm's steepest direction along the averaged gradient."""
        velocity = self.momentum * state["velocity"] + (1 - self.momentum) * gradient
        # A window that is not full yet has NaN as its oldest loss, and no comparison with NaN holds.
        window = torch.cat([state["window"][:, 1:], value.unsqueeze(1)], dim=1)
        flat = window[:, -1] < window[:, 0]
        rate = torch.where(flat, torch.maximum(state["rate"] / self.plateau_drop, state["least"]), state["rate"])
        window = window.masked_fill(flat.unsqueeze(1), torch.nan)
        step = rate.to(points.dtype).reshape(-1, 1, 1, 1) * threat.steepest(velocity, at=points)
        return state | {"velocity": velocity, "rate": rate, "window": window}, step


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2014, 1412.6980), each coordinate with a step size of its own.

    Attributes:
        lr: the step size, in the units of the images; None: a third of eps.
    """

    lr: float | str | None

    def __post_init__(self) -> None:
        check_rates(self.lr, None)

    def start(self, x: Tensor, threat: Lp) -> State:
        """Return moments of zero."""
        radius = threat.radius(x).expand(len(x), 1, 1, 1)
        return {
            "rate": radius / 3 if self.lr is None else torch.full_like(radius, parse_number(self.lr)),
            "mean": torch.zeros_like(x),
            "square": torch.zeros_like(x),
            "time": torch.zeros_like(radius),
        }

    def __call__(
        self, state: State, points: Tensor, value: Tensor, gradient: Tensor, threat: Lp
    ) -> tuple[State, Tensor]:
        """Return the bias-corrected mean over the root of the bias-corrected mean square, times the rate."""
        time = state["time"] + 1
        mean = 0.9 * state["mean"] + 0.1 * gradient
        square = 0.999 * state["square"] + 0.001 * gradient.square()
        root = (square / (1 - 0.999**time)).sqrt()
        step = state["rate"] * (mean / (1 - 0.9**time)) / (root + 1e-8)
        return state | {"mean": mean, "square": square, "time": time}, step


def check_rates(lr: float | str | None, min_lr: float | str | None) -> None:
    """Check step lengths.

    Raises:
        ValueError: one that is not positive.
    """
    for name, value in (("lr", lr), ("min_lr", min_lr)):
        if value is not None and not parse_number(value) > 0:
            raise ValueError(f"{name} must be > 0, got {value}; for pixel units write '2/255'")


def check_queries(queries: int) -> None:
    """Check a budget of forward passes.

    Raises:
        ValueError: not a whole number, or below 1.
    """
    if not isinstance(queries, int) or queries < 1:
        raise ValueError(f"queries must be a whole number, at least 1, got {queries!r}")
