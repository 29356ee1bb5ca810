"""Certifiers that bound margins: a prediction stands if every z_pred - z_j stays positive over the whole threat."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustbench_lite.certify.base import Certifier
from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.certify.forward import answer
from robustbench_lite.certify.graph import graph_of
from robustbench_lite.core.checks import check_labels, check_predictions, explain_mismatch
from robustbench_lite.core.models import ABSTAIN, Model, is_stochastic, own_predict, predict
from robustbench_lite.core.results import Certificate, Status
from robustbench_lite.core.rng import Streams
from robustbench_lite.core.threats import Lp, Threat

__all__ = ["Findings", "MarginCertifier"]


@dataclass(frozen=True, eq=False)
class Findings:
    """What a certifier found out about one label of each of B samples.

    Attributes:
        margins: float64 (B, K), lower bounds of z_label - z_j over the threat: +inf at j = label.
        status: int64 (B,) of `Status`, for samples whose margins prove nothing; None: UNKNOWN.
        counterexample: (B, C, H, W), an input of the threat with another label where the status is FALSIFIED.
    """

    margins: Tensor
    status: Tensor | None = None
    counterexample: Tensor | None = None


@dataclass(frozen=True)
class MarginCertifier(Certifier):
    """The common part of IBP and its kin: a subclass writes `lower_margins`.

    The decision is made in float64, on a float64 reading of the parameters (TF32 plays no part there): VERIFIED asks
    every lower bound to exceed `tolerance`. Float64 rounding of a net whose activations stay below 1e6 is some 1e-8.
    The claim is for real arithmetic: a deployed float32 forward has rounding of its own, near a margin of 0.

    Nothing is proven about a model with a `predict` of its own (`core.models.own_predict`): bounds of the logits do not
    tell what `predict` answers elsewhere in the ball. All its samples are UNKNOWN (ABSTAINED where it abstains) and
    `margins` is None: a defense that decides by itself brings its own certifiers. A model whose largest logit decides
    is UNKNOWN where its logits are not finite.

    Attributes:
        tolerance: what a lower bound of a margin has to exceed.
    """

    kind: ClassVar[str] = "deterministic"
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be >= 0 and finite, got {self.tolerance}")

    @abstractmethod
    def lower_margins(self, model: nn.Module, x: Tensor, threat: Lp, C: Tensor) -> Tensor:
        """Return lower bounds (B, S) of C z over the threat around float64 images `x`; NaN where nothing is known."""

    def run(self, model: Model, x: Tensor, y: Tensor, threat: Threat, streams: Streams) -> Certificate:
        """Certify one chunk; `threat` is an `Lp` ball."""
        if not isinstance(model, nn.Module) or not isinstance(threat, Lp):
            raise TypeError(f"{type(self).__name__} reads a model's layers: it needs an nn.Module and an Lp threat")
        if is_stochastic(model):
            raise CannotCertify(
                f"{type(model).__name__} is stochastic: a deterministic certificate says nothing about it; certify the "
                "net inside, or use a probabilistic certifier"
            )
        if own_predict(model) is not None:
            nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            return self._certificate(nothing, _prediction(model, x), y, threat, None)
        num_classes = graph_of(model, x, recheck=True).num_classes
        if num_classes < 2:
            raise ValueError(f"a margin needs at least 2 logits, the model returns {num_classes}")
        check_labels(y, x, num_classes)
        with torch.no_grad():
            prediction = _prediction(model, x)
            found = self.findings(model, x, prediction, threat, streams, num_classes)
            verified, margins = (found.margins > self.tolerance).all(dim=1), found.margins
            wrong = (prediction != y).nonzero().flatten()
            if len(wrong):
                true = self.losing(model, x[wrong], threat.take(wrong), y[wrong], num_classes)
                margins = margins.index_copy(0, wrong, true)
        return self._certificate(verified, prediction, y, threat, margins, found)

    def findings(
        self, model: nn.Module, x: Tensor, label: Tensor, threat: Lp, streams: Streams, num_classes: int
    ) -> Findings:
        """Return what is found out about these labels, int64 (B,); nothing about negative ones (abstentions)."""
        return Findings(self.margins(model, x, threat, label, num_classes))

    def losing(self, model: nn.Module, x: Tensor, threat: Lp, label: Tensor, num_classes: int) -> Tensor:
        """Return the margins of the true label where the prediction is another: for the record, nothing hangs on it."""
        return self.margins(model, x, threat, label, num_classes)

    def margins(
        self, model: nn.Module, x: Tensor, threat: Lp, label: Tensor, num_classes: int, asked: Tensor | None = None
    ) -> Tensor:
        """Return lower bounds (B, K) of z_label - z_j: +inf at j = label, -inf where nothing is known.

        Only margins `asked` for, bool (B, K), need be bounded.
        """
        margins = torch.full((len(x), num_classes), -torch.inf, dtype=torch.float64, device=x.device)
        rows = (label >= 0).nonzero().flatten()
        if len(rows):
            unit = torch.eye(num_classes, dtype=torch.float64, device=x.device)
            chosen = unit[label[rows]]
            C = chosen.unsqueeze(1) - unit
            C = C if asked is None else C * asked[rows].unsqueeze(2)
            found = self.lower_margins(model, x[rows].double(), threat.take(rows), C)
            margins[rows] = torch.where(chosen.bool(), torch.inf, found.nan_to_num(-torch.inf, torch.inf, -torch.inf))
        return margins

    def _certificate(
        self,
        verified: Tensor,
        prediction: Tensor,
        y: Tensor,
        threat: Lp,
        margins: Tensor | None,
        found: Findings | None = None,
    ) -> Certificate:
        unproven = torch.full_like(y, int(Status.UNKNOWN)) if found is None or found.status is None else found.status
        status = torch.where(verified, int(Status.VERIFIED), unproven)
        status = torch.where(prediction == ABSTAIN, int(Status.ABSTAINED), status)
        eps = torch.as_tensor(threat.eps, dtype=torch.float64, device=y.device).reshape(-1).expand(len(y))
        return Certificate(
            status=status,
            certified=verified & (prediction == y),
            radius=torch.where(verified, eps, 0.0),
            prediction=prediction,
            kind=self.kind,
            confidence=1.0,
            samples=torch.zeros_like(y),
            margins=margins,
            counterexample=None if found is None else found.counterexample,
        )


@torch.no_grad()
def _prediction(model: nn.Module, x: Tensor) -> Tensor:
    """Return the deployed model's labels."""
    try:
        prediction = answer(lambda images: predict(model, images), x)
    except RuntimeError as error:
        reason = explain_mismatch(model, x)
        if reason is None:
            raise
        raise ValueError(reason) from error
    check_predictions(prediction, x)
    return prediction
