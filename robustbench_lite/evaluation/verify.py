"""Verification of a store from scratch, with nothing but the models and the hash-checked images.

For every stored adversarial example: the clean image has the hash it had, the threat is rebuilt from its spec, the
example lies in it at the distance on record, and the model, asked again, is wrong there. Clean answers are asked
again too, the audit is repeated, and the table is derived anew. Certificates are audited against all examples but not
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_lite.core.models import Model
from robustbench_lite.core.threats import Threat
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation.audit import Contradiction, audit
from robustbench_lite.evaluation.records import TIE
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.specs import build
from robustbench_lite.evaluation.store import Part, Store
from robustbench_lite.evaluation.subject import Subject
from robustbench_lite.evaluation.summary import summarize

__all__ = ["Mismatch", "Verification", "verify"]

Models = Mapping[str, Model] | Callable[[str], Model | None]
Data = Dataset | Mapping[str, Dataset] | Callable[[str], Dataset | None]
_BATCH = 500


@dataclass(frozen=True)
class Mismatch:
    """A record that does not hold: the cell's file, the sample, and what is wrong with it."""

    file: str
    index: int
    reason: str


@dataclass(eq=False)
class Verification:
    """What verification found.

    Attributes:
        examples: adversarial examples checked.
        clean: clean answers checked.
        mismatches: records that do not hold.
        skipped: what could not be checked, and why.
        violations: what the audit of all records objects to.
        warnings: damaged files.
        table: the table, derived anew.
    """

    examples: int = 0
    clean: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    violations: list[Contradiction] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def ok(self) -> bool:
        """Whether all was checked and holds."""
        return not (self.mismatches or self.skipped or self.violations or self.warnings)


def verify(store: Store | str, models: Models, data: Data, *, device: str = "auto") -> Verification:
    """Check every example and clean answer of a store.

    Args:
        store: the store, or its folder.
        models: the models by fingerprint, or a function from fingerprint to model (None: not at hand).
        data: the data sets by the name in the records, a function from that name, or the only one.
        device: as in `evaluate`.

    Raises:
        StoreError: there is no such store, or a newer version of this package has written it.
    """
    opened = store if isinstance(store, Store) else Store(store)
    found, subjects, samples = Verification(), _Subjects(models, device), _Data(data)
    records, everything = opened.records(), opened.records(all_versions=True)
    for part in opened.parts():
        if part.identity["kind"] == "certifier":
            continue
        reason = samples.missing(part) or subjects.missing(part)
        if reason:
            found.skipped.append(f"{part.path.relative_to(opened.root)}: {reason}")
            continue
        _check_part(opened, part, subjects, samples, found)
    found.violations = audit(everything).violations
    found.warnings = list(opened.warnings)
    found.table = summarize(records, opened.flags())
    return found


