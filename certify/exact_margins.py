"""The exact minimum of specifications over a threat, and that of the linear relaxation: what other bounds are held to.

`exact_margins` solves a mixed-integer programme, `relaxation_bounds` the same programme with fractions for integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_lite.certify._exact_search import minima
from robustbench_lite.certify._network_programme import given
from robustbench_lite.certify._questions import Question, check_has_programme, questions
from robustbench_lite.certify.bounds import bounds
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.core.checks import check_images
from robustbench_lite.core.threats import Lp

__all__ = ["exact_margins", "relaxation_bounds"]


def exact_margins(
    model: nn.Module, x: Tensor, threat: Lp, C: Tensor, *, time_limit: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Return (lower, upper), each float64 (B, S), with the minimum of C z over the threat in between.

    `lower` is the solver's bound less its tolerances, `upper` is attained by an image of the threat, as the model in
    float64 computes it. They agree to about 1e-6 where the solver ends in time. For small ReLU nets: the work grows
    exponentially with the number of neurons whose sign the threat can change.

    Source: Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", 2019,
    arXiv:1711.07356.

    Args:
        model: nn.Module from images (B, C, H, W) to logits (B, K), of affine operators, ReLU, LeakyReLU and max
            pooling.
        x: images, floating point.
        threat: of norm linf, l1 or l0.
        C: specification (S, K) or (B, S, K), such as rows e_y - e_j.
        time_limit: seconds an image; where they run out, the bounds are apart.

    Raises:
        UnsupportedOperator: an operator that is not piecewise linear.
        ValueError: another threat, wrong shapes, or a model whose values overflow.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[1].weight.data, net[3].weight.data = torch.tensor([[1.0], [-1.0]]), torch.ones(1, 2)  # |x|
    >>> threat = Lp("linf", 0.5, bounds=(-1.0, 1.0))
    >>> lower, upper = exact_margins(net, torch.full((1, 1, 1, 1), 0.2), threat, torch.eye(1))
    >>> bool(abs(lower) < 1e-6), bool(abs(upper) < 1e-6)
    (True, True)
    """
    found = []
    for i, question in enumerate(_asked(model, x, threat, C)):
        specification = torch.from_numpy(question.C)

        def value(image: Tensor, specification: Tensor = specification) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return bounds(model, (image, image), C=specification)[1][0].detach().numpy()

        pair = minima(question, value, time_limit)
        if np.isnan(pair[0]).any():
            raise ValueError(f"the model's values overflow, or its parameters hold NaN: no bounds of image {i}")
        found.append(pair)
    lower, upper = (torch.from_numpy(np.stack(side)) for side in zip(*found, strict=True))
    return lower, upper


def relaxation_bounds(
    model: nn.Module, x: Tensor, threat: Lp, C: Tensor, intermediate: Mapping[int, Interval] | None = None
) -> Tensor:
    """Return the minimum, float64 (B, S), of C z over the linear relaxation: each unstable neuron in its triangle.

    It is the best that any choice of slopes can prove over the same intermediate bounds (Salman, Yang, Zhang, Hsieh,
    Zhang, "A Convex Relaxation Barrier to Tight Robustness Verification of Neural Networks", 2019, arXiv:1902.08722),
    less the solver's tolerances.

    Args:
        model: as in `exact_margins`.
        x: images, floating point.
        threat: of norm linf, l1 or l0; the set of inputs is exact for linf and l1, and for l0 the convex hull.
        C: specification (S, K) or (B, S, K).
        intermediate: bounds of what enters an activation, by the position of that node in `graph_of(model, x)`, each
            side (B, *node.shape). Nodes without an entry get interval bounds.

    Raises:
        UnsupportedOperator: an operator that is not piecewise linear.
        ValueError: another threat, or wrong shapes.
    """
    rows = []
    for i, question in enumerate(_asked(model, x, threat, C)):
        built = question.programme(given(intermediate or {}, i))
        rows.append([built.programme.minimise(built.row(s), relaxed=True).lower for s in range(len(question.C))])
    return torch.tensor(rows, dtype=torch.float64)


def _asked(model: nn.Module, x: Tensor, threat: Lp, C: Tensor) -> list[Question]:
    check_has_programme(threat)
    check_images(x, threat.bounds)
    threat.check_fits(x)
    return questions(model, x, threat, C)
