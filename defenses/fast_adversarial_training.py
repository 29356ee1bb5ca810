"""Fast adversarial training: one gradient step a batch, and a watch on whether it still means anything."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustbench_lite.attacks.pgd import PGD
from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Batch, Descend, Step, TrainingData

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.core.rng import Streams

__all__ = ["FastAdversarialTraining"]

log = logging.getLogger(__name__)


class _Watch(nn.Module):
    """Samples that are never learnt from, and the weights that held best on them.

    Attributes:
        best: a frozen copy of the net with the best weights.
        accuracy: of `best` under the check, float64 (); -1 before the first look. On the CPU, as is `epoch`.
        epoch: passes that `best` had behind it, int64 ().
        looked: the last epoch before which a look was taken, int64 ().
        indices: the samples' numbers, int64 (n,), on the CPU.
    """

    accuracy: Tensor
    epoch: Tensor
    looked: Tensor

    def __init__(self, model: nn.Module, data: TrainingData, rows: Tensor) -> None:
        super().__init__()
        self.best = copy.deepcopy(model).requires_grad_(False).eval()
        self.register_buffer("accuracy", torch.tensor(-1.0, dtype=torch.float64))
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("looked", torch.tensor(0))
        device = next(model.parameters()).device
        indices = data.indices[rows].cpu()
        self.probe = Batch(data.images[rows].to(device), data.labels[rows].to(device), indices)  # setup brings it back

    def keep(self, model: nn.Module, accuracy: float, epoch: int) -> None:
        """Copy the weights of the model if they held at least as well as the best so far."""
        if accuracy >= float(self.accuracy):
            self.best.load_state_dict(model.state_dict())
            self.accuracy.fill_(accuracy)
            self.epoch.fill_(epoch)


@dataclass(frozen=True)
class FastAdversarialTraining(AdversarialTraining):
    """Adversarial training with a one-step attack, guarded against catastrophic overfitting.

    With `FGSM(random_start=True)` (a uniform start in the ball, then one step of 1.25 eps) this is the training of
    Wong, Rice and Kolter. One step is enough while the loss is almost linear in the ball; a net can learn to bend it
    instead, and then from one epoch to the next its accuracy under PGD falls to nothing while that under FGSM rises.
    So some samples are held aside and never learnt from. Before each epoch and in the end the net's accuracy on them
    under `check` is measured, and the best weights so far are kept; if in the end it lies more than `drop` below its
    best, those weights are what is deployed, and a warning says so.

    Source: Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", 2020, arXiv:2001.03994.
    Departures: their early stopping looks at a training batch after each epoch and stops at the first fall by 0.2; here
    the samples are held aside, and the training goes on, since nets may recover. As everywhere here, of start and end
    of the step the point with the higher loss is learnt from (a wrong one before a right one), while theirs is the end,
    whatever its loss. The optional warm-up and ramp.

    Args:
        attack: what finds the examples.
        threat: what the adversary may do, in the attack and in the check.
        mix: the share of the clean loss; Wong et al.: 0.
        warmup: share of the training on clean images alone.
        ramp: share of the training, after the warm-up, in which eps rises linearly from 0; the check has the whole eps.
        check: the attack that tells whether the net is robust.
        held_aside: number of samples for the check, spread evenly over the data.
        drop: fall of the accuracy under the check, in [0, 1], beyond which the best weights are brought back.

    Raises:
        ValueError: as in `AdversarialTraining`, a number or share out of range, or (from `setup`) no sample to learn
            from.
    """

    check: Attack = field(default_factory=lambda: PGD(steps=10))
    held_aside: int = 128
    drop: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.check.supports(self.threat):
            raise ValueError(f"{self.check} does not support the threat {self.threat}")
        if not (isinstance(self.held_aside, int) and self.held_aside >= 1):
            raise ValueError(f"held_aside is a number of samples, at least 1, got {self.held_aside!r}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a fall of the accuracy, in [0, 1], got {self.drop:g}")

    def setup(self, model: nn.Module, data: TrainingData) -> _Watch:
        """Hold samples aside.

        Raises:
            ValueError: none would be left to learn from.
        """
        count = len(data.labels)
        if count <= self.held_aside:
            raise ValueError(f"held_aside={self.held_aside} leaves nothing of {count} samples to learn from: lower it")
        return _Watch(model, data, torch.arange(self.held_aside) * count // self.held_aside)

    def update(
        self, model: nn.Module, batch: Batch, step: Step, state: _Watch, streams: Streams, descend: Descend
    ) -> Tensor:
        """Look at the net before each epoch, then learn from those of the batch that are not held aside."""
        if step.epoch > int(state.looked):
            state.keep(model, self.accuracy(model, state.probe, self.check), step.epoch)
            state.looked.fill_(step.epoch)
        rows = torch.isin(torch.tensor(streams.indices), state.probe.indices, invert=True).nonzero().flatten()
        if len(rows) == 0:
            return torch.zeros((), device=batch.x.device)
        own = rows.to(batch.x.device)
        rest = Batch(batch.x[own], batch.y[own], batch.indices[own])
        return super().update(model, rest, step, state, streams.take(rows), descend)

    def finish(
        self, model: nn.Module, data: TrainingData, state: _Watch, calibration: TrainingData | None = None
    ) -> nn.Module:
        """Return the model, with the best weights if the last ones have collapsed."""
        last, best = self.accuracy(model, state.probe, self.check), float(state.accuracy)
        if last < best - self.drop:
            log.warning(
                "catastrophic overfitting: on %d samples held aside the accuracy under the check is %.3f (under the "
                "attack of the training %.3f), and was %.3f after epoch %d, whose weights are deployed; lower the "
                "learning rate, train for fewer epochs, or take more steps",
                self.held_aside, last, self.accuracy(model, state.probe, self.attack), best, int(state.epoch),
            )  # fmt: skip
            model.load_state_dict(state.best.state_dict())
        return model

    def accuracy(self, model: nn.Module, probe: Batch, attack: Attack) -> float:
        """Return the share of the samples that an attack leaves right, its draws the same at every look."""
        result = attack(model, probe.x, probe.y, self.threat, indices=probe.indices)
        return 1 - float(result.success.double().mean())
