"""Lines: one row of the table as masks over its samples, from which every figure of it follows.

`summary` makes lines of a frame of records, `scan` of the columns of a store; the figures are computed here alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.audit import GROUP
from robustbench_lite.evaluation.detection import area_under_curve
from robustbench_lite.evaluation.intervals import clopper_pearson
from robustbench_lite.evaluation.notes import concerns, speaks_for
from robustbench_lite.evaluation.unanswered import unanswered_under

__all__ = ["Flags", "Line", "Mask", "Names", "Outcomes", "Scores", "Seen", "Summary", "titled", "to_summary"]

Flags = Mapping[tuple[str, str], Iterable[Mapping[str, Any]]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Scores = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Names:
    """The samples of a line: index int64 (n,), image hash and label of each; equal lines may share one object."""

    index: np.ndarray[Any, Any]
    sample_hash: np.ndarray[Any, Any]
    label: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What became of each sample of a line: it still stands under the worst of all attacks, bool (n,)."""

    names: Names
    standing: Mask


@dataclass(eq=False)
class Seen:
    """What one method said about the samples of a line.

    Attributes:
        kind: "attack" or "certifier".
        seen: bool (n,), whom it was asked about.
        won: the attack succeeded, or the certifier proved.
        sure: proven by a deterministic certificate; None where it gave none.
        likely: the same of probabilistic ones.
        late: the certifier ran out of time.
        submitted: the rows are examples that somebody handed in: there are none of failures.
        scores: a detector's scores (n,) of what an attack ended with, NaN where the model is right about that; None of
            a model that is no detector.
    """

    kind: str
    seen: Mask
    won: Mask
    sure: Mask | None = None
    likely: Mask | None = None
    late: Mask | None = None
    submitted: bool = False
    scores: Scores | None = None


@dataclass(eq=False)
class Line:
    """One row of the table.

    Attributes:
        key: dataset, fingerprint, seed, precision, threat and eps.
        defense: what the table calls the model.
        names: the samples.
        correct: bool (n,), the model is right on the clean image.
        methods: what each method said, by its name, in the order of columns.
        non_finite: whether the model ever answered with NaN or infinity.
        accepted: bool (n,), a detector answers the clean image; None of a model that is no detector.
        scores: its scores (n,) of the clean images.
    """

    key: dict[str, Any]
    defense: str
    names: Names
    correct: Mask
    methods: dict[str, Seen] = field(default_factory=dict)
    non_finite: bool = False
    accepted: Mask | None = None
    scores: Scores | None = None

    @property
    def n(self) -> int:
        """How many samples."""
        return len(self.names)

    @property
    def group(self) -> tuple[Any, ...]:
        """The line's name in the audit."""
        return tuple(self.key[name] for name in GROUP)

    def of(self, kind: str) -> dict[str, Seen]:
        """Return the methods of a kind."""
        return {name: seen for name, seen in self.methods.items() if seen.kind == kind}

    @property
    def attacks(self) -> dict[str, Seen]:
        """The attacks that ran: they have a row for each sample they were asked about."""
        return {name: seen for name, seen in self.of("attack").items() if not seen.submitted}

    @property
    def standing(self) -> Mask:
        """Bool (n,): right on the clean image, and broken by no attack."""
        fallen = [seen.won for seen in self.of("attack").values()]
        return self.correct & ~_any(fallen, self.n)

    @property
    def outcomes(self) -> Outcomes | None:
        """What became of each sample; None where that is not known."""
        return Outcomes(self.names, self.standing) if self.judged else None

    @property
    def proven(self) -> Mask | None:
        """Bool (n,): a deterministic certificate covers it; None where no certifier gives one."""
        return _union([seen.sure for seen in self.methods.values()])

    @property
    def judged(self) -> bool:
        """Whether it is known who stands: something was attacked, or proofs leave nothing to attack."""
        proven = self.proven
        return bool(self.of("attack")) or (proven is not None and not (self.correct & ~proven).any())

    @property
    def outsiders(self) -> Mask:
        """Bool (n,): submitted examples broke what every attack left standing."""
        attacked = self.correct & ~_any([seen.won for seen in self.attacks.values()], self.n)
        return attacked & ~self.standing

    def figures(self) -> dict[str, Any]:
        """Return the columns that are measured."""
        standing, attacks = self.standing, self.of("attack")
        sure = self.proven
        likely = _union([seen.likely for seen in self.methods.values()])
        out: dict[str, Any] = {"n": self.n, "mode": self._mode()} | self._share("clean", self.correct)
        for name, seen in attacks.items():
            whole = seen.submitted or bool(seen.seen[self.correct].all())
            out |= self._share(name, self.correct & ~seen.won if whole else None)
        out |= self._share("worst_case", standing if self.judged else None)
        for name, seen in self.of("certifier").items():
            out |= self._share(name, seen.won if seen.seen.all() else None)
        out |= self._share("certified", sure) | self._share("certified_probabilistic", likely)
        out["gap"] = out["worst_case"] - out["certified"]  # NaN where either is
        proven = np.zeros(self.n, dtype=bool) if sure is None else sure
        out["spared"] = self._spared(self.correct & proven)
        out["coverage"] = np.nan if self.accepted is None else self.accepted.mean()
        out["auc"] = self._auc()
        out["timeouts"] = self._timeouts(sure, likely)
        out["incomplete"] = int((standing & ~proven & ~self._seen_by_all()).sum())
        return out

    def _seen_by_all(self) -> Mask:
        return ~_any([~seen.seen for seen in self.attacks.values()], self.n)

    def _spared(self, proven: Mask) -> float:
        masks = [seen.seen & self.correct for seen in self.attacks.values()]
        spared = sum(int((proven & ~mask).sum()) for mask in masks)
        return spared / max(1, spared + sum(int(mask.sum()) for mask in masks))

    def _auc(self) -> float:
        """Return the least area under the ROC curve over attacks: clean images against what each ended with."""
        if self.scores is None:
            return np.nan
        clean = self.scores[~np.isnan(self.scores)]
        ended = [seen.scores[~np.isnan(seen.scores)] for seen in self.attacks.values() if seen.scores is not None]
        return min((area_under_curve(clean, scores) for scores in ended), default=np.nan)

    def _timeouts(self, sure: Mask | None, likely: Mask | None) -> int:
        late = _any([seen.late for seen in self.methods.values() if seen.late is not None], self.n)
        for proven in (sure, likely):
            late &= True if proven is None else ~proven
        return int(late.sum())

    def _mode(self) -> str:
        spared = self.judged and not self.of("attack")  # proofs left nothing to attack
        return "full" if not spared and all(seen.seen.all() for seen in self.attacks.values()) else "cascade"

    def _share(self, name: str, mask: Mask | None) -> dict[str, float]:
        if mask is None:
            return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
        low, high = clopper_pearson(int(mask.sum()), self.n)
        return {name: mask.sum() / self.n, f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True, eq=False)
