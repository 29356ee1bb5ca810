"""Projected gradient ascent on flow fields: how far a bounded smooth deformation can go.

Threat: deformations with a budget. Access: gradients.
Source: ours; the bounded test that minimum-norm deformation attacks (ADef, stAdv) leave out. The loop is that of Madry
et al. 2017 (1706.06083) in the norm max_s ||flow(s)||_2, with the momentum of Dong et al. 2017 (1710.06081).
Choices, by experiment on MNIST digits against an adversarially trained net: vectors of unit length at each pixel rather
than signs or one length for the whole field; steps of 5 budgets in all rather than 2.5; momentum 0.75 rather than none.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_lite.attacks._parametric_ascent import ParametricAscent
from robustbench_lite.core.spatial import Deformation
from robustbench_lite.core.threats import Threat

__all__ = ["FlowPGD"]


@dataclass(frozen=True)
class FlowPGD(ParametricAscent):
    """Ascend the loss over the raw field; each step moves each pixel's vector by the same length.

    Attributes:
        steps: gradient steps in each run.
        step_size: length of a step as a share of the threat's pixels; None: `5 / steps`.
        restarts: runs from fresh random fields, each on the samples that still stand.
        loss: "ce", "margin" or "dlr".
        momentum: share of the last direction that is kept; gradients, each over its l1 norm, add up to it.

    Raises:
        ValueError: a setting out of range.
    """

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is a deformation with a budget."""
        return isinstance(threat, Deformation) and threat.size is not None
