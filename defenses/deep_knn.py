"""Deep k-nearest neighbours: an answer is worth as much as the training samples that agree with it, layer by layer.

Source: Papernot and McDaniel 2018, "Deep k-Nearest Neighbors: Towards Confident, Interpretable and Robust Deep
Learning" (1803.04765).
The activations of a layer, flattened, scaled to unit length and less their mean over the training set, are compared by
Euclidean distance. The nonconformity of a class is the number of neighbours, over all layers, that belong to other
classes; its p-value the share of held-out samples whose own label conforms no better.
Departures: the search is exact (the paper hashes, to which the mean matters; distances do not change with it, and here
it only spares rounding). The paper classifies by the largest p-value, and leaves open what happens where several are
equal (often all are 0): the smaller nonconformity wins, then the smaller class. p-values never increase with
nonconformity, so that this is the class with the most neighbours. Held-out samples are of two kinds: some give the
p-values, the others the threshold of the rejection, which the paper does not have.
What it withstands: transferred and plain examples of the net. `DeepKNNAttack`, which pulls towards neighbours of
another class, is the one to believe (Sitawarin and Wagner 2019, 1903.08333; 2020, 2003.06559).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.attacks._neighbours import nearest
from robustbench_lite.attacks.deep_knn_attack import DeepKNNAttack
from robustbench_lite.core.models import frozen
from robustbench_lite.defenses._activations import activations, layer_names
from robustbench_lite.defenses._soft_neighbours import SoftNeighbours
from robustbench_lite.defenses.base import TrainingData
from robustbench_lite.defenses.detector import CHUNK, Detector

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.threats import Threat

__all__ = ["DeepKNN"]

UNUSED = -1.0  # what fills the scores that trimming leaves out: no nonconformity is that small


class DeepKNN(Detector):
    """The vote of the neighbours in every layer of a net, refused where too few held-out samples conform as badly.

    `forward` gives the logarithms of p-values, smoothed so that they are finite and ordered by nonconformity; `predict`
    answers `ABSTAIN` where the credibility is below a threshold that rejects the share `fpr` of clean inputs.

    `fit` draws `calibration` of the held-out samples (the same ones each time) for the p-values and sets the threshold
    by all others: a sample is no witness of its own credibility. `calibrate` leaves the former out as well.
    The embeddings of the training samples are too large for a weights file: `restore` computes them again.

    Args:
        net: the trained net; in eval mode.
        k: neighbours that vote in each layer.
        layers: submodules by their names in `net.named_modules()`, whose outputs are compared, and "logits" for the
            output of the net; None: every `nn.ReLU`, and the logits.
        fpr: share of clean inputs that may be rejected.
        calibration: held-out samples that give the p-values, at least k; the paper's number is 750.
        samples: training samples that are kept as neighbours, the first ones; None: all.
        trim: leave out held-out samples of nonconformity 0, as the published code does and the paper does not.

    Attributes:
        reference_labels: labels of the training samples, int64 (N,).
        scores: nonconformities of the calibration samples, ascending, (calibration,); NaN until `fit`. With `trim` the
            first are -1, and do not count.
        scored: the numbers (`indices`) of those samples in their data set, int64 (calibration,).

    Raises:
        TypeError: numbers of samples that are not whole.
        ValueError: numbers out of range, fewer calibration samples than k, a layer that the net does not have.
    """

    needs_data: ClassVar[bool] = True
    reference_labels: Tensor
    scores: Tensor
    scored: Tensor

    def __init__(
        self,
        net: nn.Module,
        k: int = 75,
        layers: Sequence[str] | None = None,
        fpr: float = 0.05,
        calibration: int = 750,
        samples: int | None = None,
        trim: bool = False,
    ) -> None:
        super().__init__(net, fpr)
        _check_counts(k, calibration, samples)
        self.k, self.calibration, self.samples, self.trim = k, calibration, samples, trim
        self._names = layer_names(net, layers)
        self.layers = None if layers is None else self._names
        self.num_classes = 0
        self.register_buffer("scores", torch.full((calibration,), torch.nan))
        self.register_buffer("scored", torch.full((calibration,), -1))
        self.register_buffer("reference_labels", torch.zeros(0, dtype=torch.int64), persistent=False)
        for number in range(len(self._names)):
            for part, shape in (("points", (0, 0)), ("sizes", (0,)), ("mean", ())):
                self.register_buffer(f"_{part}_{number}", torch.zeros(shape), persistent=False)

    @property
    def references(self) -> list[Tensor]:
        """For each layer the embeddings (N, D) of the training samples."""
        return self._buffers_named("points")

    @property
    def sizes(self) -> list[Tensor]:
        """For each layer the squared lengths (N,) of the embeddings.

        Raises:
            ValueError: there are no training samples yet.
        """
        if not self.num_classes:
            raise ValueError("DeepKNN has no neighbours yet: call fit(data, calibration); after a load, restore(data)")
        return self._buffers_named("sizes")

    def embed(self, x: Tensor) -> list[Tensor]:
        """Return for each layer the embeddings (B, D) of images (B, C, H, W), differentiable.

        Raises:
            RuntimeError: a layer that did not run exactly once, or gave no tensor.
        """
        found = activations(self.net, self._names, x)
        means = self._buffers_named("mean")
        return [nn.functional.normalize(part, dim=1) - mean for part, mean in zip(found, means, strict=True)]

    @torch.no_grad()
    def nonconformity(self, x: Tensor) -> Tensor:
        """Return for each class the number of neighbours of other classes, over all layers, float (B, K).

        Raises:
            ValueError: there are no training samples yet.
        """
        votes = x.new_zeros(len(x), self.num_classes)
        for points, references, sizes in zip(self.embed(x), self.references, self.sizes, strict=True):
            _, rows = nearest(points, references, self.k, sizes)
            votes.scatter_add_(1, self.reference_labels[rows], torch.ones_like(rows, dtype=votes.dtype))
            votes[~points.isfinite().all(dim=1)] = torch.nan  # a NaN has neighbours too: it must not pass for an answer
        return len(self._names) * self.k - votes

    def p_values(self, x: Tensor) -> Tensor:
        """Return for each class the share of calibration samples that conform no better, float (B, K) in [0, 1]."""
        return self._conforming(self.nonconformity(x)) / self._count

    def credibility(self, x: Tensor) -> Tensor:
        """Return the largest p-value (B,): small where the training data do not support any answer."""
        return self.p_values(x).amax(dim=1)

    def confidence(self, x: Tensor) -> Tensor:
        """Return 1 less the second largest p-value (B,): small where they support two answers."""
        return 1 - self.p_values(x).topk(2, dim=1).values[:, 1]

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K), log((c + 1 - a / (a_max + 1)) / (n + 1)), and 1 - credibility (B,).

        c of n calibration samples conform no better than a class with nonconformity a.
        """
        found = self.nonconformity(x)
        conforming, most = self._conforming(found), len(self._names) * self.k
        logits = ((conforming + 1 - found / (most + 1)) / (self._count + 1)).log()
        return logits, 1 - (conforming / self._count).amax(dim=1)

    def fit(self, data: TrainingData, calibration: TrainingData | None) -> None:
        """Embed the training samples, then draw the scores and the threshold from the calibration samples.

        Raises:
            ValueError: samples that are missing or too few, a single class, or, with `trim`, no score above 0.
        """
        if calibration is None:
            raise ValueError("DeepKNN compares with held-out samples: give calibration=...")
        least = self.calibration + math.ceil(1 / self.fpr)
        if len(calibration.images) < least:
            raise ValueError(
                f"DeepKNN needs {self.calibration} calibration samples for p-values and {least - self.calibration} "
                f"more for its threshold, got {len(calibration.images)}: lower calibration, or give more"
            )
        self.restore(data)
        order = torch.randperm(len(calibration.images), generator=torch.Generator().manual_seed(0))
        self._score(_part(calibration, order[: self.calibration].sort().values))
        self.calibrate(calibration)

    def calibrate(self, data: TrainingData, fpr: float | None = None) -> None:
        """Set the threshold by the samples of `data` that gave no score.

        Raises:
            ValueError: too few samples to tell the rate.
        """
        fresh = torch.isin(data.indices.cpu(), self.scored.cpu(), invert=True)
        super().calibrate(_part(data, fresh.nonzero().flatten()), fpr)

    def restore(self, data: TrainingData) -> None:
        """Embed the training samples.

        Raises:
            ValueError: fewer samples than k, or a single class.
        """
        images, labels = data.images[: self.samples], data.labels[: self.samples]
        if data.num_classes < 2:
            raise ValueError(f"neighbours of one class say nothing: expected 2 classes or more, got {data.num_classes}")
        if len(images) < self.k:
            raise ValueError(f"k = {self.k} neighbours need as many training samples, got {len(images)}: lower k")
        place = self.threshold.device
        self.reference_labels, self.num_classes = labels.to(place), int(data.num_classes)
        for number in range(len(self._names)):
            setattr(self, f"_mean_{number}", torch.zeros((), device=place))
        with frozen(self.net), torch.no_grad():
            for number, points in enumerate(self._embedded(images, place)):
                mean = points.mean(dim=0)
                setattr(self, f"_mean_{number}", mean)
                setattr(self, f"_points_{number}", points.sub_(mean))
                setattr(self, f"_sizes_{number}", points.square().sum(dim=1))

    def attack_view(self, samples: int = 1) -> nn.Module:
        """Return soft votes of the neighbours, which have gradients."""
        return SoftNeighbours(self)

    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        """Return the attack on the neighbours."""
        attack = DeepKNNAttack()
        return [attack] if attack.supports(threat) else []

    @property
    def _count(self) -> Tensor:
        """Calibration samples that count."""
        return (self.scores >= 0).sum()

    def _conforming(self, found: Tensor) -> Tensor:
        """Return how many calibration samples have at least these nonconformities (B, K); NaN for NaN."""
        if self.scores.isnan().any():
            raise ValueError("DeepKNN has no calibration scores yet: call fit(data, calibration) first")
        below = torch.searchsorted(self.scores.to(found.dtype), found.contiguous())
        return torch.where(found.isnan(), torch.nan, len(self.scores) - below)

    @torch.no_grad()
    def _score(self, data: TrainingData) -> None:
        place = self.threshold.device
        with frozen(self.net):
            found = torch.cat([self.nonconformity(part.to(place)) for part in torch.split(data.images, CHUNK)])
        own = found.gather(1, data.labels.to(place).unsqueeze(1)).squeeze(1)
        if self.trim:
            own = torch.where(own > 0, own, UNUSED)
        if not bool((own >= 0).any()):
            raise ValueError("every calibration sample conforms perfectly, and trim leaves none: set trim to false")
        self.scores.copy_(own.sort().values)
        self.scored.copy_(data.indices)

    def _embedded(self, images: Tensor, place: torch.device) -> list[Tensor]:
        """Return the embeddings of all images, for each layer (N, D); memory for one copy."""
        tables: list[Tensor] = []
        for start in range(0, len(images), CHUNK):
            found = self.embed(images[start : start + CHUNK].to(place))
            tables = tables or [part.new_empty(len(images), part.shape[1]) for part in found]
            for table, part in zip(tables, found, strict=True):
                table[start : start + len(part)] = part
        return tables

    def _buffers_named(self, part: str) -> list[Tensor]:
        return [self.get_buffer(f"_{part}_{number}") for number in range(len(self._names))]


@dataclass(frozen=True, eq=False)
class _Part:
    """Some samples of a data set."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    num_classes: int


def _part(data: TrainingData, rows: Tensor) -> _Part:
    return _Part(data.images[rows], data.labels[rows], data.indices[rows], data.num_classes)


def _check_counts(k: int, calibration: int, samples: int | None) -> None:
    for name, value in (("k", k), ("calibration", calibration), ("samples", samples)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if calibration < k:
        raise ValueError(f"p-values need at least as many calibration samples as neighbours: {calibration} < k = {k}")
    if samples is not None and samples < k:
        raise ValueError(f"k = {k} neighbours need as many training samples, got samples = {samples}")
