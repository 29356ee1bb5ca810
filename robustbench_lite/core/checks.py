"""Checks of what a user hands in. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

__all__ = [
    "check_images",
    "check_indices",
    "check_labels",
    "check_logits",
    "check_predictions",
    "check_untouched",
    "explain_mismatch",
    "parse_number",
    "version_of",
]


def parse_number(value: float | int | str) -> float:
    """Return a finite float from a number or a string such as ``"0.3"`` or ``"8/255"``.

    Raises:
        ValueError: the text is no number, or the number is not finite.
    """
    try:
        number = float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as '8/255', got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value!r}")
    return number


def check_images(x: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Check that `x` is a batch of images (B, C, H, W), floating, finite and within `bounds`.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong rank, a value that is not finite, or one outside the bounds.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"images must be floating point in [{bounds[0]:g}, {bounds[1]:g}], got {x.dtype}: x.float() / 255"
        )
    if x.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(x.shape)}")
    if x.numel() == 0:
        return
    low, high = (v.item() for v in torch.aminmax(x))
    if math.isnan(low):
        raise ValueError("images contain NaN")
    if low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6:
        hint = "; divide by 255" if bounds == (0.0, 1.0) and low >= 0 and 1.5 < high <= 255 else ""
        hint = hint or "; keep normalisation inside the model, or give the threat other bounds"
        raise ValueError(f"images must lie in [{bounds[0]:g}, {bounds[1]:g}], got values in [{low:g}, {high:g}]{hint}")


def check_labels(y: Tensor, x: Tensor, num_classes: int | None = None) -> None:
    """Check that `y` is int64 (B,), on the device of the images `x`, with labels in 0 .. num_classes - 1.

    Raises:
        TypeError: not an int64 tensor.
        ValueError: wrong shape or device, or a label out of range.
    """
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {getattr(y, 'dtype', type(y).__name__)}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape ({len(x)},), one for each image, got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"labels are on {y.device} but images on {x.device}: move them to one device")
    if y.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "at least 0" if num_classes is None else f"in 0 .. {num_classes - 1}"
        raise ValueError(f"labels must be {expected}, got {low} .. {high}")


def check_indices(indices: Tensor, x: Tensor) -> None:
    """Check that `indices` name the images `x` (B, C, H, W) for their random streams: whole numbers (B,).

    Raises:
        TypeError: not an int64 tensor.
        ValueError: another shape.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.shape != x.shape[:1]:
        raise ValueError(f"indices must have shape ({len(x)},), one for each image, got {tuple(indices.shape)}")


def check_logits(logits: Tensor, x: Tensor) -> None:
    """Check that a model answered images `x` (B, C, H, W) with logits (B, K).

    Raises:
        TypeError: the answer is not a floating-point tensor.
        ValueError: the answer has another shape.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        came = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"a model must return floating-point logits (B, K), got {came}")
    if logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(f"a model must return logits of shape ({len(x)}, K), got {tuple(logits.shape)}")


def check_predictions(labels: Tensor, x: Tensor) -> None:
    """Check that a model's own `predict` answered images `x` (B, C, H, W) with labels int64 (B,).

    Raises:
        TypeError: the answer is not an int64 tensor.
        ValueError: the answer has another shape.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"predict must return int64 labels, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != x.shape[:1]:
        raise ValueError(f"predict must return labels of shape ({len(x)},), got {tuple(labels.shape)}")


def version_of(x: Tensor) -> int | None:
    """Return the number that changes with each change in place; None in inference mode, where none is kept."""
    return None if x.is_inference() else x._version


def check_untouched(x: Tensor, version: int | None) -> None:
    """Check that a forward pass left its input alone; `version` is `version_of(x)` from before it.

    Raises:
        ValueError: the input was changed in place, so that nobody would know which image the answer belongs to.
    """
    if version is not None and x._version != version:
        raise ValueError("the model changes its input in place: write x = x - mean, not x -= mean")


def explain_mismatch(model: object, x: Tensor) -> str | None:
    """Say how a model's parameters differ from images in device or dtype; None where they do not.

    For use after a failed forward pass only: a model may well cast its input.
    """
    if not isinstance(model, nn.Module):
        return None
    for parameter in model.parameters():
        if parameter.device != x.device:
            return f"the model is on {parameter.device} but the images on {x.device}: move them to one device"
        if parameter.is_floating_point() and parameter.dtype != x.dtype:
            return f"the model's parameters are {parameter.dtype} but the images {x.dtype}: convert one of them"
    return None
