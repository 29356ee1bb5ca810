"""Data that change under one name: slices share rows, versions never meet in a row of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluation_fakes as fakes
import pandas as pd
import pytest
import torch
from evaluation_fakes import Exact, Liar, Linear, Shift, two_blocks

from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Store, evaluate, summarize
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.evaluation.verify import verify

THREAT = Lp("linf", 0.05)
METHODS: dict[str, Any] = {"attacks": [Shift()], "certifiers": [Exact()]}


def changed(data: Dataset, rows: list[int], labels: bool = False) -> Dataset:
    """The data set with other images, or labels, in these rows."""
    images, targets = data.images.clone(), data.labels.clone()
    if labels:
        targets[rows] = 1 - targets[rows]
    else:
        images[rows] = 1 - images[rows]
    return Dataset(data.name, data.split, images, targets, data.indices, 2)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("rows", [list(range(40)), [0, 3, 25]])
def test_the_table_is_about_the_version_evaluated_last(tmp_path: Path, rows: list[int], labels: bool) -> None:
    old = two_blocks(40)
    new = changed(old, rows, labels)
    for data in (old, new, old):
        report = evaluate(Linear(), data, THREAT, store=tmp_path, **METHODS)
        table, store = report.summary().drop(columns="unfinished"), Store(tmp_path)
        assert summarize(store.records()).equals(table)
        assert len(store.records(["method"])) == 40 * 3
    assert "rows about other images or labels are left out" in store.warnings[0]
    assert len(store.records(all_versions=True)) == (40 + len(rows)) * 3


def test_what_did_not_change_is_not_computed_again(tmp_path: Path) -> None:
    old = two_blocks(40)
    evaluate(Linear(), old, THREAT, store=tmp_path, **METHODS)
    fakes.CALLS.clear()
    evaluate(Linear(), changed(old, [0, 3]), THREAT, store=tmp_path, **METHODS)
    assert fakes.count("Shift 1") == 2


def test_a_slice_of_the_new_data_takes_nothing_from_the_old(tmp_path: Path) -> None:
    old = two_blocks(40)
    evaluate(Linear(), old, THREAT, store=tmp_path, **METHODS)
    report = evaluate(Linear(), changed(old, list(range(40))).head(10), THREAT, store=tmp_path, **METHODS)
    table = summarize(Store(tmp_path).records())
    assert table["n"].item() == 10
    assert table.equals(report.summary().drop(columns="unfinished"))


def test_slices_of_one_data_set_are_one_row(tmp_path: Path) -> None:
    data = two_blocks(40)
    for part in (data.head(10), data, data.take(torch.arange(20, 30))):
        evaluate(Linear(), part, THREAT, store=tmp_path, **METHODS)
    store = Store(tmp_path)
    assert summarize(store.records())["n"].tolist() == [40]
    assert not store.warnings


def test_records_of_two_versions_have_no_common_table() -> None:
    old = two_blocks(20)
    both = [evaluate(Linear(), data, THREAT, **METHODS).records for data in (old, changed(old, [0]))]
    with pytest.raises(ValueError, match="index 0 of linear stands for two samples"):
        summarize(pd.concat(both))


def test_a_witness_is_the_example_of_its_own_version(tmp_path: Path) -> None:
    old = two_blocks(12)
    new = changed(old, list(range(12)))
    for data in (old, new):
        evaluate(Linear(), data, THREAT, [Liar(outside=False)], store=tmp_path)
    for data in (old, new):
        for violation in evaluate(Linear(), data, THREAT, [Liar(outside=False)], store=tmp_path).violations:
            place = data.indices.tolist().index(violation.facts["index"])
            assert (violation.example == data.images[place].numpy()).all()


def test_verification_names_a_label_that_is_not_the_one_on_record(tmp_path: Path) -> None:
    data = two_blocks(20)
    evaluate(Linear(), data, THREAT, store=tmp_path, **METHODS)
    found = verify(tmp_path, {fingerprint(Linear()): Linear()}, changed(data, [3], labels=True))
    assert {(m.index, m.reason) for m in found.mismatches} == {(3, "the label is not the one on record")}
