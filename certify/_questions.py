"""What is asked of a network at one image: how small rows of C z can get over a threat; and that as a programme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from robustbench_lite.certify._affine import Affine
from robustbench_lite.certify._milp import Programme, Solution
from robustbench_lite.certify._network_programme import NORMS, Bounder, Network, enter, network_of
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.core.threats import Lp, Threat

__all__: list[str] = []

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Question:
    """One image, a threat around it, and rows of C z to be minimised.

    Attributes:
        network: of the model.
        x: (1, C, H, W), float64.
        threat: of this one image.
        C: (S, K).
        known: bounds, each side (1, ...), of what enters an activation, by the node's position.
    """

    network: Network
    x: Tensor
    threat: Lp
    C: Floats
    known: Mapping[int, Interval] = field(default_factory=dict)

    def programme(self, bounds: Bounder) -> Built:
        """Write it down, with these bounds of what enters each activation."""
        programme = Programme()
        image = enter(programme, self.x, self.threat)
        logits = self.network.encode(programme, image, bounds)
        return Built(self, programme, image, logits.mapped(sparse.csr_array(self.C)))


@dataclass(frozen=True, eq=False)
class Built:
    """A question as a programme."""

    question: Question
    programme: Programme
    image: Affine
    values: Affine

    def row(self, s: int) -> Affine:
        """Return one row of C z."""
        return self.values.rows(np.array([s]))

    def found(self, solution: Solution) -> Tensor | None:
        """Return the image (1, C, H, W) of a solution, moved by its tolerance into the threat; float64."""
        if solution.point is None:
            return None
        x = self.question.x
        flat = torch.from_numpy(self.image.at(solution.point))
        return self.question.threat.project(flat.reshape(x.shape), x)


def questions(model: nn.Module, x: Tensor, threat: Lp, C: Tensor) -> list[Question]:
    """Return the question at each image (B, C, H, W), for rows C (S, K) or (B, S, K).

    Raises:
        UnsupportedOperator: an operator of the model is not piecewise linear.
        ValueError: C has another shape.
    """
    images, specification = x.detach().double().cpu(), C.detach().double().cpu()
    if not len(images):
        return []
    network = network_of(model, images)
    if specification.ndim == 2:
        specification = specification.expand(len(images), *specification.shape)
    if specification.ndim != 3 or len(specification) != len(images) or specification.shape[2] != network.num_classes:
        raise ValueError(
            f"C must have shape (S, {network.num_classes}) or ({len(images)}, S, {network.num_classes}) for this model "
            f"and batch, got {tuple(C.shape)}"
        )
    return [
        Question(network, image[None], threat.take(torch.tensor([i])), rows.numpy())
        for i, (image, rows) in enumerate(zip(images, specification, strict=True))
    ]


def has_programme(threat: Threat) -> bool:
    """Say whether a threat's images can be written as linear rows and integers."""
    return isinstance(threat, Lp) and threat.norm in NORMS and threat.eps is not None


def check_has_programme(threat: Threat) -> None:
    """Check that a threat's images can be written as linear rows and integers.

    Raises:
        ValueError: they cannot; the message says which can, and what to take instead.
    """
    if has_programme(threat):
        return
    norms = ", ".join(NORMS)
    instead = "an l2 ball has no linear rows: take IBP, CROWN or AlphaCROWN; " if threat.name.startswith("l2") else ""
    raise ValueError(f"exact programmes exist for Lp threats of norm {norms}, with an eps; {instead}got {threat}")
