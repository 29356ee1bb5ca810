"""The nearest neighbour of an image, and a certificate for it.

The oldest classifier, and a row in tables of robustness over several norms such as that of Schott, Rauber, Bethge and
Brendel 2018 (1805.09190). Nothing is trained: `epochs=0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._neighbours import blocks, squared_distances
from robustbench_lite.attacks.nearest_neighbour_attack import NearestNeighbourAttack
from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.models import Model, predict
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.defenses.base import Batch, Objective, Step, TrainingData, Wrapper

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.rng import Streams

__all__ = ["NearestNeighbour", "NearestNeighbourCertificate", "NoTraining"]

DUALS = {"l2": 2.0, "linf": 1.0, "l1": math.inf}
ROUNDING = 1e-9  # of squared distances in float64, for images in [0, 1] of up to a million entries


class NearestNeighbour(Wrapper):
    """Answers with the label of the nearest training image, in l2.

    The logits are minus the distances to the nearest image of each class; their gradients are exact wherever they
    exist, so that it is its own `attack_view`.

    Args:
        net: not asked, and not kept: every wrapper is given one.
        samples: training images that are kept, the first ones; None: all.

    Attributes:
        points: the training images, in the order of their classes, (N, D).
        reference_labels: their labels, int64 (N,).

    Raises:
        ValueError: `samples` that is no whole number, at least 1.
    """

    needs_data: ClassVar[bool] = True
    k: int = 1
    points: Tensor
    reference_labels: Tensor

    def __init__(self, net: nn.Module, samples: int | None = None) -> None:
        super().__init__()
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples must be a whole number of training images, at least 1, got {samples!r}")
        self.samples, self.num_classes = samples, 0
        self.shape: tuple[int, ...] = ()
        self._counts: list[int] = []
        self.register_buffer("points", torch.zeros(0, 0), persistent=False)
        self.register_buffer("reference_labels", torch.zeros(0, dtype=torch.int64), persistent=False)

    @property
    def references(self) -> list[Tensor]:
        """The training images as (N, D), the only embedding."""
        return [self.points]

    def embed(self, x: Tensor) -> list[Tensor]:
        """Return the images (B, C, H, W) as (B, D).

        Raises:
            ValueError: there are no training images yet, or they have another shape.
        """
        if not self.num_classes:
            raise ValueError("NearestNeighbour has no images yet: call fit(data), or restore(data) after a load")
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"expected images of shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        return [x.flatten(1)]

    def forward(self, x: Tensor) -> Tensor:
        """Return minus the distances to the nearest image of each class (B, K)."""
        images = self.embed(x)[0]
        nearest = self.points[self._nearest(images.detach())]
        # Distances once more, of the few: a matrix product loses half the digits of small ones.
        far: Tensor = torch.linalg.vector_norm(images.unsqueeze(1) - nearest, dim=2)
        return -far

    def fit(self, data: TrainingData, calibration: TrainingData | None = None) -> None:
        """Keep the training images."""
        self.restore(data)

    def restore(self, data: TrainingData) -> None:
        """Keep the training images.

        Raises:
            ValueError: a single class, or a class without an image.
        """
        images, labels = data.images[: self.samples], data.labels[: self.samples]
        counts = torch.bincount(labels, minlength=data.num_classes)
        if data.num_classes < 2 or not bool((counts > 0).all()):
            raise ValueError(
                f"nearest neighbours need 2 classes or more with an image each, got counts {counts.tolist()}"
            )
        place, order = self.points.device, labels.argsort(stable=True)
        self.num_classes, self.shape, self._counts = int(data.num_classes), tuple(images.shape[1:]), counts.tolist()
        self.points, self.reference_labels = images.flatten(1)[order].to(place), labels[order].to(place)

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attack by quadratic programmes."""
        attack = NearestNeighbourAttack()
        return [attack] if attack.supports(threat) else []

    def certifiers(self) -> list[Certifier]:
        """Return the certificate of the nearest neighbour."""
        return [NearestNeighbourCertificate()]

    @torch.no_grad()
    def _nearest(self, images: Tensor) -> Tensor:
        """Return the numbers of the nearest training images of each class, int64 (B, K)."""
        found = torch.zeros(len(images), self.num_classes, dtype=torch.int64, device=images.device)
        sizes = self.points.square().sum(dim=1)  # not kept: it would stay in float32 where the points become float64
        for part in blocks(len(images), len(self.points)):
            first, far = 0, squared_distances(images[part], self.points, sizes)
            for label, members in enumerate(torch.split(far, self._counts, dim=1)):
                found[part, label] = first + members.argmin(dim=1)
                first += self._counts[label]
        return found


