"""Transfer: craft on nets that the attacker has, and try the result on the one that he has not.

Threat: that of the attack inside, with a budget. Access: labels, one query a sample.
Source: Papernot, McDaniel and Goodfellow 2016, "Transferability in Machine Learning" (1605.07277); ensembles: Liu,
Chen, Liu and Song 2016, "Delving into Transferable Adversarial Examples and Black-box Attacks" (1611.02770).
The surrogates are the attacker's own: passes through them are no queries, are not limited by `max_queries` and are not
counted. The deployed model answers once for the clean input and once for the crafted one.
Departures: crafting always goes on to the end (`stop="never"`) and keeps the point of the highest loss, for the first
point over a surrogate's boundary rarely crosses another net's. Minimum-norm threats are not supported for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.ensemble import Ensemble
from robustbench_lite.core.checks import check_images, check_indices, check_labels
from robustbench_lite.core.goals import Goal, as_goal
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Transfer", "transfer_matrix"]


@dataclass(frozen=True)
class Transfer(Attack):
    """An attack crafted on surrogates and judged, once, by the deployed model.

    A `view` of the deployed model is not used. The surrogates must be on the device of the images, in their dtype.

    Attributes:
        attack: crafts the point; any attack, with any access: the surrogates are open to it.
        surrogates: nets with the classes of the deployed one; one alone needs no combination.
        combine: "logits", "probabilities" or "losses": what of the surrogates is averaged (`Ensemble`).
        weights: one positive number a surrogate; None: equal ones.

    Raises:
        TypeError: something that is no attack, or no net.
        ValueError: no surrogates, an unknown combination, or unfit weights.
    """

    attack: Attack
    surrogates: tuple[nn.Module, ...]
    combine: str = "logits"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(f"attack must be an Attack such as PGD(), got {self.attack!r}")
        nets = (self.surrogates,) if isinstance(self.surrogates, nn.Module) else tuple(self.surrogates)
        object.__setattr__(self, "surrogates", nets)
        object.__setattr__(self, "weights", None if self.weights is None else tuple(self.weights))
        self.ensemble()

    def __repr__(self) -> str:
        nets = ", ".join(type(net).__name__ for net in self.surrogates)
        return f"Transfer({self.attack!r}, surrogates=({nets}), combine={self.combine!r}, weights={self.weights})"

    @property
    def access(self) -> Access:
        """The deployed model gives labels alone."""
        return Access.LABEL

    def ensemble(self) -> Ensemble:
        """Return the surrogates as one net."""
        return Ensemble(self.surrogates, self.combine, self.weights)

    def supports(self, threat: Threat) -> bool:
        """Say whether the attack inside supports the threat, and the threat has a budget."""
        return self.attack.supports(threat) and threat.size is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Craft for the samples that still stand, then ask the deployed model once."""
        rows = oracle.standing(oracle.judge_cost)
        if len(rows):
            part = streams.take(rows).fork(0)
            points = _craft(
                self.attack,
                self.ensemble(),
                x[rows],
                goal.take(rows),
                threat.take(rows),
                part,
                memory_budget=oracle.memory_budget,
            )
            oracle.judge(points, rows)
        return oracle.best


def transfer_matrix(
    attack: Attack,
    models: Mapping[str, nn.Module],
    x: Tensor,
    y: Goal | Tensor,
    threat: Threat,
    *,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> pd.DataFrame:
    """Craft on each model, judge on each, and return the success rates: rows are surrogates, columns targets.

    An entry is the share of samples that fall, among those whose clean input does not achieve the goal on that target
    already (for labels: that the target classifies correctly); NaN where there are none. The diagonal is the white-box
    success. Each sample is crafted once a surrogate, with the same random streams for all, to the end and not to the
    first success.

    Args:
        attack: crafts the points.
        models: the nets by name, in eval mode or not: they are left as they were found.
        x: clean images (B, C, H, W).
        y: the goal, or labels int64 (B,).
        threat: where points must lie; with a budget.
        indices: the samples' names for their random streams, int64 (B,); default 0 .. B - 1.
        generator: the source of randomness, one draw a call; None: a fresh one with seed 0.
        memory_budget: bytes that questions to a model may take, as for an attack.

    Raises:
        ValueError: a threat that the attack does not support or that has no budget, no models, or unfit images,
            labels or indices.
        TypeError: images that are not floating point, or labels that are not int64.
    """
    import pandas as pd

    goal, names = as_goal(y), torch.arange(len(x)) if indices is None else indices
    if not models:
        raise ValueError("a transfer matrix needs at least one model")
    if not attack.supports(threat) or threat.size is None:
        raise ValueError(f"{attack} does not support the threat {threat}, or the threat has no budget")
    check_images(x, threat.bounds)
    check_labels(goal.labels, x)
    check_indices(names, x)
    threat.check_fits(x)
    streams = Streams.from_generator(generator, names, x.device)
    rates = {}
    for name, surrogate in models.items():
        crowd, own = Ensemble([surrogate]), streams.fork(0)
        points = _craft(attack, crowd, x, goal, threat, own, memory_budget=memory_budget)
        rates[name] = {target: _rate(model, x, goal, threat, points) for target, model in models.items()}
    matrix = pd.DataFrame.from_dict(rates, orient="index", columns=list(models))
    return matrix.rename_axis(index="surrogate", columns="target")


def _craft(
    attack: Attack,
    ensemble: Ensemble,
    x: Tensor,
    goal: Goal,
    threat: Threat,
    streams: Streams,
    *,
    memory_budget: int | None = None,
) -> Tensor:
    """Return each sample's point of the highest loss, among those that fool the ensemble where there are any."""
    if len(x) == 0:
        return threat.origin(x)
    access = attack.access
    with ensemble.oracle(x.detach(), goal, threat, access=access, stop="never", memory_budget=memory_budget) as oracle:
        oracle.judge_clean()
        Attack._rejudge(oracle, attack.run(oracle, x.detach(), goal, threat, streams))
        return oracle.best


def _rate(model: nn.Module, x: Tensor, goal: Goal, threat: Threat, points: Tensor) -> float:
    if len(x) == 0:
        return float("nan")
    with Oracle(model, x, goal, threat, access=Access.LABEL) as oracle:
        oracle.judge_clean()
        rows = oracle.standing()
        if len(rows) == 0:
            return float("nan")
        oracle.labels(points[rows], rows)
        return float(oracle.found.fallen[rows].double().mean())
