"""Sheets: what a table says, before it is drawn. One sheet a threat, since threats are never mixed in one ranking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pandas as pd

if TYPE_CHECKING:
    from robustbench_lite.evaluation.report import Report

__all__ = ["NOT_APPLICABLE", "TEXT_COLUMNS", "Cell", "Sheet", "rank", "sheets", "table_of"]

NOT_APPLICABLE = "n/a"
TEXT_COLUMNS = ("defense", "verdict", "flags")
_GROUP = ["dataset", "threat", "eps", "n"]
_BEFORE = ("dataset", "defense", "fingerprint", "threat", "eps", "seed", "precision", "n", "mode", "clean")
_AFTER = ("certified", "certified_probabilistic", "gap", "spared", "timeouts", "incomplete", "verdict", "flags")
_SUMS = ("clean", "worst_case", "certified")
_HEADERS = {"worst_case": "robust", "certified_probabilistic": "certified (prob.)"}
_OPTIONAL = (
    "certified_probabilistic",
    "spared",
    "timeouts",
    "incomplete",
    "flags",
)  # shown where there is something to show


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


def table_of(report: Report) -> pd.DataFrame:
    """Return the summary of a report, its methods that are not applicable standing among those of their kind."""
    table = report.summary()
    names = list(table.columns)
    for method, kind in {part.method: part.kind for part in report.not_applicable}.items():
        columns = [method + end for end in ("", "_low", "_high")]
        names = [name for name in names if name not in columns]
        place = names.index("worst_case" if kind == "attack" else "certified")
        names[place:place] = columns
    return table[names]


def rank(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a summary with a column `rank`, best first.

    The rank is 1 + the number of rows with a higher worst-case accuracy, so equals share one. A row that is invalid,
    incomplete or was not attacked has none (NaN) and comes last.
    """
    counted = summary["worst_case"].where((summary["verdict"] != "invalid") & (summary["incomplete"] == 0))
    ranked = summary.assign(rank=counted.rank(ascending=False, method="min"))
    ordered = ranked.sort_values(["rank", "clean", "defense"], ascending=[True, False, True], kind="stable")
    return ordered[["rank", *summary.columns]].reset_index(drop=True)


def sheets(summaries: Iterable[pd.DataFrame]) -> Iterator[Sheet]:
    """Yield one sheet for each data set, threat, eps and number of samples.

    Args:
        summaries: results of `table_of`. A method that one of them names stays in the sheets of its rows, even where it
            has no figure: n/a. One that is meant for another threat is left out.
    """
    groups: dict[tuple[Any, ...], list[pd.DataFrame]] = {}
    for summary in summaries:
        for key, rows in summary.groupby(_GROUP, sort=False, dropna=False):
            names = tuple(None if pd.isna(part) else part for part in cast(tuple[Any, ...], key))
            groups.setdefault(names, []).append(rows)
    frames = {key: _stacked(parts) for key, parts in groups.items()}
    told = {name for frame in frames.values() for name in frame.columns if frame[name].notna().any()}
    for (dataset, threat, eps, n), found in frames.items():
        frame = rank(found.drop(columns=[name for name in told & set(_methods(found)) if found[name].isna().all()]))
        title, slug = _names(str(dataset), threat, eps, n)
        columns, named = _shown(frame), frame.assign(defense=_told_apart(frame))
        cells = [[_cell(row, column) for column in columns] for _, row in named.iterrows()]
        yield Sheet(title, slug, [_HEADERS.get(column, column) for column in columns], cells, frame)


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
    budget = "" if eps is None else f" eps {_number(eps)}"
    return f"{dataset}, {threat}{budget}, {n} samples", f"{_slug(f'{dataset}-{threat}{budget}')}-{n}"


def _number(value: float) -> str:
    """Return a number in few characters that no other number shares: 0.1, 8/255, 0.031372549."""
    if float(f"{value:.4g}") == value:
        return f"{value:.4g}"
    if round(value * 255) / 255 == value:
        return f"{round(value * 255)}/255"
    return f"{value:.12g}" if float(f"{value:.12g}") == value else repr(float(value))


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
    after = [name for name in _AFTER if name not in _OPTIONAL or _says_something(frame[name])]
    first = ["rank", "defense"] if len(frame) > 1 else ["defense"]
    return [*first, "clean", *attacks, "worst_case", *certifiers, *after]


def _says_something(column: pd.Series[Any]) -> bool:
    return bool(column.notna().any()) and not bool(column.isin([0, ""]).all())


def _cell(row: pd.Series[Any], column: str) -> Cell:
    value = row[column]
    if pd.isna(value):
        return Cell("-" if column == "rank" else NOT_APPLICABLE)
    if column in ("rank", "timeouts", "incomplete"):
        return Cell(f"{int(value)}")
    if isinstance(value, str):
        return Cell(value)
    if column in ("gap", "spared"):
        return Cell(f"{100 * value:.1f}")
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return Cell(f"{100 * value:.1f}", f"{100 * low:.1f}-{100 * high:.1f}")
