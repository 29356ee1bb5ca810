from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.certify import IBP, Inside, RandomizedSmoothing
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.threats import Lp


class Shell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return -self.net(x)


def test_it_certifies_the_part_and_not_the_whole() -> None:
    shell, x, threat = Shell(), torch.rand(5, 1, 3, 3), Lp("linf", 0.01)
    y = shell.net(x).argmax(dim=1)
    found, inner = Inside(IBP())(shell, x, y, threat), IBP()(shell.net, x, y, threat)
    assert torch.equal(found.prediction, inner.prediction)
    assert found.margins is not None
    assert inner.margins is not None
    assert torch.equal(found.margins, inner.margins)
    assert torch.equal(
        Inside(IBP()).radius(shell, x, y, "linf", max_eps=0.1), IBP().radius(shell.net, x, y, "linf", max_eps=0.1)
    )


def test_it_speaks_for_its_certifier() -> None:
    smoothing = Inside(RandomizedSmoothing(0.5, n=100))
    assert smoothing.kind == "probabilistic"
    assert not smoothing.smooths
    assert smoothing.supports(Lp("l2", 1))
    assert not Inside(IBP()).supports(Lp("l0", 1))


def test_what_a_table_asks_of_a_class_is_the_certifiers() -> None:
    class Other(IBP):
        kind: ClassVar[str] = "estimate"
        cheap: ClassVar[bool] = False
        forgives: ClassVar[bool] = True
        version: ClassVar[int] = 7

    for inner in (IBP(), Other()):
        for name in ("kind", "cheap", "forgives", "version"):
            assert getattr(Inside(inner), name) == getattr(inner, name)


def test_a_model_without_the_part_is_refused() -> None:
    with pytest.raises(CannotCertify, match="'net'"):
        Inside(IBP())(nn.Flatten(), torch.rand(2, 1, 1, 3), torch.tensor([0, 1]), Lp("linf", 0.1))
