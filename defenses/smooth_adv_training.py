"""SmoothAdv training: learn from the worst inputs of the smoothed classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify.noise import GaussianNoise
from robustbench_lite.core.checks import parse_number
from robustbench_lite.core.models import frozen
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.ramps import check_ramp, ramp

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["SmoothAdvTraining"]


@dataclass(frozen=True)
class SmoothAdvTraining(Objective):
    """Minimise CE(f(x' + e_i), y), where x' is within l2 eps of x and maximises -log mean_i softmax(f(x' + e_i))_y.

    Each sample has `samples` fresh draws e_i a step, and PGD keeps them for all its steps: what is attacked is the
    soft classifier of these very draws, and the net then learns from all of them. PGD starts at the clean image and
    takes steps of 2 eps / steps along the gradient's direction. For a `SmoothedClassifier` with the same sigma.

    Source: Salman, Yang, Li, Zhang, Zhang, Razenshteyn, Bubeck, "Provably Robust Deep Learning via Adversarially
    Trained Smoothed Classifiers", NeurIPS 2019, arXiv:1906.04584; MNIST settings (eps 1, 10 steps, 4 draws, ramp 10 of
    90 epochs): Jeong and Shin 2020, arXiv:2006.04062.
    Departures: all samples of a batch pass together; where they learn from m copies of a sample, their batches hold
    1 / m of the samples. The ramp rises each step, not each epoch. A step that leaves ball or image is projected on
    both exactly. The attack is written out here, for one of `attacks/` would judge each iterate by votes.

    Args:
        sigma: standard deviation of the noise, in the units of the images.
        eps: l2 radius of the attack.
        steps: of the attack.
        samples: draws m.
        ramp: share of the training in which eps rises linearly from 0.
        bounds: range of the images.

    Raises:
        ValueError: sigma or eps not positive, steps or samples below 1, or a ramp that is no share.
    """

    sigma: float
    eps: float | str
    steps: int = 10
    samples: int = 4
    ramp: float = 10 / 90
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        GaussianNoise(self.sigma)  # which checks it
        check_ramp(0.0, self.ramp)
        object.__setattr__(self, "bounds", Lp("l2", self.eps, self.bounds).bounds)
        if parse_number(self.eps) <= 0:
            raise ValueError(f"eps must be > 0, got {self.eps}; use GaussianAugmentation without an attack")
        for name in ("steps", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the mean cross-entropy over all noisy copies of the adversarial images."""
        noise = self.sigma * streams.normal(self.samples, *batch.x.shape[1:], dtype=batch.x.dtype)
        share = ramp(step.progress, 0.0, self.ramp)
        x_adv = self.examples(model, batch, noise, share * parse_number(self.eps)) if share > 0 else batch.x
        logits = model(_copies(x_adv, noise)).float()
        return F.cross_entropy(logits, batch.y.repeat_interleave(self.samples))

    def examples(self, model: nn.Module, batch: Batch, noise: Tensor, eps: float) -> Tensor:
        """Return the images (B, C, H, W) that PGD finds within eps, for noise (B, samples, C, H, W)."""
        threat = Lp("l2", eps, self.bounds)
        points, project = batch.x, threat.projector(batch.x)
        with frozen(model), torch.enable_grad():
            for _ in range(self.steps):
                leaf = points.detach().requires_grad_()
                logits = model(_copies(leaf, noise)).float().log_softmax(dim=1)
                soft = logits.reshape(len(leaf), self.samples, -1).logsumexp(dim=1)
                value = F.nll_loss(soft, batch.y, reduction="sum")
                slope = torch.autograd.grad(value, leaf)[0].nan_to_num(0.0, 0.0, 0.0)
                points = project(points + 2 * eps / self.steps * threat.steepest(slope))
        return points.detach()


def _copies(x: Tensor, noise: Tensor) -> Tensor:
    """Return the noisy copies (B * m, C, H, W) of images (B, C, H, W), those of an image together."""
    return (x.unsqueeze(1) + noise).flatten(0, 1)
