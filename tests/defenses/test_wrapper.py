from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from robustbench_lite.core.models import ABSTAIN, INVALID, is_stochastic, predict, rejects
from robustbench_lite.core.threats import Lp
from robustbench_lite.defenses.base import Wrapper
from tests.defenses.contract_cases import blobs, fitted


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


def test_a_failed_pass_names_the_images_or_what_does_not_match() -> None:
    wrapper = Plain()
    with pytest.raises(RuntimeError, match=r"Plain failed on images \(2, 3, 5, 5\): .*2x75 and 4x3") as found:
        wrapper(torch.rand(2, 3, 5, 5))
    assert isinstance(found.value.__cause__, RuntimeError)
    both = r"Plain failed on images .*: .*[dD]ouble.*; .*parameters are torch\.float32 but the images torch\.float64"
    with pytest.raises(RuntimeError, match=both):  # what torch says is not lost
        wrapper(torch.rand(2, 1, 2, 2).double())


def test_a_failed_pass_is_explained_once() -> None:
    class Outer(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain()  # type: ignore[assignment]

    with pytest.raises(RuntimeError, match="Plain failed on images") as found:
        Outer()(torch.rand(2, 3, 5, 5))
    assert str(found.value).count("failed on images") == 1


def test_more_arguments_reach_forward_and_odd_answers_their_caller() -> None:
    class Odd(Plain):
        def forward(self, x: Tensor, twice: bool = False) -> Any:
            return {"logits": 2 * x if twice else x}

    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(Odd()(x, twice=True)["logits"], 2 * x)
    assert torch.equal(Odd()(x, False)["logits"], x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), ZeroDivisionError("none")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    class Failing(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(type(error)) as found:
        Failing()(torch.rand(2, 1, 2, 2))
    assert found.value is error


def test_hooks_run_and_see_what_the_caller_sees() -> None:
    wrapper, x = Plain(), torch.rand(2, 1, 2, 2)
    wrapper.register_forward_pre_hook(lambda _, inputs: (1 - inputs[0],))
    wrapper.register_forward_hook(lambda _, inputs, output: 2 * output)
    assert torch.equal(wrapper(x), 2 * wrapper.net(1 - x))


def test_a_wrapper_can_be_traced_compiled_and_mapped() -> None:
    wrapper, x = Plain().eval(), torch.rand(4, 1, 2, 2)
    expected = wrapper(x)
    outer = nn.Sequential(wrapper)
    assert torch.equal(fx.symbolic_trace(outer)(x), expected)
    assert torch.equal(torch.export.export(outer, (x,), strict=False).module()(x), expected)
    assert torch.equal(torch.compile(wrapper, backend="eager", fullgraph=True)(x), expected)
    assert torch.allclose(torch.vmap(lambda image: wrapper(image[None])[0])(x), expected)


def test_a_detector_can_be_compiled_before_it_has_answered() -> None:
    x = blobs(4).images
    expected = fitted("DeepRBF")(x)
    assert torch.allclose(torch.compile(fitted("DeepRBF"), backend="eager", fullgraph=True)(x), expected)
