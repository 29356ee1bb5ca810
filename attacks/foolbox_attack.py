"""Attacks of foolbox, one sample at a time, under our accounting.

Threat: the Lp norm of the foolbox attack; attacks that look for the nearest adversarial example also take a budget.
Access: that of the foolbox attack.
Source: Rauber, Zimmermann, Bethge and Brendel 2020, "Foolbox Native" (Journal of Open Source Software 5(53), 2607);
the papers of the attacks are named in foolbox's own documentation. Checked against foolbox 3.3.4.
Departures: every forward and backward pass goes through the oracle, so a budget holds and the nearest (or first)
success that was met is kept, whatever foolbox returns. Whether a point is adversarial is the deployed model's verdict,
not the largest logit of a view. Each sample has its own seed for the global generators that foolbox draws from. Known
faults are refused by name, with the reason (`_foolbox_catalogue.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._foolbox_catalogue import Entry, find
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal, Targeted, Untargeted
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["FoolboxAttack"]

Scalar = bool | int | float | str | None


@dataclass(frozen=True, init=False, repr=False)
class FoolboxAttack(Attack):
    """An attack class of foolbox by its name: `FoolboxAttack("DDNAttack", steps=50)`.

    Foolbox is imported when the attack runs, not before.

    Attributes:
        name: the class in `foolbox.attacks`; aliases such as "LinfPGD" are resolved.
        options: its arguments, sorted (name, value) pairs; foolbox's defaults where not given. The distance is not
            among them: it is the threat's.

    Args:
        name: the class, or an alias.
        options: the arguments as a mapping (or as pairs).
        more: further arguments, as keywords.

    Raises:
        ValueError: an unknown or a refused attack, or an option that is no plain value.
    """

    name: str
    options: tuple[tuple[str, Scalar], ...] = ()

    def __init__(
        self, name: str, options: Mapping[str, Scalar] | Iterable[tuple[str, Scalar]] = (), **more: Scalar
    ) -> None:
        given = {**dict(options), **more}
        for option, value in given.items():
            if option == "distance":
                raise ValueError("the option 'distance' is the threat's norm: leave it out, and choose the threat")
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"option {option!r} must be a number, text or None, got {type(value).__name__}")
        object.__setattr__(self, "name", find(name)[0])
        object.__setattr__(self, "options", tuple(sorted(given.items())))

    def __repr__(self) -> str:
        return f"FoolboxAttack({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.options)])})"

    @property
    def _entry(self) -> Entry:
        return find(self.name)[1]

    @property
    def access(self) -> Access:
        """What the foolbox attack sees of the model."""
        return self._entry.access

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an Lp ball of the attack's norm, with a budget where the attack needs one."""
        entry = self._entry
        norms = (dict(self.options).get("constraint", "l2"),) if self.name == "HopSkipJumpAttack" else entry.norms
        return (
            isinstance(threat, Lp)
            and threat.norm in norms
            and not (entry.fixed and threat.eps is None)
            and not (entry.unit_bounds and threat.bounds != (0.0, 1.0))
        )

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Run foolbox on each sample that still stands, and return what it returned where that is not known yet."""
        self._check_goal(goal)
        from robustbench_lite.attacks import _foolbox_bridge as bridge

        attack = bridge.build(self.name, self._entry, dict(self.options), cast(Lp, threat).norm)
        seeds = streams.integers(2**31).tolist()
        returned = {}
        for row in oracle.standing(oracle.judge_cost).tolist():
            rows = torch.tensor([row], device=x.device)
            point = bridge.search(attack, self._entry, oracle, rows, seeds[row])
            if point is not None and bool(point.isfinite().all()):
                returned[row] = _inside(threat.take(rows), point, x[rows])
        points = oracle.best.clone()
        for row, point in returned.items():
            points[row] = point[0]
        return points

    def _check_goal(self, goal: Goal) -> None:
        goals = self._entry.goals
        if goals == "untargeted" and isinstance(goal, Targeted):
            raise ValueError(f"foolbox's {self.name} knows no target: use an Untargeted goal, or DDNAttack or PGD")
        if goals == "targeted" and isinstance(goal, Untargeted):
            raise ValueError(f"foolbox's {self.name} needs a target for each sample: use a Targeted goal")


def _inside(threat: Threat, point: Tensor, x: Tensor) -> Tensor:
    """Return the point, or where it lies outside a budget its projection, as foolbox itself clips what it returns."""
    if threat.size is None or bool(threat.contains(point, x)):
        return point
    return threat.project(point, x)
