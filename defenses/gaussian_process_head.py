"""A Gaussian process in the place of a net's last layer: it knows where it has seen no data, and refuses there.

Source: Grosse, Pfaff, Smith and Backes 2018, "The Limitations of Model Uncertainty in Adversarial Settings"
(1812.02606), who show that it can be fooled: their attack is `HighConfidenceLowUncertainty`.
Regression on labels +-1, one column a class, with one RBF kernel on the features phi(x):
mean m = k^T (K + s^2 I)^-1 y, variance v = k(x, x) - k^T (K + s^2 I)^-1 k.
Refused is what has a large variance or a small mean. Both tests are made one by -max_k m_k / sqrt(v + s^2), minus the
quantile at which the label of the answered class is positive, so that one threshold keeps one false-positive rate.
Departures: the paper classifies with a Laplace approximation and a Gaussian-process latent variable model; regression
on the labels is exact. The process sees the features of a net, not pixels, and a subset of the training samples, so
that the weights file stays small. GPyTorch finds the signal variance, length and noise of the largest marginal
likelihood (the extra `gp`, which training needs); answers are plain linear algebra in float64, since a variance is a
small difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.hclu import HighConfidenceLowUncertainty
from robustbench_lite.attacks.rejection_aware import RejectionAware
from robustbench_lite.defenses._gaussian_process import condition, posterior
from robustbench_lite.defenses._penultimate import embed, embed_all, last_linear
from robustbench_lite.defenses.base import TrainingData
from robustbench_lite.defenses.detector import Detector

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.threats import Threat

__all__ = ["GaussianProcessHead"]


class GaussianProcessHead(Detector):
    """The largest mean of a Gaussian process on the features of a trained net; refused where it is unsure.

    `forward` gives the means, on the scale of labels +-1. The features of `size` training samples, the same number of
    each class as far as there are, are kept in the weights file (4 bytes a number); what follows from them is computed
    at loading.

    Args:
        net: the trained net; its last linear layer is not used.
        size: training samples that the process is conditioned on.
        fpr: share of clean inputs that may be rejected.

    Attributes:
        points: the features of those samples, (size, D); NaN until `fit`.
        labels: their labels, int64 (size,).
        scales: logarithms of signal variance, length and noise variance, float64 (3,).

    Raises:
        ValueError: a size that is not positive, a net without a linear layer at its end.
    """

    points: Tensor
    labels: Tensor
    scales: Tensor
    _weights: Tensor
    _inverse_root: Tensor

    def __init__(self, net: nn.Module, size: int = 500, fpr: float = 0.05) -> None:
        super().__init__(net, fpr)
        if not isinstance(size, int) or size < 2:
            raise ValueError(f"size is a number of training samples, at least 2, got {size!r}")
        head = last_linear(net)
        self.size, self._classes = size, head.out_features
        self.register_buffer("points", torch.full((size, head.in_features), torch.nan))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("scales", torch.zeros(3, dtype=torch.float64))
        for name, width in (("_weights", head.out_features), ("_inverse_root", size)):
            unknown = torch.full((size, width), torch.nan, dtype=torch.float64)
            self.register_buffer(name, unknown, persistent=False)
        self.register_load_state_dict_post_hook(_condition)  # type: ignore[no-untyped-call]

    def mean_and_variance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictive means (B, K) and variances (B,) of images (B, C, H, W), float64, differentiable."""
        features = embed(self.net, x)[1].double()
        points, weights, root, scales = self.points, self._weights, self._inverse_root, self.scales
        return posterior(features, points.double(), weights.double(), root.double(), scales.double())

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means (B, K), and -max_k m_k / sqrt(v + s^2), (B,), in the dtype of the images."""
        mean, variance = self.mean_and_variance(x)
        score = -mean.amax(dim=1) / (variance + torch.exp(self.scales[2].double())).sqrt()
        return mean.to(x.dtype), score.to(x.dtype)

    @torch.no_grad()
    def learn(self, data: TrainingData) -> None:
        """Keep the features of a subset of the samples, and fit the kernel to them.

        Raises:
            ModuleNotFoundError: the extra `gp` is not installed.
            ValueError: fewer samples than `size`.
        """
        if len(data.images) < self.size:
            raise ValueError(f"size={self.size} training samples are to be kept, got {len(data.images)}: lower size")
        chosen = _balanced(data.labels, self.size).to(data.images.device)
        points, labels = embed_all(self.net, data.images[chosen])[1], data.labels[chosen].to(self.labels)
        self.scales.copy_(_likely_scales(points, self._targets(labels)))
        self.points.copy_(points)
        self.labels.copy_(labels)
        _condition(self)

    def _targets(self, labels: Tensor) -> Tensor:
        return 2 * F.one_hot(labels, self._classes).double() - 1

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attacks on the score, and on mean and variance."""
        attacks: list[Attack] = [RejectionAware(), HighConfidenceLowUncertainty()]
        return [attack for attack in attacks if attack.supports(threat)]


@torch.no_grad()
def _condition(head: GaussianProcessHead, _: Any = None) -> None:
    """Compute what follows from the points, unless there are none; torch calls this after each load."""
    if bool(head.points.isfinite().all()):
        weights, root = condition(head.points.double(), head._targets(head.labels), head.scales.double())
        head._weights.copy_(weights)
        head._inverse_root.copy_(root)


def _likely_scales(points: Tensor, targets: Tensor) -> Tensor:
    try:
        from robustbench_lite.defenses._likely_scales import likely_scales
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "GaussianProcessHead is fitted by GPyTorch: pip install 'robustbench_lite[gp]'; a trained one loads without"
        ) from error
    return likely_scales(points, targets)


def _balanced(labels: Tensor, size: int) -> Tensor:
    """Return the positions (size,) of samples, in turn one of each class, in a fixed random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    mixed = labels.cpu()[order]
    rank = torch.empty_like(order)  # how many of its class come before it
    for label in range(int(mixed.max()) + 1):
        rank[mixed == label] = torch.arange(int((mixed == label).sum()))
    return order[rank.argsort(stable=True)[:size]]
