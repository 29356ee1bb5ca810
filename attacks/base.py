"""The base of all attacks: it checks what comes in, and judges what comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_lite.core.checks import check_images, check_indices, check_labels
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Goal, as_goal
from robustbench_lite.core.models import Model
from robustbench_lite.core.oracle import Access, Oracle, Stop
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Threat

__all__ = ["Attack"]


@dataclass(frozen=True)
class Attack(ABC):
    """A search for adversarial examples; subclasses are frozen dataclasses whose fields are the hyper-parameters.

    A subclass writes `run` and, where they differ, `access` and `supports`. It never sees the model, and it is never
    trusted: success is what the deployed model answers, in the threat, on the returned input.

    Attributes:
        version: part of the identity of stored results; raise it when the attack's answers change.
        needs: a protocol of `core.insides` that the deployed model must satisfy; None: any model will do.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[type | None] = None

    @property
    def access(self) -> Access:
        """What the attack needs to see of the model."""
        return Access.GRADIENT

    @abstractmethod
    def supports(self, threat: Threat) -> bool:
        """Say whether the attack can search this threat."""

    @abstractmethod
    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        """Search, and return one point for each sample: images (B, C, H, W), or parameters of a parametric threat.

        Usually `oracle.best`: points that were never put to the oracle are judged afterwards.

        Args:
            oracle: answers questions about the model, and keeps the best candidate of each sample.
            x: clean images (B, C, H, W).
            goal: what counts as success, one label a sample.
            threat: where candidates must lie.
            streams: the random streams of the samples.
        """

    def __call__(
        self,
        model: Model,
        x: Tensor,
        goal: Goal | Tensor,
        threat: Threat,
        *,
        view: Model | None = None,
        max_queries: int | None = None,
        stop: Stop = "success",
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
        memory_budget: int | None = None,
    ) -> AttackResult:
        """Attack a batch.

        The model runs in eval mode with frozen parameters and is left as it was found, `.grad` included.

        Args:
            model: images (B, C, H, W) to logits (B, K).
            x: clean images (B, C, H, W), floating point, within the threat's bounds.
            goal: `Untargeted(y)`, `Targeted(t)`, or a label tensor int64 (B,), which means `Untargeted`.
            threat: what the adversary may do.
            view: a differentiable stand-in to take gradients from; success is judged by `model` all the same.
            max_queries: forward passes that each sample may spend; None for no limit.
            stop: "success": a sample leaves at its first success; "never": every sample runs to the end and keeps its
                highest loss, among its successes where it has any.
            indices: the samples' names for their random streams, int64 (B,); default 0 .. B - 1.
            generator: the source of randomness, one draw a call; None: a fresh one with seed 0.
            memory_budget: bytes that questions to the model may take, its activations included; None: 1 GiB (an eighth
                of a GPU's memory) where no gradient is asked for, no limit where one is.

        Raises:
            TypeError: images that are not floating point, or labels that are not int64.
            ValueError: a threat that this attack does not support, or images, labels, indices or budgets out of range.
            NotApplicableError: a model that is not what the attack is made for.
        """
        goal = as_goal(goal)
        if not callable(model):
            raise TypeError(f"a model is a callable from images to logits, got {type(model).__name__}")
        if self.needs is not None and not isinstance(model, self.needs):
            raise NotApplicableError(
                f"{type(self).__name__} attacks what is a {self.needs.__name__} ({_first_line(self.needs)}), and "
                f"{type(model).__name__} is none"
            )
        self._check(x, goal, threat, max_queries, stop, indices)
        names = torch.arange(len(x)) if indices is None else indices
        x = x.detach()
        threat = threat.around(x)
        streams = Streams.from_generator(generator, names, x.device)
        access, budget = self.access, memory_budget
        with Oracle(
            model, x, goal, threat, view=view, access=access, max_queries=max_queries, stop=stop, memory_budget=budget
        ) as oracle:
            if len(x):
                oracle.judge_clean()
                self._rejudge(oracle, self.run(oracle, x, goal, threat, streams))
        return _result(oracle)

    def _check(
        self, x: Tensor, goal: Goal, threat: Threat, max_queries: int | None, stop: str, indices: Tensor | None
    ) -> None:
        if not isinstance(threat, Threat):
            raise TypeError(f"a threat is Lp('linf', 0.3), RotationTranslation() ..., got {threat!r}")
        if not self.supports(threat):
            raise ValueError(f"{self} does not support the threat {threat}")
        check_images(x, threat.bounds)
        check_labels(goal.labels, x)
        threat.check_fits(x)
        if stop not in ("success", "never"):
            raise ValueError(f"stop must be 'success' or 'never', got {stop!r}")
        if max_queries is not None and max_queries < 1:
            raise ValueError(f"max_queries must be at least 1 (the clean check), got {max_queries}")
        if indices is not None:
            check_indices(indices, x)

    @staticmethod
    def _rejudge(oracle: Oracle, points: Tensor) -> None:
        """Judge returned points that the oracle has not kept itself."""
        if points.shape != oracle.best.shape:
            raise ValueError(f"run must return points of shape {tuple(oracle.best.shape)}, got {tuple(points.shape)}")
        rows = oracle.standing()
        rows = rows[(points[rows] != oracle.best[rows]).flatten(1).any(dim=1)]
        if len(rows):
            oracle.labels(points[rows].detach(), rows)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")


def _result(oracle: Oracle) -> AttackResult:
    found, threat, x = oracle.found, oracle.threat, oracle.x
    with torch.no_grad():
        images = threat.apply(x, found.points)
        distance = threat.distance(found.points, x)
    return AttackResult(
        x_adv=images,
        success=found.fallen,
        distance=torch.where(found.fallen, distance, torch.inf),
        forwards=oracle.forwards,
        backwards=oracle.backwards,
        first_success=found.first_success,
        parameters=found.points if threat.parametric else None,
    )
