"""A run that is killed and started again ends in the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_lite.attacks import FGSM, Transfer
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses import AdversarialTraining, Deploy, EnsembleAdversarialTraining, InputNoise
from robustbench_lite.defenses.base import Batch, Objective, State, Step, TrainingData
from robustbench_lite.defenses.standard import StandardTraining
from robustbench_lite.training import CropFlip, train
from robustbench_lite.training.checkpoint import seconds_in

STEPS_PER_EPOCH, EPOCHS = 4, 3


class KilledError(Exception):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Noisy(Objective):
    """Everything that a checkpoint must hold: a trained module and streams; the net adds BatchNorm and Dropout."""

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        return nn.Linear(1, data.num_classes)

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        x = batch.x + 0.1 * streams.normal(*batch.x.shape[1:])
        return F.cross_entropy(model(x) + state(torch.full((len(x), 1), step.progress)), batch.y)


@dataclass(frozen=True)
class Tables(StandardTraining):
    """A dict of tensors that the steps change in place."""

    def setup(self, model: nn.Module, data: TrainingData) -> State:
        return {"shift": torch.zeros(data.images.shape[1:])}

    def loss(self, model: nn.Module, batch: Batch, step: Step, state: Any, streams: Streams) -> Tensor:
        state["shift"].add_(batch.x.mean(dim=0), alpha=0.01)
        return F.cross_entropy(model(batch.x + state["shift"]), batch.y)


OBJECTIVES = [Noisy(), Tables(), StandardTraining()]


def data() -> Dataset:
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Dataset("noise", "train", x, torch.arange(50) % 3, torch.arange(50), 3)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 3)]
        return nn.Sequential(*parts)


def run(objective: Objective, checkpoint: Path | None = None, **other: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "batch_size": 15,
        "schedule": "one_cycle",
        "learning_rate": 0.02,
        "augment": CropFlip(1),
    }
    model = other.pop("model", None) or net()
    return train(model, data(), objective, checkpoint=checkpoint, **(settings | other))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("every", [1, 2])
def test_killed_before_any_step(
    objective: Objective, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(objective)
    original = type(objective).update
    for at in range(STEPS_PER_EPOCH * EPOCHS):

        def update(self: Objective, model: nn.Module, batch: Batch, step: Step, *rest: Any, at: int = at) -> Tensor:
            if step.index == at:
                raise KilledError
            return original(self, model, batch, step, *rest)

        path = tmp_path / f"{at}.pt"
        with monkeypatch.context() as patch:
            patch.setattr(type(objective), "update", update)
            with pytest.raises(KilledError):
                run(objective, path, checkpoint_every=every)
        assert path.exists() == (at >= every * STEPS_PER_EPOCH)
        assert equal(run(objective, path, checkpoint_every=every), whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = run(Noisy(), path)
    stamp = path.stat().st_mtime_ns
    assert equal(run(Noisy(), path), first)
    assert path.stat().st_mtime_ns == stamp


def test_a_checkpoint_counts_the_time_of_all_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once a reading: an epoch, read at its two ends, takes a second, in either process."""
    clock, path = itertools.count(), tmp_path / "run.pt"
    assert seconds_in(path) == 0
    monkeypatch.setattr("robustbench_lite.training.run.time.perf_counter", lambda: next(clock))
    second = Noisy.update

    def update(self: Objective, model: nn.Module, batch: Batch, step: Step, *rest: Any) -> Tensor:
        if step.epoch == 1:
            raise KilledError
        return second(self, model, batch, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Noisy, "update", update)
        with pytest.raises(KilledError):
            run(Noisy(), path)
    assert seconds_in(path) == 1
    run(Noisy(), path)
    assert seconds_in(path) == EPOCHS


