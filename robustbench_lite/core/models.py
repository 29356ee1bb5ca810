"""What the suite asks of a model: logits, labels, and to be left as it was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]

ABSTAIN = -1  # predict's label for "no answer": a detector's rejection, or a vote without a winner
INVALID = -2  # the logits had a NaN or an infinity: the model's error, counted as broken

__all__ = [
    "ABSTAIN",
    "INVALID",
    "Model",
    "answers_of",
    "forward_passes",
    "frozen",
    "is_stochastic",
    "labels_of",
    "own_predict",
    "predict",
    "rejects",
    "surely_finite",
]


def labels_of(logits: Tensor) -> Tensor:
    """Return the predicted labels, int64 (B,), of logits (B, K); `INVALID` where a row is not finite."""
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), INVALID)


def surely_finite(values: Tensor) -> bool:
    """Say whether all values are finite, by their sum: never wrongly yes; on a GPU, where to know is to wait, never."""
    return values.device.type == "cpu" and math.isfinite(values.detach().sum().item())


def answers_of(logits: Tensor) -> Tensor:
    """Return `labels_of(logits)`, on a CPU in less time; not for code that may be traced or mapped: it branches."""
    return logits.argmax(dim=1) if surely_finite(logits) else labels_of(logits)


def own_predict(model: Model) -> Callable[[Tensor], Tensor] | None:
    """Return the model's own `predict`; None where the largest logit decides.

    A `predict` that is by definition the largest logit says so by the attribute `is_argmax`, as a wrapper's default
    does: one forward pass then gives logits and answer.
    """
    own = getattr(model, "predict", None)
    return own if callable(own) and not getattr(own, "is_argmax", False) else None


def predict(model: Model, x: Tensor) -> Tensor:
    """Return the deployed model's labels, int64 (B,), for images (B, C, H, W).

    A defense's own `predict` decides where there is one (it may answer `ABSTAIN`); otherwise the largest logit does.
    """
    own = own_predict(model)
    return labels_of(model(x)) if own is None else own(x)


def is_stochastic(model: Model) -> bool:
    """Say whether the model declares that two calls may differ."""
    return bool(getattr(model, "stochastic", False))


def rejects(model: Model) -> bool:
    """Say whether the model declares that `ABSTAIN` means "suspicious input" (a detector)."""
    return bool(getattr(model, "rejects", False))


def forward_passes(model: Model) -> int:
    """Return the forward passes of one call: the most that the model or a module inside says in its attribute `cost`.

    A module that calls another one several times says the product, as `EOT` does.
    """
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    return max(int(getattr(part, "cost", 1)) for part in parts)


@contextmanager
def frozen(*models: Any) -> Iterator[None]:
    """Put models in eval mode with frozen parameters; restore each submodule and parameter afterwards.

    Callables that are not modules pass through untouched. `.grad` is never read or written.
    """
    with ExitStack() as stack:
        for module in {id(m): m for m in models if isinstance(m, nn.Module)}.values():
            stack.enter_context(_frozen_module(module))
        yield


@contextmanager
def _frozen_module(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.eval()
        module.requires_grad_(False)
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, requires in grads:
            parameter.requires_grad_(requires)
