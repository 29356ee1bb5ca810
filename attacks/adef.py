"""ADef: DeepFool on flow fields, the nearest deformation that changes the answer.

Threat: deformations, with or without a budget. Access: gradients.
Source: Alaifari, Alberti and Gauksson 2018, "ADef: an Iterative Algorithm to Construct Adversarial Deformations"
(1804.07729). In the raw field r, whose smoothed form G r is the flow, the paper's smoothed step -f G a1 / ||a1||^2 with
a1 = G a is the plain least-squares step -f a1 / ||a1||^2: the threat's smoothness takes the place of the attack's.
Departures: f is linearised by the exact derivative of the rendered image in the field, where the paper takes central
differences of the deformed image. At pixel centres, where the search starts, bilinear sampling has a kink, and the mean
of both sides, which is the central difference, is taken. f is always taken against the label, not the
current answer; candidates are overshot as in DeepFool, since the steps approach the boundary from below; under a budget
each field is projected on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_lite.attacks._memory import graphs
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.spatial import Deformation
from robustbench_lite.core.threats import Threat

__all__ = ["ADef"]

BESIDE = 1e-4  # pixels from a pixel's centre: either side of the kink
FIELDS = 3  # classes whose fields take about the room that `Oracle.capacity` leaves for a probe


@dataclass(frozen=True)
class ADef(Attack):
    """Step to the linearised boundary of the nearest class until the answer changes.

    Attributes:
        steps: largest number of steps.
        overshoot: share by which candidates exceed the accumulated field.
        classes: classes considered, the label included: those with the largest logits at the start.

    Raises:
        ValueError: a setting out of range.
    """

    steps: int = 100
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number, at least 1, got {self.steps!r}")
        if not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(f"classes must be a whole number, at least 2, got {self.classes!r}")
        if not self.overshoot >= 0:
            raise ValueError(f"overshoot must be >= 0, got {self.overshoot}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is a deformation."""
        return isinstance(threat, Deformation)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Take the first step from the clean image, and go on from candidates."""
        assert isinstance(threat, Deformation)
        rows = oracle.standing(2 * oracle.probe_cost)
        if len(rows) == 0:
            return oracle.best
        begun = [self._begin(oracle, threat, rows[part]) for part in self._parts(oracle, rows)]
        raw, rivals = (torch.cat(part) for part in zip(*begun, strict=True))
        for _ in range(self.steps - 1):
            keep = oracle.still(rows, oracle.gradient_cost)
            rows, raw, rivals = rows[keep], raw[keep], rivals[keep]
            if len(rows) == 0:
                return oracle.best
            gone = [
                self._go_on(oracle, threat, rows[part], raw[part], rivals[part]) for part in self._parts(oracle, rows)
            ]
            raw, searching = (torch.cat(part) for part in zip(*gone, strict=True))
            rows, raw, rivals = rows[searching], raw[searching], rivals[searching]
        keep = oracle.still(rows, oracle.judge_cost)
        if len(keep):
            oracle.judge(self._candidate(threat, x[rows[keep]], raw[keep]), rows[keep])
        return oracle.best

    def _parts(self, oracle: Oracle, rows: Tensor) -> tuple[Tensor, ...]:
        """Split positions so that the graph of each part, and its fields towards all classes, keep within memory."""
        size = max(1, graphs(oracle) // (1 + self.classes // FIELDS))
        return torch.split(torch.arange(len(rows), device=rows.device), size)

    def _begin(self, oracle: Oracle, threat: Deformation, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw fields (n, 2, H, W) after one step from the clean images, and the rivals, int64 (n, k)."""
        raw = threat.origin(oracle.x[rows])
        f, slope, rivals = self._linearise(oracle, raw + BESIDE, rows, None, candidate=False)
        f_back, slope_back, _ = self._linearise(oracle, raw - BESIDE, rows, rivals, candidate=False)
        return self._step(threat, oracle.x[rows], raw, (f + f_back) / 2, (slope + slope_back) / 2), rivals

    def _go_on(
        self, oracle: Oracle, threat: Deformation, rows: Tensor, raw: Tensor, rivals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Judge the candidates and step on; return the raw fields, and bool (n,): who searches on."""
        x = oracle.x[rows]
        f, slope, _ = self._linearise(oracle, self._candidate(threat, x, raw), rows, rivals)
        searching = ~oracle.verdict  # the search ends at the boundary
        keep = searching.nonzero().flatten()
        raw = raw.index_copy(0, keep, self._step(threat, x[keep], raw[keep], f[keep], slope[keep]))
        return raw, searching

    def _linearise(
        self, oracle: Oracle, points: Tensor, rows: Tensor, rivals: Tensor | None, *, candidate: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return f (n, k) of each rival class, its gradients (n, k, 2, H, W), and the rivals, int64 (n, k)."""
        logits, pull = oracle.pullback(points, rows, candidate=candidate)
        goal = oracle.goal.take(rows)
        if rivals is None:
            rivals = self._rivals(logits, goal)
        weights = _differences(logits, goal, rivals)
        # Logits that are not finite say nothing; a field that is not crashes torch's sampling.
        f = (weights * logits.unsqueeze(1)).sum(dim=2).nan_to_num(0.0, 0.0, 0.0)
        return f, torch.stack([pull(weights[:, k]) for k in range(weights.shape[1])], dim=1), rivals

    def _rivals(self, logits: Tensor, goal: Goal) -> Tensor:
        label = goal.labels.unsqueeze(1)
        if isinstance(goal, Targeted):
            return label
        count = min(self.classes, logits.shape[1]) - 1
        return logits.scatter(1, label, -torch.inf).topk(count, dim=1).indices

    def _candidate(self, threat: Deformation, x: Tensor, raw: Tensor) -> Tensor:
        points = (1 + self.overshoot) * raw
        return points if threat.size is None else threat.project(points, x)

    @staticmethod
    def _step(threat: Deformation, x: Tensor, raw: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """Return the accumulated raw fields (n, 2, H, W), each towards the class that needs the smallest flow."""
        square = slope.flatten(2).square().sum(dim=2)
        # |f|, for where the logits have crossed and the deployed model has not: there the step goes on, not back.
        length = f.abs() / torch.where(square > 0, square, 1)
        fields = raw.unsqueeze(1) + length[..., None, None, None] * slope
        size = threat.flow(fields.flatten(0, 1)).flatten(1).norm(dim=1).reshape(square.shape)
        nearest = torch.where(square > 0, size, torch.inf).argmin(dim=1)
        raw = fields[torch.arange(len(raw), device=raw.device), nearest]
        return raw if threat.size is None else threat.project(raw, x)


def _differences(logits: Tensor, goal: Goal, rivals: Tensor) -> Tensor:
    """Return the weights (n, k, K) that turn logits into f: z_rival - z_label, or z_target - max of the others."""
    label = goal.labels.unsqueeze(1)
    if isinstance(goal, Targeted):
        label = logits.scatter(1, label, -torch.inf).argmax(dim=1, keepdim=True)
    weights = torch.zeros(*rivals.shape, logits.shape[1], dtype=logits.dtype, device=logits.device)
    weights.scatter_(2, rivals.unsqueeze(2), 1.0)
    return weights.scatter_(2, label.unsqueeze(1).expand(-1, rivals.shape[1], 1), -1.0)
