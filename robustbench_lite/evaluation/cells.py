"""Cells: what a stored row's identity is made of.

A row is named by model fingerprint, sample, threat, method with all its hyper-parameters and its own version, seed and
precision. All but the sample are the same for a whole cell, and name its directory; the sample (index, image hash and
label) is matched row by row. The index belongs to the name because it names the sample's random stream, the data set
because an index means nothing without it.

The content of the data is in the name through the sample, not through a hash of the slice, so that slices of one data
set share their rows, and a corrected image or label makes its own row new and no other. One index may therefore have
rows about several contents in one cell: whoever picks rows does so by (index, hash, label), never by index. Which
contents go together in a table `versions` says.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from robustbench_lite.evaluation.records import SCHEMA
from robustbench_lite.evaluation.specs import canonical

__all__ = ["BLOCK", "BLOCKS_PER_FILE", "Cell", "SampleNames", "block_of", "sample_keys"]

BLOCK = 500  # dataset indices: the names of files say of which blocks they hold rows
BLOCKS_PER_FILE = 20  # at most: 10,000 rows, so that a damaged file costs no more than that


class SampleNames(Protocol):
    """What rows need to know of samples."""

    @property
    def indices(self) -> np.ndarray[Any, Any]:
        """Int64 (N,), the numbers in the whole data set."""
        ...

    @property
    def hashes(self) -> list[str]:
        """One image hash a sample."""
        ...

    @property
    def targets(self) -> np.ndarray[Any, Any]:
        """Int64 (N,), the true classes."""
        ...


def block_of(indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the number of the block that each dataset index belongs to."""
    return indices // BLOCK


def sample_keys(rows: pa.Table) -> list[tuple[int, str, int]]:
    """Return (index, sample hash, label) of each record: its name within its cell."""
    columns = (rows.column(name).to_pylist() for name in ("index", "sample_hash", "label"))
    return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class Cell:
    """One method on one defense, data set, threat and seed.

    Attributes:
        kind: "clean", "attack" or "certifier".
        dataset: name of the data.
        defense: what the model is called; not part of the identity.
        fingerprint: the model.
        threat: the threat's name; None for clean rows.
        eps: its budget as one number.
        threat_spec: what rebuilds the threat.
        method: the method's name in tables.
        method_spec: what rebuilds the method.
        version: the method's own version.
        seed: the seed of the evaluation.
        precision: "float32" or "float64".
        settings: what else changes the answers, such as a limit of queries.
    """

    kind: str
    dataset: str
    defense: str
    fingerprint: str
    threat: str | None
    eps: float | None
    threat_spec: dict[str, Any] | None
    method: str
    method_spec: dict[str, Any] | None
    version: int
    seed: int
    precision: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this cell from all others, as JSON; it is stored in the metadata of every file."""
        return {
            "kind": self.kind,
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "threat": self.threat_spec,
            "method": self.method_spec,
            "version": self.version,
            "seed": self.seed,
            "precision": self.precision,
            "settings": self.settings,
        }

    @cached_property
    def key(self) -> str:
        """The name of the cell's directory: 24 hex digits over the identity."""
        return hashlib.sha256(canonical(self.identity).encode()).hexdigest()[:24]

    def rows(self, samples: SampleNames, measured: dict[str, Any]) -> pa.Table:
        """Return records of these samples with the measured columns; the others are null."""
        count = len(samples.hashes)
        known = {
            "dataset": self.dataset,
            "defense": self.defense,
            "fingerprint": self.fingerprint,
            "threat": self.threat,
            "eps": self.eps,
            "kind": self.kind,
            "method": self.method,
            "version": self.version,
            "seed": self.seed,
            "precision": self.precision,
        }
        own = {"index": samples.indices, "sample_hash": samples.hashes, "label": samples.targets} | measured
        unknown = set(own) - set(SCHEMA.names)
        if unknown:
            raise ValueError(f"no such columns in a record: {sorted(unknown)}")
        arrays = [
            pa.array(own[column.name], type=column.type)
            if column.name in own
            else pa.nulls(count, column.type)
            if known.get(column.name) is None
            else pa.repeat(pa.scalar(known[column.name], column.type), count)
            for column in SCHEMA
        ]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)

    def renamed(self, rows: pa.Table) -> pa.Table:
        """Return stored rows under the name that the defense has today."""
        place = SCHEMA.get_field_index("defense")
        return rows.set_column(place, SCHEMA.field(place), pa.repeat(pa.scalar(self.defense, pa.string()), len(rows)))
