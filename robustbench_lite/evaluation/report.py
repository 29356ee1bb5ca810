"""The report of one evaluation: records, table, flags, verdict. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from robustbench_lite.evaluation.audit import Contradiction
from robustbench_lite.evaluation.flags import Flag
from robustbench_lite.evaluation.records import KINDS
from robustbench_lite.evaluation.summary import VERDICTS, summarize
from robustbench_lite.evaluation.unfinished import Unfinished

__all__ = ["NotApplicable", "Report"]


@dataclass(frozen=True)
class NotApplicable:
    """A method that has nothing to say about a threat, or about this model under it: n/a in the table, never 0.

    Attributes:
        threat: the threat's name.
        eps: its budget.
        kind: "attack" or "certifier".
        method: the method's name in tables.
        reason: why not.
    """

    threat: str
    eps: float | None
    kind: str
    method: str
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate` returns.

    Attributes:
        records: one row for each sample and method (`evaluation/records.py` documents the columns).
        threats: (name, eps) of the threats that were judged, each alone.
        notes: reasons to doubt the result, and checks that were made.
        violations: contradictions between attack and proof; one is enough to make the verdict "invalid".
        findings: contradictions that chance, rounding or a heuristic explains.
        not_applicable: methods that do not support a threat, certifiers that cannot bound the model; with the reason.
        warnings: what was damaged in the store, and computed again.
        unsaved: cells that could not be written, with the system's reason.
        unfinished: methods without rows about some samples: cut off, not run, failed. Each raises a flag.
        remarks: what was done otherwise than asked, in words: batches that did not fit in memory.
    """

    records: pd.DataFrame
    threats: list[tuple[str, float | None]]
    notes: list[Flag]
    violations: list[Contradiction]
    findings: list[Contradiction]
    not_applicable: list[NotApplicable] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unsaved: list[str] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def flags(self) -> list[Flag]:
        """The reasons to doubt the result."""
        return [note for note in self.notes if note.raised]

    @property
    def verdict(self) -> str:
        """The worst verdict of the table's rows: "invalid", "doubtful" or "reliable" (`evaluation/summary.py`)."""
        found = set(self.summary()["verdict"])
        return next(verdict for verdict in VERDICTS if verdict in found)

    @property
    def elsewhere(self) -> dict[tuple[str, float | None], set[str]]:
        """By threat, the methods that do not apply under it, but do under another one of this evaluation."""
        names = dict.fromkeys(self.threats)
        silent = {
            name: {part.method for part in self.not_applicable if (part.threat, part.eps) == name} for name in names
        }
        nowhere = set.intersection(*silent.values()) if silent else set()
        return {name: methods - nowhere for name, methods in silent.items()}

    def summary(self) -> pd.DataFrame:
        """Return the table: one row for each threat.

        A method that is not applicable, or has not run, has a column of NaN. The column `unfinished` names the methods
        that were cut off, not run or failed; a sample that such an attack has not seen makes a row `incomplete`.
        """
        first = self.records.iloc[0]
        kept = {(str(first["fingerprint"]), str(first["dataset"])): [asdict(note) for note in self.notes]}
        table = summarize(self.records, kept, self.threats)
        methods = [part.method for part in self.not_applicable]
        methods += [part.method for part in self.unfinished if part.kind in KINDS]
        missing = dict.fromkeys(method for method in methods if method not in table.columns)
        for column in [name + end for name in missing for end in ("", "_low", "_high")]:
            table.insert(list(table.columns).index("verdict"), column, float("nan"))
        left = [self._open(row) for _, row in table.iterrows()]
        table.insert(list(table.columns).index("verdict"), "unfinished", left)
        table["incomplete"] = [self._incomplete(row) for _, row in table.iterrows()]
        return table

    def _of(self, row: pd.Series[Any]) -> list[Unfinished]:
        return [part for part in self.unfinished if part.threat is None or part.names == (row["threat"], row["eps"])]

    def _open(self, row: pd.Series[Any]) -> str:
        return "; ".join(dict.fromkeys(f"{part.method}: {part.words}" for part in self._of(row)))

    def _incomplete(self, row: pd.Series[Any]) -> int:
        """Return how many samples stand unproven that some attack has not seen, one without any row included."""
        ran = self.records[(self.records["threat"] == row["threat"]) & (self.records["eps"] == row["eps"])]
        unanswered = sum(part.samples for part in self._of(row) if part.kind == "clean")
        never = {part.method for part in self._of(row) if part.kind == "attack"} - set(ran["method"])
        if not never:
            return int(row["incomplete"]) + unanswered
        standing = row["clean"] if pd.isna(row["worst_case"]) else row["worst_case"]
        proven = 0.0 if pd.isna(row["certified"]) else row["certified"]
        return round(float(standing - proven) * int(row["n"])) + unanswered
