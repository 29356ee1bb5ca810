"""What the model itself says about stored rows: clean answers, and adversarial examples, asked again.

Each function yields (index, reason) of records that do not hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_lite.core.threats import Threat
from robustbench_lite.evaluation.examples import Examples
from robustbench_lite.evaluation.parts import Part
from robustbench_lite.evaluation.records import TIE
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.specs import build
from robustbench_lite.evaluation.subject import Subject

__all__ = ["attack_reasons", "clean_reasons"]

_DRAWS, _FEWEST = 80, 20  # a fair coin shows fewer than 20 heads in 80 once in 700,000 times
_LEAD = 1e-3  # what another device may make of a lead in logits, relative to 1 + its size


def clean_reasons(subject: Subject, samples: Samples, rows: pd.DataFrame) -> Iterator[tuple[int, str]]:
    """Ask a model about clean images again; a randomised one is only asked whether it answers."""
    x, y = subject.images(samples.x), samples.y.to(subject.device)
    with subject.seeded(int(rows["seed"].iloc[0])):
        prediction, lead = subject.answer(x, y)
    if subject.stochastic:
        return
    for index, old, new, margin in zip(
        rows["index"], rows["prediction"], prediction.tolist(), lead.tolist(), strict=True
    ):
        if old != new and abs(margin) > TIE:
            yield int(index), f"the model answers {new} on the clean image, the record says {old}"
    yield from _lead_reasons(rows, lead)


def _lead_reasons(rows: pd.DataFrame, lead: Tensor) -> Iterator[tuple[int, str]]:
    for index, old, new in zip(rows["index"], rows["margin"], lead.tolist(), strict=True):
        if not (old == new or abs(old - new) <= _LEAD * (1 + abs(new))):
            yield int(index), f"the true class leads by {new:.4g}, the record says {old:.4g}"


def attack_reasons(
    part: Part, examples: Examples | None, subject: Subject, samples: Samples, rows: pd.DataFrame
) -> Iterator[tuple[int, str]]:
    """Look at the examples of successes: in the threat, at the distance and with the lead on record, and wrong."""
    points, images, kept = _stored(part, examples, subject, samples, rows)
    threat: Threat = build(part.identity["threat"])
    x, y = subject.images(samples.x), samples.y.to(subject.device)
    with torch.no_grad(), subject.seeded(int(rows["seed"].iloc[0])):
        inside, distance = threat.contains(points, x), threat.distance(points, x)
        same = (threat.apply(x, points) - images).flatten(1).abs().amax(dim=1) <= 1e-5
        prediction, lead = subject.answer(images, y)
        once = subject.achieved(prediction, y) | ((lead.abs() <= TIE) & (not subject.decides))
        fooled = _often(subject, images, y) if subject.stochastic else once
    recorded = torch.tensor(rows["distance"].to_numpy(dtype=float), device=distance.device)
    verdicts = {
        "it has no stored example": torch.tensor(kept) | (recorded.cpu() == 0),
        "the example lies outside the threat": inside & images.flatten(1).isfinite().all(dim=1),
        "the example is not the image its parameters stand for": same,
        "the model is right on the example": fooled,
        "the example is at another distance than recorded": (distance - recorded).abs() <= 1e-6 * (1 + recorded),
    }
    for reason, holds in verdicts.items():
        for row in (~holds).nonzero().flatten().tolist():
            yield int(rows["index"].iloc[row]), reason
    if not subject.stochastic:
        clean = torch.tensor(kept) | (recorded.cpu() == 0)
        yield from _lead_reasons(rows[clean.numpy()], lead[clean.to(lead.device)])


def _often(subject: Subject, images: Tensor, y: Tensor) -> Tensor:
    """Say which images (B,) fool a randomised model about as often as it takes to count as fallen."""
    votes = [subject.achieved(subject.answer(images, y)[0], y) for _ in range(_DRAWS)]
    return torch.stack(votes).sum(dim=0) >= _FEWEST


def _stored(
    part: Part, examples: Examples | None, subject: Subject, samples: Samples, rows: pd.DataFrame
) -> tuple[Tensor, Tensor, list[bool]]:
    """Return points and images of these rows, and which are stored: a sample wrong from the start may keep none."""
    threat: Threat = build(part.identity["threat"])
    x = subject.images(samples.x)
    points, images = threat.origin(x).clone(), x.clone()
    places = {} if examples is None else {int(i): place for place, i in enumerate(examples.index)}
    kept = [int(index) in places for index in rows["index"]]
    mine = [row for row, here in enumerate(kept) if here]
    if examples is not None and mine:
        there = np.array([places[int(rows["index"].iloc[row])] for row in mine])
        images[mine] = subject.images(torch.from_numpy(examples.x_adv[there]))
        own = examples.x_adv if examples.parameters is None else examples.parameters
        points[mine] = subject.images(torch.from_numpy(own[there]))
    return points, images, kept
