"""Which samples an evaluation brought down."""

from __future__ import annotations

from robustbench_lite.evaluation import Report


def fallen(report: Report) -> set[int]:
    """Return the indices of the samples that an attack brought down, or whose clean answer is wrong.

    Raises:
        RuntimeError: the audit found a contradiction between attack and proof.
    """
    if report.violations:
        raise RuntimeError(f"the audit found contradictions: {report.violations}")
    rows = report.records
    wrong = (rows["kind"] == "clean") & ~rows["correct"].fillna(False)
    return set(rows[wrong | ((rows["kind"] == "attack") & rows["success"].fillna(False))]["index"])
