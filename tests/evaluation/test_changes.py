"""What changed between two stores, against counts by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_fakes import Exact, Linear, Shift, two_blocks
from scipy.stats import binomtest

from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import Store, StoreError, evaluate
from robustbench_lite.evaluation.changes import COLUMNS, changes
from robustbench_lite.evaluation.compact import compact

THREAT, FAR, DATA = Lp("linf", 0.05), Lp("linf", 0.1), two_blocks(60)


def run(
    store: Path, attack: Any = None, samples: Any = DATA, threat: Any = THREAT, name: str = "net", **more: Any
) -> Any:
    model = more.pop("model", None) or Linear()
    return evaluate(model, samples, threat, [attack or Shift(0.2)], store=store, name=name, **more)


def line(table: pd.DataFrame, **equal: Any) -> pd.Series:
    for name, value in equal.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_a_store_has_not_changed_from_itself_nor_by_compaction(tmp_path: Path) -> None:
    run(tmp_path / "a", certifiers=[Exact()])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    compact(tmp_path / "b")
    found = changes(tmp_path / "a", tmp_path / "b")
    assert tuple(found.columns) == COLUMNS
    row = line(found, defense="net")
    assert (row["change"], row["common"], row["lost"], row["gained"], row["p"]) == ("same", 60, 0, 0, 1.0)
    assert (row["rows_removed"], row["rows_added"]) == (0, 0)


def test_a_stronger_attack_is_a_significant_loss(tmp_path: Path) -> None:
    weak, strong = run(tmp_path / "a", Shift(0.1)), run(tmp_path / "b", Shift(1.0))
    row = line(changes(tmp_path / "a", tmp_path / "b"), defense="net")
    fell = {kind: set(r.records.loc[r.records["success"].fillna(False), "index"]) for kind, r in
            (("weak", weak), ("strong", strong))}  # fmt: skip
    lost = len(fell["strong"] - fell["weak"])
    assert (row["lost"], row["gained"]) == (lost, 0)
    assert row["p"] == pytest.approx(binomtest(0, lost).pvalue)
    assert row["significant"]
    assert row["change"] == "changed"
    assert row["robust_before"] == weak.summary()["worst_case"].iloc[0]
    assert row["robust_after"] == strong.summary()["worst_case"].iloc[0]
    assert (row["rows_removed"], row["rows_added"]) == (60, 60)  # the clean rows are the same
    back = line(changes(tmp_path / "b", tmp_path / "a"), defense="net")
    assert (back["gained"], back["lost"], back["p"]) == (row["lost"], row["gained"], row["p"])


def test_lines_are_compared_on_the_samples_that_both_have(tmp_path: Path) -> None:
    one, two = run(tmp_path / "a", samples=DATA.head(45)), run(tmp_path / "b", Shift(1.0))
    row = line(changes(tmp_path / "a", tmp_path / "b"), defense="net")
    assert (row["common"], row["n_before"], row["n_after"]) == (45, 45, 60)
    shared = set(DATA.head(45).indices.tolist())
    fallen = two.records.loc[two.records["success"].fillna(False), "index"]
    assert row["robust_after"] == 1 - len(shared & set(fallen)) / 45
    assert row["robust_before"] == one.summary()["worst_case"].iloc[0]
    assert (row["rows_removed"], row["rows_added"]) == (45, 60 + 15)  # clean answers of the other 15
    one = run(tmp_path / "c", samples=DATA.head(10))
    moved = type(DATA)(DATA.name, DATA.split, DATA.images[30:], DATA.labels[30:], DATA.indices[30:], 2)
    run(tmp_path / "d", samples=moved)
    row = line(changes(tmp_path / "c", tmp_path / "d"), defense="net")
    assert row["common"] == 0
    assert np.isnan(row["p"])
    assert not row["significant"]


def test_what_only_one_store_has(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "a", threat=FAR)
    run(tmp_path / "b")
    run(tmp_path / "b", name="new", model=Linear(7.5))
    found = changes(tmp_path / "a", tmp_path / "b")
    assert list(found["change"]) == ["same", "only before", "only after"]
    gone, new = line(found, eps=0.1), line(found, defense="new")
    assert (gone["rows_removed"], gone["rows_added"]) == (120, 0)
    assert (new["rows_removed"], new["rows_added"]) == (0, 120)
    assert pd.isna(new["verdict_before"])
    assert new["verdict_after"] == "doubtful"


def test_p_values_are_corrected_for_the_lines(tmp_path: Path) -> None:
    for eps in (0.03, 0.04, 0.05):
        run(tmp_path / "a", Shift(0.1), threat=Lp("linf", eps))
        run(tmp_path / "b", Shift(1.0), threat=Lp("linf", eps))
    found = changes(tmp_path / "a", tmp_path / "b")
    raw = sorted(binomtest(0, int(lost)).pvalue for lost in found["lost"])
    expected = np.maximum.accumulate([min(1.0, (3 - i) * p) for i, p in enumerate(raw)])
    assert sorted(found["p"]) == pytest.approx(expected)


def test_a_model_that_was_trained_again_keeps_its_line(tmp_path: Path) -> None:
    run(tmp_path / "a", Shift(1.0))
    run(tmp_path / "b", Shift(1.0), model=Linear(8.2))
    row = line(changes(tmp_path / "a", tmp_path / "b"), defense="net")
    assert row["fingerprint_before"] != row["fingerprint_after"]
    assert row["common"] == 60
    assert (row["rows_removed"], row["rows_added"]) == (120, 120)
    run(tmp_path / "b", Shift(1.0))  # and with both of them there, each has its own
    found = changes(tmp_path / "a", tmp_path / "b")
    assert sorted(found["change"]) == ["only after", "same"]


def test_a_verdict_that_changed_is_a_change(tmp_path: Path) -> None:
    run(tmp_path / "a", Shift(1.0), certifiers=[Exact()])
    run(tmp_path / "b", Shift(1.0), certifiers=[Exact(3.0)])
    row = line(changes(tmp_path / "a", tmp_path / "b"), defense="net")
    assert (row["change"], row["lost"], row["gained"]) == ("changed", 0, 0)
    assert (row["verdict_before"], row["verdict_after"]) == ("doubtful", "invalid")
    assert row["certified_before"] < row["certified_after"]


def test_stores_without_lines(tmp_path: Path) -> None:
    run(tmp_path / "a")
    (tmp_path / "b" / "cells").mkdir(parents=True)
    assert changes(tmp_path / "a", Store(tmp_path / "b"))["change"].tolist() == ["only before"]
    assert len(changes(tmp_path / "b", tmp_path / "b")) == 0
    with pytest.raises(StoreError, match="no store"):
        changes(tmp_path / "a", tmp_path / "nowhere")
