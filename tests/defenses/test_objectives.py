"""The contract of every objective, run on every config of conf/defense that is one: a new objective inherits it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from robustbench_lite.core.rng import Streams
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Batch, Objective, Step
from robustbench_lite.defenses.deploy import Deploy
from robustbench_lite.training import train

FOLDER = Path(__file__).parents[2] / "conf" / "defense"
LOADED = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted(FOLDER.glob("*.yaml"))}
OF_ANOTHER_KIND = {"abs", "binary_abs", "nearest_neighbour"}  # of autoencoders, and of no net at all
OBJECTIVES = {
    name: made for name, made in LOADED.items() if isinstance(made, Objective) and name not in OF_ANOTHER_KIND
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", "train").head(300)


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES[request.param]


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batch_of(data: Dataset, rows: torch.Tensor) -> Batch:
    return Batch(data.images[rows], data.labels[rows], data.indices[rows])


def loss_of(
    objective: Objective, model: nn.Module, data: Dataset, progress: float = 0.9, seed: int = 0
) -> torch.Tensor:
    """The loss on all samples at one moment of the training, the same randomness for every model."""
    state = objective.setup(model, data)
    streams = Streams.from_generator(torch.Generator().manual_seed(seed), data.indices)
    step = Step(round(1000 * progress), 1000, 0)
    return objective.loss(model, batch_of(data, torch.arange(len(data))), step, state, streams)


def test_its_loss_at_the_end_of_the_schedule_falls(objective: Objective, data: Dataset) -> None:
    own = objective.objective if isinstance(objective, Deploy) else objective  # what is deployed is tested elsewhere
    model, held_out = net(), load_data("digits", "calibration")
    before = float(loss_of(own, model, data).detach())
    train(model, data, own, epochs=10, batch_size=50, learning_rate=1e-2, calibration=held_out)
    assert float(loss_of(own, model, data).detach()) < before - 0.1


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.99])
def test_its_loss_is_a_finite_scalar_with_gradients(objective: Objective, data: Dataset, progress: float) -> None:
    model = net()
    loss = loss_of(objective, model, data, progress)
    assert loss.ndim == 0
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_its_randomness_comes_from_the_streams(objective: Objective, data: Dataset) -> None:
    model = net()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = loss_of(objective, model, data)
    assert torch.equal(loss_of(objective, model, data), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_modes_and_flags_as_they_were(objective: Objective, data: Dataset, training: bool) -> None:
    model = net().train(training)
    model[1].weight.requires_grad_(False)
    model[2].train(not training)
    loss_of(objective, model, data)
    assert [part.training for part in model] == [training, training, not training, training]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_its_repr_rebuilds_it_in_a_checkpoint_key(objective: Objective) -> None:
    assert " at 0x" not in repr(objective)  # an address would refuse every resumed run
