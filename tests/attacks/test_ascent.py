"""Ascents hold their best failures themselves: what is kept is what an oracle keeps that is told about each point."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.attacks import BIM, MIFGSM, PGD
from robustbench_lite.attacks.iterative import Autograd, IterativeAttack
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.losses import Loss, margin
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp

ATTACKS = {
    "pgd": PGD(steps=9),
    "margin": PGD(steps=6, restarts=3, loss="margin"),
    "bim": BIM(steps=8),
    "momentum": MIFGSM(steps=8),
}


class Waves(nn.Module):
    """Three classes whose margins rise and fall along any line; `shift` says how many samples fall."""

    def __init__(self, shift: float = 0.6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(25 * torch.randn(36, 3, generator=generator, dtype=torch.float64))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        waves = (x.flatten(1) @ self.weight).sin()
        return waves + self.shift * torch.nn.functional.one_hot(waves.new_zeros(len(x)).long(), 3)


class Steps(Waves):
    """The loss is the same on whole regions."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + ((4 * logits).round() / 4 - logits).detach()


class Holes(Waves):
    """Some answers are not numbers, and count as wrong."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.where(logits[:, 1:2].detach() > 0.995, torch.nan, logits)


class Noisy(Waves):
    """Answers differ from call to call."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.3 * torch.randn_like(logits)


def images(count: int = 24) -> Tensor:
    return torch.rand(count, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(attack: IterativeAttack, net: nn.Module, **more: object) -> AttackResult:
    torch.manual_seed(0)
    x = images()
    labels = torch.zeros(len(x), dtype=torch.int64)
    return attack(net, x, labels, Lp("linf", 0.1), generator=torch.Generator().manual_seed(2), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "net", [Waves(3.0), Waves(), Steps(3.0), Steps(), Holes(), Noisy(1.5)], ids=lambda n: type(n).__name__
)
@pytest.mark.parametrize("budget", [None, 4, 7, 40])
@pytest.mark.parametrize("stop", ["success", "never"])
def test_kept_is_what_an_oracle_keeps_that_is_told_about_each_point(
    monkeypatch: pytest.MonkeyPatch, name: str, net: nn.Module, budget: int | None, stop: str
) -> None:
    found = run(ATTACKS[name], net, max_queries=budget, stop=stop)
    monkeypatch.setattr(Oracle, "ranks_by", lambda self, loss: False)
    told = run(ATTACKS[name], net, max_queries=budget, stop=stop)
    for field in ("x_adv", "success", "forwards", "backwards", "first_success"):
        assert torch.equal(getattr(found, field), getattr(told, field)), field
    if not isinstance(net, Noisy):  # its clean votes may be all that a small budget pays
        assert (found.x_adv != images()).flatten(1).any(dim=1).any()


def asked_of(
    net: nn.Module, attack: IterativeAttack, threat: Lp, ball: Lp, measure: Loss | None
) -> tuple[Tensor, Tensor]:
    """Return what the oracle keeps of an ascent in `ball`, (n, ...), and the points it was asked about, (k, n, ...)."""
    x, asked = images(), []
    handle = net.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].detach().clone()))
    with Oracle(net, x, Untargeted(torch.zeros(len(x), dtype=torch.int64)), threat) as oracle:
        oracle.measure = measure
        attack.ascent().search(
            oracle, ball, Streams.from_generator(torch.Generator().manual_seed(0), torch.arange(len(x)), x.device)
        )
    handle.remove()
    return oracle.best, torch.stack(asked)


def test_under_another_measure_that_one_ranks() -> None:
    net, threat = Waves(3.0), Lp("linf", 0.1)
    best, asked = asked_of(net, replace(ATTACKS["pgd"], loss="ce"), threat, threat, margin)  # type: ignore[type-var]
    goal = Untargeted(torch.zeros(len(best), dtype=torch.int64))
    with torch.no_grad():
        assert torch.equal(margin(net(best), goal), torch.stack([margin(net(p), goal) for p in asked]).amax(dim=0))


def test_points_outside_the_threat_oust_none_inside() -> None:
    net, threat = Waves(3.0), Lp("linf", 0.1)
    best, asked = asked_of(net, BIM(steps=9, step_size=0.03, loss="margin"), threat, Lp("linf", 0.13), None)
    goal = Untargeted(torch.zeros(len(best), dtype=torch.int64))
    with torch.no_grad():
        margins = torch.stack([margin(net(p), goal).where(threat.contains(p, images()), -torch.inf) for p in asked])
        inside = margins.amax(dim=0)
        kept = margin(net(best), goal)
    assert (inside > -torch.inf).sum() > 5
    assert torch.equal(kept[inside > -torch.inf], inside[inside > -torch.inf])


@dataclass(frozen=True)
class Twice(Autograd):
    """Asks about a mirrored point too."""

    def __call__(self, oracle: Oracle, points: Tensor, rows: Tensor, loss: Loss, streams: Streams) -> Tensor:
        gradient = super().__call__(oracle, points, rows, loss, streams)
        oracle.judge(2 * oracle.x[rows] - points, rows, loss)
        return gradient


def test_all_points_of_an_estimator_of_ones_own_are_kept() -> None:
    net, threat = Waves(3.0), Lp("linf", 0.05)
    best, asked = asked_of(net, PGD(steps=9, loss="margin", estimator=Twice()), threat, threat, None)
    goal = Untargeted(torch.zeros(len(best), dtype=torch.int64))
    with torch.no_grad():
        margins = torch.stack([margin(net(p), goal).where(threat.contains(p, images()), -torch.inf) for p in asked])
        assert torch.equal(margin(net(best), goal), margins.amax(dim=0))
