"""What is inside some defenses, as protocols: an attack made for one sort of defense says which (`Attack.needs`).

An attack reaches the insides by `oracle.inside(protocol)` and differentiates them by `oracle.gradient(through=...)`, so
that all it asks is counted.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["Explaining", "Explanation", "Generative", "Neighbours", "Rejecting", "Smoothed", "Uncertain"]


@runtime_checkable
class Rejecting(Protocol):
    """A defense that refuses inputs whose score is above a threshold."""

    threshold: Tensor
    """The largest score (a scalar) that is accepted."""

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and suspicion scores (B,), larger for what looks less like data."""
        ...


@runtime_checkable
class Smoothed(Protocol):
    """A defense that answers by the votes of a net on copies of the image with Gaussian noise."""

    net: nn.Module
    sigma: float
    """Standard deviation of the noise, in the units of the images."""


@runtime_checkable
class Neighbours(Protocol):
    """A defense that looks for neighbours of an input's activations among those of training samples."""

    k: int
    """Neighbours that vote in each layer."""
    num_classes: int
    """Classes that it can answer, of which some may have no training sample."""
    references: list[Tensor]
    """For each layer the embeddings (N, D) of the training samples."""
    reference_labels: Tensor
    """Their labels, int64 (N,)."""

    def embed(self, x: Tensor) -> list[Tensor]:
        """Return for each layer the embeddings (B, D) of images (B, C, H, W), differentiable."""
        ...


@runtime_checkable
class Generative(Protocol):
    """A defense that explains an input by the best reconstruction of each class."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Return the best reconstruction of each class, (B, K, C, H, W), of images (B, C, H, W)."""
        ...


class Explanation(NamedTuple):
    """How each class explains images best.

    Attributes:
        latents: (B, K, d).
        images: what the decoders make of them, (B, K, C, H, W).
        energies: (B, K), what an explanation costs, before classes are weighed.
    """

    latents: Tensor
    images: Tensor
    energies: Tensor


@runtime_checkable
class Explaining(Protocol):
    """A defense that searches for the latents by which each class explains an input best, such as ABS."""

    cut: float | None
    """Pixels above it are 1, others 0, before an image is explained; None: they stay as they are."""

    def explain(self, x: Tensor) -> Explanation:
        """Search for the best explanations of images (B, C, H, W); without gradients."""
        ...

    def follow(self, x: Tensor, latents: Tensor, steps: int) -> Explanation:
        """Go on from latents (B, K, d) that explain images close to these best; without gradients."""
        ...

    def logits_at(self, x: Tensor, explanation: Explanation) -> Tensor:
        """Return logits (B, K), differentiable by the images; a cut has the gradient of the identity."""
        ...


@runtime_checkable
class Uncertain(Protocol):
    """A defense with a predictive mean and variance, such as a Gaussian process."""

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictive means (B, K), variances (B,) of images (B, C, H, W), both differentiable."""
        ...
