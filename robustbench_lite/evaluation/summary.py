"""The table: one row for each model and threat, derived from records alone.

Robust accuracy is the mean over samples of the minimum over attacks, never the minimum of means. A misclassified clean
image is broken. Accuracies are shares in [0, 1]; `<name>_low` and `<name>_high` are the ends of the exact 95 %
interval.

- `mode` is "full" where every attack has seen every sample. In a cascade an attack sees only what stands: its own
  column is then n/a (NaN), unless all it has not seen was misclassified from the start, and `worst_case` is the
  cumulative figure.
- `certified` is the union of the deterministic certifiers, `certified_probabilistic` that of the probabilistic ones.
- `gap` is `worst_case - certified`: what neither attack nor proof has decided.
- `spared` is the share of the attacks' work that proofs made needless: of the samples that an attack was to meet
  (correct, and broken by no attack before it), those that it did not because they are proven; 0 where each saw all.
- `timeouts` counts samples that a certifier gave up on and no other proved.
- `incomplete` counts standing, unproven samples that some attack in the records has not seen: 0 for a finished
  evaluation.
- `verdict` is "invalid" where the audit found a violation; "reliable" where it did not, every attack has seen what it
  should, the attacks were compared with each other (`evaluation/probe.py`) and no flag was raised; else "doubtful".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.audit import GROUP, SAMPLE, audit
from robustbench_lite.evaluation.flags import PROBED, non_finite
from robustbench_lite.evaluation.intervals import clopper_pearson

__all__ = ["VERDICTS", "summarize"]

Flags = Mapping[tuple[str, str], Iterable[Mapping[str, Any]]]

VERDICTS = ("invalid", "doubtful", "reliable")  # the worst first

_MODEL = ["dataset", "fingerprint", "seed", "precision"]
_Mask = np.ndarray[Any, np.dtype[np.bool_]]


def summarize(
    records: pd.DataFrame, flags: Flags | None = None, threats: Iterable[tuple[str, float | None]] = ()
) -> pd.DataFrame:
    """Return the table of these records.

    Args:
        records: what `Store.records()` or `Report.records` holds.
        flags: flags that records do not show, and notes of checks, by (fingerprint, dataset), as `Store.flags()` gives
            them.
        threats: (name, eps) of threats that get a row even where no method could say anything about them.

    Raises:
        ValueError: one index of a model's data stands for two samples.
    """
    _check_one_version(records)
    invalid = {group for violation in audit(records).violations for group in violation.groups}
    table: list[dict[str, Any]] = []
    attacks: list[str] = []
    certifiers: list[str] = []
    for key, clean, rows in _groups(records, list(threats)):
        notes = [note for note in (flags or {}).get((key["fingerprint"], key["dataset"]), ()) if _about(note, key)]
        raised = [note["id"] for note in notes if note.get("raised", True)]
        broken = non_finite(pd.concat([clean, rows]) if len(rows) else clean)
        raised += [broken.id] if broken else []
        row = _Row(clean, rows)
        attacks, certifiers = attacks + list(row.attacks), certifiers + list(row.certifiers)
        figures = row.figures()
        sound = not raised and bool(row.attacks) and figures["incomplete"] == 0
        verdict = "reliable" if sound and any(note["id"] == PROBED for note in notes) else "doubtful"
        verdict = "invalid" if tuple(key[name] for name in GROUP) in invalid else verdict
        name = str(clean["defense"].iloc[-1])
        head = {"dataset": key["dataset"], "defense": name, "fingerprint": key["fingerprint"], "threat": key["threat"]}
        head |= {"eps": key["eps"], "seed": key["seed"], "precision": key["precision"]}
        table.append(head | figures | {"verdict": verdict, "flags": ", ".join(dict.fromkeys(raised))})
    return _ordered(pd.DataFrame(table), attacks, certifiers)


def _about(note: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Say whether a note concerns a row: it names no threat, or the row's."""
    return not note.get("threat") or (note["threat"], note["eps"]) == (key["threat"], key["eps"])


