"""What somebody hands in, what the store knows already, and the rows that came of it. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd

from robustbench_lite.evaluation.audit import SAMPLE
from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.flags import Flag, submitted_beats_attacks
from robustbench_lite.evaluation.records import SUBMITTED
from robustbench_lite.evaluation.specs import canonical
from robustbench_lite.evaluation.store import Store, StoreError

__all__ = ["Handed", "Known", "Submitted", "outsiders", "with_submitted"]


@dataclass(frozen=True)
class Submitted:
    """The method of submitted rows: who made the examples.

    Attributes:
        author: as the table shows it.
        source: where they come from: a paper, an address, a word on the attack.
        digest: of the arrays handed in, so that a second submission has rows of its own.
    """

    version: ClassVar[int] = 1
    author: str
    source: str
    digest: str

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"submitted({self.author})"


@dataclass(frozen=True, eq=False)
class Handed:
    """What somebody hands in.

    Attributes:
        index: int64 (N,), numbers of samples in the whole data set.
        x_adv: (N, C, H, W), floating point, in the units of the images.
        label: int64 (N,), the true classes as the author knows them; None: not given.
        parameters: (N, ...) of a parametric threat, from which the images are computed anew; None otherwise.
        author: who made them.
        source: where they come from.
    """

    index: np.ndarray[Any, Any]
    x_adv: np.ndarray[Any, Any]
    label: np.ndarray[Any, Any] | None = None
    parameters: np.ndarray[Any, Any] | None = None
    author: str = "anonymous"
    source: str = ""

    @classmethod
    def load(cls, path: Path | str, author: str, source: str) -> Handed:
        """Read an npz file with arrays index, x_adv and, if there are any, label and parameters.

        Raises:
            ValueError: it is no such file, or its arrays do not go together.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as an npz file of plain arrays: {error}") from error
        missing = [name for name in ("index", "x_adv") if name not in arrays]
        if missing:
            raise ValueError(f"{path} has no array {missing[0]!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
        kept = {name: arrays.get(name) for name in ("label", "parameters")}
        return cls(arrays["index"], arrays["x_adv"], **kept, author=author, source=source)

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or not np.issubdtype(self.index.dtype, np.integer):
            raise ValueError(f"index must be whole numbers (N,), got {self.index.dtype} of shape {self.index.shape}")
        if not np.issubdtype(self.x_adv.dtype, np.floating):
            raise ValueError(
                f"x_adv must be floating point in the images' units, got {self.x_adv.dtype}: divide by 255"
            )
        named = {"x_adv": self.x_adv, "label": self.label, "parameters": self.parameters}
        for name, array in named.items():
            if array is not None and len(array) != len(self.index):
                raise ValueError(f"{name} has {len(array)} entries, index has {len(self.index)}")
        if len(self.index) == 0:
            raise ValueError("there are no inputs in the submission")

    @property
    def digest(self) -> str:
        """12 hex digits over the arrays."""
        found = hashlib.sha256()
        for array in (self.index, self.x_adv, self.parameters):
            found.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Known:
    """What the store knows of a model under a threat: of each sample its image, and the nearest example.

    Attributes:
        hashes: image hash and label of each index that was judged under the threat.
        nearest: distance of the nearest example; infinity where the sample stands.
    """

    hashes: dict[int, tuple[str, int]]
    nearest: dict[int, float]

    @classmethod
    def of(cls, store: Store, cell: Cell) -> Known:
        """Read it.

        Raises:
            StoreError: the store has no clean answers of the model, or no method under the threat.
        """
        identity = cell.identity
        same = ("dataset", "fingerprint", "seed", "precision")
        heads = [head for head in store.heads() if all(head.identity[name] == identity[name] for name in same)]
        clean = [head.name for head in heads if head.identity["kind"] == "clean"]
        under = [head for head in heads if canonical(head.identity["threat"]) == canonical(identity["threat"])]
        if not clean or not under:
            what = f"under {cell.threat} {cell.eps:g}" if clean else f"on {cell.dataset}"
            raise StoreError(
                f"{store.root} holds no evaluation of {cell.defense} ({cell.fingerprint}) {what} with seed {cell.seed} "
                f"in {cell.precision}: there is nothing to beat; rbl evaluate it first"
            )
        rows = store.records(cells=[*clean, *(head.name for head in under)])
        judged = set(rows.loc[rows["kind"] != "clean", "index"].tolist())
        answers = rows[(rows["kind"] == "clean") & rows["index"].isin(judged)]
        named = zip(answers["index"], answers["sample_hash"], answers["label"], strict=True)
        hashes = {int(index): (str(image), int(label)) for index, image, label in named}
        fallen = rows[(rows["kind"] == "attack") & rows["success"].fillna(False)]
        wrong = {int(index): 0.0 for index in answers.loc[~answers["correct"].astype(bool), "index"]}
        best = fallen.groupby("index")["distance"].min()
        nearest = dict(zip(best.index.tolist(), best.tolist(), strict=True)) | wrong
        return cls(hashes, nearest)


def with_submitted(store: Store, records: pd.DataFrame, threats: Sequence[tuple[str, float | None]]) -> pd.DataFrame:
    """Return the records of one evaluation with the submitted rows that concern its samples under its threats.

    Raises:
        NewerSchemaError: a file has a newer schema.
    """
    first = records.iloc[0]
    name = f"{first['fingerprint']}-{str(first['dataset']).replace('/', '%')}"
    cells = [_cell_of(path) for path in sorted((store.root / "submissions").glob(f"{name}-*.json"))]
    named = [cell for cell in cells if cell]
    if not named:
        return records
    rows = store.records(all_versions=True, cells=named)
    under = [pair in set(threats) for pair in zip(rows["threat"], rows["eps"], strict=True)]
    same = (
        (rows["dataset"] == first["dataset"])
        & (rows["seed"] == first["seed"])
        & (rows["precision"] == first["precision"])
    )
    samples = pd.MultiIndex.from_frame(records[SAMPLE])
    rows = rows[np.array(under, dtype=bool) & same.to_numpy() & pd.MultiIndex.from_frame(rows[SAMPLE]).isin(samples)]
    renamed = rows.assign(defense=pd.Series([first["defense"]] * len(rows), rows.index, dtype=rows["defense"].dtype))
    return pd.concat([records, renamed], ignore_index=True) if len(rows) else records


def outsiders(records: pd.DataFrame) -> list[Flag]:
    """Return a flag for each threat under which submitted examples broke what every attack left standing."""
    if not (records["status"] == SUBMITTED).any():
        return []
    attacks = records[records["kind"] == "attack"]
    handed = (attacks["status"] == SUBMITTED).fillna(False).astype(bool)
    found = []
    for key, rows in attacks[handed].groupby(["threat", "eps"], sort=False, dropna=False):
        name, eps = cast(tuple[Any, ...], key)
        own = attacks[~handed & (attacks["threat"] == name) & (attacks["eps"] == eps)]
        fallen = set(own.loc[own["success"].fillna(False).astype(bool), "index"].tolist())
        flag = submitted_beats_attacks(sorted(set(rows["index"].tolist()) - fallen))
        found += [replace(flag, threat=str(name), eps=float(eps))] if flag else []
    return found


def _cell_of(path: Path) -> str | None:
    """Return the cell of a submission; None where nothing was recorded, or the file cannot be read."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))["cell"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(cell) if cell else None
