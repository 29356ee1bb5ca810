"""A first look at the model on a few images, which finds what no record shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robustbench_lite.core.checks import check_labels, check_logits, explain_mismatch
from robustbench_lite.core.convolutions import image_gradients
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.losses import margin
from robustbench_lite.core.models import Model, frozen
from robustbench_lite.evaluation.flags import Flag, probabilities, randomised, zero_gradients
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.scarcity import ran_out
from robustbench_lite.evaluation.subject import Subject
from robustbench_lite.evaluation.unfinished import EvaluationError

__all__ = ["LOOKED_AT", "first_look", "margin_gradients"]

LOOKED_AT = 64  # images: four forward passes on each


def first_look(subject: Subject, samples: Samples, seed: int, count: int = LOOKED_AT) -> list[Flag]:
    """Return the flags that the model's answers on the first `count` images raise.

    Raises:
        TypeError: the model does not answer with a floating-point tensor.
        ValueError: its answer has the wrong shape, device or dtype do not fit, a label has no logit, or
            the net is for other images.
        EvaluationError: the model raised an error of another kind.
    """
    x, y = subject.images(samples.x[:count]), samples.y[:count].to(subject.device)
    with subject.seeded(seed):
        with torch.no_grad(), frozen(subject.model):
            first, second = _ask(subject.model, x), _ask(subject.model, x)
        check_logits(first, x)
        if first.shape[1] < 2:
            raise ValueError(f"a classifier needs at least two logits, got {first.shape[1]}")
        highest = int(samples.y.max())
        if highest >= first.shape[1]:
            raise ValueError(f"the model returns {first.shape[1]} logits but the data have labels up to {highest}")
        check_labels(samples.y, samples.x, first.shape[1])
        slopes = _gradients(subject, x, _margin(y), lambda logits: cross_entropy(logits, y, reduction="sum"))
        dead = zero_gradients(slopes[0]) or zero_gradients(slopes[1], "cross-entropy")
    found = [probabilities(first), randomised(first, second, subject.stochastic), dead]
    return [flag for flag in found if flag is not None]


def margin_gradients(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    """Return the margin's gradients (B, C, H, W) at images, from what an attacker differentiates.

    Zeros where there is none, NaN where it cannot be computed.
    """
    return _gradients(subject, x, _margin(y))[0]


def _margin(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: margin(logits, Untargeted(y)).sum()


def _ask(model: Model, x: Tensor) -> Tensor:
    """Ask the model; say what may be wrong with a forward pass that fails."""
    try:
        return model(x)
    except Exception as error:
        if ran_out(error):
            raise
        kind, shape = type(model).__name__, "x".join(map(str, x.shape[1:]))
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
            mismatch = explain_mismatch(model, x)
            raise ValueError(mismatch or f"{kind} cannot take images of shape {shape}: {error}") from error
        raise EvaluationError(f"{kind} failed on images of shape {shape}: {type(error).__name__}: {error}") from error


def _gradients(subject: Subject, x: Tensor, *losses: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return the gradients (B, C, H, W) of losses of the logits, from one forward pass."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad(), frozen(subject.model, subject.view):
        with image_gradients(leaf):
            logits = _ask(subject.model if subject.view is None else subject.view, leaf)
        return [_slope(loss(logits), leaf) for loss in losses]


def _slope(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    try:
        (slope,) = torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        if ran_out(error):
            raise
        # an operation without a derivative: the flag says so
        return torch.full_like(leaf, torch.nan)
    return torch.zeros_like(leaf) if slope is None else slope
