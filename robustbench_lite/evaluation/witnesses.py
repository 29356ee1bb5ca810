"""Witnesses: what the audit objects to is written down, with the example, as soon as its unit of work is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import save

from robustbench_lite.evaluation.audit import Audit, Contradiction, audit
from robustbench_lite.evaluation.cells import Cell
from robustbench_lite.evaluation.files import put
from robustbench_lite.evaluation.ledger import Ledger
from robustbench_lite.evaluation.records import to_frame
from robustbench_lite.evaluation.samples import Samples

__all__ = ["Witnesses", "may_contradict"]

_KEPT = ("broken_certificate", "refuted_attack")


class Witnesses:
    """Collects the witnesses of one evaluation, unit by unit."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._found: dict[str, Contradiction] = {}

    def collect(self, part: Samples, rows: pa.Table, cells: Sequence[Cell]) -> None:
        """Audit a unit, and keep the examples of its violations: in the store if there is one, and at hand."""
        suspect = may_contradict(rows)  # few units are: the audit of a small net's took a tenth of the evaluation
        violations = [v for v in audit(to_frame(rows)).violations if v.id in _KEPT] if suspect else []
        if violations:
            found = [dataclasses.replace(v, example=self._example(v, part, cells)) for v in violations]
            path = self._write(found, part)
            self._found |= {v.evidence: dataclasses.replace(v, witness=path) for v in found}
        self._ledger.forget(int(part.unit[0]))

    def attach(self, whole: Audit) -> Audit:
        """Return the audit of all records with the witnesses that were kept."""
        return Audit([self._found.get(v.evidence, v) for v in whole.violations], whole.findings)

    def _example(self, violation: Contradiction, part: Samples, cells: Sequence[Cell]) -> Any:
        """Return the input that a violation is about, the attack's or the clean image; None where it is damaged."""
        facts, prefix = violation.facts, "" if violation.id == "refuted_attack" else "witness_"
        wanted = (facts["threat"], *(facts[f"{prefix}{name}"] for name in ("method", "version", "eps")))
        for cell in cells:
            if (cell.threat, cell.method, cell.version, cell.eps) == wanted:
                example = self._ledger.example(cell, (facts["index"], facts["sample_hash"], facts["label"]))
                if example is not None:
                    return example.x_adv[0]
        if violation.id == "refuted_attack" or facts["witness_distance"] > 0:
            return None
        return part.x[int(np.flatnonzero(part.indices == facts["index"])[0])].numpy()

    def _write(self, violations: list[Contradiction], part: Samples) -> str | None:
        """Write the unit's violations as JSON, and the images of those that have any; return the file's name."""
        if self._ledger.store is None:
            return None
        listed = [{"id": v.id, "evidence": v.evidence, "defense": v.defense, **_plain(v.facts)} for v in violations]
        data = json.dumps(listed, indent=1).encode()
        name = f"violations/{violations[0].facts['fingerprint']}-{hashlib.sha256(data).hexdigest()[:12]}"
        shown = [v for v in violations if v.example is not None]
        indices = np.array([v.facts["index"] for v in shown], dtype=np.int64)
        places = [int(np.flatnonzero(part.indices == index)[0]) for index in indices]
        images = np.array([v.example for v in shown]).reshape(-1, *part.x.shape[1:])
        tensors = {"index": indices, "x": part.x[places].numpy(), "x_adv": images}
        try:
            put(self._ledger.store.root / f"{name}.safetensors", save(tensors))
            put(self._ledger.store.root / f"{name}.json", data)
        except OSError as error:
            self._ledger.unsaved.append(f"{name}: {error}")
            return None
        return f"{name}.json"


def may_contradict(rows: pa.Table) -> bool:
    """Say whether the audit can find a violation of `_KEPT` in these records: quickly, and never wrongly no.

    It needs a refuted attack, or a sample with both a claim about its true label and a witness against it.
    """
    if pc.any(pc.equal(rows.column("status"), "refuted")).as_py():
        return True
    right, index = rows.column("correct"), rows.column("index")
    certified = pc.equal(rows.column("kind"), "certifier")
    claims = pc.and_(
        pc.and_(certified, right), pc.or_kleene(rows.column("certified"), pc.greater(rows.column("radius"), 0))
    )
    wrong = pc.and_(pc.equal(rows.column("kind"), "clean"), pc.invert(right))
    against = pc.or_kleene(wrong, rows.column("success"))
    return bool(pc.any(pc.is_in(index.filter(claims), value_set=index.filter(against).combine_chunks())).as_py())


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    item: Callable[[Any], Any] = lambda value: None if value is pd.NA else getattr(value, "item", lambda: value)()  # noqa: E731
    return {key: item(value) for key, value in facts.items()}
