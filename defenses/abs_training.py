"""Training for analysis by synthesis: each class's variational autoencoder learns from its own images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from robustbench_lite.defenses.base import Batch, Objective, State, Step, TrainingData

if TYPE_CHECKING:
    from robustbench_lite.core.rng import Streams

__all__ = ["ABSTraining"]


@runtime_checkable
class _Autoencoders(Protocol):
    def encode(self, x: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Return means and log-variances, each (n, d), of images (n, C, H, W) by the encoder of one class."""
        ...

    def decode(self, z: Tensor, label: int) -> Tensor:
        """Return images (n, C, H, W) of latents (n, d) by the decoder of one class."""
        ...


@dataclass(frozen=True)
class ABSTraining(Objective):
    """Minimise ||x - G_y(z)||^2 + beta KL(N(m, s^2) || N(0, 1)), z = m + s e drawn from what y's encoder says of x.

    Squared errors are summed over pixels, as in the energy that the deployed `ABS` minimises over z; with beta 1 this
    is the negative ELBO of pixels with variance 1/2. No class sees an image of another one. The model is a
    `ClassVAEs`, or any with `encode` and `decode` by class; `Deploy` puts its decoders into `ABS` or `BinaryABS`.

    Source: Schott, Rauber, Bethge, Brendel, "Towards the First Adversarially Robust Neural Network Model on MNIST",
    2018, arXiv:1805.09190. Departure: all classes learn in one run, each from its share of every batch.

    Args:
        beta: weight of the KL divergence.

    Raises:
        ValueError: a negative `beta`.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(f"beta is the weight of the KL divergence, >= 0, got {self.beta:g}")

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        """Check the model; nothing is kept between steps.

        Raises:
            TypeError: a model without encoders and decoders by class.
        """
        if not isinstance(model, _Autoencoders):
            raise TypeError(
                f"ABSTraining trains autoencoders with encode(x, label) and decode(z, label), and "
                f"{type(model).__name__} has none: take model=class_vaes"
            )
        return None

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the mean over the batch of squared error and weighted KL divergence."""
        vaes, total = cast("_Autoencoders", model), batch.x.new_zeros(())
        for label in sorted(set(batch.y.tolist())):
            own = batch.y == label
            x = batch.x[own]
            mean, log_variance = vaes.encode(x, label)
            noise = streams.take(own).normal(mean.shape[1], dtype=mean.dtype)
            image = vaes.decode(mean + (log_variance / 2).exp() * noise, label)
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
            total = total + (image - x).square().sum() + self.beta * divergence
        return total / len(batch.x)