SCRIPT = """
import importlib.util, os, signal, sys
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("resume", sys.argv[1])
resume = importlib.util.module_from_spec(spec)
sys.modules["resume"] = resume
spec.loader.exec_module(resume)
torch.set_num_threads(1)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "step":
    original = resume.Noisy.loss
    def loss(self, model, batch, step, *rest):
        if step.index == 6:
            kill()
        return original(self, model, batch, step, *rest)
    resume.Noisy.loss = loss
else:
    written = 0
    def replace(self, target):
        global written
        written += 1
        if written == 2:
            kill()
        os.replace(self, target)
    Path.replace = replace
resume.run(resume.Noisy(), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", ["step", "write"])
def test_kill_9_in_mid_epoch_and_while_a_checkpoint_is_written(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, __file__, str(path), moment],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(path, weights_only=True)["content"]["epoch"] == 1
    assert equal(run(Noisy(), path), run(Noisy()))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"epochs": 4}, "epochs was 3 and is 4"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 10}, "batch_size was 15 and is 10"),
        ({"learning_rate": 0.1}, "learning_rate was 0.02 and is 0.1"),
        ({"augment": None}, "augment was CropFlip"),
        ({"model": net(1)}, "initial weights was"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_run_is_refused(other: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(StandardTraining(), path)
    with pytest.raises(ValueError, match=rf"belongs to another training: {named}"):
        run(StandardTraining(), path, **other)


class Rate:
    """A schedule that repr cannot tell from another of its class."""

    def __call__(self, progress: float) -> float:
        return 0.5


def halved(progress: float) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("name", "value"), [("schedule", lambda progress: 1.0), ("schedule", Rate()), ("augment", lambda x, streams: x)]
)
def test_what_has_no_name_cannot_be_known_again(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"must know its {name} again.*use a function defined at the top of a module"):
        run(StandardTraining(), tmp_path / "run.pt", **{name: value})
    assert not (tmp_path / "run.pt").exists()
    run(StandardTraining(), epochs=1, **{name: value})  # without a checkpoint it needs none


def test_a_named_function_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = run(StandardTraining(), path, schedule=halved)
    assert equal(run(StandardTraining(), path, schedule=halved), first)
    with pytest.raises(ValueError, match=r"schedule was .*\.halved and is .*\.constantly_one"):
        run(StandardTraining(), path, schedule=constantly_one)


def constantly_one(progress: float) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("place", "layer", "named"),
    [
        (3, nn.Dropout(0.9), r"model was \(3\): Dropout\(p=0.3.* and is \(3\): Dropout\(p=0.9"),
        (2, nn.Tanh(), r"model was \(2\): ReLU\(\) and is \(2\): Tanh\(\)"),
    ],
    ids=["dropout", "activation"],
)
def test_a_model_with_other_layers_and_the_same_weights_is_refused(
    place: int, layer: nn.Module, named: str, tmp_path: Path
) -> None:
    path, other = tmp_path / "run.pt", net()
    run(StandardTraining(), path)
    assert isinstance(other, nn.Sequential)
    other[place] = layer
    with pytest.raises(ValueError, match=named):
        run(StandardTraining(), path, model=other)


def test_another_objective_or_other_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(StandardTraining(), path)
    with pytest.raises(ValueError, match=r"objective was StandardTraining\(\) and is Noisy\(\)"):
        run(Noisy(), path)
    with pytest.raises(ValueError, match="data was noise train"):
        train(net(), data().take(torch.arange(45)), StandardTraining(), epochs=3, checkpoint=path)


@dataclass(frozen=True, eq=False)
class Given(StandardTraining):
    shift: Any


THREAT = Lp("linf", 0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: EnsembleAdversarialTraining(FGSM(), THREAT, surrogates=(net(seed),)),
        lambda seed: Deploy(AdversarialTraining(Transfer(FGSM(), net(seed)), THREAT), partial(InputNoise, sigma=0.1)),
        lambda seed: Given(torch.zeros(3000).index_fill(0, torch.tensor([1500]), seed)),
        lambda seed: Given({"inner": partial(InputNoise, net(seed))}),
    ],
    ids=["modules", "in the attack", "tensor", "in a partial"],
)
def test_an_objective_with_other_weights_of_the_same_look_is_refused(
    make: Callable[[int], Objective], tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    assert repr(make(0)) == repr(make(1))
    first = run(make(0), path, epochs=1)
    assert equal(run(make(0), path, epochs=1), first)
    with pytest.raises(ValueError, match="objective was"):
        run(make(1), path, epochs=1)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken zip"])
def test_a_broken_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt is no readable training checkpoint: delete it"):
        run(StandardTraining(), path)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(StandardTraining(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no readable training checkpoint"):
        run(StandardTraining(), path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = tmp_path / "run.pt"
    torch.save({"format": 1, "content": Evil()}, path)
    with pytest.raises(ValueError, match="is no readable training checkpoint"):
        run(StandardTraining(), path)
    assert not (tmp_path / "owned").exists()


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(net().state_dict(), path)
    with pytest.raises(ValueError, match="is no training checkpoint of format 1"):
        run(StandardTraining(), path)
