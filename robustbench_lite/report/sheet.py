"""Sheets: what a table says, before it is drawn. One sheet a threat, since threats are never mixed in one ranking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.compare import compare
from robustbench_lite.evaluation.lines import Outcomes, Summary
from robustbench_lite.evaluation.summary import outcomes_of

if TYPE_CHECKING:
    from robustbench_lite.evaluation.report import Report

__all__ = ["NOT_APPLICABLE", "TEXT_COLUMNS", "Cell", "Sheet", "number", "p_text", "rank", "sheets", "table_of"]

NOT_APPLICABLE = "n/a"
TEXT_COLUMNS = ("defense", "threat", "change", "verdict", "flags", "source")
_GROUP = ["dataset", "threat", "eps", "n"]
_BEFORE = ("dataset", "defense", "fingerprint", "threat", "eps", "seed", "precision", "n", "mode", "clean")
_FIGURES = ("certified", "certified_probabilistic", "gap", "spared", "coverage", "auc", "timeouts", "incomplete")
_AFTER = (*_FIGURES, "unfinished", "verdict", "flags", "source")
_SUMS = ("clean", "worst_case", "certified")
_HEADERS = {"worst_case": "robust", "certified_probabilistic": "certified (prob.)", "p_above": "p"}
_OPTIONAL = (  # shown where there is something to show
    "certified_probabilistic", "spared", "coverage", "auc", "timeouts", "incomplete", "unfinished", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One entry of a table: its text, and the 95 % interval in words where it has one."""

    text: str
    interval: str = ""


@dataclass(frozen=True, eq=False)
class Sheet:
    """One table over one data set, threat and number of samples.

    Attributes:
        title: data set, threat and number of samples, in words.
        slug: the same as part of a file name.
        headers: of the columns.
        rows: of cells, as many as headers each, best first.
        frame: the rows of the summary in the same order, with their rank: every digit.
    """

    title: str
    slug: str
    headers: list[str]
    rows: list[list[Cell]]
    frame: pd.DataFrame


def table_of(report: Report) -> Summary:
    """Return the summary of a report, its methods that are not applicable standing among those of their kind."""
    table = report.summary()
    names = list(table.columns)
    for method, kind in {part.method: part.kind for part in report.not_applicable}.items():
        columns = [method + end for end in ("", "_low", "_high")]
        names = [name for name in names if name not in columns]
        place = names.index("worst_case" if kind == "attack" else "certified")
        names[place:place] = columns
    return Summary(table[names], outcomes_of(report.records, report.threats), elsewhere=report.elsewhere)


def rank(summary: Summary) -> pd.DataFrame:
    """Return the rows of a summary with columns `rank` and `p_above`, best first.

    The rank is 1 + the number of rows that are significantly better, by McNemar's exact test on the samples that both
    have, corrected for all pairs (`evaluation/compare.py`): what cannot be told apart shares a rank. `p_above` is the
    corrected p-value against the row above. A row that is invalid, incomplete or was not attacked has none (NaN) and
    comes last.
    """
    table, outcomes = summary.table, summary.outcomes
    sound = (table["verdict"] != "invalid") & (table["incomplete"] == 0) & table["worst_case"].notna()
    rows = [row for row, counts in enumerate(sound) if counts and outcomes[row] is not None]
    found = compare([own for row in rows if (own := outcomes[row]) is not None])
    ranks, above = np.full(len(table), np.nan), np.full(len(table), np.nan)
    ranks[rows] = 1 + found.better.sum(axis=0)
    ranked = table.assign(rank=ranks, p_above=above, _row=np.arange(len(table)))
    by = {"rank": True, "worst_case": False, "clean": False, "defense": True}
    ordered = ranked.sort_values(list(by), ascending=list(by.values()), kind="stable").reset_index(drop=True)
    place = {row: i for i, row in enumerate(rows)}
    order = [place.get(row) for row in ordered.pop("_row")]
    ordered["p_above"] = [
        np.nan if before is None or own is None else found.p[before, own]
        for before, own in zip([None, *order], order, strict=False)
    ]
    return ordered[["rank", "p_above", *table.columns]]


def sheets(summaries: Iterable[Summary], published: pd.DataFrame | None = None) -> Iterator[Sheet]:
    """Yield one sheet for each data set, threat, eps and number of samples.

    Args:
        summaries: results of `table_of` or `scan`. A method that one of them names stays in the sheets of its rows,
            even where it has no figure: n/a. One that is meant for other threats is left out.
        published: rows of others (`published.py`); they stand below ours of the same data set, threat and eps, marked
            as published, with their source and without a rank.
    """
    groups: dict[tuple[Any, ...], list[tuple[pd.DataFrame, list[Outcomes | None]]]] = {}
    meant: dict[tuple[Any, ...], set[str]] = {}  # for other threats
    for summary in summaries:
        places = summary.table.reset_index(drop=True).groupby(_GROUP, sort=False, dropna=False).indices
        for key, rows in places.items():
            names = tuple(None if pd.isna(part) else part for part in cast(tuple[Any, ...], key))
            part = (summary.table.iloc[rows], [summary.outcomes[row] for row in rows])
            groups.setdefault(names, []).append(part)
            others = summary.elsewhere.get((str(names[1]), names[2]), set())
            meant.setdefault(names, set()).update(name + end for name in others for end in ("", "_low", "_high"))
    frames = {key: _stacked([table for table, _ in parts]) for key, parts in groups.items()}
    told = {name for frame in frames.values() for name in frame.columns if frame[name].notna().any()}
    for (dataset, threat, eps, n), found in frames.items():
        gone = told | meant[dataset, threat, eps, n]
        empty = [name for name in gone & set(_methods(found)) if found[name].isna().all()]
        outcomes = [own for _, few in groups[dataset, threat, eps, n] for own in few]
        own = rank(Summary(found.drop(columns=empty), outcomes))
        title, slug = _names(str(dataset), threat, eps, n)
        theirs = _beside(published, dataset, threat, eps)
        frame = own if theirs is None else _below(own, theirs)
        called = [*_told_apart(own), *frame["defense"].iloc[len(own) :]]
        columns, named = _shown(frame), frame.assign(defense=called)
        cells = [[_cell(row, column) for column in columns] for _, row in named.iterrows()]
        yield Sheet(title, slug, [_HEADERS.get(column, column) for column in columns], cells, frame)


