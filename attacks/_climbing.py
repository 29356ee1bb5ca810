"""What NES and SPSA share: a climb from the clean images along gradients estimated from scores."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, cast

from torch import Tensor

from robustbench_lite.attacks._nes_search import Update, check_queries, climb
from robustbench_lite.attacks._score_estimator import ScoreEstimator
from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.losses import loss_named
from robustbench_lite.core.oracle import Access, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["ClimbingAttack"]


class ClimbingAttack(Attack):
    """A climb; a subclass says where gradients come from, and how steps follow from them.

    Without fields of its own, so that those of subclasses keep their order.

    Attributes:
        norms: the norms of the balls that are searched.
    """

    queries: int
    loss: str
    norms: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        self.estimator()  # which checks the fields, as the steps do
        self.steps()
        loss_named(self.loss)
        check_queries(self.queries)

    @abstractmethod
    def estimator(self) -> ScoreEstimator:
        """Return where gradients come from."""

    @abstractmethod
    def steps(self) -> Update:
        """Return the rule for steps."""

    @property
    def access(self) -> Access:
        """Scores are enough."""
        return Access.SCORES

    def supports(self, threat: Threat) -> bool:
        """Say whether the threat is a ball of such a norm with a budget."""
        return isinstance(threat, Lp) and threat.norm in self.norms and threat.eps is not None

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Climb from the clean images."""
        climb(
            oracle,
            cast(Lp, threat),
            streams,
            loss=loss_named(self.loss),
            estimator=self.estimator(),
            update=self.steps(),
            queries=self.queries,
        )
        return oracle.best
