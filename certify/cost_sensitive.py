"""Cost-sensitive certificates: only some mistakes matter, and some matter more than others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.certify.base import Certifier
from robustbench_lite.core.checks import check_labels
from robustbench_lite.core.models import Model, predict
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat

__all__ = ["CostReport", "CostSensitive", "cost_report", "seed_class_costs", "small_large_costs"]

Matrix = Sequence[Sequence[float]] | Tensor


@dataclass(frozen=True)
class CostSensitive(Certifier):
    """Certify that no image of the threat makes a mistake that costs anything.

    A pair (y, j) of classes is protected where mistaking y for j has a cost, C_yj > 0. A sample is VERIFIED, and
    certified, where the prediction is its true label y and z_y > z_j all over the threat for every protected j; with no
    protected pair of y nothing is asked. So the model may answer another class inside the threat: only one that costs
    nothing. FALSIFIED: the inner certifier's counterexample gets a label of a protected pair. Other samples keep the
    inner certifier's status, but a counterexample to an unprotected class leaves UNKNOWN.

    What it says of a whole data set, `cost_report` says from the certificate's margins. Bounds need not be trained for
    it; but a net that is trained for the protected pairs is less robust at the others, so look at both.

    Source: Zhang and Evans, "Cost-Sensitive Robustness against Adversarial Examples", ICLR 2019, arXiv:1810.09225.
    Departures: any certifier that bounds margins in the place of Wong and Kolter's dual bound.

    Attributes:
        certifier: a deterministic certifier whose certificates have margins, such as IBP or CROWN. Exact needs
            `every_margin=True`.
        cost_matrix: C (K, K), entries >= 0 and 0 on the diagonal, as nested sequences or a tensor; kept as tuples.
        tolerance: what the lower bound of a margin has to exceed.

    >>> from robustbench_lite.certify.ibp import IBP
    >>> from robustbench_lite.core.threats import Lp
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 3, bias=False))
    >>> net[1].weight.data = torch.tensor([[1.0], [0.9], [-1.0]])
    >>> x, y, threat = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), Lp("linf", 0.4)
    >>> [CostSensitive(IBP(), seed_class_costs(k, 3))(net, x, y, threat).certified.item() for k in (0, 1)]
    [True, True]
    >>> net[1].bias = torch.nn.Parameter(torch.tensor([0.0, 0.02, 0.0]))
    >>> [CostSensitive(IBP(), seed_class_costs(k, 3))(net, x, y, threat).certified.item() for k in (0, 1)]
    [False, True]
    """

    kind: ClassVar[str] = "deterministic"
    forgives: ClassVar[bool] = True

    certifier: Certifier
    cost_matrix: Matrix
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.certifier.kind != "deterministic":
            raise ValueError(
                f"costs are counted from margins, which only deterministic certifiers bound; {self.certifier} is "
                f"{self.certifier.kind}"
            )
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be >= 0 and finite, got {self.tolerance}")
        rows = tuple(tuple(row) for row in _costs(self.cost_matrix).tolist())
        object.__setattr__(self, "cost_matrix", rows)

    def supports(self, threat: Threat) -> bool:
        """Say yes where the inner certifier does."""
        return self.certifier.supports(threat)

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk."""
        inner = self.certifier.run(model, x, y, threat, streams)
        if inner.margins is None:  # a model that decides by itself: see MarginCertifier
            return inner
        protected = _costs(self.cost_matrix, inner.margins, y).to(y.device)[y] > 0
        certified = (~protected | (inner.margins > self.tolerance)).all(dim=1) & (inner.prediction == y)
        status = inner.status.clone()
        status[status == int(Status.VERIFIED)] = int(Status.UNKNOWN)
        status[status == int(Status.FALSIFIED)] = int(Status.UNKNOWN)
        shown = ((inner.status == int(Status.FALSIFIED)) & (inner.prediction == y)).nonzero().flatten()
        if len(shown) and inner.counterexample is not None:
            with torch.no_grad():
                reached = predict(model, inner.counterexample[shown])
            costs = (reached < 0) | protected[shown].gather(1, reached.clamp_min(0).unsqueeze(1)).flatten()
            status[shown[costs]] = int(Status.FALSIFIED)
        status[certified] = int(Status.VERIFIED)
        eps = torch.as_tensor(getattr(threat, "eps", 0.0), dtype=torch.float64, device=y.device).expand(len(y))
        return replace(inner, status=status, certified=certified, radius=torch.where(certified, eps, 0.0))


