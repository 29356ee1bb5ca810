"""Small models, attacks and certifiers with one property each. Also imported by the child processes of the kill
test."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import as_goal
from robustbench_lite.core.oracle import Access
from robustbench_lite.core.results import AttackResult, Certificate, Status
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation.cells import BLOCK, BLOCKS_PER_FILE

CALLS: dict[str, list[list[int]]] = {}  # the dataset indices of each call, by name of the method


class Linear(nn.Module):
    """Logits (s, -s) of the sum s of the pixels, less a threshold: the exact linf radius is known."""

    def __init__(self, threshold: float = 8.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        lead = (x.flatten(1).sum(dim=1) - self.threshold) * self.scale
        return torch.stack([lead, -lead], dim=1)


def linear_data(n: int = 40, seed: int = 0, wrong: float = 0.2) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 4, 4), and labels of which a share `wrong` is not what `Linear()` answers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=g)
    y = (x.flatten(1).sum(dim=1) < 8.0).long()
    return x, torch.where(torch.rand(n, generator=g) < wrong, 1 - y, y)


def two_blocks(n: int = 40, seed: int = 0) -> Dataset:
    """`linear_data` under indices of which half lie in the block from 500 on."""
    x, y = linear_data(n, seed)
    indices = torch.arange(n) + torch.where(torch.arange(n) >= n // 2, 500, 0)
    return Dataset("linear", "test", x, y, indices, 2)


def two_groups(n: int = 40) -> Dataset:
    """`two_blocks` under indices whose second half lies so far away that a store has other files for it."""
    data = two_blocks(n)
    return replace(
        data, indices=torch.where(data.indices >= 500, data.indices - 500 + BLOCK * BLOCKS_PER_FILE, data.indices)
    )


def exact_radius(x: Tensor) -> Tensor:
    """The linf distance of each image from the decision boundary of `Linear()`, bounds aside."""
    return ((x.double().flatten(1).sum(dim=1) - 8.0).abs() / 16).double()


@dataclass(frozen=True)
class Shift(Attack):
    """Moves each pixel by a share of eps towards the boundary of `Linear`: at reach 1 the strongest linf attack."""

    reach: float = 1.0
    sleep: float = 0.0
    fail_from: int = 10**9  # raise when asked about an index from here on

    def supports(self, threat: Any) -> bool:
        return threat.name == "linf"

    def __call__(self, model: Any, x: Tensor, goal: Any, threat: Any, **rest: Any) -> AttackResult:
        CALLS.setdefault(f"Shift {self.reach:g}", []).append(rest["indices"].tolist())
        if int(rest["indices"].max()) >= self.fail_from:
            raise RuntimeError("a bad day")
        time.sleep(self.sleep)
        return super().__call__(model, x, goal, threat, **rest)

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        sign = torch.where(goal.labels == 0, -1.0, 1.0).to(x).reshape(-1, 1, 1, 1)
        rows = oracle.standing(oracle.judge_cost)
        points = threat.project(x + sign * self.reach * threat.eps, x)
        noise = threat.take(rows).random_point(x[rows], streams.take(rows))  # so that randomness shows in the records
        oracle.judge(points[rows], rows)
        still = oracle.still(rows, oracle.judge_cost)
        oracle.judge(noise[still], rows[still])
        return oracle.best


@dataclass(frozen=True)
class Liar:
    """Claims that the clean image, or an image far outside the threat, is adversarial."""

    version: ClassVar[int] = 1
    access: ClassVar[Access] = Access.GRADIENT
    outside: bool = False

    def supports(self, threat: Any) -> bool:
        return True

    def __call__(self, model: Any, x: Tensor, goal: Any, threat: Any, **rest: Any) -> AttackResult:
        labels, ones = as_goal(goal).labels, torch.ones(len(x), dtype=torch.int64)
        far = torch.where(labels.reshape(-1, 1, 1, 1) == 0, torch.zeros_like(x), torch.ones_like(x))
        x_adv = far if self.outside else x
        return AttackResult(x_adv, ones.bool(), torch.zeros(len(x), dtype=torch.float64), ones, ones * 0, ones)


@dataclass(frozen=True)
class Exact:
    """The true radius of `Linear()`, times `factor`: above 1 it lies."""

    version: ClassVar[int] = 1
    smooths: ClassVar[bool] = False
    forgives: ClassVar[bool] = False
    factor: float = 1.0
    kind: str = "deterministic"
    alpha: float = 0.0
    lies_about: int = 10**9  # only every so many samples are lied about
    timeout: bool = False
    cheap: bool = True

    def supports(self, threat: Any) -> bool:
        return threat.name == "linf"

    def __call__(
        self, model: Any, x: Tensor, y: Tensor, threat: Any, *, indices: Tensor, generator: Any
    ) -> Certificate:
        CALLS.setdefault(f"Exact {self.factor:g}", []).append(indices.tolist())
        lie = (indices % self.lies_about == 0) if self.lies_about < 10**9 else torch.ones(len(x), dtype=torch.bool)
        radius = exact_radius(x) * (1 - 1e-6) * torch.where(lie, self.factor, 1.0)
        prediction = model(x).argmax(dim=1)
        proven = (radius >= threat.eps) & (not self.timeout)
        lost = Status.TIMEOUT if self.timeout else Status.UNKNOWN
        return Certificate(
            status=torch.where(proven, int(Status.VERIFIED), int(lost)),
            certified=proven & (prediction == y) & (self.kind != "estimate"),
            radius=torch.where(proven, radius, 0.0),
            prediction=prediction,
            kind=self.kind,
            confidence=1 - self.alpha,
            samples=torch.zeros(len(x), dtype=torch.int64),
            estimate=radius if self.kind == "estimate" else None,
        )


def count(method: str) -> int:
    """Samples that a method was asked about since `CALLS` was cleared."""
    return sum(len(indices) for indices in CALLS.get(method, []))