def _beside(published: pd.DataFrame | None, dataset: Any, threat: Any, eps: Any) -> pd.DataFrame | None:
    """Return the published rows about this data set, threat and eps, best first; None where there are none."""
    if published is None or eps is None:
        return None
    same = (published["dataset"] == dataset) & (published["threat"] == threat) & np.isclose(published["eps"], eps)
    rows = published[same].sort_values("worst_case", ascending=False, kind="stable")
    return rows if len(rows) else None


def _below(own: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    columns = list(dict.fromkeys([*own.columns, *theirs.columns]))
    records = [row for part in (own, theirs) for row in part.astype(object).to_dict("records")]
    return pd.DataFrame(records, columns=columns).infer_objects()


def _methods(frame: pd.DataFrame) -> list[str]:
    """Return the columns of attacks and certifiers, with their intervals."""
    return [name for name in frame.columns if not name.startswith(_SUMS) and name not in (*_BEFORE, *_AFTER)]


def _stacked(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Put rows of several summaries below each other; methods that one lacks stand where the others have them."""
    before = [name for name in parts[0].columns if name in _BEFORE or name.startswith("clean_")]
    names = dict.fromkeys(name for part in parts for name in part.columns)
    attacks, certifiers = [], []
    for part in parts:
        columns = list(part.columns)
        worst, end = columns.index("worst_case"), columns.index("certified")
        attacks += [name for name in columns[:worst] if name not in before]
        certifiers += columns[worst:end]
    ordered = list(dict.fromkeys([*before, *attacks, *certifiers, *names]))
    records = [row for part in parts for row in part.astype(object).to_dict("records")]
    return pd.DataFrame(records, columns=ordered).infer_objects()


def _names(dataset: str, threat: str | None, eps: float | None, n: int) -> tuple[str, str]:
    if threat is None:
        return f"{dataset}, {n} samples, no threat", f"{_slug(dataset)}-clean-{n}"
    budget = "" if eps is None else f" eps {number(eps)}"
    return f"{dataset}, {threat}{budget}, {n} samples", f"{_slug(f'{dataset}-{threat}{budget}')}-{n}"


def number(value: float) -> str:
    """Return a number in few characters that no other number shares: 0.1, 8/255, 0.031372549."""
    if float(f"{value:.4g}") == value:
        return f"{value:.4g}"
    if round(value * 255) / 255 == value:
        return f"{round(value * 255)}/255"
    return f"{value:.12g}" if float(f"{value:.12g}") == value else repr(float(value))


def p_text(value: float) -> str:
    """Return a p-value as tables show it."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text.replace(" eps ", "-"))


def _told_apart(frame: pd.DataFrame) -> list[str]:
    """Return the names of the rows, with what they were run with where that differs between them."""
    varying = [name for name in ("seed", "precision", "mode") if frame[name].nunique(dropna=False) > 1]
    settings = [", ".join(f"{name} {row[name]}" for name in varying) for _, row in frame.iterrows()]
    return [f"{name} ({own})" if own else str(name) for name, own in zip(frame["defense"], settings, strict=True)]


def _shown(frame: pd.DataFrame) -> list[str]:
    measured = [name for name in frame.columns if f"{name}_low" in frame.columns]
    worst, end = measured.index("worst_case"), measured.index("certified")
    attacks, certifiers = measured[1:worst], measured[worst + 1 : end]
    certifiers = certifiers if len(certifiers) > 1 else []  # one alone is the column "certified"
    shown = (
        name for name in _AFTER if name in frame.columns and name != "unfinished"
    )  # that stands where the figure would
    after = [name for name in shown if name not in _OPTIONAL or _says_something(frame[name])]
    first = ["rank", "p_above", "defense"] if len(frame) > 1 else ["defense"]
    return [*first, "clean", *attacks, "worst_case", *certifiers, *after]


def _reasons(row: pd.Series[Any]) -> dict[str, str]:
    """Return why methods have no figure: "METHOD: not run: budget; METHOD: open: error" by method."""
    parts = [part.rsplit(": ", 2) for part in str(row.get("unfinished", "")).split("; ") if part.count(": ") > 1]
    return {method: f"{how}: {why}" for method, how, why in parts}


def _says_something(column: pd.Series[Any]) -> bool:
    return bool(column.notna().any()) and not bool(column.isin([0, ""]).all())


def _cell(row: pd.Series[Any], column: str) -> Cell:
    value = row[column]
    if pd.isna(value):
        return Cell("-" if column in ("rank", "p_above") else _reasons(row).get(column, NOT_APPLICABLE))
    if column in ("rank", "timeouts", "incomplete"):
        return Cell(f"{int(value)}")
    if column == "p_above":
        return Cell(p_text(value))
    if isinstance(value, str):
        return Cell(value)
    if column == "auc":
        return Cell(f"{value:.3f}")
    if column in ("gap", "spared", "coverage"):
        return Cell(f"{100 * value:.1f}")
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return Cell(f"{100 * value:.1f}", "" if pd.isna(low) else f"{100 * low:.1f}-{100 * high:.1f}")
