"""The table read column by column is the table of all records, whatever the store went through."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_fakes import Exact, Liar, Linear, Shift, linear_data, two_blocks

from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Store, StoreError, evaluate, summarize
from robustbench_lite.evaluation.audit import SAMPLE, audit
from robustbench_lite.evaluation.compact import compact
from robustbench_lite.evaluation.records import to_frame
from robustbench_lite.evaluation.scan import scan

THREAT, FAR = Lp("linf", 0.05), Lp("linf", 0.1)


class Broken(Linear):
    """Answers NaN where the first pixel is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return torch.where(x[:, :1, 0, 0] > 0.9, torch.nan, logits)


def full(store: Path) -> None:
    for samples in (two_blocks(40).head(10), two_blocks(40)):
        evaluate(Linear(), samples, [THREAT, FAR], [Shift(0.5), Shift()], [Exact(), Exact(0.5)], store=store)


def cascade(store: Path) -> None:
    evaluate(Linear(), two_blocks(40), [THREAT, FAR], [Shift(0.5), Shift()], [Exact(0.7)], store=store, mode="cascade")


def several_models(store: Path) -> None:
    for threshold in (7.5, 8.0, 8.5):
        methods: dict[str, Any] = {"attacks": [Shift()], "certifiers": [Exact(0.9)] if threshold == 8.0 else []}
        evaluate(Linear(threshold), two_blocks(30), THREAT, store=store, name=f"t{threshold}", **methods)
    evaluate(Linear(), two_blocks(30).head(20), FAR, [Shift()], store=store, name="other name", seed=1)
    evaluate(Linear(), two_blocks(30), FAR, [Shift()], store=store, precision="float64")
    evaluate(Linear(9.0), two_blocks(30), THREAT, store=store)  # nothing but clean answers


def probabilistic(store: Path) -> None:
    kinds = [Exact(0.9, kind="probabilistic", alpha=0.01), Exact(0.5, timeout=True), Exact(1.2, kind="estimate")]
    evaluate(Linear(), two_blocks(60), THREAT, [Shift()], [*kinds, Exact(0.5)], store=store)


def lies(store: Path) -> None:
    evaluate(Linear(), two_blocks(40), THREAT, [Shift(), Liar()], [Exact(3.0)], store=store)
    evaluate(Linear(7.5), two_blocks(40), THREAT, [Shift()], [], store=store, name="honest")


def refuted(store: Path) -> None:
    """A claim that does not stand is a violation without any certificate."""
    evaluate(Linear(), two_blocks(40), THREAT, [Shift(), Liar(outside=True)], store=store)


