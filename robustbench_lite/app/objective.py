"""What a job of a sweep answers to a sweeper that searches, and the best that it found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from robustbench_lite.app import receipts, sweeps
from robustbench_lite.evaluation.report import Report

__all__ = ["OBJECTIVES", "check_objective", "search_in_words", "value_of"]

OBJECTIVES = ("worst_case", "clean", "certified", "gap")  # columns of a summary; worst_case is the robust accuracy
_RESULTS = "optimization_results.yaml"  # which Hydra's sweepers that search leave in the folder of the sweep


def check_objective(name: str | None) -> None:
    """Refuse an objective that no summary has.

    Raises:
        ValueError: it is not one of `OBJECTIVES`.
    """
    if name not in (None, *OBJECTIVES):
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")


def value_of(report: Report, name: str) -> float:
    """Return a share in [0, 1] from a report: of several threats that of the first, the job's own.

    Raises:
        ValueError: the report has no such figure.
    """
    value = float(report.summary().iloc[0].get(name, math.nan))
    if math.isnan(value):
        raise ValueError(f"there is no {name} to answer the sweeper: no method of the suite gave it")
    return value


def search_in_words(folder: Path, store: Path, name: str | None) -> list[str]:
    """Return the trials of a search as lines, in order of their value, and last what the sweeper calls best.

    Args:
        folder: of the sweep.
        store: holds the rows.
        name: of the objective; None: nothing was searched, and there are no lines.
    """
    if name is None:
        return []
    outcomes = sweeps.outcomes(folder)
    ended = [(end, receipts.report_of(receipt, store)) for end, receipt in outcomes if receipt]
    common = set.intersection(*(set(end.overrides) for end, _ in outcomes)) if len(outcomes) > 1 else set()
    trials = [
        (value_of(report, name), " ".join(text for text in end.overrides if text not in common))
        for end, report in ended
        if report is not None
    ]
    lines = [f"{100 * value:6.1f} %  {overrides}" for value, overrides in sorted(trials)]
    return [f"{name} of {len(lines)} trials:", *lines, *_best(folder / _RESULTS, name)]


def _best(file: Path, name: str) -> list[str]:
    found: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    if "best_params" not in found:  # a plain sweep, or several objectives
        return []
    overrides = " ".join(f"{key}={value}" for key, value in found["best_params"].items())
    return [f"best: {name} {100 * found['best_value']:.1f} % with {overrides}"]
