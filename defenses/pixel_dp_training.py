"""PixelDP training: through the noise layer, whose sensitivity is kept near 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.certify._sensitivity import layer_of
from robustbench_lite.certify.noise import GaussianNoise, LaplaceNoise
from robustbench_lite.certify.pixel_dp import PixelDP
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.models import frozen
from robustbench_lite.defenses.base import Batch, Objective, State, Step, TrainingData
from robustbench_lite.defenses.noise_after import noise_after

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["PIXEL_DP_NOISE", "PixelDPTraining"]

PIXEL_DP_NOISE: dict[str, type[GaussianNoise] | type[LaplaceNoise]] = {
    "gaussian": GaussianNoise,
    "laplace": LaplaceNoise,
}


@dataclass(frozen=True)
class PixelDPTraining(Objective):
    """Cross-entropy under fresh noise at the input or after a first, affine layer, one draw for each sample and step.

    The certificate divides the noise by the layer's operator norm, so that a net could drown the noise by larger
    weights and gain nothing. After every step a layer with weights is therefore moved towards a Parseval frame,
    W <- (1 + b) W - b W W^T W with W the kernel as a matrix (outputs x inputs), whose fixed point has singular values
    of 1. That bounds the norm of the layer's matrix itself only up to the overlap of its windows; the certificate
    measures it (`certify.PixelDP`), and nothing is taken on trust.

    Source: Lecuyer, Atlidakis, Geambasu, Hsu, Jana, "Certified Robustness to Adversarial Examples with Differential
    Privacy", IEEE S&P 2019, arXiv:1802.03471; the projection: Cisse et al. 2017, arXiv:1704.08847.
    Departure: the noise's scale is given as such; the paper's is sqrt(2 ln(1.25 / delta)) L / eps for an attack of
    size L, with eps 1 and delta 0.05 2.54 L. The paper's own bound of the overlap is not needed.

    Args:
        scale: standard deviation of Gaussian noise, or b of Laplace noise, in the units of what it is added to.
        layer: name of the module whose output it is added to, as in `named_modules`, or its number in a
            `Sequential`; None: the input.
        noise: "gaussian" or "laplace".
        parseval: step b of the projection; 0 for none.

    Raises:
        ValueError: a scale that is not positive, an unknown noise, a negative step; at the start of the training also a
            layer that the net does not have, or whose noise proves nothing, such as one behind a ReLU.
    """

    scale: float
    layer: str | int | None = None
    noise: str = "gaussian"
    parseval: float = 3e-4

    def __post_init__(self) -> None:
        lookup(self.noise, PIXEL_DP_NOISE, "noise")(self.scale)  # which checks the scale
        if not 0 <= self.parseval < 1:
            raise ValueError(f"parseval is the step of a projection, in [0, 1), got {self.parseval}")

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        """Look whether noise after the layer can be certified, before a training is spent on it."""
        if self.layer is not None:
            law = PIXEL_DP_NOISE[self.noise](self.scale)
            with frozen(model):
                device = next(model.parameters()).device
                PixelDP(law, str(self.layer)).corruption(model, data.images[:1].to(device), (0.0, 1.0))
        return None

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the mean cross-entropy under noise."""

        def drawn(output: Tensor) -> Tensor:
            shape = output.shape[1:]
            if self.noise == "gaussian":
                return self.scale * streams.normal(*shape, dtype=output.dtype)
            return self.scale * (
                _exponential(streams, shape, output.dtype) - _exponential(streams, shape, output.dtype)
            )

        with noise_after(model, self.layer, drawn):
            return F.cross_entropy(model(batch.x).float(), batch.y)

    @torch.no_grad()
    def after_step(self, model: nn.Module, state: Any) -> None:
        """Move the kernel of the noisy layer a step towards a Parseval frame."""
        if self.layer is None or self.parseval == 0:
            return
        weight = getattr(layer_of(model, str(self.layer)), "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            kernel = weight.flatten(1)
            pulled = (1 + self.parseval) * kernel - self.parseval * (kernel @ kernel.T @ kernel)
            weight.copy_(pulled.view_as(weight))


def _exponential(streams: Streams, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return standard exponential draws (B, *shape): the difference of two is Laplace noise."""
    return -torch.log1p(-streams.uniform(*shape, dtype=dtype))
