"""Samples of an evaluation that have no clean answer: no row tells of them, so the list of samples has to.

Beside a slice (`versions`) a file says which evaluations lacked some of its clean answers, and where the others are:

    STORE/slices/<fingerprint>-<dataset>-<content>@<run>.json

A sample of the slice without a row there is one that the model failed on. It makes those rows of the table incomplete
that the evaluation was for, until a clean answer is there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from robustbench_lite.evaluation.cells import Cell, sample_keys
from robustbench_lite.evaluation.files import put
from robustbench_lite.evaluation.specs import canonical
from robustbench_lite.evaluation.versions import newest, slice_of

__all__ = ["keep_run", "unanswered", "unanswered_under"]

_ID = "unanswered"
_ABOUT = ("threat", "eps", "seed", "precision")


def keep_run(root: Path, stem: str, clean: Cell, threats: Iterable[tuple[str, float | None]]) -> None:
    """Keep that a slice was evaluated under these threats, and not all of its samples answered.

    Args:
        root: of the store.
        stem: the name of the slice's file, without its end.
        clean: the cell of the clean answers.
        threats: name and eps of each.

    Raises:
        OSError: it cannot be written.
    """
    run = {name: getattr(clean, name) for name in ("dataset", "fingerprint", "seed", "precision")}
    text = canonical(run | {"clean": clean.key, "threats": [list(threat) for threat in threats]})
    path = root / "slices" / f"{stem}@{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if not path.exists():
        put(path, text.encode())


def unanswered(root: Path, rows: Callable[[str], pa.Table]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Yield ((fingerprint, dataset), note) for each row of the table that lacks clean answers.

    A file that cannot be read says nothing.

    Args:
        root: of the store.
        rows: reads the names of the samples that a cell, by its own name, has rows about.
    """
    asked: dict[tuple[Any, ...], set[tuple[int, str, int]]] = {}
    for path in sorted((root / "slices").glob("*@*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            samples = set(slice_of(path.with_name(f"{path.stem.rpartition('@')[0]}.json"))[1])
            cell = tuple(run[name] for name in ("fingerprint", "dataset", "seed", "precision", "clean"))
            under = [(str(name), eps) for name, eps in run["threats"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for threat in (None, None), *under:  # without a threat stands the row of a model that nothing was asked about
            asked.setdefault((cell, threat), set()).update(samples)
    open_: dict[tuple[Any, ...], set[tuple[int, str, int]]] = {}
    for cell in dict.fromkeys(cell for cell, _ in asked):
        open_[cell] = asked[cell, (None, None)] - set(sample_keys(rows(cell[-1])))
    for (cell, (name, eps)), samples in asked.items():
        fingerprint, dataset, seed, precision, _ = cell
        missing = samples & open_[cell]
        known = newest(root, fingerprint, dataset) if missing else {}
        count = sum(known.get(index) == (image, label) for index, image, label in missing)
        if count:
            about = dict(zip(_ABOUT, (name, eps, seed, precision), strict=True))
            yield (fingerprint, dataset), {"id": _ID, "raised": False, "samples": count, **about}


def unanswered_under(notes: Iterable[Mapping[str, Any]], key: Mapping[str, Any]) -> int:
    """Return how many samples have no clean answer, by the notes of `unanswered`, in the table's row of this key."""
    wanted = [_plain(key[name]) for name in _ABOUT]
    return sum(note["samples"] for note in notes if note["id"] == _ID and [note[name] for name in _ABOUT] == wanted)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