class Summary:
    """The table, and what lies behind each of its rows.

    Attributes:
        table: one row for each model and threat (`evaluation/summary.py` documents the columns).
        outcomes: of each row, in the same order; None where who stands is not known.
        elsewhere: by name and budget of a threat, the columns of methods that are meant for other threats alone.
    """

    table: pd.DataFrame
    outcomes: list[Outcomes | None]
    elsewhere: Mapping[tuple[str, float | None], set[str]] = field(default_factory=dict, kw_only=True)


def titled(methods: Iterable[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Return the column of each (method, version): the version is named where there are several."""
    pairs = list(dict.fromkeys(methods))
    versions: dict[str, int] = {}
    for method, _ in pairs:
        versions[method] = versions.get(method, 0) + 1
    return {(m, v): m if versions[m] == 1 else f"{m} v{v}" for m, v in pairs}


def to_summary(lines: Iterable[Line], flags: Flags, invalid: set[tuple[Any, ...]]) -> Summary:
    """Return the table of these lines.

    Args:
        lines: in their order.
        flags: flags that records do not show, and notes of checks, by (fingerprint, dataset).
        invalid: the groups (`audit.GROUP`) that the audit found a violation in.
    """
    table: list[dict[str, Any]] = []
    outcomes: list[Outcomes | None] = []
    attacks: dict[str, None] = {}
    certifiers: dict[str, None] = {}
    for line in lines:
        key, figures = line.key, line.figures()
        notes = [note for note in flags.get((key["fingerprint"], key["dataset"]), ()) if concerns(note, key)]
        figures["incomplete"] += unanswered_under(notes, key)
        raised = [note["id"] for note in notes if note.get("raised", True)] + ["non_finite"] * line.non_finite
        raised += ["submitted_beats_attacks"] * bool(line.outsiders.any())
        sound = not raised and bool(line.attacks) and figures["incomplete"] == 0
        verdict = "reliable" if sound and any(speaks_for(note, line.n) for note in notes) else "doubtful"
        verdict = "invalid" if line.group in invalid else verdict
        head = {"dataset": key["dataset"], "defense": line.defense, "fingerprint": key["fingerprint"]}
        head |= {name: key[name] for name in ("threat", "eps", "seed", "precision")}
        table.append(head | figures | {"verdict": verdict, "flags": ", ".join(dict.fromkeys(raised))})
        outcomes.append(line.outcomes)
        attacks |= dict.fromkeys(line.of("attack"))
        certifiers |= dict.fromkeys(line.of("certifier"))
    return Summary(_ordered(pd.DataFrame(table), attacks, certifiers), outcomes)


def _any(masks: list[Mask], n: int) -> Mask:
    union: Mask = np.logical_or.reduce([np.zeros(n, dtype=bool), *masks])
    return union


def _union(masks: list[Mask | None]) -> Mask | None:
    given = [mask for mask in masks if mask is not None]
    union: Mask | None = np.logical_or.reduce(given) if given else None
    return union


_FIRST = ["dataset", "defense", "fingerprint", "threat", "eps", "seed", "precision", "n", "mode", "clean"]
_LAST = ["certified", "certified_probabilistic", "gap", "spared", "coverage", "auc", "timeouts", "incomplete"]
_LAST += ["verdict", "flags"]


def _ordered(table: pd.DataFrame, attacks: Iterable[str], certifiers: Iterable[str]) -> pd.DataFrame:
    """Put the columns in one order: who, clean, attacks, worst case, proofs, verdict."""
    names = dict.fromkeys([*_FIRST, *attacks, "worst_case", *certifiers, *_LAST])
    return table[[name + end for name in names for end in ("", "_low", "_high") if name + end in table.columns]]
