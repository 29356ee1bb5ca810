"""Evolution strategies as attacks: a search distribution over the coefficients of a change, moved by scores.

Threat: linf, l2. Access: scores.
Source: the strategies are those of Wierstra et al. 2011 (1106.4487), Salimans et al. 2017 (1703.03864) and Hansen 2016
(1604.00772), see `attacks/strategies.py`; the search in low frequencies is that of Guo, Frank and Weinberger 2018
(1809.08758).
A generation of one sample is held whole, in float64: population times coefficients, some seven times. Where that does
not fit in the memory budget, the attack refuses.
Departures: they were not made for attacks. Members are projected on the threat before they are asked about. The best
member of each generation is then put to the oracle as a candidate, at one more query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from robustbench_lite.attacks._memory import budget
from robustbench_lite.attacks._nes_search import check_queries, take
from robustbench_lite.attacks._purse import Purse
from robustbench_lite.attacks.base import Attack
from robustbench_lite.attacks.basis import DCT, Basis
from robustbench_lite.attacks.strategies import RankNES, Strategy
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import Loss, loss_named, margin
from robustbench_lite.core.models import labels_of
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["EvolutionStrategy"]


@dataclass(frozen=True)
class EvolutionStrategy(Attack):
    """An evolution strategy on the loss at Proj(x + change), with changes in the span of a basis.

    With `RankNES` or `CMAES` nothing but the order of the losses counts: an increasing function of the score, such as
    exp, changes no bit of the search.

    Attributes:
        strategy: `RankNES()`, `OpenAIES()` or `CMAES()`.
        basis: where changes lie: `DCT(fraction)`, `Tiles(side)`, `Pixels()`. CMA-ES wants at most about 200.
        queries: forward passes that each sample may spend, the clean check aside.
        loss: "margin", "ce" or "dlr", or a function of logits and goal.

    Raises:
        ValueError: a hyper-parameter out of range; on a call, a generation that does not fit in the memory budget.
    """

    strategy: Strategy = field(default_factory=RankNES)
    basis: Basis = field(default_factory=DCT)
    queries: int = 10_000
    loss: str | Loss = "margin"

    def __post_init__(self) -> None:
        loss_named(self.loss)
        check_queries(self.queries)

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is an linf or l2 ball with a budget."""
        return isinstance(threat, Lp) and threat.norm in ("linf", "l2") and threat.eps is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Let generations pass until each sample has fallen or has spent its budget."""
        ball, size = cast(Lp, threat), self.basis.size(x.shape[1:])
        purse, everyone = Purse(oracle, self.queries), oracle.standing()
        for rows in torch.split(everyone, self._at_once(oracle, size)):
            self._search(oracle, ball, rows, size, purse, streams)
        return oracle.best

    def _at_once(self, oracle: Oracle, size: int) -> int:
        """Return how many searches may run at a time: their states take a quarter of the budget."""
        allowed, state = budget(oracle), self.strategy.state_bytes(size)
        needed = state + self.strategy.generation_bytes(size)
        if needed > allowed:
            raise ValueError(
                f"a generation of {self.strategy.members(size)} members with {size} coefficients takes about "
                f"{needed / 2**20:.1f} MiB for one image, over the memory budget of {allowed / 2**20:.1f} MiB: lower "
                "the population, choose a smaller basis such as DCT(0.1), or raise memory_budget"
            )
        return max(1, allowed // (4 * state))

    def _search(self, oracle: Oracle, threat: Lp, rows: Tensor, size: int, purse: Purse, streams: Streams) -> None:
        count = self.strategy.members(size)
        state = self.strategy.start(self._unit(oracle.x[rows], threat.take(rows), size), size)
        generation = 0
        while True:
            rows, state = take(purse.still(rows, count + oracle.scores_cost), rows, state)
            if len(rows) == 0:
                return
            groups = torch.split(torch.arange(len(rows), device=rows.device), max(1, oracle.capacity // count))
            parts = []
            for group in groups:
                part = {name: tensor[group] for name, tensor in state.items()} if len(groups) > 1 else state
                draws = self.strategy.draw(size, streams.take(rows[group]))
                loss = self._ask(oracle, threat, rows[group], self.strategy.offspring(part, draws))
                parts.append(self.strategy.update(part, draws, loss, generation))
            state = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            generation += 1

    def _unit(self, x: Tensor, threat: Lp, size: int) -> Tensor:
        """Return the standard deviation, float64 (n, 1), of draws that are as long as the ball is wide.

        A corner of the linf ball is at the distance eps * sqrt(C H W).
        """
        width = math.sqrt(x.shape[1:].numel()) if threat.norm == "linf" else 1.0
        radius = threat.radius(x).double().reshape(-1, 1).expand(len(x), 1)
        return radius * width / math.sqrt(size)

    def _ask(self, oracle: Oracle, threat: Lp, rows: Tensor, members: Tensor) -> Tensor:
        """Return the loss of members (n, lambda, m) in float64 (n, lambda), and judge the best one of each sample."""
        x, loss = oracle.x[rows], loss_named(self.loss)
        count = members.shape[1]
        values, margins = [], []
        for block in torch.split(members, max(1, oracle.capacity // len(rows)), dim=1):
            owners = rows.repeat_interleave(block.shape[1])
            logits = oracle.scores(self._points(x, threat, rows, block), owners, loss, candidate=False).double()
            values.append(loss(logits, oracle.goal.take(owners)).reshape(len(rows), -1))
            goal = oracle.goal.take(owners)
            lead = margin(logits, goal)
            broken = lead.isnan() & goal.achieved(labels_of(logits))  # an answer that is none: a success without margin
            lead = lead.nan_to_num(nan=-torch.inf).masked_fill(broken, 0.0)
            margins.append(lead.reshape(len(rows), -1))
        best = torch.cat(margins, dim=1).argmax(dim=1).reshape(-1, 1, 1)
        champion = members.gather(1, best.expand(-1, 1, members.shape[2]))
        oracle.scores(self._points(x, threat, rows, champion), rows, loss)
        return torch.cat(values, dim=1).reshape(len(rows), count)

    def _points(self, x: Tensor, threat: Lp, rows: Tensor, members: Tensor) -> Tensor:
        """Return the projected images (n * lambda, C, H, W) of members (n, lambda, m)."""
        owners = rows.repeat_interleave(members.shape[1])
        clean = x.repeat_interleave(members.shape[1], dim=0)
        change = self.basis.decode(members, x.shape[1:]).flatten(0, 1)
        return threat.take(owners).project(clean + change.to(x.dtype), clean)
