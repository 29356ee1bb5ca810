"""The settings of a training: checked once, and the larger part of what names a run."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim

from robustbench_lite.core.errors import lookup
from robustbench_lite.data.base import Dataset
from robustbench_lite.defenses.base import Objective
from robustbench_lite.training.augment import Augment
from robustbench_lite.training.schedules import Schedule

__all__ = ["Settings", "identity_of"]

OPTIMIZERS = ("adam", "adamw", "sgd")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class Settings:
    """What `train` was asked for, less model, data and objective; `train` says what each field means."""

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    momentum: float
    schedule: Schedule
    augment: Augment | None
    seed: int
    device: torch.device
    precision: str

    def __post_init__(self) -> None:
        lookup(self.optimizer, dict.fromkeys(OPTIMIZERS), "optimizer")
        lookup(self.precision, PRECISIONS, "precision")
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(f"need epochs >= 0 and batch_size >= 1, got {self.epochs} and {self.batch_size}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be > 0 and finite, got {self.learning_rate:g}")

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
        """Return the optimiser of these parameters."""
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer == "sgd":
            return optim.SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=decay)
        return (optim.Adam if self.optimizer == "adam" else optim.AdamW)(parameters, lr=rate, weight_decay=decay)

    def autocast(self) -> torch.autocast:
        """Return the context of the forward passes.

        Without the cache of cast weights: a weight cast under `no_grad` would be met again, cut off from its gradient.
        """
        enabled = self.precision != "float32"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def identity_of(settings: Settings, model: nn.Module, data: Dataset, objective: Objective) -> dict[str, str]:
    """Return what names a run: two runs with equal names on one machine end in equal weights.

    A model is named by its repr, classes and settings of its layers, and its initial weights; so are the modules and
    tensors that are settings of the objective, or of the attack in it.

    Raises:
        ValueError: a schedule, augmentation or objective that has no name to know it by in another process.
    """
    named = {field.name: _text(field.name, getattr(settings, field.name)) for field in fields(settings)}
    named["device"] = settings.device.type
    return named | {
        "objective": "\n".join([_text("objective", objective), *map(_digest, _states(objective))]),
        "model": ADDRESS.sub("", f"{type(model).__qualname__}\n{model!r}"),
        "initial weights": _digest(model.state_dict()),
        "data": f"{data.name} {data.split} {data.content_hash}",
    }


def _text(what: str, value: Any) -> str:
    """Return the repr, or the importable name of a function; refuse what two processes would name differently."""
    if inspect.ismethod(value):
        return f"{_text(what, value.__self__)}.{value.__name__}"
    text = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)
    if ADDRESS.search(text) or "<lambda>" in text or "<locals>" in text:
        raise ValueError(
            f"a checkpoint must know its {what} again, and {text} has no name to know it by: use a function defined at "
            "the top of a module, or a frozen dataclass such as those of training.schedules; or leave checkpoint out"
        )
    return text


def _states(value: Any) -> Iterator[dict[str, Tensor]]:
    """Yield what the repr of an objective, or of what it is made of, does not show: weights and tensors."""
    if isinstance(value, Tensor):
        yield {"": value}
    elif isinstance(value, nn.Module):
        yield value.state_dict()
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _states([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, partial):
        yield from _states([value.args, value.keywords])
    elif isinstance(value, Mapping):
        yield from _states(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _states(part)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
