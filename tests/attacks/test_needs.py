"""Attacks that know what is inside a defense: they reach it through the oracle, and pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.errors import NotApplicableError
from robustbench_lite.core.goals import Goal, Untargeted
from robustbench_lite.core.insides import Rejecting
from robustbench_lite.core.oracle import Access, AccessDeniedError, Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.evaluation import evaluate


class Guarded(nn.Module):
    """Logits of a linear net, and the mean brightness as suspicion."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
        self.threshold = torch.tensor(10.0)

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x.flatten(1).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)[0]


class Score(nn.Module):
    cost = 3

    def __init__(self, guarded: Rejecting) -> None:
        super().__init__()
        self.guarded = guarded

    def forward(self, x: Tensor) -> Tensor:
        return self.guarded.answer(x)[1].unsqueeze(1).expand(-1, 5)


@dataclass(frozen=True)
class Darken(Attack):
    """One step down the suspicion."""

    needs: ClassVar[type | None] = Rejecting

    def supports(self, threat: Threat) -> bool:
        return isinstance(threat, Lp)

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        rows = oracle.standing(oracle.judge_cost + 3)
        score = Score(oracle.inside(Rejecting))
        _, slope = oracle.gradient(x[rows], rows, lambda values, _: -values[:, 0], candidate=False, through=score)
        assert isinstance(threat, Lp)
        ball = threat.take(rows)
        oracle.judge(ball.project(x[rows] + ball.radius(x[rows]) * slope.sign(), x[rows]), rows)
        return oracle.best


def test_what_is_asked_through_a_part_is_differentiated_and_paid() -> None:
    model, x = Guarded().eval(), torch.rand(4, 1, 3, 3) / 2 + 0.25
    y = model(x).argmax(dim=1)
    found = Darken()(model, x, y, Lp("linf", 0.01), stop="never")
    assert torch.allclose(found.x_adv, x - 0.01, atol=1e-6)  # the mean's gradient is positive everywhere
    assert found.forwards.tolist() == [1 + 3 + 1] * 4
    assert found.backwards.tolist() == [1] * 4
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_the_insides_is_not_attacked_and_a_table_says_so() -> None:
    net, x, y = Guarded().net.eval(), torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(NotApplicableError, match="Rejecting"):
        Darken()(net, x, y, Lp("linf", 0.1))
    for mode in ("full", "cascade"):
        report = evaluate(net, (x, y), Lp("linf", 0.1), [Darken()], mode=mode)
        assert [(entry.kind, entry.method) for entry in report.not_applicable] == [("attack", "Darken")]


def test_no_candidate_is_judged_through_a_part_and_none_is_reached_without_access() -> None:
    model, x = Guarded().eval(), torch.rand(2, 1, 3, 3)
    y, rows = torch.tensor([0, 1]), torch.arange(2)
    goal = Untargeted(y)
    with Oracle(model, x, goal, Lp("linf", 0.1)) as oracle, pytest.raises(ValueError, match="candidate"):
        oracle.gradient(x, rows, lambda values, _: values[:, 0], through=Score(model))
    with Oracle(model, x, goal, Lp("linf", 0.1), access=Access.SCORES) as oracle, pytest.raises(AccessDeniedError):
        oracle.inside(Rejecting)
    with Oracle(model, x, goal, Lp("linf", 0.1)) as oracle, pytest.raises(ValueError, match="anything"):
        oracle.gradient(x, rows, lambda values, _: values[:, 0], candidate=False, through=nn.Flatten(0))


class Own(Guarded):
    def adaptive_attacks(self, threat: Threat) -> list[Attack]:
        return [Darken()]


def test_an_evaluation_adds_what_the_defense_brings_unless_told_not_to() -> None:
    model, x = Own().eval(), torch.rand(4, 1, 3, 3)
    y = model(x).argmax(dim=1)
    methods = set(evaluate(model, (x, y), Lp("linf", 0.1)).records["method"])
    assert methods == {"clean", "Darken"}
    assert set(evaluate(model, (x, y), Lp("linf", 0.1), [Darken()]).records["method"]) == {"clean", "Darken"}
    assert set(evaluate(model, (x, y), Lp("linf", 0.1), adaptive=False).records["method"]) == {"clean"}
