from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustbench_lite.core.models import ABSTAIN, INVALID, is_stochastic, predict, rejects
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Wrapper


class Plain(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Detector(Plain):
    rejects = True

    def predict(self, x: Tensor) -> Tensor:
        return torch.where(x.mean(dim=(1, 2, 3)) > 0.5, ABSTAIN, super().predict(x))


def test_a_wrapper_that_overrides_nothing_is_its_net() -> None:
    wrapper, x = Plain(), torch.rand(6, 1, 2, 2)
    assert torch.equal(predict(wrapper, x), wrapper.net(x).argmax(dim=1))
    assert not is_stochastic(wrapper)
    assert not rejects(wrapper)
    assert wrapper.attack_view() is wrapper
    assert wrapper.attack_view(samples=8) is wrapper
    assert wrapper.adaptive_attacks(Lp("linf", 0.1)) == []
    assert wrapper.certifiers() == []
    assert list(wrapper.state_dict()) == ["net.1.weight", "net.1.bias"]


def test_logits_that_are_not_finite_are_invalid() -> None:
    wrapper = Plain()
    with torch.no_grad():
        wrapper.net[1].bias[1] = torch.nan
    assert predict(wrapper, torch.rand(2, 1, 2, 2)).tolist() == [INVALID, INVALID]


def test_a_detector_says_so_and_its_predict_is_the_deployed_one() -> None:
    x = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    detector = Detector()
    assert rejects(detector)
    assert predict(detector, x)[1] == ABSTAIN
    assert predict(detector, x)[0] == detector(x)[0].argmax()


def test_forward_must_be_written() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Wrapper()  # type: ignore[abstract]
