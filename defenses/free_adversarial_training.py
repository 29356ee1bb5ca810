"""Free adversarial training: one backward pass gives the step of the weights and the step of the perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Batch, Descend, Objective, Step, TrainingData

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["FreeAdversarialTraining"]


class _Carried(nn.Module):
    """The perturbations (B, C, H, W) that one batch leaves to the next; as many as the largest batch had images.

    Attributes:
        delta: (B, C, H, W), 0 at first.
    """

    delta: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(0, *shape, device=device), persistent=False)

    def first(self, count: int) -> Tensor:
        """Return the first `count` perturbations, to be changed in place."""
        if count > len(self.delta):
            self.delta = torch.cat([self.delta, self.delta.new_zeros(count - len(self.delta), *self.delta.shape[1:])])
        return self.delta[:count]

    def get_extra_state(self) -> Tensor:
        """Return the perturbations: a buffer could not be loaded before its size is known."""
        return self.delta

    def set_extra_state(self, state: Tensor) -> None:
        """Go on with saved perturbations."""
        self.delta = state.to(self.delta.device)


@dataclass(frozen=True)
class FreeAdversarialTraining(Objective):
    """Train on each batch `replays` times in a row, and let each backward pass move weights and perturbation at once.

    theta <- descend on CE(f(x + delta), y); delta <- clip(delta + step_size * sign(grad_x), -eps, eps). The
    perturbation is carried over to the next batch, as a start. One pass over the data costs `replays` epochs of
    standard training, so divide the epochs by it. Robust within its linf ball only.

    Source: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein, "Adversarial Training for Free!",
    2019, arXiv:1904.12843.
    Departure: where x + delta was cut to the range of the images the perturbation follows the gradient all the same,
    or it would stay where it has no effect.

    Args:
        eps: linf radius, in the units of the images, a number or "8/255".
        replays: descents on each batch, the authors' m; 4 in their ImageNet code.
        step_size: of the perturbation, in the units of the images; None: eps, as in their code.
        bounds: range of the images.

    Raises:
        ValueError: eps or step_size not positive, eps wider than the range, bounds in the wrong order, or no replay.
    """

    eps: float | str
    replays: int = 4
    step_size: float | str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", Lp("linf", self.eps, self.bounds).bounds)
        for name, value in (("eps", self.eps), ("step_size", self.step_size)):
            if value is not None and not parse_number(value) > 0:
                raise ValueError(f"{name} must be > 0, got {value}; for pixel units write '8/255'")
        if not (isinstance(self.replays, int) and self.replays >= 1):
            raise ValueError(f"replays must be a whole number, at least 1, got {self.replays!r}")

    def setup(self, model: nn.Module, data: TrainingData) -> _Carried:
        """Return the perturbations, none yet."""
        return _Carried(data.images.shape[1:], next(model.parameters()).device)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: _Carried, streams: Streams) -> Tensor:
        """Return the cross-entropy at the perturbations of the moment."""
        return F.cross_entropy(model(self._moved(batch.x, state)).float(), batch.y)

    def update(
        self, model: nn.Module, batch: Batch, step: Step, state: _Carried, streams: Streams, descend: Descend
    ) -> Tensor:
        """Descend `replays` times, and move the perturbations by the same gradients."""
        eps = parse_number(self.eps)
        length = eps if self.step_size is None else parse_number(self.step_size)
        for _ in range(self.replays):
            x = self._moved(batch.x, state).requires_grad_()
            loss = F.cross_entropy(model(x).float(), batch.y)
            descend(loss)
            state.first(len(x)).add_(cast(Tensor, x.grad).sign(), alpha=length).clamp_(-eps, eps)
        return loss.detach()

    def _moved(self, x: Tensor, state: _Carried) -> Tensor:
        return (x + state.first(len(x))).clamp(*self.bounds)
