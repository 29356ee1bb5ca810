"""A trained net deployed in a wrapper: any objective, any wrapper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from robustbench_lite.defenses.base import Batch, Descend, Objective, State, Step, TrainingData, Wrapper

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["Deploy"]


@dataclass(frozen=True)
class Deploy(Objective):
    """Train a net by one objective, put it into a wrapper, and let the wrapper learn what it must.

    Args:
        objective: how the net is trained.
        wrapper: what makes the defense of the trained net: a `Wrapper` class, or a partial of one with its settings.

    Raises:
        TypeError: what `wrapper` makes is no `Wrapper`.
    """

    objective: Objective
    wrapper: Callable[[nn.Module], Wrapper]

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        """Set up the objective."""
        return self.objective.setup(model, data)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the objective's loss."""
        return self.objective.loss(model, batch, step, state, streams)

    def update(
        self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams, descend: Descend
    ) -> Tensor:
        """Learn from one batch as the objective does."""
        return self.objective.update(model, batch, step, state, streams, descend)

    def after_step(self, model: nn.Module, state: Any) -> None:
        """Project as the objective does."""
        self.objective.after_step(model, state)

    def finish(
        self, model: nn.Module, data: TrainingData, state: Any, calibration: TrainingData | None = None
    ) -> nn.Module:
        """Return the wrapper around the trained net, fitted."""
        defense = self.wrapper(self.objective.finish(model, data, state, calibration))
        if not isinstance(defense, Wrapper):
            raise TypeError(f"wrapper must make a defenses.Wrapper, got {type(defense).__name__}")
        defense.to(next(model.parameters()).device).eval()
        defense.fit(data, calibration)
        return defense
