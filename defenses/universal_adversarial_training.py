"""Universal adversarial training: learn to withstand one perturbation that is added to every image."""

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

__all__ = ["UniversalAdversarialTraining"]


@dataclass(frozen=True)
class UniversalAdversarialTraining(Objective):
    """Minimise max_{|delta| <= eps} of the mean of CE(f(x_i + delta), y_i): one delta, kept from batch to batch.

    Of each batch one backward pass gives both steps: theta <- descend on CE(f(x + delta), y);
    delta <- clip(delta + step_size * sign(grad_delta of the mean of min(CE, beta)), -eps, eps). The clipped loss keeps
    a few images that are lost anyway from steering the perturbation. Meant against universal perturbations, and to be
    tested by a fresh one (`attacks.UniversalPerturbation`); an adversary who may change each image in its own way still
    wins.

    Source: Shafahi, Najibi, Xu, Dickerson, Davis, Goldstein, "Universal Adversarial Training", 2018, arXiv:1811.11304,
    the simultaneous form.
    Departures: where x_i + delta was cut to the range of the images, that image has no say in a step further out. The
    default step is ours: with eps / 10 a small net on digits learns each delta faster than delta moves, forgets the
    last one, and ends no better than a net of standard training.

    Args:
        eps: linf radius, in the units of the images, a number or "8/255".
        step_size: of the perturbation, in the units of the images; None: eps.
        beta: where the loss that moves the perturbation is clipped, in nats.
        bounds: range of the images.

    Raises:
        ValueError: eps, step_size or beta not positive, eps wider than the range, or bounds in the wrong order.
    """

    eps: float | str
    step_size: float | str | None = None
    beta: float = 9.0
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", Lp("linf", self.eps, self.bounds).bounds)
        for name, value in (("eps", self.eps), ("step_size", self.step_size), ("beta", self.beta)):
            if value is not None and not parse_number(value) > 0:
                raise ValueError(f"{name} must be > 0, got {value}")

    def setup(self, model: nn.Module, data: TrainingData) -> dict[str, Tensor]:
        """Return the perturbation (C, H, W), 0."""
        return {"delta": torch.zeros(data.images.shape[1:], device=next(model.parameters()).device)}

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: dict[str, Tensor], streams: Streams) -> Tensor:
        """Return the cross-entropy at the perturbation of the moment."""
        x = (batch.x + state["delta"]).clamp(*self.bounds)
        return F.cross_entropy(model(x).float(), batch.y)

    def update(
        self, model: nn.Module, batch: Batch, step: Step, state: dict[str, Tensor], streams: Streams, descend: Descend
    ) -> Tensor:
        """Descend once, and move the perturbation by the same gradients."""
        moved = batch.x + state["delta"]
        x = moved.clamp(*self.bounds).requires_grad_()
        losses = F.cross_entropy(model(x).float(), batch.y, reduction="none")
        loss = losses.mean()
        descend(loss)
        slope = self._clipped(cast(Tensor, x.grad), moved, losses.detach())
        eps = parse_number(self.eps)
        length = eps if self.step_size is None else parse_number(self.step_size)
        state["delta"].add_(slope.sign(), alpha=length).clamp_(-eps, eps)
        return loss.detach()

    def _clipped(self, slope: Tensor, moved: Tensor, losses: Tensor) -> Tensor:
        """Return the gradient (C, H, W) of the sum of min(loss, beta), of slopes (B, C, H, W) of the losses (B,)."""
        low, high = self.bounds
        outward = ((moved < low) & (slope < 0)) | ((moved > high) & (slope > 0))
        lost = (losses >= self.beta).reshape(-1, 1, 1, 1)
        return slope.masked_fill(outward | lost, 0).sum(dim=0)
