"""One method on one batch: what is measured, and what of the method's word is not taken on trust."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from robustbench_lite.certify.errors import CannotCertify
from robustbench_lite.core.goals import Untargeted
from robustbench_lite.core.results import AttackResult, Status
from robustbench_lite.core.threats import Threat
from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.examples import Examples
from robustbench_lite.evaluation.records import TIE
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.subject import Subject

if TYPE_CHECKING:
    from robustbench_lite.attacks.base import Attack
    from robustbench_lite.certify.base import Certifier

__all__ = ["Method", "Outcome", "attack_method", "certifier_method", "clean_method", "sparing"]

Outcome = tuple[pa.Table, Examples | None]
"""The records of a batch, and the examples of its successes."""

Method = Callable[[Cell, Samples], Outcome]


def clean_method(subject: Subject) -> Method:
    """Return the method that asks the model about the clean images."""

    def run(cell: Cell, part: Samples) -> Outcome:
        x, y, start = subject.images(part.x), part.y.to(subject.device), time.perf_counter()
        with subject.seeded(cell.seed, part):
            prediction, lead = subject.answer(x, y)
            score = subject.suspicion(x)
        measured = {
            "prediction": _array(prediction),
            "correct": _array(prediction == y),
            "margin": _array(lead),
            "suspicion": None if score is None else _array(score),
            "forwards": np.full(len(part), 2 if subject.decides else 1),
            "seconds": _share(start, part),
        }
        return cell.rows(part, _given(measured)), None

    return run


def attack_method(subject: Subject, attack: Attack, threat: Threat, max_queries: int | None) -> Method:
    """Return the method that attacks, and checks each claimed success itself.

    A success stands if the returned input lies in the threat and the deployed model, asked once more, is wrong there (a
    lead within `TIE`, or a stochastic model, is given the benefit of the doubt). A claim that does not stand is kept as
    status "refuted", and the audit makes of it a violation. Distances are computed here.
    """

    def run(cell: Cell, part: Samples) -> Outcome:
        x, y, start = subject.images(part.x), part.y.to(subject.device), time.perf_counter()
        with subject.seeded(cell.seed, part):
            result = attack(
                subject.model,
                x,
                Untargeted(y),
                threat,
                view=subject.view,
                max_queries=max_queries,
                indices=torch.from_numpy(part.indices),
                generator=torch.Generator().manual_seed(cell.seed),
            )
            prediction, lead = subject.answer(result.x_adv, y)
            score = subject.suspicion(result.x_adv)
        inside, distance = _measured(threat, result, x)
        undecided = (lead.abs() <= TIE) & (not subject.decides) | subject.stochastic
        success = inside & (subject.achieved(prediction, y) | undecided)
        measured = {
            "prediction": _array(prediction),
            "correct": _array(prediction == y),
            "success": _array(success),
            "status": ["refuted" if lie else None for lie in (result.success & ~success).tolist()],
            "distance": _array(torch.where(success, distance, torch.inf)),
            "margin": _array(lead),
            "suspicion": None if score is None else _array(score),
            "forwards": _array(result.forwards),
            "backwards": _array(result.backwards),
            "first_success": _array(torch.where(success, result.first_success, -1)),
            "seconds": _share(start, part),
        }
        return cell.rows(part, _given(measured)), _examples(part, result.success, result.x_adv, result.parameters)

    return run


def certifier_method(subject: Subject, certifier: Certifier, threat: Threat) -> Method:
    """Return the method that certifies. A proof of a wrong prediction, and an estimate, are never `certified`."""

    def run(cell: Cell, part: Samples) -> Outcome:
        if certifier.smooths:
            raise CannotCertify(
                f"{cell.method} certifies the smoothed classifier around a net; {cell.defense} answers without noise: "
                "call the certifier directly, or evaluate a defense that answers by the vote"
            )
        if certifier.forgives:
            raise CannotCertify(
                f"{cell.method} forgives mistakes that cost nothing, so it proves no robust accuracy: call the "
                "certifier directly, and sum up with certify.cost_report"
            )
        x, y, start = subject.images(part.x), part.y.to(subject.device), time.perf_counter()
        with subject.seeded(cell.seed, part):
            found = certifier(
                subject.model,
                x,
                y,
                threat,
                indices=torch.from_numpy(part.indices),
                generator=torch.Generator().manual_seed(cell.seed),
            )
        right, guess = found.prediction == y, found.kind == "estimate"
        radius = found.estimate if guess and found.estimate is not None else found.radius
        measured = {
            "prediction": _array(found.prediction),
            "correct": _array(right),
            "certified": _array(found.certified & right & (not guess)),
            "status": [Status(code).name.lower() for code in found.status.tolist()],
            "radius": _array(radius.double()),
            "margin": None if found.margins is None else _array(found.margins.amin(dim=1).double()),
            "forwards": _array(found.samples),
            "seconds": _share(start, part),
            "certificate": [found.kind] * len(part),
            "confidence": np.full(len(part), float(found.confidence)),
        }
        return cell.rows(part, _given(measured)), None

    return run


def sparing(method: Method, subject: Subject, clean: pa.Table) -> Method:
    """Return an attack that spares itself samples which a deterministic model gets wrong from the start.

    They are successes at distance 0, as the attack itself would say; their example is the clean image.

    Args:
        method: the attack.
        subject: the model.
        clean: the clean rows of the unit.
    """
    columns = {name: clean.column(name).to_pylist() for name in ("index", "prediction", "label", "margin", "forwards")}
    rows = zip(*columns.values(), strict=True)
    answers = {index: (answer, lead, cost) for index, answer, label, lead, cost in rows if answer != label}

    def run(cell: Cell, part: Samples) -> Outcome:
        wrong = np.array([index in answers for index in part.indices.tolist()], dtype=bool) & (not subject.stochastic)
        guesses = torch.tensor([answers[i][0] if i in answers else -1 for i in part.indices.tolist()])
        spared = wrong & subject.achieved(guesses, part.y).numpy()
        if not spared.any():
            return method(cell, part)
        known = [answers[index] for index in part.indices[spared].tolist()]
        prediction, lead, cost = (list(column) for column in zip(*known, strict=True))
        always = {"correct": False, "success": True, "distance": 0.0, "backwards": 0, "seconds": 0.0}
        measured: dict[str, Any] = {name: [value] * len(known) for name, value in always.items()}
        measured |= {"prediction": prediction, "margin": lead, "forwards": cost, "first_success": cost}
        table = cell.rows(part.take(spared), measured)
        if spared.all():
            return table, None
        rest, examples = method(cell, part.take(~spared))
        return pa.concat_tables([table, rest]), examples

    return run


def _measured(threat: Threat, result: AttackResult, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return of what is called a success whether it lies in the threat, bool (B,), and how far, float64 (B,).

    An image must be the one that its parameters stand for. The rest is outside, infinitely far.
    """
    claimed = result.success.nonzero().flatten()
    threat = threat.take(claimed)
    x_adv, x = result.x_adv[claimed], x[claimed]
    point = x_adv if result.parameters is None else result.parameters[claimed]
    sound = threat.contains(point, x) & x_adv.flatten(1).isfinite().all(dim=1)
    if result.parameters is not None:
        sound &= (threat.apply(x, point) - x_adv).flatten(1).abs().amax(dim=1) <= 1e-5
    inside = torch.zeros_like(result.success).index_put((claimed,), sound)
    far = torch.full(inside.shape, torch.inf, dtype=torch.float64, device=x.device)
    return inside, far.index_put((claimed,), threat.distance(point, x).double())


def _examples(part: Samples, claimed: Tensor, x_adv: Tensor, parameters: Tensor | None) -> Examples:
    """Keep what the attack calls successes, refuted ones too: they are the audit's witnesses."""
    rows = claimed.nonzero().flatten()
    chosen = None if parameters is None else _array(parameters[rows])
    return Examples(part.indices[_array(rows)], _array(x_adv[rows]), chosen)


def _given(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if value is not None}


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy()


def _share(start: float, part: Samples) -> np.ndarray[Any, Any]:
    return np.full(len(part), (time.perf_counter() - start) / len(part))