def _check_one_version(records: pd.DataFrame) -> None:
    """Refuse a mix of two data sets of one name: their mean would be about neither."""
    samples = records[["dataset", "fingerprint", *SAMPLE]].drop_duplicates()
    twice = samples[samples.duplicated(["dataset", "fingerprint", "index"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"index {first['index']} of {first['dataset']} stands for two samples (the data have changed): summarize "
            "the records of each version alone; Store.records() keeps the newest"
        )


def _groups(
    records: pd.DataFrame, threats: list[tuple[str, float | None]]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Yield (key, clean rows of the samples concerned, other rows) of each row of the table."""
    for model, rows in records.groupby(_MODEL, sort=False):
        clean, other = rows[rows["kind"] == "clean"], rows[rows["kind"] != "clean"]
        if len(clean) == 0:
            continue
        key = dict(zip(_MODEL, model, strict=True))
        parts = {tuple(k): part for k, part in other.groupby(["threat", "eps"], sort=False, dropna=False)}
        wanted = list(dict.fromkeys([*threats, *parts])) or [(None, None)]
        for threat, eps in wanted:
            part = parts.get((threat, eps), other.iloc[:0])
            seen = clean.merge(part[SAMPLE].drop_duplicates(), on=SAMPLE) if len(part) else clean
            yield key | {"threat": threat, "eps": eps}, seen, part


class _Row:
    """One row of the table: masks over the samples of the clean rows."""

    def __init__(self, clean: pd.DataFrame, rows: pd.DataFrame) -> None:
        places = clean[SAMPLE].assign(place=np.arange(len(clean)))
        self.n = len(clean)
        self.correct: _Mask = clean["correct"].to_numpy(dtype=bool)
        self.rows = rows.merge(places, on=SAMPLE)
        self.attacks, self.certifiers = self._methods("attack"), self._methods("certifier")

    def figures(self) -> dict[str, Any]:
        """Return the columns that are measured."""
        standing = self._standing(self.rows[self.rows["kind"] == "attack"])
        worst = standing if self.attacks else None
        sure, likely = self._union("deterministic"), self._union("probabilistic")
        out: dict[str, Any] = {"n": self.n, "mode": self._mode()} | self._share("clean", self.correct)
        for name, rows in self.attacks.items():
            out |= self._share(name, self._standing(rows) if self._complete(rows, self.correct) else None)
        out |= self._share("worst_case", worst)
        for name, rows in self.certifiers.items():
            out |= self._share(name, self._proven(rows) if self._complete(rows) else None)
        out |= self._share("certified", sure) | self._share("certified_probabilistic", likely)
        out["gap"] = out["worst_case"] - out["certified"]  # NaN where either is
        proven = np.zeros(self.n, dtype=bool) if sure is None else sure
        out["spared"] = self._spared(self.correct & proven)
        out["timeouts"] = self._timeouts(sure, likely)
        out["incomplete"] = self._incomplete(standing & ~proven)
        return out

    def _methods(self, kind: str) -> dict[str, pd.DataFrame]:
        """Return the rows of each method, in order of appearance; a version is named where there are several."""
        found = self.rows[self.rows["kind"] == kind]
        several = found.groupby("method")["version"].nunique()
        parts: Any = found.groupby(["method", "version"], sort=False)
        return {str(m) if several[m] == 1 else f"{m} v{v}": rows for (m, v), rows in parts}

    def _mask(self, rows: pd.DataFrame) -> _Mask:
        mask = np.zeros(self.n, dtype=bool)
        mask[rows["place"].to_numpy()] = True
        return mask

    def _standing(self, rows: pd.DataFrame) -> _Mask:
        return self.correct & ~self._mask(rows[rows["success"].fillna(False).astype(bool)])

    def _proven(self, rows: pd.DataFrame) -> _Mask:
        return self._mask(rows[rows["certified"].fillna(False).astype(bool)])

    def _complete(self, rows: pd.DataFrame, needed: _Mask | None = None) -> bool:
        seen = self._mask(rows)
        return bool((seen if needed is None else seen[needed]).all())

    def _union(self, kind: str) -> _Mask | None:
        rows = self.rows[(self.rows["certificate"] == kind).fillna(False).astype(bool)]
        return self._proven(rows) if len(rows) else None

    def _spared(self, proven: _Mask) -> float:
        seen = [self._mask(rows) & self.correct for rows in self.attacks.values()]
        spared = sum(int((proven & ~mask).sum()) for mask in seen)
        return spared / max(1, spared + sum(int(mask.sum()) for mask in seen))

    def _incomplete(self, open_: _Mask) -> int:
        unseen = np.zeros(self.n, dtype=bool)
        for rows in self.attacks.values():
            unseen |= open_ & ~self._mask(rows)
        return int(unseen.sum())

    def _timeouts(self, sure: _Mask | None, likely: _Mask | None) -> int:
        late = self._mask(self.rows[(self.rows["status"] == "timeout").fillna(False)])
        for proven in (sure, likely):
            late &= True if proven is None else ~proven
        return int(late.sum())

    def _mode(self) -> str:
        return "full" if all(self._complete(rows) for rows in self.attacks.values()) else "cascade"

    def _share(self, name: str, mask: _Mask | None) -> dict[str, float]:
        if mask is None:
            return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
        low, high = clopper_pearson(int(mask.sum()), self.n)
        return {name: mask.sum() / self.n, f"{name}_low": low, f"{name}_high": high}


_FIRST = ["dataset", "defense", "fingerprint", "threat", "eps", "seed", "precision", "n", "mode", "clean"]
_LAST = ["certified", "certified_probabilistic", "gap", "spared", "timeouts", "incomplete", "verdict", "flags"]


def _ordered(table: pd.DataFrame, attacks: list[str], certifiers: list[str]) -> pd.DataFrame:
    """Put the columns in one order: who, clean, attacks, worst case, proofs, verdict."""
    names = dict.fromkeys([*_FIRST, *attacks, "worst_case", *certifiers, *_LAST])
    return table[[name + end for name in names for end in ("", "_low", "_high") if name + end in table.columns]]
