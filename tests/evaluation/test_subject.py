"""The subject: which model is evaluated, in which precision, and what randomness it meets."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from evaluation_fakes import Linear, two_blocks
from torch import Tensor, nn

from robustbench_lite.attacks.base import Attack
from robustbench_lite.core.goals import Goal
from robustbench_lite.core.oracle import Oracle
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat
from robustbench_lite.defenses.base import Wrapper
from robustbench_lite.evaluation import evaluate
from robustbench_lite.evaluation.subject import Subject
from tests.defenses.contract_cases import blobs, fitted

THREAT = Lp("linf", 0.05)


def test_a_head_in_float64_behind_a_float32_net_is_evaluated_as_it_is() -> None:
    head = fitted("GaussianProcessHead")
    subject = Subject.of(head, None, "cpu", "auto")
    assert subject.precision == "float32"
    assert subject.model is head


class Mixed(nn.Module):
    """Parameters of one dtype, and buffers of several."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 16, dtype=dtype))
        for kind in (torch.float16, torch.float32, torch.float64, torch.int64):
            self.register_buffer(str(kind).removeprefix("torch."), torch.ones(3, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize(
    ("own", "precision"), [(torch.float32, "float64"), (torch.float64, "float32"), (torch.float16, "float32")]
)
def test_another_precision_converts_a_copy_and_the_buffers_of_the_parameters_dtype(
    own: torch.dtype, precision: str
) -> None:
    model, wanted = Mixed(own), getattr(torch, precision)
    moved = Subject.of(model, None, "cpu", precision).model
    assert isinstance(moved, Mixed)
    assert moved(torch.ones(1, 1, 4, 4, dtype=wanted)).dtype == moved.weight.dtype == wanted
    for name, buffer in model.named_buffers():
        assert moved.get_buffer(name).dtype == (wanted if buffer.dtype == own else buffer.dtype)
        assert str(buffer.dtype) == f"torch.{name}"
    assert model.weight.dtype == own


def test_without_parameters_the_buffers_follow_the_precision() -> None:
    model = fitted("NearestNeighbour")
    assert Subject.of(model, None, "cpu", "auto").model is model
    double = Subject.of(model, None, "cpu", "float64")
    assert double.model(double.images(blobs(4).images)).dtype == torch.float64


class Noisy(Linear):
    """Notes what it draws."""

    def __init__(self, stochastic: bool) -> None:
        super().__init__()
        self.stochastic, self.drawn = stochastic, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        return super().forward(x)


@dataclass(frozen=True)
class Ask(Attack):
    """Asks once about the clean images."""

    def supports(self, threat: Threat) -> bool:
        return True

    def run(self, oracle: Oracle, x: Tensor, goal: Goal, threat: Threat, streams: Streams) -> Tensor:
        oracle.scores(x, torch.arange(len(x)), candidate=False)
        return x


def drawn(stochastic: bool, seed: int = 0) -> list[float]:
    """Return what each batch meets, as the clean answers do: four batches, two of them in another block."""
    model = Noisy(stochastic)
    evaluate(model, two_blocks(40), THREAT, seed=seed, batch_size=10, device="cpu", adaptive=False)
    return model.drawn[-4:]


def test_each_batch_of_a_stochastic_model_has_draws_of_its_own() -> None:
    first = drawn(stochastic=True)
    assert len(set(first)) == 4
    assert drawn(stochastic=True) == first
    assert not set(drawn(stochastic=True, seed=1)) & set(first)


def test_attacks_meet_other_draws_in_each_batch_too() -> None:
    model, before = Noisy(stochastic=True), torch.get_rng_state()
    evaluate(model, two_blocks(20), THREAT, [Ask()], batch_size=5, device="cpu", adaptive=False)
    calls = model.drawn[2:]  # after the first look
    assert len(set(calls)) == len(calls) - 4  # an attack begins with the draw of the clean answers
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_changes_for_a_model_that_is_not_stochastic() -> None:
    torch.manual_seed(3)
    assert drawn(stochastic=False, seed=3) == [float(torch.rand(()))] * 4


class Masked(Wrapper):
    """Answers by its largest logit, as wrappers do, and counts the images that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.asked = Linear(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        logits: Tensor = self.net(x)
        return logits

    def attack_view(self, samples: int = 1) -> nn.Module:
        return self.net


def test_a_wrapper_that_answers_by_its_largest_logit_is_asked_once() -> None:
    model, data = Masked(), two_blocks(20)
    subject = Subject.of(model, None, "cpu", "auto")
    labels, _ = subject.answer(data.images, data.labels)
    assert model.asked == len(data)
    assert torch.equal(labels, Linear()(data.images).argmax(dim=1))
    records = evaluate(model, data, THREAT, device="cpu", adaptive=False).records
    assert set(records["forwards"]) == {1}
