"""Bounds of a model's logits, or of linear combinations of them, over a set of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.inputs import NORMS, input_region
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.core.errors import lookup

if TYPE_CHECKING:
    from robustbench_lite.certify.intervals import Interval
    from robustbench_lite.core.threats import Threat

__all__ = ["bounds"]

METHODS = {"ibp": propagate}


def bounds(
    model: nn.Module,
    threat_or_box: Threat | tuple[Tensor, Tensor],
    method: str = "ibp",
    C: Tensor | None = None,
    return_linear: bool = False,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (lower, upper), each (B, K), around the logits; with `C`, each (B, S), around C z.

    Sound for the model's forward in eval mode (whatever mode it is in) in real arithmetic; computed in the dtype of the
    input, so rounding can trespass by its size: `Certifier`s decide in float64. Differentiable in the model's
    parameters and in the box. At a box of one point, and at eps = 0, both bounds are the logits.

    Args:
        model: nn.Module from images (B, C, H, W) to logits (B, K).
        threat_or_box: a box (lower, upper), or an `Lp` threat of norm linf, l2 or l1 around `x`. linf is the ball cut
            by the image bounds; l2 and l1 start from the box around the ball, cut likewise, and use the dual norm at
            the first linear or convolutional layer where it is tighter. l0 has no rule yet.
        method: "ibp".
        C: specification (S, K) or (B, S, K), such as rows e_y - e_j; a last Linear layer is merged with it, which
            bounds differences of logits more tightly than the difference of their bounds.
        return_linear: interval bounds have no linear coefficients.
        x: the images of a threat.

    Raises:
        TypeError: the model is no nn.Module, or the input no floating-point tensor.
        ValueError: an unknown method, unsupported operator or threat, wrong shapes, lower > upper, NaN in the box or in
            the model's parameters, or `return_linear` with a method that has no coefficients.

    >>> import torch
    >>> from robustbench_lite.core.threats import Lp
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> image = torch.full((1, 1, 2, 2), 0.5)
    >>> lower, upper = bounds(net, Lp("linf", 0.1), x=image)
    >>> bool((lower <= net(image)).all() and (net(image) <= upper).all())
    True
    """
    found = unchecked_bounds(model, threat_or_box, method, C, return_linear, x)
    _check_found(model, found)
    return found.lower, found.upper


def unchecked_bounds(
    model: nn.Module,
    threat_or_box: Threat | tuple[Tensor, Tensor],
    method: str = "ibp",
    C: Tensor | None = None,
    return_linear: bool = False,
    x: Tensor | None = None,
) -> Interval:
    """Return what `bounds` returns, before it looks for NaN: for callers to whom a NaN means "not proven"."""
    walk = lookup(method, METHODS, "bound method")
    if return_linear:
        raise ValueError(f"{method} bounds are plain numbers, without linear coefficients; leave return_linear out")
    box = input_region(threat_or_box, x, NORMS).interval()
    _check_device(model, box.lower)
    graph = graph_of(model, box.lower)
    model = uncompiled(model)
    if C is not None:
        C = _specification(C, graph.num_classes, box.lower)
    with full_precision(box.lower.device):
        return walk(graph, model, box, C)


def _specification(C: Tensor, num_classes: int, x: Tensor) -> Tensor:
    if C.ndim not in (2, 3) or C.shape[-1] != num_classes or (C.ndim == 3 and len(C) != len(x)):
        raise ValueError(
            f"C must have shape (S, {num_classes}) or ({len(x)}, S, {num_classes}) for this model and batch, "
            f"got {tuple(C.shape)}"
        )
    return C.to(x)


def _check_device(model: object, x: Tensor) -> None:
    held = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if held is not None and held.device != x.device:
        raise ValueError(f"the model is on {held.device} but the input on {x.device}: move one of them")


def _check_found(model: nn.Module, found: Interval) -> None:
    if not bool((found.lower.isnan() | found.upper.isnan()).any()):
        return
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not bool(value.isfinite().all()):
            raise ValueError(f"the bounds are NaN because {name!r} of the model holds NaN or infinity")
    raise ValueError(
        "the bounds are NaN: the model's values overflow over this box; a smaller one, or float64, may help"
    )
