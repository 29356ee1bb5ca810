"""Verification of a store from scratch, with nothing but the models and the hash-checked images.

For every stored adversarial example: the clean image has the hash it had, the threat is rebuilt from its spec, the
example lies in it at the distance on record, and the model, asked again, is wrong there by the lead on record (a
randomised one in most of 80 fresh draws, with some leeway for chance). Clean answers are asked again too. Every record
must agree with its cell, with itself and with the examples (`consistency`). The audit is repeated, and the table is
derived anew. Certificates are audited against all examples, but not computed again; that an attack has failed is not
proven by attacking again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robustbench_lite.core.models import Model
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation.audit import Contradiction
from robustbench_lite.evaluation.consistency import against_cell, against_examples, against_themselves
from robustbench_lite.evaluation.examples import Examples
from robustbench_lite.evaluation.lines import Summary
from robustbench_lite.evaluation.parts import Part
from robustbench_lite.evaluation.recheck import attack_reasons, clean_reasons
from robustbench_lite.evaluation.samples import Samples, as_samples
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.evaluation.store import Store
from robustbench_lite.evaluation.subject import Subject

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
        records: records of all kinds looked at.
        mismatches: records that do not hold.
        skipped: what could not be checked, and why.
        violations: what the audit of all records objects to.
        warnings: damaged files.
        summary: the table, derived anew, with the outcomes behind its rows.
    """

    examples: int = 0
    clean: int = 0
    records: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    violations: list[Contradiction] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: Summary = field(default_factory=lambda: Summary(pd.DataFrame(), []))

    @property
    def table(self) -> pd.DataFrame:
        """The table, derived anew."""
        return self.summary.table

    @property
    def ok(self) -> bool:
        """Whether all was checked and holds."""
        return not (self.mismatches or self.skipped or self.violations or self.warnings)


def verify(store: Store | str, models: Models, data: Data, *, device: str = "auto") -> Verification:
    """Check every record, example and clean answer of a store.

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
    done: set[Path] = set()
    gone = True
    while gone:  # files that others merge meanwhile are met again in the merged one
        gone = False
        for part in [part for part in opened.parts() if part.path not in done]:
            done.add(part.path)
            own = _part(opened, part, subjects, samples)
            gone |= own is None
            _add(found, own or Verification())
    whole = scan(opened)
    found.summary, found.violations, found.warnings = whole, whole.violations, list(opened.warnings)
    return found


def _add(found: Verification, own: Verification) -> None:
    found.examples, found.clean = found.examples + own.examples, found.clean + own.clean
    found.records += own.records
    found.mismatches += own.mismatches
    found.skipped += own.skipped


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


def _part(store: Store, part: Part, subjects: _Subjects, data: _Data) -> Verification | None:
    """Check one file; None where it has been merged with others meanwhile."""
    name = str(part.path.relative_to(store.root))
    try:
        rows = store.file_records(part)
    except FileNotFoundError:
        return None
    examples = store.examples_of(part.path)
    if not part.path.exists():
        return None
    found = Verification()
    if rows is None:
        return found
    found.records, kind = len(rows), part.identity["kind"]
    reasons = [*against_cell(part, rows), *against_themselves(kind, rows)]
    reasons += against_examples(rows, examples) if kind == "attack" else []
    missing = data.missing(part) or (subjects.missing(part) if kind != "certifier" else None)
    if missing:
        found.skipped.append(f"{name}: {missing}")
    else:
        reasons += _against_data(part, rows, examples, subjects, data, found)
    found.mismatches = [Mismatch(name, index, reason) for index, reason in reasons]
    return found


def _against_data(
    part: Part, rows: pd.DataFrame, examples: Examples | None, subjects: _Subjects, data: _Data, found: Verification
) -> Iterator[tuple[int, str]]:
    """Compare records with images and model, and count what was asked again."""
    samples, places = data.of(part.identity["dataset"]) or (None, {})
    if samples is None:
        return
    hashes = zip(rows["index"], rows["sample_hash"], strict=True)
    known = np.array([_hash(samples, places, int(i)) == h for i, h in hashes], dtype=bool)
    for index in rows.loc[~known, "index"]:
        yield int(index), "the image does not have the hash on record"
    rows = rows[known]
    labels = zip(rows["index"], rows["label"], strict=True)
    same = np.array([samples.targets[places[int(i)]] == y for i, y in labels], dtype=bool)
    for index in rows.loc[~same, "index"]:
        yield int(index), "the label is not the one on record"
    rows, kind = rows[same], part.identity["kind"]
    if kind == "certifier":
        return
    rows = rows[rows["success"].fillna(False).astype(bool)] if kind == "attack" else rows
    subject = subjects.of(part)
    for start in range(0, len(rows), _BATCH):
        batch = rows.iloc[start : start + _BATCH]
        chosen = samples.take(np.array([places[int(i)] for i in batch["index"]], dtype=np.int64))
        if kind == "clean":
            found.clean += len(batch)
            yield from clean_reasons(subject, chosen, batch)
        else:
            found.examples += len(batch)
            yield from attack_reasons(part, examples, subject, chosen, batch)


def _hash(samples: Samples, places: dict[int, int], index: int) -> str | None:
    return samples.hashes[places[index]] if index in places else None
