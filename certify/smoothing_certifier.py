"""The common part of all certificates by votes on corrupted copies of an image."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_lite.certify._binomial import upper_tail
from robustbench_lite.certify._corruptions import Corruption
from robustbench_lite.certify._poll import Ballot, Poll
from robustbench_lite.certify._vote_checks import budget, check_finite, check_settings, check_votes
from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.stopping import FixedSampleSize, Stopping
from robustbench_lite.certify.votes import Votes
from robustbench_lite.core.checks import check_images, check_indices, check_labels
from robustbench_lite.core.models import ABSTAIN, Model, frozen
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["SmoothingCertifier"]

Array = NDArray[np.float64]

ROUNDING = 1e-9  # of a radius: it holds for what is strictly nearer, and the quantiles behind it are rounded


@dataclass(frozen=True, kw_only=True)
class SmoothingCertifier(Certifier):
    """Certificates about the smoothed classifier: the class that a base classifier answers most often under noise.

    The model that is handed over is the base classifier: any callable whose answer depends on the image alone. The
    certificate is about the smoothed classifier. `prediction` is its answer and may differ from the base's; it is
    `ABSTAIN`, with status ABSTAINED, where the votes do not prove an answer. Status is VERIFIED where the radius
    reaches the threat's eps. `radius` is all that the votes prove and may exceed eps. Each certificate is wrong with
    probability at most `alpha`; for a whole set of samples see `bonferroni` and `holm`.

    A sample's draws come from its own stream: batch size, memory budget and the other samples change nothing, up to
    the rounding of the forward pass. Those
    that choose the class are not used to measure it. The same votes serve other certifiers of the same noise:
    `other.certify_votes(one.votes(model, x), y, threat)`.

    The proofs are for noise in real numbers. Float32 noise is a finite set of points, and a base classifier made for
    the purpose could tell them apart (Voracek and Hein 2022, arXiv:2207.07209).

    A subclass writes `norms`, `source`, `corruption` and `proven`.

    Attributes:
        n0: draws that choose the class.
        n: further draws, that measure how likely it is; `predict` takes as many.
        alpha: probability with which a certificate may be wrong.
        memory_budget: bytes for images and activations at a time; None: 1 GiB, or an eighth of a GPU's memory.

    Raises:
        ValueError: n0 or n below 1, alpha outside (0, 1), a memory budget below 1, or what should be a number is none;
            at the call also an eps that n votes cannot prove, and a model with a parameter that is not finite.
    """

    kind: ClassVar[str] = "probabilistic"
    cheap: ClassVar[bool] = False
    smooths: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]]
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    @abstractmethod
    def source(self) -> tuple[object, ...]:
        """What the copies are corrupted with; certifiers with equal sources can read each other's votes."""

    @abstractmethod
    def corruption(self, model: Model, x: Tensor, bounds: tuple[float, float]) -> Corruption:
        """Return what is done to images `x` (B, C, H, W) of the range `bounds` before the model sees them."""

    @abstractmethod
    def proven(self, votes: Votes, norm: str) -> Array:
        """Return the radii (B,) in `norm` that votes prove; NaN where they do not even prove an answer."""

    def needed(self, eps: Array, norm: str, shape: torch.Size) -> Array | None:
        """Return the probabilities (B,) of the chosen class that eps (B,) needs; None where one does not decide."""
        return None

    @property
    def plan(self) -> Stopping:
        """When to stop drawing."""
        return FixedSampleSize()

    def supports(self, threat: Threat) -> bool:
        """Say yes to balls of the right norm with a radius."""
        return isinstance(threat, Lp) and threat.norm in self.norms and threat.eps is not None

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk."""
        if not isinstance(threat, Lp):
            raise TypeError(f"{type(self).__name__} certifies Lp balls, got {type(threat).__name__}")
        return self.certify_votes(self._vote(model, x, streams, threat.bounds, threat), y, threat)

    def certify_votes(self, votes: Votes, y: Tensor, threat: Lp) -> Certificate:
        """Return the certificate that votes (B) prove about labels `y`, int64 (B,).

        Raises:
            TypeError: labels that are not int64.
            ValueError: a threat that this certifier does not support or that does not fit the images, votes on copies
                that were corrupted with something else, or labels that do not fit the votes.
        """
        check_labels(y, check_votes(self, votes, threat), votes.counts.shape[1])
        found = torch.from_numpy(self.proven(votes, threat.norm)).to(y.device) if len(y) else y.double()
        answered, radius = ~found.isnan(), found.nan_to_num(nan=0.0)
        verified = answered & (radius >= torch.from_numpy(budget(threat, len(y))).to(y.device))
        status = torch.where(verified, int(Status.VERIFIED), int(Status.UNKNOWN))
        prediction = torch.where(answered, votes.chosen, ABSTAIN) if len(y) else y
        return Certificate(
            status=torch.where(answered, status, int(Status.ABSTAINED)),
            certified=verified & (prediction == y),
            radius=radius,
            prediction=prediction,
            kind=self.kind,
            confidence=1 - self.alpha,
            samples=votes.n0 + votes.draws,
        )

    def votes(
        self,
        model: Model,
        x: Tensor,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
    ) -> Votes:
        """Return the votes on images `x` (B, C, H, W), all `n` of them; the arguments are those of `__call__`."""
        streams = _streams(x, bounds, indices, generator, batch_size)
        rows = torch.arange(len(x), device=x.device)
        with frozen(model):
            parts = torch.split(rows, batch_size)
            return _joined([self._vote(model, x[part], streams.take(part), bounds, None) for part in parts])

    def predict(
        self,
        model: Model,
        x: Tensor,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Return the smoothed classifier's labels, int64 (B,), from n draws: PREDICT of Cohen et al.

        The label is wrong with probability at most alpha; it is `ABSTAIN` where a two-sided binomial test cannot tell
        the two classes with most votes apart. The arguments are those of `__call__`.
        """
        streams = _streams(x, bounds, indices, generator, batch_size)
        rows = torch.arange(len(x), device=x.device)
        labels = torch.empty_like(rows)
        with frozen(model), torch.no_grad():
            for part in torch.split(rows, batch_size) if len(x) else ():
                poll = self._poll(model, x[part], bounds)
                ballot = Ballot(streams.take(part), poll.num_classes)
                poll.extend(ballot, list(range(len(part))), 0, self.n)
                labels[part] = _winner(ballot.counts, self.alpha)
        return labels

    def radius(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        norm: str,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        max_eps: float | None = None,
        tolerance: float = 1e-4,
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Return the radius that one run of votes proves, float64 (B,), at most `max_eps`; 0 where the label is wrong.

        The arguments are those of `Certifier.radius`; as nothing is searched, `tolerance` plays no part.

        Raises:
            ValueError: a norm that the method cannot certify, `max_eps` not positive, or as in `__call__`.
        """
        self._check_norm(norm)
        top = math.inf if max_eps is None else float(max_eps)
        if not top > 0:
            raise ValueError(f"max_eps must be positive, got {top:g}")
        check_images(x, bounds)
        check_labels(y, x)
        votes = self.votes(model, x, bounds=bounds, indices=indices, generator=generator, batch_size=batch_size)
        if len(x):
            self._largest(norm, votes.shape, votes.counts.shape[1], votes.sensitivity)
        found = self.certify_votes(votes, y, Lp(norm, 0.0, bounds))
        return torch.where(found.certified, found.radius, 0.0).clamp(max=top)

    def largest_radius(
        self,
        norm: str,
        shape: torch.Size,
        num_classes: int | None = None,
        sensitivity: Mapping[str, float] | None = None,
    ) -> float:
        """Return the radius in `norm` that n unanimous votes prove: the ceiling of `CertifiedAccuracy`.

        Args:
            norm: one of `norms`.
            shape: (C, H, W) of the images.
            num_classes: K; has to be given where the bounds share alpha out among the classes (`TopTwoCertifier`).
            sensitivity: of the votes; has to be given where the noise is added after a layer.

        Raises:
            ValueError: a norm that the method cannot certify, what has to be given is missing, or n unanimous votes
                prove no answer at all.
        """
        self._check_norm(norm)
        return self._largest(norm, shape, num_classes or 2, sensitivity or {})

    @torch.no_grad()
    def _vote(self, model: Model, x: Tensor, streams: Streams, bounds: tuple[float, float], threat: Lp | None) -> Votes:
        """SAMPLE and COUNT of Cohen et al.: n0 draws, then up to n others until the plan has seen enough."""
        if not len(x):
            nothing = torch.zeros(0, 2, dtype=torch.int64, device=x.device)
            return Votes(nothing, nothing, self.n0, nothing[:, 0], x.shape[1:], self.source)
        poll = self._poll(model, x, bounds)
        needed = None if threat is None else self._needed(threat, x, poll)
        selection, measured = Ballot(streams, poll.num_classes), Ballot(streams, poll.num_classes)
        rows = list(range(len(x)))
        poll.extend(selection, rows, 0, self.n0)
        chosen = selection.counts.argmax(dim=1, keepdim=True)
        draws, before = np.zeros(len(x), dtype=np.int64), 0
        for look in self.plan.looks(self.n, poll.block):
            poll.extend(measured, rows, before, look)
            draws[rows], before = look, look
            if needed is not None and look < self.n:
                successes = measured.counts.gather(1, chosen)[rows, 0].cpu().numpy()
                open_ = self.plan.undecided(successes, look, self.alpha, needed[rows])
                rows = [row for row, more in zip(rows, open_.tolist(), strict=True) if more]
            if not rows:
                break
        drawn = torch.from_numpy(draws).to(x.device)
        counts = (selection.counts, measured.counts, self.n0, drawn)
        return Votes(*counts, x.shape[1:], self.source, poll.sensitivity)

    def _poll(self, model: Model, x: Tensor, bounds: tuple[float, float]) -> Poll:
        check_finite(model)
        return Poll(model, x, self.corruption(model, x, bounds), self.memory_budget)

    def _check_norm(self, norm: str) -> None:
        if norm not in self.norms:
            raise ValueError(f"{type(self).__name__} certifies {', '.join(self.norms)}, got the norm {norm!r}")

    def _largest(self, norm: str, shape: torch.Size, num_classes: int, sensitivity: Mapping[str, float]) -> float:
        unanimous = torch.zeros(1, num_classes, dtype=torch.int64)
        unanimous[0, 0] = self.n
        votes = Votes(unanimous, unanimous, self.n0, unanimous[:, 0], shape, self.source, sensitivity)
        found = float(self.proven(votes, norm)[0])
        if math.isnan(found):
            raise ValueError(
                f"n = {self.n} draws at alpha = {self.alpha:g} can prove no answer by {self}, not even a radius of 0: "
                "raise n"
            )
        return found

    def _needed(self, threat: Lp, x: Tensor, poll: Poll) -> Array | None:
        """Return `needed` for a threat, after a check that n draws can prove its eps at all."""
        eps = budget(threat, len(x))
        largest = self._largest(threat.norm, x.shape[1:], poll.num_classes, poll.sensitivity)
        if eps.max() > largest:
            raise ValueError(
                f"n = {self.n} draws at alpha = {self.alpha:g} can prove a {threat.norm} radius of at most "
                f"{largest:.6g} by {self}, and eps = {eps.max():.6g} was asked for: raise n, or the noise"
            )
        return self.needed(eps, threat.norm, x.shape[1:])


def _streams(
    x: Tensor, bounds: tuple[float, float], indices: Tensor | None, generator: torch.Generator | None, batch_size: int
) -> Streams:
    check_images(x, bounds)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    names = torch.arange(len(x)) if indices is None else indices
    check_indices(names, x)
    return Streams.from_generator(generator, names, x.device)


def _winner(counts: Tensor, alpha: float) -> Tensor:
    """Return the class with most votes where a two-sided test at level alpha tells it from the second."""
    votes, classes = counts.topk(2, dim=1)
    first, both = (t.double().cpu().numpy() for t in (votes[:, 0], votes.sum(dim=1)))
    clear = 2 * upper_tail(first, both, 0.5) <= alpha  # at 1/2 both tails are alike
    return torch.where(torch.from_numpy(clear).to(counts.device), classes[:, 0], ABSTAIN)


def _joined(parts: list[Votes]) -> Votes:
    selection, counts = (torch.cat([getattr(part, name) for part in parts]) for name in ("selection", "counts"))
    return replace(parts[0], selection=selection, counts=counts, draws=torch.cat([part.draws for part in parts]))