class _Data:
    """The samples that records speak of."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._known: dict[str, tuple[Samples, dict[int, int]] | None] = {}

    def missing(self, part: Part) -> str | None:
        name = part.identity["dataset"]
        return None if self.of(name) else f"the data {name!r} is not at hand"

    def of(self, name: str) -> tuple[Samples, dict[int, int]] | None:
        """Return samples and the position of each dataset index."""
        if name not in self._known:
            found = _resolve(self._data, name)
            samples = None if found is None else as_samples(found, (-np.inf, np.inf))
            places = {} if samples is None else {int(index): i for i, index in enumerate(samples.indices)}
            self._known[name] = None if samples is None else (samples, places)
        return self._known[name]


class _Subjects:
    """The models that records speak of; the last one is kept."""

    def __init__(self, models: Models, device: str) -> None:
        self._models, self._device = models, device
        self._last: tuple[tuple[str, str], Subject | str] | None = None

    def missing(self, part: Part) -> str | None:
        found = self._of(part)
        return found if isinstance(found, str) else None

    def of(self, part: Part) -> Subject:
        found = self._of(part)
        if isinstance(found, str):
            raise LookupError(found)
        return found

    def _of(self, part: Part) -> Subject | str:
        key = (part.identity["fingerprint"], part.identity["precision"])
        if self._last is None or self._last[0] != key:
            self._last = (key, self._make(*key, part.defense))
        return self._last[1]

    def _make(self, fingerprint: str, precision: str, defense: str) -> Subject | str:
        model = _resolve(self._models, fingerprint)
        if model is None:
            return f"the model {defense} ({fingerprint}) is not at hand"
        subject = Subject.of(model, defense, self._device, precision)
        if subject.fingerprint != fingerprint:
            return f"the model given as {defense} has the fingerprint {subject.fingerprint}, not {fingerprint}"
        return subject


def _resolve(source: Any, name: str) -> Any:
    if isinstance(source, Dataset):
        return source if name in (source.name, f"{source.name}/{source.split}") else None
    return source(name) if callable(source) else source.get(name)


def _check_part(store: Store, part: Part, subjects: _Subjects, data: _Data, found: Verification) -> None:
    rows, subject, known = store.file_records(part), subjects.of(part), data.of(part.identity["dataset"])
    if rows is None or known is None:
        return
    samples, places = known
    rows = rows[rows["success"].fillna(False).astype(bool)] if part.identity["kind"] == "attack" else rows
    wrong = {
        int(i) for i, h in zip(rows["index"], rows["sample_hash"], strict=True) if _hash(samples, places, int(i)) != h
    }
    name = str(part.path.relative_to(store.root))
    found.mismatches += [Mismatch(name, i, "the image does not have the hash on record") for i in sorted(wrong)]
    rows = rows[~rows["index"].isin(wrong)]
    other = {int(i) for i, y in zip(rows["index"], rows["label"], strict=True) if samples.targets[places[int(i)]] != y}
    found.mismatches += [Mismatch(name, i, "the label is not the one on record") for i in sorted(other)]
    rows = rows[~rows["index"].isin(other)]
    for start in range(0, len(rows), _BATCH):
        batch = rows.iloc[start : start + _BATCH]
        chosen = samples.take(np.array([places[int(i)] for i in batch["index"]], dtype=np.int64))
        if part.identity["kind"] == "clean":
            reasons = _clean_reasons(subject, chosen, batch)
            found.clean += len(batch)
        else:
            reasons = _attack_reasons(store, part, subject, chosen, batch)
            found.examples += len(batch)
        found.mismatches += [Mismatch(name, index, reason) for index, reason in reasons]


def _hash(samples: Samples, places: dict[int, int], index: int) -> str | None:
    return samples.hashes[places[index]] if index in places else None


def _clean_reasons(subject: Subject, samples: Samples, rows: pd.DataFrame) -> Iterator[tuple[int, str]]:
    x, y = subject.images(samples.x), samples.y.to(subject.device)
    with subject.seeded(int(rows["seed"].iloc[0])):
        prediction, lead = subject.answer(x, y)
    for index, old, new, margin in zip(
        rows["index"], rows["prediction"], prediction.tolist(), lead.tolist(), strict=True
    ):
        if old != new and abs(margin) > TIE and not subject.stochastic:
            yield int(index), f"the model answers {new} on the clean image, the record says {old}"


def _attack_reasons(
    store: Store, part: Part, subject: Subject, samples: Samples, rows: pd.DataFrame
) -> Iterator[tuple[int, str]]:
    points, images, kept = _stored(store, part, subject, samples, rows)
    threat: Threat = build(part.identity["threat"])
    x, y = subject.images(samples.x), samples.y.to(subject.device)
    with torch.no_grad(), subject.seeded(int(rows["seed"].iloc[0])):
        inside, distance = threat.contains(points, x), threat.distance(points, x)
        same = (threat.apply(x, points) - images).flatten(1).abs().amax(dim=1) <= 1e-5
        prediction, lead = subject.answer(images, y)
    fooled = subject.achieved(prediction, y) | subject.stochastic | ((lead.abs() <= TIE) & (not subject.decides))
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


def _stored(
    store: Store, part: Part, subject: Subject, samples: Samples, rows: pd.DataFrame
) -> tuple[Tensor, Tensor, list[bool]]:
    """Return points and images of these rows, and which are stored: a sample wrong from the start may keep none."""
    threat: Threat = build(part.identity["threat"])
    x, examples = subject.images(samples.x), store.examples_of(part.path)
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
