"""Rows that others published, and rows of ours in their format: RobustBench's model_info.

A model_info file is a JSON object with the fields of `FIELDS`, accuracies in per cent, kept as
`model_info/<dataset>/<threat>/<name>.json`. `load_published` reads such files, a folder of them, a JSON list or a CSV
table; `model_info` makes one of a row of ours. No figure of anybody is part of this package.

Source of the format: RobustBench, https://github.com/RobustBench/robustbench, folder model_info.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_lite.core.files import write_atomically
from robustbench_lite.report.sheet import Sheet, number

__all__ = ["FIELDS", "PUBLISHED", "load_published", "model_info", "write_cards"]

FIELDS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "external", "footnote", "unreliable",
)  # fmt: skip
"""The fields of a model_info file, in their order."""

PUBLISHED = "published"  # what stands in the column `verdict`: nobody here has checked these figures

_COLUMNS = ["dataset", "defense", "threat", "eps", "clean", "worst_case", "verdict", "source"]
_THREATS = {"linf": "Linf", "l2": "L2", "l1": "L1", "l0": "L0"}
_ACCURACIES = ("autoattack_acc", "external", "reported")  # of the first two the smaller counts; else what was reported


def load_published(path: Path | str) -> pd.DataFrame:
    """Return published rows: dataset, defense, threat, eps, clean, worst_case, verdict and source.

    Args:
        path: a model_info file, a folder of them, a JSON list of such objects, or a CSV table with these columns. An
            entry says its threat in a field `threat`, or by the folder its file lies in ("Linf"); what the table calls
            it in a field `model`, or by the name of its file.

    Raises:
        ValueError: a file that is none of these, an entry without data set, threat, eps, accuracy or source, or an
            accuracy that is no percentage; the message names the entry.
    """
    root = Path(path)
    files = sorted(root.rglob("*.json")) if root.is_dir() else [root]
    if not files:
        raise ValueError(f"there are no .json files in {root}")
    rows = [_row(entry, file, place) for file in files for place, entry in enumerate(_entries(file))]
    return pd.DataFrame(
        rows, columns=["dataset", "defense", "threat", "eps", "clean", "worst_case", "verdict", "source"]
    )


def model_info(row: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the card of a row of a sheet's frame in the fields of a model_info file.

    `autoattack_acc` is the column of an AutoAttack that has seen every sample, `external` the share that stood against
    everything, null where some sample was not attacked to the end; what a table does not know is null, as in a new file
    of theirs.

    Args:
        row: of `Sheet.frame`.
        about: further fields, such as link, authors and venue.
    """
    attacks = [name for name in row if name.startswith("AutoAttack") and not name.endswith(("_low", "_high"))]
    proven = "" if pd.isna(row["certified"]) else f", certified {_per_cent(row['certified'])} %"
    flags = f" ({row['flags']})" if row["flags"] else ""
    flags += f", {row['incomplete']} samples not attacked to the end" if row["incomplete"] else ""
    known = {
        "name": row["defense"],
        "dataset": row["dataset"],
        "eps": None if pd.isna(row["eps"]) else number(float(row["eps"])),
        "clean_acc": _per_cent(row["clean"]),
        "autoattack_acc": _per_cent(min((row[name] for name in attacks if pd.notna(row[name])), default=float("nan"))),
        "external": _per_cent(float("nan") if row["incomplete"] else row["worst_case"]),
        "footnote": f"robustbench_lite: {row['n']} samples{proven}, verdict {row['verdict']}{flags}",
        "unreliable": row["verdict"] == "invalid",
    }
    return {name: (about or {}).get(name, known.get(name)) for name in FIELDS}


def write_cards(sheet: Sheet, folder: Path, about: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write `<dataset>/<threat>/<defense>.json` for each row of ours, and return the paths.

    Args:
        sheet: the rows.
        folder: where to.
        about: further fields by the name of the defense.
    """
    written = []
    for row in sheet.frame.to_dict("records"):
        threat = row["threat"]
        if row["verdict"] == PUBLISHED or not isinstance(threat, str):
            continue
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in str(row["defense"]))
        budget = f"_{number(float(row['eps'])).replace('/', '_')}_{row['n']}_seed{row['seed']}"
        path = folder / str(row["dataset"]).replace("/", "_") / _THREATS.get(threat, threat) / f"{name}{budget}.json"
        card = model_info({str(key): value for key, value in row.items()}, about.get(str(row["defense"])))
        write_atomically(path, (json.dumps(card, indent=2, allow_nan=False) + "\n").encode())
        written.append(path)
    return written


def _per_cent(share: float) -> str | None:
    return None if pd.isna(share) else f"{100 * share:.2f}"


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        content = list(csv.DictReader(text.splitlines())) if file.suffix == ".csv" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as published rows: {error}") from error
    entries = [{"model": file.stem, **content}] if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file} must hold an object with the fields {', '.join(FIELDS)}, or a list of them")
    return entries


def _row(entry: dict[str, Any], file: Path, place: int) -> dict[str, Any]:
    where = f"{file.name}, entry {place + 1}"
    given = {key: value for key, value in entry.items() if value not in (None, "")}
    threat = str(given.get("threat", "" if file.suffix == ".csv" else file.parent.name)).lower()
    if threat not in _THREATS:
        raise ValueError(f"{where}: say the threat in a field 'threat': {', '.join(_THREATS)}")
    for name in ("dataset", "eps", "clean_acc"):
        if name not in given:
            raise ValueError(f"{where} has no {name}")
    source = ", ".join(str(given[name]) for name in ("venue", "link") if given.get(name) not in (None, "N/A"))
    if not source:
        raise ValueError(f"{where} has no source: give link or venue")
    found = {name: _share(given[name], f"{where}, {name}") for name in _ACCURACIES if name in given}
    if not found:
        raise ValueError(f"{where} has no robust accuracy: {', '.join(_ACCURACIES)}")
    judged = [found[name] for name in _ACCURACIES[:2] if name in found]
    return {
        "dataset": str(given["dataset"]),
        "defense": str(given.get("model", given.get("name", file.stem))),
        "threat": threat,
        "eps": _budget(given["eps"], where),
        "clean": _share(given["clean_acc"], f"{where}, clean_acc"),
        "worst_case": min(judged) if judged else found["reported"],
        "verdict": PUBLISHED,
        "source": source if judged else f"{source} (as its authors report)",
    }


def _budget(value: Any, where: str) -> float:
    try:
        return float(Fraction(str(value).replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{where}: eps must be a number or a fraction such as 8/255, got {value!r}") from None


def _share(value: Any, where: str) -> float:
    try:
        per_cent = float(value)
    except (TypeError, ValueError):
        per_cent = float("nan")
    if not 0 <= per_cent <= 100:
        raise ValueError(f"{where} must be a percentage between 0 and 100, got {value!r}")
    return per_cent / 100