@dataclass(frozen=True)
class NearestNeighbourCertificate(Certifier):
    """How far an image can move in l2, linf or l1 before its nearest training image can be of another class.

    Proof: for s of the predicted class, o of another and a move d with |d|_p < (|x-o|^2 - |x-s|^2) / (2 |o-s|_q),
    |x+d-o|^2 - |x+d-s|^2 = |x-o|^2 - |x-s|^2 - 2 <d, o-s> > 0 by Hoelder (1/p + 1/q = 1): o is not the nearest.
    The radius is the least over all o of the largest of these bounds over the nearest s; in float64, less what rounding
    can do. It is at least half the difference of the distances to the nearest o and s (the triangle inequality), and at
    most the distance to the nearest adversarial example, which `NearestNeighbourAttack` looks for.

    Source: the constraint of one pair is in Wang, Liu, Yi, Zhou and Hsieh 2019, "Evaluating the Robustness of Nearest
    Neighbor Classifiers: A Primal-Dual Perspective" (1906.03972).

    Attributes:
        witnesses: training images s of the predicted class that are tried, the nearest ones.

    Raises:
        ValueError: no witness.
    """

    kind: ClassVar[str] = "deterministic"
    witnesses: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.witnesses, int) or self.witnesses < 1:
            raise ValueError(f"witnesses must be a whole number, at least 1, got {self.witnesses!r}")

    def supports(self, threat: Threat) -> bool:
        """Say yes to l2, linf and l1 balls with a radius."""
        return isinstance(threat, Lp) and threat.norm in DUALS and threat.eps is not None

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk; `radius` is all that is proven, and may exceed eps."""
        assert isinstance(threat, Lp)
        with torch.no_grad():
            prediction = predict(model, x)
            radius = self._radius(_checked(model), x, prediction, threat.norm)
        verified = radius > threat.radius(x.double()).reshape(-1)
        return Certificate(
            status=torch.where(verified, int(Status.VERIFIED), int(Status.UNKNOWN)),
            certified=verified & (prediction == y),
            radius=radius,
            prediction=prediction,
            kind=self.kind,
            confidence=1.0,
            samples=torch.zeros_like(y),
        )

    def radius(self, model: Model, x: Tensor, y: Tensor, norm: str, **options: Any) -> Tensor:
        """Return the radii, float64 (B,), at most `max_eps`; 0 where the label is wrong. In one go: no search."""
        top = options.pop("max_eps", None)
        options.pop("tolerance", None)
        found = self(model, x, y, Lp(norm, 0.0, options.pop("bounds", (0.0, 1.0))), **options)
        return torch.where(found.prediction == y, found.radius, 0.0).clamp_max(math.inf if top is None else float(top))

    def _radius(self, model: NearestNeighbour, x: Tensor, label: Tensor, norm: str) -> Tensor:
        images, references = x.flatten(1).double(), model.points.double()
        sizes = references.square().sum(dim=1)
        radii = []
        for part in blocks(len(images), 4 * len(references)):
            own = model.reference_labels.unsqueeze(0) == label[part].unsqueeze(1)
            far = squared_distances(images[part], references, sizes)
            near = far.masked_fill(~own, torch.inf).topk(min(self.witnesses, far.shape[1]), dim=1, largest=False)
            best = torch.zeros_like(far)
            for place in range(near.values.shape[1]):
                across = _lengths(references[near.indices[:, place]], references, sizes, norm)
                lead = far - near.values[:, place : place + 1] - ROUNDING
                best = torch.maximum(best, (lead / (2 * across)).nan_to_num(0.0, 0.0, 0.0))
            radii.append(best.masked_fill(own, torch.inf).amin(dim=1))
        return torch.cat(radii) if radii else images.new_zeros(0)


@dataclass(frozen=True)
class NoTraining(Objective):
    """For defenses in which nothing is trained: run them with `epochs=0`."""

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError("this defense has nothing to train: set epochs=0")


def _checked(model: Model) -> NearestNeighbour:
    if not isinstance(model, NearestNeighbour):
        raise CannotCertify(f"NearestNeighbourCertificate certifies a NearestNeighbour, got {type(model).__name__}")
    return model


def _lengths(points: Tensor, references: Tensor, sizes: Tensor, norm: str) -> Tensor:
    """Return the distances (n, N) in the dual norm, rounded up."""
    if norm == "l2":
        return (squared_distances(points, references, sizes) + ROUNDING).sqrt()
    return torch.cdist(points, references, p=DUALS[norm]) * (1 + 1e-12)
