"""alpha-CROWN: CROWN with the lower slopes of its activations optimised for each margin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustbench_lite.certify.crown import LinearCertifier, least_of
from robustbench_lite.certify.ir import Graph
from robustbench_lite.certify.joint_slopes import ascend_jointly
from robustbench_lite.certify.linear_bounds import LinearBounds, specification_rows
from robustbench_lite.certify.region import Region
from robustbench_lite.certify.slopes import Ascent

__all__ = ["AlphaCROWN"]


@dataclass(frozen=True)
class AlphaCROWN(LinearCertifier):
    """CROWN, and then gradient ascent over the lower slope of every undecided ReLU, for each margin by itself.

    Source: Xu, Zhang, Wang, Wang, Jana, Lin, Hsieh, "Fast and Complete: Enabling Complete Verification with Rapid and
    Massively Parallel Incomplete Verifiers", ICLR 2021, arXiv:2011.13824.
    Departures: as CROWN; margins that are proven leave the ascent; by default the slopes of the last walk alone are
    optimised; the lines of activations other than ReLU and leaky ReLU stay as CROWN chose them.

    Attributes:
        steps: updates of the slopes.
        step_size: of the first update; it falls by 5 % a step.
        joint: whether to go on with an ascent over the slopes of the hidden layers' boxes too: many times dearer.
    """

    steps: int = 20
    step_size: float = 0.25
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.step_size > 0:
            raise ValueError(f"steps and step_size must be positive, got {self.steps} and {self.step_size}")

    def least(self, graph: Graph, model: nn.Module, region: Region, C: Tensor) -> Tensor:
        """Return lower bounds (B, S) of C z over a region; a bound above `tolerance` is not improved further."""
        net = LinearBounds(graph, model, region, C, memory_budget=self.memory_budget)
        return self.improved(net, C, least_of(net, C, net.final.lower))

    def improved(self, net: LinearBounds, C: Tensor, lower: Tensor) -> Tensor:
        """Return lower bounds (B, S) of C z, with slopes optimised where `lower` does not exceed `tolerance`."""
        rows = specification_rows(C, len(lower))
        open_rows = (lower.flatten() <= self.tolerance) & (rows.values != 0).any(1)
        keep = open_rows.nonzero().flatten()
        ascent = Ascent(self.steps, self.step_size, target=self.tolerance)
        best = lower.flatten().clone()
        best[keep] = torch.maximum(best[keep], ascent.best(net, rows.take(keep)))
        keep = keep[best[keep] <= self.tolerance]
        if self.joint and len(keep):
            best[keep] = torch.maximum(best[keep], ascend_jointly(ascent, net, rows.take(keep)))
        return best.reshape(lower.shape)
