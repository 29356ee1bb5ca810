"""QuickAutoAttack: what AutoAttack finds, in a small part of its time, on nets whose gradients can be trusted.

Threat: linf, l2, l1. Access: gradients.
Source: our own schedule of Auto-PGD (Croce and Hein 2020, 2003.01690; see APGD). Targets are ranked by the linear
estimate of their distance, as in MALT: Melamed, Yehudai and Shamir 2024, "MALT Powers Up Adversarial Attacks"
(2407.02240).
Departures: MALT runs Auto-PGD with 100 steps towards 9 targets; here every sample meets two targets, and the
cross-entropy twice, for 25 steps each, then, in l2 and l1, searches from noise (FarFMN); only those that came close to
falling go on, at the end with Square. FarFMN is there for nets trained against linf: in the other norms their gradients
mislead Auto-PGD, at any length, and a sample that it leaves far from falling would be given up. It finds what
AutoAttack needs FAB towards nine classes and Square for.

`benchmarks/quick_auto_attack.py` prints how it compares with AutoAttack, in robust accuracy and in time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._targets import Towards, difference, likeliest_targets
from robustbench_lite.attacks.apgd import APGD
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.far_fmn import FarFMN
from robustbench_lite.attacks.square import Square
from robustbench_lite.core.goals import Goal, Targeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["QuickAutoAttack"]

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}


@dataclass(frozen=True)
class QuickAutoAttack(Attack):
    """Short runs of Auto-PGD towards the nearest classes; long ones for the samples that nearly fell.

    Attributes:
        steps: gradient steps in each run.
        targets: nearest wrong classes that every sample meets.
        far_steps: steps of each search from noise, in l2 and l1.
        far_restarts: such searches; as many again for those that nearly fell.
        close: go on with a sample when the margin at its best point is at most this share of the clean one.
        rounds: further runs of each kind for these samples, each with one more of the targets, the next nearest; they
            are gone through again when all have been met.
        queries: most queries of a last search without gradients (Square) on these samples; none in l1.
        candidates: likeliest wrong classes that are ranked by distance: one gradient each.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    steps: int = 25
    targets: int = 2
    far_steps: int = 60
    far_restarts: int = 5
    close: float = 0.2
    rounds: int = 4
    queries: int = 2000
    candidates: int = 9

    def __post_init__(self) -> None:
        for name in ("steps", "targets", "far_steps", "far_restarts", "queries", "candidates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not isinstance(self.rounds, int) or self.rounds < 0:
            raise ValueError(f"rounds must be a whole number, at least 0, got {self.rounds!r}")
        if not self.close >= 0:
            raise ValueError(f"close must be at least 0, got {self.close}")

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf, l2 or l1 ball with a budget."""
        return APGD().supports(threat)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Try the nearest targets and the cross-entropy on all, then all of it again on those that nearly fell."""
        oracle.measure = margin  # `_close` asks for the margin at the best point
        ball = cast(Lp, threat)
        everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
        clean, aims = self._aims(oracle, x, goal, ball)
        self._round(oracle, aims[: self.targets], goal, ball, streams, everyone)
        far = FarFMN(steps=self.far_steps, restarts=self.far_restarts)
        if ball.norm != "linf":
            far.search(oracle, oracle.standing(), ball, streams.fork(1))
        chosen = self._close(oracle, clean)
        further = itertools.cycle(aims[self.targets :])
        for _ in range(self.rounds):
            met = [*aims[: self.targets], *itertools.islice(further, 1)]
            self._round(oracle, met, goal, ball, streams, chosen)
        if ball.norm != "linf":
            rows = oracle.standing()
            far.search(oracle, rows[chosen[rows]], ball, streams.fork(2))
        rows = oracle.standing(oracle.scores_cost)
        Square(queries=self.queries).search(oracle, rows[chosen[rows]], ball, streams.fork(0))
        return oracle.best

    def _aims(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Lp) -> tuple[Tensor, list[Goal]]:
        """Return the clean margins (B,) and what the runs on the ratio loss head for: the nearest class first."""
        clean, rows = torch.zeros(len(x), dtype=x.dtype, device=x.device), oracle.standing()
        if len(rows) == 0:
            return clean, []
        logits = oracle.scores(x[rows], rows, candidate=False)
        clean[rows] = margin(logits, goal.take(rows))
        if isinstance(goal, Targeted):
            return clean, [goal]
        likeliest = likeliest_targets(logits, goal.labels[rows], self.candidates)
        ranked = likeliest.gather(1, self._distances(oracle, rows, likeliest, threat).argsort(dim=1, stable=True))
        return clean, [Towards(goal.labels, goal.labels.index_copy(0, rows, t)) for t in ranked.unbind(dim=1)]

    @staticmethod
    def _distances(oracle: Oracle, rows: Tensor, targets: Tensor, threat: Lp) -> Tensor:
        """Return (z_y - z_t) / ||grad(z_y - z_t)||_dual at the clean images, (n, T); infinite for who cannot pay."""
        distances, labels = torch.full(targets.shape, torch.inf, device=rows.device), oracle.goal.labels[rows]
        for column, target in enumerate(targets.unbind(dim=1)):
            able = oracle.still(rows, oracle.gradient_cost)
            if len(able):
                aim, images = Towards(labels[able], target[able]), oracle.x[rows[able]]
                gap, slope = oracle.gradient(images, rows[able], difference, aim, candidate=False)
                steepness = torch.linalg.vector_norm(slope.flatten(1), ord=ORDERS[threat.dual_norm], dim=1)
                distances[able, column] = (-gap / steepness).nan_to_num(torch.inf).to(distances.dtype)
        return distances

    def _round(
        self, oracle: Oracle, aims: list[Goal], goal: Goal, threat: Lp, streams: Streams, chosen: Tensor
    ) -> None:
        """Run once towards each aim, and twice on the cross-entropy, of which once from afar; `chosen` is bool (B,)."""
        ratio, entropy = APGD(steps=self.steps, loss="dlr"), APGD(steps=self.steps, loss="ce")
        runs = [(ratio, aim) for aim in aims] + [(entropy, goal), (replace(entropy, wide_start=True), goal)]
        for attack, aim in runs:
            rows = oracle.standing(attack.step_cost(oracle))
            rows = rows[chosen[rows]]
            if len(rows):
                attack.search(oracle, rows, aim.take(rows), threat.take(rows), streams.take(rows))

    def _close(self, oracle: Oracle, clean: Tensor) -> Tensor:
        """Return bool (B,): standing, and the margin at the best point is at most `close` times the clean one."""
        chosen, rows = torch.zeros(len(clean), dtype=torch.bool, device=clean.device), oracle.standing()
        if len(rows):
            logits = oracle.scores(oracle.best[rows], rows, candidate=False)
            chosen[rows] = margin(logits, oracle.goal.take(rows)) >= self.close * clean[rows]
        return chosen
