from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.core.rng import Streams
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Batch, Descend, Objective, State, Step, TrainingData
from robustbench_lite.defenses.standard import StandardTraining
from robustbench_lite.training import CropFlip, train


def blobs(n: int = 60, constant: bool = False) -> Dataset:
    """Images whose mean brightness is their label."""
    y = torch.arange(n) % 3
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 4 + y.view(-1, 1, 1, 1) / 4
    if constant:
        x, y = torch.full_like(x, 0.5), torch.zeros_like(y)
    return Dataset("blobs", "train", x, y, torch.arange(n) * 10, 3)


def net(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3))


def mean_loss(model: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(data.images), data.labels))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


@dataclass(frozen=True)
class Spy(StandardTraining):
    """Notes in `seen` what the loop hands over."""

    seen: Any = None

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        self.seen.append((model.training, batch, step, streams))
        return super().loss(model, batch, step, state, streams)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "cosine", "steps"])
def test_the_loss_falls(optimizer: str, schedule: str) -> None:
    data, model = blobs(), net()
    before = mean_loss(model, data)
    settings = {"optimizer": optimizer, "schedule": schedule, "learning_rate": 0.05}
    train(model, data, StandardTraining(), epochs=40, batch_size=20, **settings)
    assert mean_loss(model, data) < before / 2


def test_a_constant_data_set_is_learnt_without_complaint() -> None:
    data = blobs(constant=True)
    assert mean_loss(train(net(), data, StandardTraining(), epochs=20, learning_rate=0.05), data) < 0.05


def test_every_epoch_passes_once_over_all_samples_in_a_new_order() -> None:
    seen: list[Any] = []
    data = blobs(50)
    train(net(), data, Spy(seen), epochs=3, batch_size=16)
    assert len(seen) == 3 * 4
    epochs = [torch.cat([b.indices for _, b, s, _ in seen if s.epoch == epoch]) for epoch in range(3)]
    assert all(torch.equal(e.sort().values, data.indices) for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for training, batch, step, streams in seen:
        assert training
        rows = batch.indices // 10
        assert torch.equal(batch.x, data.images[rows])
        assert torch.equal(batch.y, data.labels[rows])
        assert streams.indices == batch.indices.tolist()
        assert step.progress == step.index / 12
    assert [s.index for _, _, s, _ in seen] == list(range(12))
    assert len({streams.root for *_, streams in seen}) == 12


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    data = blobs()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = train(net(dropout=0.5), data, StandardTraining(), epochs=2, batch_size=16, augment=CropFlip(1))
    assert torch.equal(torch.rand(4), expected)
    assert equal(first, train(net(dropout=0.5), data, StandardTraining(), epochs=2, batch_size=16, augment=CropFlip(1)))
    other = train(net(dropout=0.5), data, StandardTraining(), epochs=2, batch_size=16, augment=CropFlip(1), seed=1)
    assert not equal(first, other)


def test_the_defense_comes_back_in_eval_mode_without_gradients() -> None:
    model = net()
    model[1].weight.requires_grad_(False)
    frozen = model[1].weight.clone()
    assert train(model, blobs(), StandardTraining(), epochs=1) is model
    assert not any(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert torch.equal(model[1].weight, frozen)


def test_bfloat16_trains_float32_weights() -> None:
    data, model = blobs(), net()
    train(model, data, StandardTraining(), epochs=10, batch_size=20, learning_rate=0.05, precision="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert mean_loss(model, data) < 0.5


@dataclass(frozen=True)
class TwoDescents(Objective):
    """Uses every hook: a trained module as state, two descents a batch with the input's gradient, a projection."""

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        return nn.Linear(1, data.num_classes, bias=False)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        return F.cross_entropy(model(batch.x) + state(torch.ones(len(batch.x), 1)), batch.y)

    def update(
        self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams, descend: Descend
    ) -> Tensor:
        x = batch.x.clone().requires_grad_()
        descend(self.loss(model, Batch(x, batch.y, batch.indices), step, state, streams))
        assert x.grad is not None
        x = (x + 0.01 * x.grad.sign()).detach()
        loss = self.loss(model, Batch(x, batch.y, batch.indices), step, state, streams)
        descend(loss)
        return loss.detach()

    def after_step(self, model: nn.Module, state: Any) -> None:
        state.weight.clamp_(-0.01, 0.01)

    def finish(
        self, model: nn.Module, data: TrainingData, state: Any, calibration: TrainingData | None = None
    ) -> nn.Module:
        return nn.ModuleList([model, state])


def test_every_hook_is_called() -> None:
    defense = train(net(), blobs(), TwoDescents(), epochs=5, batch_size=20, learning_rate=0.05)
    assert not defense.training
    state = defense[1].weight
    assert 0 < state.abs().max() <= 0.01  # it was trained, and projected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step(bad: float) -> None:
    @dataclass(frozen=True)
    class Breaks(StandardTraining):
        def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
            return super().loss(model, batch, step, state, streams) * (bad if step.index == 5 else 1)

    with pytest.raises(FloatingPointError, match=r"at step 5 of 12 \(epoch 2\)"):
        train(net(), blobs(), Breaks(), epochs=4, batch_size=20)


def test_validation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="robustbench_lite"):
        train(net(), blobs(), StandardTraining(), epochs=60, learning_rate=0.05, validation=blobs(30))
    assert "epoch 60/60: loss" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("clean accuracy 1.0000")


def test_the_bar_goes_to_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    train(net(), blobs(), StandardTraining(), epochs=2, progress=True)
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert captured.out == ""


def test_bad_arguments_say_what_to_do() -> None:
    data = blobs()
    for message, wrong in {
        "did you mean 'adam'": {"optimizer": "adm"},
        "unknown learning-rate schedule": {"schedule": "linear"},
        "unknown precision": {"precision": "float16"},
        "batch_size >= 1": {"batch_size": 0},
        "epochs >= 0": {"epochs": -1},
        "learning_rate must be > 0": {"learning_rate": 0.0},
        "checkpoint_every must be at least 1": {"checkpoint_every": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            train(net(), data, StandardTraining(), **({"epochs": 1} | wrong))
    with pytest.raises(ValueError, match="nothing to train"):
        train(net().requires_grad_(False), data, StandardTraining(), epochs=1)


def test_no_epochs_only_set_up_and_finish() -> None:
    model = net()
    train(model, blobs(), TwoDescents(), epochs=0)
    assert equal(model, net())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trains_on_a_gpu(precision: str) -> None:
    data = blobs()
    model = train(net(), data, StandardTraining(), epochs=15, batch_size=20, learning_rate=0.05, precision=precision)
    assert next(model.parameters()).is_cuda
    assert mean_loss(model.cpu(), data) < 0.5
