"""What the contract tests share: every config of conf/attack with each threat it supports, and the run most look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from robustbench_lite.attacks import PGD, Attack, FoolboxAttack, IterativeAttack, Transfer
from robustbench_lite.core.models import predict
from robustbench_lite.core.results import AttackResult
from robustbench_lite.core.spatial import Deformation, RotationTranslation
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.core.weighted import WeightedLp
from tests.conftest import tiny_net

CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "attack").glob("*.yaml"))
THREATS = [
    Lp("linf", 0.15),
    Lp("l2", 0.8),
    Lp("l1", 2.5),
    Lp("l0", 4),
    RotationTranslation(),
    Deformation(1.5),
    Lp("l2", None),
    Lp("linf", None),
    Lp("l1", None),
    Lp("l0", None),
    Deformation(None),
    WeightedLp("l1", 12.0),
    WeightedLp("l1", None),
]
NAMES = torch.arange(40, 52)  # of the 12 images, for their random streams

# Baselines that try one direction or one filter: they find what lies there, and need not find anything. In any norm.
ONE_WAY = {"LinearSearchBlendedUniformNoiseAttack", "LinearSearchContrastReductionAttack", "GaussianBlurAttack"}


class Surrogate(nn.Module):
    """What the attacker has of the tests' models: `tiny_net` for its images, a linear net for all others."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] == (1, 6, 6):
            logits: Tensor = tiny_net().to(x)(x)
            return logits
        return torch.stack([x.flatten(1)[:, k::4].sum(dim=1) for k in range(4)], dim=1)


def load(config: Path) -> Attack:
    attack: Attack = instantiate(OmegaConf.load(config))
    # the config's surrogate is a net for digits
    return replace(attack, surrogates=(Surrogate(),)) if isinstance(attack, Transfer) else attack


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images() -> Tensor:
    return torch.rand(12, 1, 6, 6, dtype=torch.float64, generator=generator(1))


def true_labels() -> Tensor:
    """True labels of these images for `tiny_net`, one of them not the model's answer."""
    labels = predict(tiny_net(), some_images())
    labels[0] = (labels[0] + 1) % 4
    return labels


def points_of(result: AttackResult) -> Tensor:
    return result.x_adv if result.parameters is None else result.parameters


def tensors(result: AttackResult) -> dict[str, Tensor]:
    return {name: value for name, value in vars(result).items() if value is not None}


def spy(net: nn.Module, passes: dict[str, int]) -> None:
    """Count in `passes` the images that the net is shown, and those it is differentiated at."""
    passes.update(forwards=0, backwards=0)

    def forward(_: nn.Module, args: tuple[Tensor], logits: Tensor) -> None:
        passes["forwards"] += len(logits)
        if logits.requires_grad:
            logits.register_hook(backward)

    def backward(slope: Tensor) -> None:
        passes["backwards"] += len(slope)

    net.register_forward_hook(forward)


@dataclass(frozen=True, eq=False)
class Case:
    """An attack and a threat."""

    name: str
    attack: Attack
    threat: Threat

    @property
    def foolbox(self) -> bool:
        """Foolbox runs sample by sample, some 1.5 ms a query."""
        return isinstance(self.attack, FoolboxAttack)

    @property
    def one_way(self) -> bool:
        return isinstance(self.attack, FoolboxAttack) and self.attack.name in ONE_WAY

    @property
    def queries(self) -> int:
        """Enough for each search to find something."""
        return 40 if self.foolbox else 150

    @cached_property
    def first(self) -> AttackResult:
        """The run on the 12 images that most tests look at; `passes` says what a spy saw in it."""
        net = tiny_net()
        spy(net, self.passes)
        run = {"max_queries": self.queries, "indices": NAMES, "generator": generator()}
        return self.attack(net, some_images(), true_labels(), self.threat, **run)

    @cached_property
    def passes(self) -> dict[str, int]:
        return {}


CASES = [
    pytest.param(Case(name, attack, threat), id=name)
    for config in CONFIGS
    for attack in [load(config)]
    if attack.needs is None  # else it attacks one kind of defense: see tests/defenses/test_contract.py
    for threat in THREATS
    for name in [f"{config.stem}-{threat.name}{'' if threat.size else '-minimum'}"]
    if attack.supports(threat)
    # One attack on the iterative core shows for all that the core searches weighted balls.
    if not (isinstance(threat, WeightedLp) and isinstance(attack, IterativeAttack) and type(attack) is not PGD)
    if not (Case(name, attack, threat).one_way and threat.name != "l2")
    # Foolbox's bridge does the same without a budget in every norm.
    if not (isinstance(attack, FoolboxAttack) and threat in (Lp("l1", None), Lp("l0", None)))
]
every_case = pytest.mark.parametrize("case", CASES)
