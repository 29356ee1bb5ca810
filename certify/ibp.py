"""Interval bound propagation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.inputs import INTERVAL_NORMS, input_region
from robustbench_lite.certify.margin_certifier import MarginCertifier
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["IBP"]


@dataclass(frozen=True)
class IBP(MarginCertifier):
    """Push the box around the threat through the net, layer by layer; bound the last layer as differences of logits.

    Proves linf, l2 and l1 threats (see `bounds` for how the norms enter; l0 is not supported). As cheap as two forward
    passes, and tight only on nets trained for it (`IBPTraining`): on others the bounds are vacuous after two or three
    layers.

    Source: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli, "On the Effectiveness of
    Interval Bound Propagation for Training Verifiably Robust Models", 2018, arXiv:1810.12715.
    Departures: float64; l2 and l1 by the dual norm at the first affine layer.

    >>> import torch
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> _ = nn.init.constant_(net[1].weight, 0.0)
    >>> net[1].weight.data[1] = 1.0
    >>> certificate = IBP()(net, torch.full((1, 1, 2, 2), 0.5), torch.tensor([1]), Lp("linf", 0.1))
    >>> certificate.certified.item(), certificate.radius.item(), round(certificate.margins[0, 0].item(), 6)
    (True, 0.1, 1.6)
    """

    def supports(self, threat: Threat) -> bool:
        """Say yes to linf, l2 and l1 balls with a radius."""
        return isinstance(threat, Lp) and threat.norm in INTERVAL_NORMS and threat.eps is not None

    def lower_margins(self, model: nn.Module, x: Tensor, threat: Lp, C: Tensor) -> Tensor:
        """Return interval lower bounds (B, S) of C z."""
        box = input_region(threat, x, INTERVAL_NORMS).interval()
        with full_precision(x.device):
            return propagate(graph_of(model, x), uncompiled(model), box, C).lower
