"""What a file of records is, and what a cell is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_lite.evaluation.records import KINDS
from robustbench_lite.evaluation.specs import canonical

__all__ = ["CONSTANT", "Head", "Part", "rank_of"]

CONSTANT = (
    "dataset", "defense", "fingerprint", "threat", "eps", "kind", "method", "version", "seed", "precision",
)  # fmt: skip
"""The columns that all records of a cell share; of `defense` the name when the first of them was written."""


@dataclass(frozen=True)
class Part:
    """One file of records.

    Attributes:
        path: where it is.
        identity: its cell's identity, with the specs that rebuild threat and method.
        environment: versions and device it was made under.
        defense: what the model was called.
    """

    path: Path
    identity: dict[str, Any]
    environment: dict[str, str]
    defense: str


@dataclass(frozen=True)
class Head:
    """What a cell is about.

    Attributes:
        name: of its folder.
        identity: with the specs that rebuild threat and method.
        row: the columns that all its records share (`CONSTANT`), by name.
    """

    name: str
    identity: dict[str, Any]
    row: dict[str, Any]


def rank_of(identity: dict[str, Any]) -> str:
    """Return what cells are ordered by: kind, method, threat."""
    return canonical([KINDS.index(identity["kind"]), identity["method"], identity["threat"]])
