"""The report of one evaluation: records, table, flags, verdict. Importing it does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import pandas as pd

from robustbench_lite.evaluation.audit import Contradiction
from robustbench_lite.evaluation.flags import Flag
from robustbench_lite.evaluation.summary import VERDICTS, summarize

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
    """

    records: pd.DataFrame
    threats: list[tuple[str, float | None]]
    notes: list[Flag]
    violations: list[Contradiction]
    findings: list[Contradiction]
    not_applicable: list[NotApplicable] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unsaved: list[str] = field(default_factory=list)

    @property
    def flags(self) -> list[Flag]:
        """The reasons to doubt the result."""
        return [note for note in self.notes if note.raised]

    @property
    def verdict(self) -> str:
        """The worst verdict of the table's rows: "invalid", "doubtful" or "reliable" (`evaluation/summary.py`)."""
        found = set(self.summary()["verdict"])
        return next(verdict for verdict in VERDICTS if verdict in found)

    def summary(self) -> pd.DataFrame:
        """Return the table: one row for each threat; a method that is not applicable has a column of NaN."""
        first = self.records.iloc[0]
        kept = {(str(first["fingerprint"]), str(first["dataset"])): [asdict(note) for note in self.notes]}
        table = summarize(self.records, kept, self.threats)
        missing = dict.fromkeys(n.method for n in self.not_applicable if n.method not in table.columns)
        for column in [name + end for name in missing for end in ("", "_low", "_high")]:
            table.insert(list(table.columns).index("verdict"), column, float("nan"))
        return table