def wrong_from_the_start(store: Path) -> None:
    """No attack, and a proof about a wrong class whose radius claims the true one."""
    evaluate(Linear(), two_blocks(40), THREAT, [], [Exact()], store=store)
    for path in sorted(store.rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        if table["kind"][0].as_py() == "clean":
            place = table.schema.get_field_index("correct")
            flipped = pa.array([False] * len(table))
            pq.write_table(table.set_column(place, table.schema.field(place), flipped), path)


def another_budget_breaks_it(store: Path) -> None:
    """The certificate at the larger eps is broken by the attack at the smaller."""
    evaluate(Linear(), two_blocks(40), FAR, [], [Exact(4.0)], store=store)
    evaluate(Linear(), two_blocks(40), THREAT, [Shift()], [], store=store)


def nan_outputs(store: Path) -> None:
    evaluate(Broken(), two_blocks(40), THREAT, [Shift()], store=store)


def extended(store: Path) -> None:
    evaluate(Linear(), two_blocks(40).head(25), THREAT, [Shift()], [Exact()], store=store)
    evaluate(Linear(), two_blocks(40), THREAT, [Shift()], store=store)


def fewer_samples_under_another_threat(store: Path) -> None:
    evaluate(Linear(), two_blocks(40), THREAT, [Shift()], [Exact()], store=store)
    evaluate(Linear(), two_blocks(40).head(15), FAR, [Shift()], [Exact()], store=store, name="renamed")


def changed_data(store: Path) -> None:
    x, y = linear_data(30)
    for labels in (y, torch.where(torch.arange(30) % 5 == 0, 1 - y, y)):
        evaluate(
            Linear(),
            Dataset("linear", "test", x, labels, torch.arange(30), 2),
            THREAT,
            [Shift()],
            [Exact()],
            store=store,
        )


def written_twice(store: Path) -> None:
    full(store)
    for path in sorted(store.rglob("*.parquet"))[:3]:
        path.with_name(path.name.replace("-", "-0")).write_bytes(path.read_bytes())


def damaged(store: Path) -> None:
    full(store)
    path = sorted(store.rglob("*.parquet"))[1]
    path.write_bytes(path.read_bytes()[:300])


def two_versions(store: Path) -> None:
    full(store)
    for path in sorted(store.rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        if table["method"][0].as_py() == "Shift":
            folder = path.parent.with_name(path.parent.name[::-1])
            folder.mkdir(exist_ok=True)
            place = table.schema.get_field_index("version")
            raised = pa.array([2] * len(table), pa.int64())
            pq.write_table(table.set_column(place, table.schema.field(place), raised), folder / path.name)


STORES: list[Callable[[Path], None]] = [
    full, cascade, several_models, probabilistic, lies, refuted, wrong_from_the_start, another_budget_breaks_it,
    nan_outputs, extended, fewer_samples_under_another_threat, changed_data, written_twice, damaged, two_versions,
]  # fmt: skip


@pytest.mark.parametrize("fill", STORES, ids=lambda fill: fill.__name__)
@pytest.mark.parametrize("merged", [False, True], ids=["as written", "compacted"])
def test_it_is_the_table_of_all_records(fill: Callable[[Path], None], merged: bool, tmp_path: Path) -> None:
    fill(tmp_path)
    if merged:
        compact(tmp_path)
    opened = Store(tmp_path)
    records = opened.records()
    found = scan(tmp_path)
    pd.testing.assert_frame_equal(found.table, summarize(records, opened.flags()), check_exact=True)
    assert sorted(v.evidence for v in found.violations) == sorted(v.evidence for v in audit(records).violations)
    assert sorted(found.warnings) == sorted(opened.warnings)


@pytest.mark.parametrize("fill", STORES, ids=lambda fill: fill.__name__)
def test_outcomes_by_brute_force(fill: Callable[[Path], None], tmp_path: Path) -> None:
    fill(tmp_path)
    found, records = scan(tmp_path), Store(tmp_path).records()
    for row, outcomes in zip(found.table.to_dict("records"), found.outcomes, strict=True):
        mine = records[(records["fingerprint"] == row["fingerprint"]) & (records["seed"] == row["seed"])]
        mine = mine[mine["precision"] == row["precision"]]
        attacks = mine[(mine["threat"] == row["threat"]) & (mine["eps"] == row["eps"]) & (mine["kind"] == "attack")]
        fallen = set(map(tuple, attacks.loc[attacks["success"], SAMPLE].to_numpy()))
        right = mine[(mine["kind"] == "clean") & mine["correct"]]
        standing = set(map(tuple, right[SAMPLE].to_numpy())) - fallen
        proofs = mine[(mine["certificate"] == "deterministic") & (mine["eps"] == row["eps"])]
        proven = set(map(tuple, proofs.loc[proofs["certified"], SAMPLE].to_numpy()))
        if len(attacks) == 0 and (len(proofs) == 0 or standing - proven):
            assert outcomes is None
            continue
        assert outcomes is not None
        names = list(zip(outcomes.names.index, outcomes.names.sample_hash, outcomes.names.label, strict=True))
        assert len(names) == row["n"]
        assert {name for name, stands in zip(names, outcomes.standing, strict=True) if stands} == (
            standing & set(names)
        )
        assert outcomes.standing.mean() == row["worst_case"]


def test_it_reads_no_column_that_it_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(tmp_path)
    read: list[str] = []
    real = Store.columns

    def columns(store: Store, name: str, wanted: Any) -> Any:
        read.extend(wanted)
        return real(store, name, wanted)

    monkeypatch.setattr(Store, "columns", columns)
    monkeypatch.setattr(Store, "records", lambda *_, **__: pytest.fail("all records of an ordinary store were read"))
    scan(tmp_path)
    assert {"margin", "seconds", "forwards", "backwards", "method", "fingerprint"}.isdisjoint(read)


def test_models_share_the_names_of_their_samples(tmp_path: Path) -> None:
    several_models(tmp_path)
    found = scan(tmp_path)
    names = {id(outcomes.names) for outcomes in found.outcomes if outcomes and len(outcomes.names) == 30}
    assert len(names) == 1


def test_an_empty_store_and_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        scan(tmp_path / "nowhere")
    (tmp_path / "cells").mkdir()
    assert len(scan(tmp_path).table) == 0


def test_a_cell_without_rows_changes_nothing(tmp_path: Path) -> None:
    full(tmp_path)
    before = scan(tmp_path).table
    some = next(tmp_path.rglob("*.parquet"))
    empty = tmp_path / "cells" / ("0" * 24)
    empty.mkdir()
    table = pq.ParquetFile(some).read()
    pq.write_table(table.slice(0, 0), empty / "00000-a.parquet")
    assert to_frame(table.slice(0, 0)).empty
    pd.testing.assert_frame_equal(scan(tmp_path).table, before)
    shutil.rmtree(empty)
