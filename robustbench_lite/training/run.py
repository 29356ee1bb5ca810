"""One training under way: everything that a step changes, and so everything that a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_lite.core.rng import Streams
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Batch, Objective, State, Step
from robustbench_lite.training.settings import Settings

__all__ = ["Run", "reproducible"]

RESIDENT_BYTES = 4 << 30  # images up to this size move to the device once (CIFAR-10 takes 0.6 GB)
CHECK_EVERY = 64  # steps between two looks at the losses on a GPU, where each look waits for the device


@contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators and ask cuDNN for one answer; put both back afterwards."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                _gpu_generator(device).manual_seed(seed)
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


class Run:
    """The model, the objective's state, the optimiser and the generators of one training.

    Two generators belong to the run: one shuffles, one is the root of every stream that augmentation and objective
    draw from. Dropout and its like draw from torch's global generator, which `reproducible` seeds.
    """

    def __init__(self, model: nn.Module, data: Dataset, objective: Objective, settings: Settings) -> None:
        self.model, self.data, self.objective, self.settings = model, data, objective, settings
        self.state: State = objective.setup(model, data)
        self.modules = [model, *([self.state] if isinstance(self.state, nn.Module) else [])]
        trained = {p: None for module in self.modules for p in module.parameters() if p.requires_grad}
        if not trained and settings.epochs:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
        self.optimizer = settings.make_optimizer(trained) if trained else None
        self.order = torch.Generator().manual_seed(settings.seed)
        self.noise = torch.Generator().manual_seed(settings.seed + (1 << 32))
        self.epoch = 0
        self.seconds = 0.0  # wall time of the epochs so far
        self.steps_per_epoch = -(-len(data) // settings.batch_size)
        device = settings.device
        self._images = data.images.to(device) if data.images.nbytes <= RESIDENT_BYTES else data.images
        self._labels = data.labels.to(device)

    @property
    def total(self) -> int:
        """Number of steps of the whole training."""
        return self.settings.epochs * self.steps_per_epoch

    def train_epoch(self, advance: Callable[[int], None]) -> float:
        """Pass once over the data and return the mean loss of the steps.

        Args:
            advance: told the number of steps done so far, after each.

        Raises:
            FloatingPointError: a loss is not finite; the model's weights are then of no use.
        """
        start = time.perf_counter()
        self.model.train()
        losses = torch.zeros(self.steps_per_epoch, device=self.settings.device)
        look = 1 if self.settings.device.type == "cpu" else CHECK_EVERY
        rows_of_steps = torch.split(torch.randperm(len(self.data), generator=self.order), self.settings.batch_size)
        for k, rows in enumerate(rows_of_steps):
            step = Step(self.epoch * self.steps_per_epoch + k, self.total, self.epoch)
            losses[k] = self._train_step(rows, step)
            if (k + 1) % look == 0 or k + 1 == self.steps_per_epoch:
                self._check(losses[: k + 1])
            advance(step.index + 1)
        mean = float(losses.mean())  # waits for the device
        self.epoch += 1
        self.seconds += time.perf_counter() - start
        return mean

    def _train_step(self, rows: Tensor, step: Step) -> Tensor:
        device = self.settings.device
        indices = self.data.indices[rows]
        streams = Streams.from_generator(self.noise, indices, device)
        x = self._images[rows.to(self._images.device)].to(device)
        if self.settings.augment is not None:
            x = self.settings.augment(x, streams.fork(0))
        batch = Batch(x, self._labels[rows.to(device)], indices.to(device))
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self.settings.schedule(step.progress)
        with self.settings.autocast():
            loss = self.objective.update(self.model, batch, step, self.state, streams, self._descend)
        with torch.no_grad():
            self.objective.after_step(self.model, self.state)
        return loss

    def _descend(self, loss: Tensor) -> None:
        if self.optimizer is None or loss.ndim:
            raise ValueError(f"an objective's loss must be a scalar, got shape {tuple(loss.shape)}")
        with torch.autocast(self.settings.device.type, enabled=False):
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def _check(self, losses: Tensor) -> None:
        bad = losses.isfinite().logical_not().nonzero().flatten().tolist()
        if bad:
            step = self.epoch * self.steps_per_epoch + bad[0]
            raise FloatingPointError(
                f"the loss is {losses[bad[0]].item()} at step {step} of {self.total} (epoch {self.epoch + 1}): "
                "lower the learning rate, or lengthen the warm-up or ramp; the last checkpoint is from before"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the coming epochs depend on. Its tensors are the live ones: save or copy it before a step."""
        state = self.state.state_dict() if isinstance(self.state, nn.Module) else self.state
        device = self.settings.device
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "state": None if state is None else dict(state),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "noise": self.noise.get_state(),
            "global": torch.get_rng_state(),
            "gpu": _gpu_generator(device).get_state() if device.type == "cuda" else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.epoch, self.seconds = saved["epoch"], saved.get("seconds", 0.0)
        self.model.load_state_dict(saved["model"])
        if isinstance(self.state, nn.Module):
            self.state.load_state_dict(saved["state"])
        elif self.state is not None:
            with torch.no_grad():
                for name, tensor in self.state.items():
                    tensor.copy_(saved["state"][name])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.order.set_state(saved["order"])
        self.noise.set_state(saved["noise"])
        torch.set_rng_state(saved["global"])
        if saved["gpu"] is not None:
            _gpu_generator(self.settings.device).set_state(saved["gpu"])


def _gpu_generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator
