"""Ask an attack for adversarial examples before a proof is tried."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Falsifier"]


class Falsifier(Protocol):
    """An attack: what is called with a model, images, labels and a threat, and returns an `AttackResult`."""

    def supports(self, threat: Threat) -> bool:
        """Say whether it can attack within this threat."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        goal: Tensor,
        threat: Threat,
        *,
        indices: Tensor | None = ...,
        generator: torch.Generator | None = ...,
    ) -> AttackResult:
        """Attack."""


def falsified(
    falsifier: Falsifier | None, model: nn.Module, x: Tensor, label: Tensor, threat: Lp, streams: Streams
) -> tuple[Tensor, Tensor]:
    """Return images (B, C, H, W), adversarial where one was found and clean elsewhere, and where, bool (B,).

    Args:
        falsifier: an attack; None, or one that does not support the threat: nothing is found.
        model: nn.Module.
        x: clean images.
        label: the label to get away from, int64 (B,); negative ones are left alone.
        threat: of these images.
        streams: of these images.
    """
    points, fallen = x.clone(), torch.zeros_like(label, dtype=torch.bool)
    rows = (label >= 0).nonzero().flatten()
    if falsifier is None or not len(rows) or not falsifier.supports(threat):
        return points, fallen
    names = torch.tensor([streams.indices[i] for i in rows.tolist()])
    source = torch.Generator().manual_seed(streams.root % 2**63)
    found = falsifier(model, x[rows], label[rows], threat.take(rows), indices=names, generator=source)
    points[rows] = torch.where(found.success.reshape(-1, 1, 1, 1), found.x_adv, x[rows])
    fallen[rows] = found.success
    return points, fallen
