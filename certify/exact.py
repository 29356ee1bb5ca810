"""The exact certificate of small ReLU nets, by mixed-integer programming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.certify._exact_search import Answer, decide
from robustbench_lite.certify._network_programme import NORMS
from robustbench_lite.certify._questions import Question, check_has_programme, has_programme, questions
from robustbench_lite.certify.falsifier import Falsifier, falsified
from robustbench_lite.certify.graph import graph_of, uncompiled
from robustbench_lite.certify.inputs import input_region
from robustbench_lite.certify.intervals import Interval
from robustbench_lite.certify.linear_bounds import LinearBounds
from robustbench_lite.certify.margin_certifier import Findings, MarginCertifier
from robustbench_lite.certify.precision import full_precision
from robustbench_lite.core.models import Model, predict
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact(MarginCertifier):
    """Minimise every z_pred - z_j over the threat by mixed-integer programming, until its sign is known.

    Complete up to the solver's tolerances and the time limit, for linf, l1 and l0 threats on small nets of affine
    operators, ReLU, LeakyReLU and max pooling: a few hundred neurons whose sign the threat can change. Linear
    programmes come first: over interval bounds, then over bounds of each neuron that are themselves found by linear
    programmes. Only what they leave open is searched.

    - VERIFIED: the solver's lower bounds, less its tolerances (`certify._milp` states them), exceed `tolerance`.
    - FALSIFIED: the falsifier's or the solver's point, moved into the threat, is given another label by the model's own
      forward; it is `counterexample` (which holds the clean image at all other samples).
    - TIMEOUT: the time limit came first. What it leaves open depends on the machine; what is decided does not.
    - UNKNOWN: a margin of 0 up to the tolerances, which grow with the widths of the layers' boxes; or activations above
      1e6, which the solver's tolerances do not suit.

    `margins` are lower bounds, not minima: where the search itself proved one it stopped just above `tolerance`
    (`exact_margins` returns minima).

    Source: Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming", 2019,
    arXiv:1711.07356.
    Departures: l1 and l0 threats; HiGHS (`scipy.optimize.milp`) as the solver; the search asks for points below the
    tolerance only, which decides in seconds what the minimisation leaves open after minutes.

    Attributes:
        time_limit: seconds a sample; a sample whose prediction is wrong takes it twice, as its margins to the true
            label are sought as well.
        every_margin: whether to go on to the other classes once a counterexample is found; without, their margins are
            what was proven until then.
        falsifier: an attack such as a short PGD, asked first: it finds most counterexamples far sooner than the solver;
            None: the solver finds them.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> _ = nn.init.constant_(net[1].weight, 0.0)
    >>> net[1].weight.data[1] = 1.0
    >>> x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([1])
    >>> Exact()(net, x, y, Lp("l0", 3)).certified.item()
    True
    >>> Exact()(net, x, y, Lp("l1", 1.9)).certified.item()
    True
    """

    cheap: ClassVar[bool] = False

    time_limit: float = 60.0
    every_margin: bool = False
    falsifier: Falsifier | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.time_limit > 0:
            raise ValueError(f"time_limit must be > 0 seconds, got {self.time_limit}")

    def supports(self, threat: Threat) -> bool:
        """Say yes to linf, l1 and l0 balls with a radius."""
        return has_programme(threat)

    def __call__(self, model: Model, x: Tensor, y: Tensor, threat: Threat, **rest: Any) -> Certificate:
        """Certify a batch, as `Certifier.__call__` says; a threat that has no programme is refused by name."""
        check_has_programme(threat)
        return super().__call__(model, x, y, threat, **rest)

    def lower_margins(self, model: nn.Module, x: Tensor, threat: Lp, C: Tensor) -> Tensor:
        """Return lower bounds (B, S) of C z."""
        answers = [self._answer(model, question, lambda image: None) for question in questions(model, x, threat, C)]
        return torch.stack([torch.from_numpy(answer.lower) for answer in answers]).to(x.device)

    def findings(
        self, model: nn.Module, x: Tensor, label: Tensor, threat: Lp, streams: Streams, num_classes: int
    ) -> Findings:
        """Return the margins, with counterexamples, and which samples the time limit left open."""
        margins = torch.full((len(x), num_classes), -torch.inf, dtype=torch.float64)
        points, fallen = falsified(self.falsifier, model, x, label, threat, streams)
        status = torch.where(fallen, int(Status.FALSIFIED), int(Status.UNKNOWN))
        rows = (label >= 0).nonzero().flatten()
        unit = torch.eye(num_classes, dtype=torch.float64)
        C = unit[label[rows].cpu()].unsqueeze(1) - unit
        for row, question in zip(rows.tolist(), questions(model, x[rows], threat.take(rows), C), strict=True):
            if fallen[row] and not self.every_margin:
                margins[row, label[row]] = math.inf
                continue
            shown = partial(_counterexample, model, x[row : row + 1], question.threat)
            answer = self._answer(model, question, shown, points[row : row + 1] if fallen[row] else None)
            margins[row] = torch.from_numpy(answer.lower).nan_to_num(-math.inf, math.inf, -math.inf)
            if answer.counterexample is not None:
                status[row], points[row] = int(Status.FALSIFIED), answer.counterexample[0]
                margins[row] = _conceded(margins[row], int(predict(model, answer.counterexample)))
            elif answer.unfinished:
                status[row] = int(Status.TIMEOUT)
        return Findings(margins.to(x.device), status, points)

    def _answer(
        self,
        model: nn.Module,
        question: Question,
        shown: Callable[[Tensor], Tensor | None],
        counterexample: Tensor | None = None,
    ) -> Answer:
        return decide(
            replace(question, known=_linear_boxes(model, question)),
            shown,
            counterexample,
            tolerance=self.tolerance,
            seconds=self.time_limit,
            every_row=self.every_margin,
        )


def _linear_boxes(model: nn.Module, question: Question) -> dict[int, Interval]:
    """Return what CROWN says about each layer, to start from: a neuron whose sign it knows needs no programme."""
    region = input_region(question.threat, question.x, NORMS)
    with full_precision(question.x.device):
        net = LinearBounds(graph_of(model, question.x), uncompiled(model), region)
    return {index: value for index, value in enumerate(net.values) if isinstance(value, Interval)}


def _conceded(margins: Tensor, reached: int) -> Tensor:
    """Return margins (K,) that do not claim what a counterexample refutes, even where rounding alone refutes it."""
    if reached < 0:  # the logits overflow there
        return torch.where(margins.isposinf(), margins, -torch.inf)
    classes = torch.arange(len(margins))
    return torch.where(classes == reached, margins.clamp(max=0.0), margins)


def _counterexample(model: Model, x: Tensor, threat: Lp, image: Tensor) -> Tensor | None:
    """Return the image, moved into the threat in the precision of `x`, if the model's label changes there."""
    image = threat.project(image.to(x), x)
    changed = predict(model, image) != predict(model, x)
    return image if bool(changed & threat.contains(image, x)) else None
