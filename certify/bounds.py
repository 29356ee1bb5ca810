"""Bounds of a model's logits, or of linear combinations of them, over a set of inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.inputs import INTERVAL_NORMS, input_region
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.linear_bounds import LinearBounds, specification_rows
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.certify.propagate import propagate
from robustbench_lite.certify.slopes import Ascent
from robustbench_lite.core.errors import lookup
from robustbench_lite.core.norms import NORMS

if TYPE_CHECKING:
    from robustbench_lite.certify.ir import Graph
    from robustbench_lite.certify.lines import Lines
    from robustbench_lite.certify.region import Region
    from robustbench_lite.certify.rows import Dense
    from robustbench_lite.core.threats import Threat

__all__ = ["LinearForms", "bounds"]

METHODS = ("ibp", "crown_ibp", "crown", "alpha_crown")


@dataclass(frozen=True, eq=False)
class LinearForms:
    """Linear functions of the images between which C z lies, everywhere on the set of inputs.

    sum(lower_slope * x) + lower_shift <= C z(x) <= sum(upper_slope * x) + upper_shift.

    Attributes:
        lower_slope: (B, S, C, H, W).
        lower_shift: (B, S).
        upper_slope: (B, S, C, H, W).
        upper_shift: (B, S).
    """

    lower_slope: Tensor
    lower_shift: Tensor
    upper_slope: Tensor
    upper_shift: Tensor


@overload
def bounds(
    model: nn.Module,
    threat_or_box: Threat | tuple[Tensor, Tensor],
    method: str = ...,
    C: Tensor | None = ...,
    return_linear: Literal[False] = ...,
    x: Tensor | None = ...,
    memory_budget: int | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def bounds(
    model: nn.Module,
    threat_or_box: Threat | tuple[Tensor, Tensor],
    method: str = ...,
    C: Tensor | None = ...,
    *,
    return_linear: Literal[True],
    x: Tensor | None = ...,
    memory_budget: int | None = ...,
) -> tuple[Tensor, Tensor, LinearForms]: ...


def bounds(
    model: nn.Module,
    threat_or_box: Threat | tuple[Tensor, Tensor],
    method: str = "ibp",
    C: Tensor | None = None,
    return_linear: bool = False,
    x: Tensor | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LinearForms]:
    """Return (lower, upper), each (B, K), around the logits; with `C`, each (B, S), around C z.

    Sound for the model's forward in eval mode (whatever mode it is in) in real arithmetic; computed in the dtype of the
    input, so rounding can trespass by its size: `Certifier`s decide in float64. Differentiable in the model's
    parameters and in the box (the slopes of alpha-CROWN are held fixed). At a box of one point, and at eps = 0, both
    bounds are the logits.

    Args:
        model: nn.Module from images (B, C, H, W) to logits (B, K).
        threat_or_box: a box (lower, upper), or an `Lp` threat around `x`: the ball cut by the image bounds. Interval
            bounds take norms linf, l2 and l1: the latter two start from the box around the ball, cut likewise, and use
            the dual norm at the first linear or convolutional layer where it is tighter. Linear bounds take l0 too.
        method: "ibp", "crown_ibp", "crown" or "alpha_crown"; see the certifiers of these names.
        C: specification (S, K) or (B, S, K), such as rows e_y - e_j; a last Linear layer is merged with it, which
            bounds differences of logits more tightly than the difference of their bounds.
        return_linear: also return linear functions of the images below and above C z, `LinearForms`. Interval bounds
            have none; the numbers may be tighter, for they are never worse than interval bounds over the same boxes.
        x: the images of a threat.
        memory_budget: bytes that the coefficients of linear bounds may take at a time (more where gradients are kept);
            None: 64 MiB on a CPU, 2 GiB elsewhere.

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
    if not torch.is_inference_mode_enabled():
        return _bounds(model, threat_or_box, method, C, return_linear, x, memory_budget)
    with torch.inference_mode(False), torch.no_grad():  # some rules differentiate, which that mode's tensors cannot
        if isinstance(threat_or_box, (tuple, list)):
            threat_or_box = (threat_or_box[0].clone(), threat_or_box[1].clone())
        C, x = (None if t is None else t.clone() for t in (C, x))
        return _bounds(model, threat_or_box, method, C, return_linear, x, memory_budget)


def _bounds(
    model: nn.Module,
    threat_or_box: Threat | tuple[Tensor, Tensor],
    method: str,
    C: Tensor | None,
    return_linear: bool,
    x: Tensor | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LinearForms]:
    lookup(method, dict.fromkeys(METHODS), "bound method")
    if return_linear and method == "ibp":
        raise ValueError("ibp bounds are plain numbers, without linear coefficients; leave return_linear out")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be a number of bytes, at least 1, got {memory_budget}")
    region = input_region(threat_or_box, x, INTERVAL_NORMS if method == "ibp" else tuple(NORMS))
    _check_device(model, region.lower)
    graph = graph_of(model, region.lower)
    model = uncompiled(model)
    if C is not None:
        C = _specification(C, graph.num_classes, region.lower)
    with full_precision(region.lower.device):
        if method == "ibp":
            box, forms = propagate(graph, model, region.interval(), C), None
        else:
            walk = _walk(method, graph, model, region, C, memory_budget)
            box, forms = walk.box(), walk.forms() if return_linear else None
    _check_found(model, box)
    return (box.lower, box.upper) if not return_linear or forms is None else (box.lower, box.upper, forms)


@dataclass(frozen=True, eq=False)
class _Walk:
    """Rows over the logits: for each sample those of C, and then their negatives."""

    net: LinearBounds
    rows: Dense
    lines: dict[int, Lines]
    final: Interval

    def box(self) -> Interval:
        lower, upper = self._halves(self.net.lower(self.net.graph.output, self.rows, self.lines))
        return Interval(lower, -upper).intersect(self.final)

    def forms(self) -> LinearForms:
        found, shift = self.net.coefficients(self.net.graph.output, self.rows, self.lines)
        slopes, shifts = self._halves(found.dense().values), self._halves(shift)
        return LinearForms(slopes[0], shifts[0], -slopes[1], -shifts[1])

    def _halves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        below, above = t.reshape(len(self.final.lower), 2, self.final.lower.shape[1], *t.shape[1:]).unbind(1)
        return below, above


def _walk(
    method: str, graph: Graph, model: nn.Module, region: Region, C: Tensor | None, memory_budget: int | None
) -> _Walk:
    net = LinearBounds(graph, model, region, C, tighten=method != "crown_ibp", memory_budget=memory_budget)
    like = region.lower
    below = torch.eye(graph.num_classes, dtype=like.dtype, device=like.device) if C is None else C
    rows = specification_rows(torch.cat([below, -below], dim=-2), len(like))
    if method != "alpha_crown":
        return _Walk(net, rows, {}, net.final)
    own, lines = _with_slopes(net, rows)
    return _Walk(own, replace(rows, owner=None), lines, net.final)


def _with_slopes(net: LinearBounds, rows: Dense) -> tuple[LinearBounds, dict[int, Lines]]:
    """Return each row as a sample of its own, and the lines with the slopes that are best for it."""
    with torch.no_grad():
        slopes = Ascent().best_slopes(net, rows)
    own = net.take(rows.samples)
    return own, {index: own.lines(own.graph.nodes[index]).chosen(slope) for index, slope in slopes.items()}


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
