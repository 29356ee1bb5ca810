"""Deep-RBF networks: a class is a place in feature space, and what is far from every place is refused.

Source: Zadeh, Hosseini and Sra 2018, "Deep-RBF Networks Revisited: Robust Classification with Rejection" (1812.03190).
The distance of features phi(x) to class k is d_k = ||A_k^T phi + b_k||_p^p. Training pulls d_y down and pushes the
others over `margin`: J = d_y + sum_{j != y} max(0, margin - d_j), or softly, with log(1 + exp(margin - d_j)).
Images of no class (noise, shuffled pixels) may be pushed away from every class, by minimising
sum_j max(0, margin - d_j); a summary of the paper has that sum maximised, which would draw them near.
Departures: phi are the K outputs of a net, so that any classifier's net will do; the threshold comes from a
false-positive rate on held-out samples, while margin / 2 would be its natural place; around a net that was trained
otherwise, `fit` takes the class distances of linear discriminant analysis.
What it withstands: noise, and attacks that do not know of the distances. An attack that lowers the distance to a wrong
class (`RejectionAware`) gets wrong and accepted at once; it is the one to believe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks.rejection_aware import RejectionAware
from robustbench_lite.core.errors import lookup
from robustbench_lite.defenses._out_distribution import check_kinds, out_of_distribution
from robustbench_lite.defenses._penultimate import embed_all, last_linear
from robustbench_lite.defenses.base import Batch, Objective, Step, TrainingData
from robustbench_lite.defenses.detector import Detector

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.rng import Streams
    from robustbench_lite.core.threats import Threat

__all__ = ["DeepRBF", "DeepRBFTraining"]

NEAR = 1e-6  # the smallest distance whose logarithm is taken
SHORTFALLS: dict[str, Callable[[Tensor], Tensor]] = {"hinge": torch.relu, "soft": F.softplus}


class _Distances(nn.Module):
    """The distances d_k = ||A_k^T phi + b_k||_p^p (B, K) of features (B, D)."""

    def __init__(self, classes: int, rank: int, p: int) -> None:
        super().__init__()
        self.p = p
        self.weight = nn.Parameter(torch.full((classes, classes, rank), torch.nan))
        self.bias = nn.Parameter(torch.full((classes, rank), torch.nan))

    def start(self) -> None:
        """Draw A_k from a normal distribution of variance 1 / D, b_k from a standard one: always the same ones.

        Runs differ by their nets.
        """
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.weight.shape[1] ** -0.5)
            self.bias.copy_(torch.randn(self.bias.shape, generator=generator))

    def forward(self, features: Tensor) -> Tensor:
        moved = torch.einsum("bd,kdr->bkr", features, self.weight) + self.bias
        return (moved.square() if self.p == 2 else moved.abs()).sum(dim=2)


class DeepRBF(Detector):
    """The class of the smallest distance; refused where even that one is large.

    `forward` gives minus the distances, the score is the smallest of them. `fit` sets the threshold; around a net that
    `DeepRBFTraining` has not trained it first finds A_k and b_k by linear discriminant analysis of the features.

    Args:
        net: the net, whose K outputs are the features.
        rank: rows of A_k^T.
        p: the distance is a sum of p-th powers, 1 or 2.
        fpr: share of clean inputs that may be rejected.

    Raises:
        ValueError: a rank that is not positive, another p, a net without a linear layer at its end.
    """

    def __init__(self, net: nn.Module, rank: int = 10, p: int = 2, fpr: float = 0.05) -> None:
        super().__init__(net, fpr)
        _check_shape(rank, p)
        self.rank, self.p = rank, p
        self.distances = _Distances(last_linear(net).out_features, rank, p)

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return minus the distances (B, K), and the smallest distance (B,)."""
        distances = self.distances(self.net(x))
        return -distances, distances.amin(dim=1)

    @torch.no_grad()
    def learn(self, data: TrainingData) -> None:
        """Find the class distances from the features, unless they were trained.

        Raises:
            ValueError: a class without samples.
        """
        if bool(self.distances.weight.isnan().any()):
            weight, bias = _discriminant(embed_all(self.net, data.images)[0], data, self.rank)
            self.distances.weight.copy_(weight)
            self.distances.bias.copy_(bias)

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return the net with the logits -log d_k, whose order is the same.

        The softmax of minus the distances saturates at distances of a few tens: its cross-entropy has no gradient left.
        """
        return _LogDistances(self)

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attack that lowers the distance to a wrong class."""
        attack = RejectionAware()
        return [attack] if attack.supports(threat) else []


