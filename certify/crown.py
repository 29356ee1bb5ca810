"""CROWN and CROWN-IBP: linear bounds of margins, over boxes of the hidden layers that are linear or interval bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.inputs import input_region
from robustbench_lite.certify.ir import Graph
from robustbench_lite.certify.linear_bounds import LinearBounds, specification_rows
from robustbench_lite.certify.margin_certifier import MarginCertifier
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.region import Region
from robustbench_lite.core.norms import NORMS
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["CROWN", "CROWNIBP"]


@dataclass(frozen=True)
class LinearCertifier(MarginCertifier):
    """The common part of certifiers that use linear bounds.

    Attributes:
        memory_budget: bytes that the coefficients of linear bounds may take at a time; None: 64 MiB on a CPU, 2 GiB
            elsewhere. It changes no answer.
    """

    memory_budget: int | None = None
    tighten: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(f"memory_budget must be a number of bytes, at least 1, got {self.memory_budget}")

    def supports(self, threat: Threat) -> bool:
        """Say yes to Lp balls with a radius, of any norm."""
        return isinstance(threat, Lp) and threat.eps is not None

    def lower_margins(self, model: nn.Module, x: Tensor, threat: Lp, C: Tensor) -> Tensor:
        """Return linear lower bounds (B, S) of C z, nowhere below the interval bounds over the same boxes."""
        if torch.is_inference_mode_enabled():  # some rules differentiate, which that mode's tensors cannot
            with torch.inference_mode(False), torch.no_grad():
                return self.lower_margins(model, x.clone(), threat, C.clone())
        region = input_region(threat, x, tuple(NORMS))
        with full_precision(x.device):
            return self.least(graph_of(model, x), uncompiled(model), region, C)

    def least(self, graph: Graph, model: nn.Module, region: Region, C: Tensor) -> Tensor:
        """Return lower bounds (B, S) of C z over a region."""
        net = LinearBounds(graph, model, region, C, tighten=self.tighten, memory_budget=self.memory_budget)
        return least_of(net, C, net.final.lower)


@dataclass(frozen=True)
class CROWN(LinearCertifier):
    """Walk the margins backwards through the net, with a line below or above every activation.

    Source: Zhang, Weng, Chen, Hsieh, Daniel, "Efficient Neural Network Robustness Certification with General Activation
    Functions", NeurIPS 2018, arXiv:1811.00866.
    Departures: the input set is the ball cut by the image bounds; the box of each hidden layer is cut with its interval
    bounds, and what follows starts from there; only neurons that interval bounds leave undecided get rows of their
    own; convolutions keep patches; float64.
    """


@dataclass(frozen=True)
class CROWNIBP(LinearCertifier):
    """Linear bounds of the margins, over interval bounds of the hidden layers: one backward walk.

    Source: Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh, "Towards Stable and Efficient Training of Verifiably
    Robust Neural Networks", ICLR 2020, arXiv:1906.06316.
    Departures: as CROWN.
    """

    tighten: ClassVar[bool] = False


def least_of(net: LinearBounds, C: Tensor, lower: Tensor) -> Tensor:
    """Return linear lower bounds (B, S) of C z, or those that are known where they are higher.

    A row of zeros stands for a margin that nobody asks about, and costs nothing.
    """
    rows = specification_rows(C, len(net.region.lower))
    asked = (rows.values != 0).any(1).nonzero().flatten()
    known = lower.flatten()
    linear = net.lower(net.graph.output, rows.take(asked))
    return known.index_copy(0, asked, torch.maximum(known[asked], linear)).reshape(lower.shape)
