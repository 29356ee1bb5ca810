"""Ensemble adversarial training: examples that other nets were fooled by, and now and then the net itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from robustbench_lite.defenses.adversarial_training import AdversarialTraining
from robustbench_lite.defenses.base import Step, TrainingData

__all__ = ["EnsembleAdversarialTraining"]

BATCH_SIZE, LEARNING_RATE = 64, 2e-3  # of the surrogates, by Adam


@dataclass(frozen=True)
class EnsembleAdversarialTraining(AdversarialTraining):
    """Minimise mix * CE(clean) + (1 - mix) * CE(adversarial), the examples made on one of several nets in turn.

    The sources are static surrogates, and the net in training as the last of them; each batch takes the next. Examples
    of the surrogates do not depend on the net's own gradient, so that masking it does not help the net. Made for
    attacks that transfer; against an adversary who knows the net it is about as weak as its one-step attack.

    A surrogate is a trained net, taken as it is, or a class (a partial of one) that is called with what it names of
    `in_channels`, `image_size` and `num_classes`, and trained by `setup` on the data, from a seed of its own, in the
    standard way. So a configuration holds architectures instead of files of weights: it trains anywhere, on any data,
    and repeats to the bit. They are kept in the state: a resumed run goes on with the very same ones.

    Source: Tramer, Kurakin, Papernot, Goodfellow, Boneh, McDaniel, "Ensemble Adversarial Training: Attacks and
    Defenses", 2017, arXiv:1705.07204.
    Departure: the optional warm-up and ramp.

    Args:
        attack: what finds the examples, such as FGSM, as in `AdversarialTraining`, and so the next four.
        threat: what the adversary may do.
        mix: the share of the clean loss.
        warmup: share of the training on clean images alone.
        ramp: share of the training, after the warm-up, in which eps rises linearly from 0.
        surrogates: the other nets, at least one.
        pretraining: epochs of standard training for those that are given as classes.

    Raises:
        ValueError: as in `AdversarialTraining`, no surrogate, or no epoch.
        TypeError: a surrogate that is neither a net nor makes one; from `setup` for the latter.
    """

    mix: float = 0.5
    surrogates: Sequence[nn.Module | Callable[..., nn.Module]] = ()
    pretraining: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "surrogates", tuple(self.surrogates))
        if not self.surrogates:
            raise ValueError("surrogates must name at least one other net; with none it is AdversarialTraining")
        if not all(callable(surrogate) for surrogate in self.surrogates):
            raise TypeError(f"a surrogate is a torch.nn.Module, or a class that makes one, got {self.surrogates}")
        if not (isinstance(self.pretraining, int) and self.pretraining >= 1):
            raise ValueError(f"pretraining is a number of epochs, at least 1, got {self.pretraining!r}")

    def setup(self, model: nn.Module, data: TrainingData) -> nn.ModuleList:
        """Return the surrogates, trained and frozen."""
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            nets = [self._ready(surrogate, data, device, seed) for seed, surrogate in enumerate(self.surrogates)]
        return nn.ModuleList(nets).requires_grad_(False).eval()

    def source(self, model: nn.Module, step: Step, state: nn.ModuleList) -> nn.Module:
        """Return the next of the surrogates and the net itself."""
        turn = step.index % (len(state) + 1)
        return model if turn == len(state) else state[turn]

    def _ready(
        self, surrogate: nn.Module | Callable[..., nn.Module], data: TrainingData, device: torch.device, seed: int
    ) -> nn.Module:
        if isinstance(surrogate, nn.Module):
            return copy.deepcopy(surrogate).to(device)
        torch.manual_seed(seed)
        shape = data.images.shape
        known = {"in_channels": shape[1], "image_size": tuple(shape[2:]), "num_classes": data.num_classes}
        named = inspect.signature(surrogate).parameters
        net = surrogate(**{name: value for name, value in known.items() if name in named})
        if not isinstance(net, nn.Module):
            raise TypeError(f"a surrogate must make a torch.nn.Module, {surrogate} made a {type(net).__name__}")
        return _trained(net.to(device), data, self.pretraining, device, seed)


def _trained(net: nn.Module, data: TrainingData, epochs: int, device: torch.device, seed: int) -> nn.Module:
    """Train a net by Adam on the cross-entropy of clean images."""
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(data.labels), generator=order), BATCH_SIZE):
            optimizer.zero_grad()
            logits = net(data.images[rows].to(device)).float()
            loss = F.cross_entropy(logits, data.labels[rows].to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net
