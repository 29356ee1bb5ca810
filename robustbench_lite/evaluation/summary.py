"""The table: one row for each model and threat, derived from records alone.

Robust accuracy is the mean over samples of the minimum over attacks, never the minimum of means. A misclassified clean
image is broken. Accuracies are shares in [0, 1]; `<name>_low` and `<name>_high` are the ends of the exact 95 %
interval.

- `mode` is "full" where every attack has seen every sample, and "cascade" where proofs left nothing to attack. In a
  cascade an attack sees only what stands: its own column is then n/a (NaN), unless all it has not seen was
  misclassified from the start, and `worst_case` is the cumulative figure: what is proven stands, also where proofs left
  nothing to attack. It is n/a where neither attacks nor proofs say who stands.
- `certified` is the union of the deterministic certifiers, `certified_probabilistic` that of the probabilistic ones.
- `gap` is `worst_case - certified`: what neither attack nor proof has decided.
- `spared` is the share of the attacks' work that proofs made needless: of the samples that an attack was to meet
  (correct, and broken by no attack before it), those that it did not because they are proven; 0 where each saw all.
- `coverage` is the share of the clean images that a detector answers, `auc` the least area under the ROC curve, over
  attacks, of its score: for telling what an attack ended with, where the model is not right about that, from the clean
  images. Both are NaN of a model that rejects nothing.
- `timeouts` counts samples that a certifier gave up on and no other proved.
- an example that somebody handed in (`submission.py`) counts in `worst_case`; such rows exist for successes alone, so
  they make nothing incomplete.
- `incomplete` counts standing, unproven samples that some attack in the records has not seen, and those of the slice
  that have no clean answer (`unanswered.py`; they are not in `n`): 0 for a finished evaluation.
- `verdict` is "invalid" where the audit found a violation; "reliable" where it did not, every attack has seen what it
  should, the attacks were compared with each other (`evaluation/probe.py`) and no flag was raised; else "doubtful".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.audit import SAMPLE, audit
from robustbench_lite.evaluation.flags import non_finite
from robustbench_lite.evaluation.lines import Flags, Line, Mask, Names, Outcomes, Seen, titled, to_summary
from robustbench_lite.evaluation.records import SUBMITTED

__all__ = ["VERDICTS", "lines_of", "outcomes_of", "summarize"]

VERDICTS = ("invalid", "doubtful", "reliable")  # the worst first

_MODEL = ["dataset", "fingerprint", "seed", "precision"]
_ABSTAIN = -1  # core.models.ABSTAIN, which needs torch


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
    return to_summary(lines_of(records, threats), flags or {}, invalid).table


def lines_of(records: pd.DataFrame, threats: Iterable[tuple[str, float | None]] = ()) -> Iterator[Line]:
    """Yield the line of each model and threat."""
    return (_line(*group) for group in _groups(records, list(threats)))


def outcomes_of(records: pd.DataFrame, threats: Iterable[tuple[str, float | None]] = ()) -> list[Outcomes | None]:
    """Return the outcomes behind the rows of the table of these records, in their order."""
    return [line.outcomes for line in lines_of(records, threats)]


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
        key = dict(zip(_MODEL, model, strict=True))
        parts = {tuple(k): part for k, part in other.groupby(["threat", "eps"], sort=False, dropna=False)}
        wanted = list(dict.fromkeys([*threats, *parts])) or [(None, None)]
        for threat, eps in wanted:
            part = parts.get((threat, eps), other.iloc[:0])
            whole = (threat, eps) in threats or not len(part)
            seen = clean if whole else clean.merge(part[SAMPLE].drop_duplicates(), on=SAMPLE)
            if len(seen):
                yield key | {"threat": threat, "eps": eps}, seen, part


def _line(key: dict[str, Any], clean: pd.DataFrame, rows: pd.DataFrame) -> Line:
    places = clean[SAMPLE].assign(place=np.arange(len(clean)))
    placed = rows.merge(places, on=SAMPLE)
    names = Names(*(clean[name].to_numpy() for name in SAMPLE))
    broken = non_finite(pd.concat([clean, rows]) if len(rows) else clean) is not None
    correct = clean["correct"].to_numpy(dtype=bool)
    methods = {name: _seen(kind, part, len(clean)) for kind in _KINDS for name, part in _methods(placed, kind)}
    line = Line(key, str(clean["defense"].iloc[-1]), names, correct, methods, broken)
    scores = clean["suspicion"].to_numpy(dtype=float)
    if not np.isnan(scores).all():
        line.scores, line.accepted = scores, ~_true(clean["prediction"] == _ABSTAIN)
    return line


_KINDS = {"attack": "success", "certifier": "certified"}  # and the column that says whether they won


def _methods(rows: pd.DataFrame, kind: str) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each method, in order of appearance."""
    parts: Any = rows[rows["kind"] == kind].groupby(["method", "version"], sort=False)
    found = {(str(method), int(version)): part for (method, version), part in parts}
    titles = titled(found)
    return [(titles[key], part) for key, part in found.items()]


def _seen(kind: str, rows: pd.DataFrame, n: int) -> Seen:
    place, won = rows["place"].to_numpy(), _true(rows[_KINDS[kind]])
    seen = Seen(kind, _mask(place, n), _mask(place[won], n))
    if kind == "attack":
        seen.submitted = bool(_true(rows["status"] == SUBMITTED).all())
        scores = np.where(_true(rows["correct"]), np.nan, rows["suspicion"].to_numpy(dtype=float))
        if not np.isnan(scores).all():
            seen.scores = np.full(n, np.nan)
            seen.scores[place] = scores
        return seen
    kinds = rows["certificate"].to_numpy(dtype=object)
    seen.sure, seen.likely = (
        _mask(place[won & (kinds == name)], n) if (kinds == name).any() else None
        for name in ("deterministic", "probabilistic")
    )
    seen.late = _mask(place[_true(rows["status"] == "timeout")], n)
    return seen


def _true(column: pd.Series[Any]) -> Mask:
    return column.to_numpy(dtype=bool, na_value=False)


def _mask(places: np.ndarray[Any, Any], n: int) -> Mask:
    mask = np.zeros(n, dtype=bool)
    mask[places] = True
    return mask
