"""Notes that no record shows, kept beside a store's records: flags, and checks that were made.

    STORE/flags/<fingerprint>-<dataset>@<threat, seed and precision>.json

One file for each threat, seed and precision, so that jobs of a sweep do not write the same one. What a note is about
decides how long it lasts:

- flags about the model (masked gradients, outputs that are not finite ...) are reasons to doubt each of its rows, and
  stay: a fingerprint stands for one model;
- the note of a probe, and what it says about the convergence of an evaluation's attacks, hold for the threat, seed and
  precision it was made for, and until the next probe there; it speaks for no more samples than that evaluation had;
- what an evaluation left unfinished holds until the next one of the same threat, seed and precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_lite.evaluation.files import put
from robustbench_lite.evaluation.flags import CONVERGENCE, PROBED, UNFINISHED
from robustbench_lite.evaluation.specs import canonical

__all__ = ["Run", "concerns", "keep_notes", "read_notes", "speaks_for"]

_OF_A_RUN = (PROBED, *CONVERGENCE, UNFINISHED)  # about one evaluation; the others are about the model


@dataclass(frozen=True)
class Run:
    """The evaluation that notes come from.

    Attributes:
        threats: (name, eps) of what it judged.
        seed: its seed.
        precision: of the model.
        n: how many samples it was about.
    """

    threats: tuple[tuple[str, float | None], ...]
    seed: int
    precision: str
    n: int


def keep_notes(root: Path, fingerprint: str, dataset: str, notes: Iterable[Mapping[str, Any]], run: Run) -> list[str]:
    """Keep the notes of a run, and return what was damaged, in words; it is written anew.

    Raises:
        OSError: they cannot be written.
    """
    damaged = []
    told = [{**note, "seed": run.seed, "precision": run.precision, "n": run.n} for note in notes]
    for about in (("", None), *run.threats):
        own = [note for note in told if (note["threat"], note["eps"]) == about]
        digest = hashlib.sha256(canonical([*about, run.seed, run.precision]).encode()).hexdigest()[:12]
        path = root / "flags" / f"{fingerprint}-{dataset.replace('/', '%')}@{digest}.json"
        before: list[dict[str, Any]] = []
        try:
            before = json.loads(path.read_text()) if path.exists() else []
        except ValueError as error:
            damaged.append(f"damaged flags {path.name}: {error}; written anew")
        after = [*_lasting(before, own), *own]
        if after != before:
            put(path, json.dumps(after, indent=1).encode())
    return damaged


def read_notes(path: Path) -> tuple[tuple[str, str], list[dict[str, Any]]]:
    """Return (fingerprint, dataset) of a file of notes, and the notes.

    Raises:
        OSError, ValueError: it cannot be read, or is damaged.
    """
    fingerprint, _, dataset = path.stem.rpartition("@")[0].partition("-")
    return (fingerprint, dataset.replace("%", "/")), json.loads(path.read_text())


def concerns(note: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Say whether a note concerns a row of the table, by the row's threat, eps, seed and precision."""
    if note.get("threat") and (note["threat"], note["eps"]) != (key["threat"], key["eps"]):
        return False
    return note["id"] not in _OF_A_RUN or all(note.get(name, key[name]) == key[name] for name in ("seed", "precision"))


def speaks_for(note: Mapping[str, Any], n: int) -> bool:
    """Say whether a note is that of a probe of an evaluation with at least as many samples."""
    return bool(note["id"] == PROBED and note.get("n", n) >= n)


def _lasting(before: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what of the notes of earlier runs still holds."""
    probes = [note for note in own if note["id"] == PROBED]
    gone = {UNFINISHED, *(note["id"] for note in own if note["id"] != PROBED)}
    gone |= set(CONVERGENCE) if probes else set()
    smaller = [note for note in before if note["id"] == PROBED and any(new["n"] >= note["n"] for new in probes)]
    return [note for note in before if note["id"] not in gone and note not in smaller]