@dataclass(frozen=True, eq=False)
class CostReport:
    """What a set of samples may cost under attack, and what is left unprotected.

    Attributes:
        robust_cost: mean over the samples of protected classes (those with a cost) of sum_j C_yj over the pairs that
            are not proven; NaN where there are none. An upper bound of the true one.
        violated: share of the same samples with any protected pair that is not proven: for costs of 0 and 1 in a single
            row, Zhang and Evans's "cost-sensitive robust error".
        protected: float64 (K, K), for each protected pair (y, j) the share of the samples of class y for which it is
            not proven; NaN elsewhere and where class y has no samples.
        unprotected: the same for all other pairs off the diagonal.
    """

    robust_cost: float
    violated: float
    protected: Tensor
    unprotected: Tensor


def cost_report(margins: Tensor, y: Tensor, cost_matrix: Matrix, tolerance: float = 1e-6) -> CostReport:
    """Count what a certificate's margins leave open, with the unprotected pairs beside the protected ones.

    Args:
        margins: (B, K), lower bounds of z_y - z_j, as `Certificate.margins`.
        y: true labels, int64 (B,).
        cost_matrix: C (K, K), entries >= 0 and 0 on the diagonal.
        tolerance: what a margin has to exceed to be proven.

    Raises:
        ValueError: a cost matrix or labels that do not fit.

    >>> margins = torch.tensor([[float("inf"), 0.5, -0.2], [0.3, float("inf"), -1.0]])
    >>> report = cost_report(margins, torch.tensor([0, 1]), [[0, 1, 4], [0, 0, 0], [0, 0, 0]])
    >>> report.robust_cost, report.violated, report.unprotected[1, 2].item()
    (4.0, 1.0, 1.0)
    """
    costs = _costs(cost_matrix, margins, y).to(margins.device)
    classes = torch.arange(len(costs), device=y.device)
    open_pairs = ((margins <= tolerance) | margins.isnan()) & (y.unsqueeze(1) != classes)
    seeds = (costs[y] > 0).any(dim=1)
    paid = (costs[y] * open_pairs).sum(dim=1)[seeds]
    any_paid = (open_pairs & (costs[y] > 0)).any(dim=1)[seeds]
    own = (y.unsqueeze(1) == classes).double()
    share = own.T @ open_pairs.double() / own.sum(dim=0).unsqueeze(1)  # 0 / 0 is NaN: a class without samples
    off_diagonal = ~torch.eye(len(costs), dtype=torch.bool, device=costs.device)
    return CostReport(
        robust_cost=float(paid.mean()) if len(paid) else float("nan"),
        violated=float(any_paid.double().mean()) if len(paid) else float("nan"),
        protected=torch.where(costs > 0, share, torch.nan),
        unprotected=torch.where((costs == 0) & off_diagonal, share, torch.nan),
    )


def seed_class_costs(seed_class: int, num_classes: int = 10) -> tuple[tuple[float, ...], ...]:
    """Return the costs where every mistake about one class counts 1 and no other counts (Zhang and Evans: class 9).

    >>> seed_class_costs(1, 3)
    ((0.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0))
    """
    if not 0 <= seed_class < num_classes:
        raise ValueError(f"seed_class must be in 0 .. {num_classes - 1}, got {seed_class}")
    classes = range(num_classes)
    return tuple(tuple(float(i == seed_class and j != i) for j in classes) for i in classes)


def small_large_costs(num_classes: int = 10) -> tuple[tuple[float, ...], ...]:
    """Return the costs (i - j)^2 of taking digit i for a larger one j, and 0 for a smaller one ("small-large").

    >>> small_large_costs(3)
    ((0.0, 1.0, 4.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0))
    """
    classes = range(num_classes)
    return tuple(tuple(float((j - i) ** 2) if i < j else 0.0 for j in classes) for i in classes)


def _costs(matrix: Matrix, margins: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """Return the matrix as float64 (K, K), checked, also against margins (B, K) and labels."""
    costs = torch.as_tensor(matrix if isinstance(matrix, Tensor) else [list(row) for row in matrix]).double()
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1]:
        raise ValueError(f"cost_matrix must be square (K, K), got shape {tuple(costs.shape)}")
    if not bool((costs.isfinite() & (costs >= 0)).all()) or bool(costs.diagonal().any()):
        raise ValueError("cost_matrix must have finite entries >= 0, and 0 on its diagonal")
    if margins is not None and y is not None:
        if margins.shape != (len(y), len(costs)):
            raise ValueError(f"margins must have shape ({len(y)}, {len(costs)}), got {tuple(margins.shape)}")
        check_labels(y, margins, len(costs))
    return costs
