"""The base of all certifiers: it checks what comes in, freezes the model, cuts the batch, and searches radii."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustbench_lite.core.checks import check_images, check_labels
from robustbench_lite.core.models import Model, frozen
from robustbench_lite.core.results import Certificate
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Certifier"]


@dataclass(frozen=True)
class Certifier(ABC):
    """A proof of robustness; subclasses are frozen dataclasses whose fields are the hyper-parameters.

    A subclass writes `supports` and `run`.

    Attributes:
        kind: "deterministic", "probabilistic" or "estimate".
        smooths: whether certificates are about the smoothed classifier around the model, and not about the model.
        forgives: whether some mistakes break no certificate, so that certificates are no robust accuracy.
        cheap: whether a proof costs less than a thorough attack; the cascade of an evaluation then asks for it first.
        version: part of the identity of stored results; raise it when the certifier's answers change.
    """

    kind: ClassVar[str]
    smooths: ClassVar[bool] = False
    forgives: ClassVar[bool] = False
    cheap: ClassVar[bool] = True
    version: ClassVar[int] = 1

    @abstractmethod
    def supports(self, threat: Threat) -> bool:
        """Say whether the method can certify against this threat."""

    @abstractmethod
    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk of a batch; the model is frozen and in eval mode, the arguments are checked."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 256,
    ) -> Certificate:
        """Certify a batch.

        The model runs in eval mode with frozen parameters and is left as it was found, `.grad` included.

        Args:
            model: images (B, C, H, W) to logits (B, K).
            x: clean images (B, C, H, W), floating point, within the threat's bounds.
            y: true labels, int64 (B,).
            threat: what the adversary may do.
            indices: the samples' names for their random streams, int64 (B,); default 0 .. B - 1.
            generator: the source of randomness, one draw a call; None: a fresh one with seed 0.
            batch_size: images at a time; it changes memory and speed, not the answer.

        Raises:
            TypeError: images that are not floating point, or labels that are not int64.
            ValueError: a threat that this certifier does not support or that does not fit the images, or images, labels
                or indices out of range.
        """
        if not self.supports(threat):
            raise ValueError(f"{self} does not support the threat {threat}")
        check_images(x, threat.bounds)
        check_labels(y, x)
        if isinstance(threat, Lp):
            threat.check_fits(x)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        names = torch.arange(len(x)) if indices is None else indices
        if names.shape != x.shape[:1]:
            raise ValueError(f"indices must have shape ({len(x)},), one for each image, got {tuple(names.shape)}")
        streams = Streams.from_generator(generator, names, x.device)
        rows = torch.arange(len(x), device=x.device)
        with frozen(model):
            return _joined(
                [
                    self.run(model, x[part], y[part], threat.take(part), streams.take(part))
                    for part in torch.split(rows, batch_size)
                ]
            )

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
        """Return the largest eps at which each sample was certified, float64 (B,); 0 where none was.

        Bisection, all samples at once. Every value it returns was certified itself; eps a `tolerance` larger was not,
        unless the answer is `max_eps`.

        Args:
            model: images (B, C, H, W) to logits (B, K).
            x: clean images (B, C, H, W) within `bounds`.
            y: true labels, int64 (B,).
            norm: "linf", "l2" or "l1", as the method supports.
            bounds: smallest and largest value of an image.
            max_eps: where the search starts; None: the diameter of the image range.
            tolerance: width at which the search ends.
            indices: as in `__call__`.
            generator: as in `__call__`, one draw for each step of the search.
            batch_size: as in `__call__`.

        Raises:
            ValueError: `max_eps` or `tolerance` not positive, or as in `__call__`.
        """
        top = _diameter(norm, x, bounds) if max_eps is None else float(max_eps)
        if not (0 < tolerance < math.inf and 0 < top < math.inf):
            raise ValueError(f"max_eps and tolerance must be positive and finite, got {top:g} and {tolerance:g}")
        names = torch.arange(len(x)) if indices is None else indices

        def certified(eps: Tensor, rows: Tensor) -> Tensor:
            rest: dict[str, Any] = {
                "indices": names[rows.to(names.device)],
                "generator": generator,
                "batch_size": batch_size,
            }
            return self(model, x[rows], y[rows], Lp(norm, eps, bounds), **rest).certified

        verified = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        failed = torch.full_like(verified, top)
        rows = torch.arange(len(x), device=x.device)
        reached = certified(failed, rows)
        verified[reached] = top
        rows = rows[~reached]
        for _ in range(math.ceil(math.log2(max(top / tolerance, 1)))):
            if not len(rows):
                break
            middle = (verified[rows] + failed[rows]) / 2
            holds = certified(middle, rows)
            verified[rows] = torch.where(holds, middle, verified[rows])
            failed[rows] = torch.where(holds, failed[rows], middle)
        return verified


def _diameter(norm: str, x: Tensor, bounds: tuple[float, float]) -> float:
    """Return the largest distance between two images, in the norm (l0 counts pixels)."""
    values = max(math.prod(x.shape[1:]), 1)
    pixels = float(max(math.prod(x.shape[2:]), 1))
    sizes = {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values)}
    return pixels if norm == "l0" else sizes.get(norm, 1.0) * (bounds[1] - bounds[0])


def _joined(parts: list[Certificate]) -> Certificate:
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in fields(Certificate):
        values = [getattr(part, field.name) for part in parts]
        joined[field.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return Certificate(**joined)