class _LogDistances(nn.Module):
    """Logits -log d_k: probabilities proportional to 1 / d_k."""

    def __init__(self, defense: DeepRBF) -> None:
        super().__init__()
        self.defense = defense

    def forward(self, x: Tensor) -> Tensor:
        distances: Tensor = -self.defense(x)
        return -distances.clamp_min(NEAR).log()


@dataclass(frozen=True)
class DeepRBFTraining(Objective):
    """Train a net and its class distances together, and deploy them as a `DeepRBF`.

    Args:
        margin: distance that wrong classes are pushed to; lambda in the paper.
        form: "hinge", max(0, margin - d), or "soft", log(1 + exp(margin - d)).
        negatives: images of no class that are pushed away from all: of "uniform", "gaussian", "pixels" (shuffled),
            "blocks" (shuffled), "mixes" (of two classes).
        rank: rows of A_k^T.
        p: the distance is a sum of p-th powers, 1 or 2.
        fpr: share of clean inputs that may be rejected.

    Raises:
        ValueError: a hyper-parameter out of range, or no calibration samples at the end.
    """

    margin: float = 10.0
    form: str = "soft"
    negatives: Sequence[str] = ("uniform", "gaussian", "pixels")
    rank: int = 10
    p: int = 2
    fpr: float = 0.05

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"margin is a distance > 0, got {self.margin:g}")
        lookup(self.form, SHORTFALLS, "form of the loss")
        object.__setattr__(self, "negatives", check_kinds(self.negatives))
        _check_shape(self.rank, self.p)

    def setup(self, model: nn.Module, data: TrainingData) -> nn.Module:
        """Return the class distances, at their start."""
        head = last_linear(model)
        distances = _Distances(head.out_features, self.rank, self.p)
        distances.start()
        return distances.to(head.weight.device)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Return the mean of J over the batch, and over the negatives the mean of their shortfalls."""
        if not self.negatives:
            return self.objective(state(model(batch.x).float()), batch.y).mean()
        negatives = out_of_distribution(batch, self.negatives, streams)
        distances = state(model(torch.cat([batch.x, negatives])).float())
        clean, noise = distances.chunk(2)
        return self.objective(clean, batch.y).mean() + self.repulsion(noise).mean()

    def objective(self, distances: Tensor, y: Tensor) -> Tensor:
        """Return J (B,) of distances (B, K) for labels (B,)."""
        own = distances.gather(1, y.unsqueeze(1)).squeeze(1)
        return own + self.repulsion(distances) - SHORTFALLS[self.form](self.margin - own)

    def repulsion(self, distances: Tensor) -> Tensor:
        """Return the shortfalls (B,) of distances (B, K), summed over the classes."""
        return SHORTFALLS[self.form](self.margin - distances).sum(dim=1)

    def finish(
        self, model: nn.Module, data: TrainingData, state: Any, calibration: TrainingData | None = None
    ) -> nn.Module:
        """Return the detector, its threshold set."""
        defense = DeepRBF(model, self.rank, self.p, self.fpr).to(next(model.parameters()).device).eval()
        defense.distances.load_state_dict(state.state_dict())
        defense.fit(data, calibration)
        return defense


def _check_shape(rank: int, p: int) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number, at least 1, got {rank!r}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")


def _discriminant(features: Tensor, data: TrainingData, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (K, D, rank) and b (K, rank): whitened distances to class means, in the directions that differ most."""
    points, labels = features.double(), data.labels.to(features.device)
    counts = torch.bincount(labels, minlength=data.num_classes)
    if bool((counts == 0).any()):
        raise ValueError(f"every class needs training samples, got none of class {int(counts.argmin())}")
    means = torch.stack([points[labels == label].mean(dim=0) for label in range(data.num_classes)])
    within = (points - means[labels]).mT @ (points - means[labels]) / len(points)
    ridge = 1e-3 * within.diagonal().mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(within + ridge * torch.eye(len(within), dtype=within.dtype, device=within.device))
    white = torch.linalg.solve_triangular(root, (means - means.mean(dim=0)).mT, upper=False)  # (D, K)
    directions = torch.linalg.svd(white, full_matrices=True).U[:, :rank]
    missing = rank - directions.shape[1]
    projection = F.pad(torch.linalg.solve_triangular(root.mT, directions, upper=True), (0, max(0, missing)))
    return projection.expand(data.num_classes, -1, -1), -means @ projection
