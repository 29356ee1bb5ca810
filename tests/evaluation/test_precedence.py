"""Of two rows about one sample the same one is read, whatever their files are called: the less flattering one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import Exact, Linear, Shift, two_groups
from safetensors.numpy import load_file, save_file

from robustbench_lite.app import receipts
from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import Store, evaluate, summarize
from robustbench_lite.evaluation.compact import compact
from robustbench_lite.evaluation.precedence import best_first, each_once
from robustbench_lite.evaluation.records import SCHEMA, to_frame
from robustbench_lite.evaluation.scan import scan
from robustbench_lite.evaluation.verify import verify

THREAT = Lp("linf", 0.05)
MARK = 0.25  # of the other machine's examples
KEY = ["kind", "method", "index"]


def other_answers(rows: pd.DataFrame) -> pd.DataFrame:
    """What another machine says: fewer successes, some of them nearer; other clean answers; more and fewer proofs."""
    rows = rows.copy()
    rows["seconds"] = rows["seconds"] + 1
    place = rows["index"].astype(int)
    if rows["kind"].iloc[0] == "clean":
        flipped = place % 3 == 0
        rows.loc[flipped, "prediction"] = 1 - rows.loc[flipped, "prediction"]
        rows["correct"] = (rows["prediction"] == rows["label"]).astype("boolean")
    elif rows["kind"].iloc[0] == "attack":
        won = rows["success"].astype(bool)
        rows.loc[won & (place % 5 != 0), ["success", "distance", "first_success"]] = [False, np.inf, -1]
        rows.loc[won & (place % 5 == 0), "distance"] -= 1e-9
    else:
        rows.loc[place % 2 == 0, ["certified", "status", "radius"]] = [False, "unknown", 0.0]
        rows.loc[place % 2 == 1, ["status", "radius"]] = ["verified", 1e-3]
        rows.loc[place % 2 == 1, "certified"] = rows["correct"]
    return rows


def wanted(mine: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Which of the two is read, told row by row."""
    kept = []
    for one, two in zip(mine.to_dict("records"), other.to_dict("records"), strict=True):
        if one["kind"] == "clean":
            kept.append(two if one["correct"] and not two["correct"] else one)
        elif one["kind"] == "attack":
            kept.append(two if two["success"] and two["distance"] < one["distance"] else one)
        elif one["certified"] != two["certified"]:
            kept.append(two if one["certified"] else one)
        else:
            same = (one["status"] == "verified") == (two["status"] == "verified")
            kept.append(two if (two["radius"] < one["radius"] if same else one["status"] == "verified") else one)
    return pd.DataFrame(kept).astype(mine.dtypes)


def contradict(store: Path, unique: str) -> None:
    """Add the files of another machine; their names come before all others, or after."""
    for path in sorted(store.rglob("*.parquet")):
        table = pq.ParquetFile(path).read()
        rows = other_answers(to_frame(table.replace_schema_metadata(None)))
        beside = path.with_name(f"{path.name.partition('-')[0]}-{unique}{path.parent.name}.parquet")
        written = pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)
        pq.write_table(written.replace_schema_metadata(table.schema.metadata), beside)
        if path.with_suffix(".safetensors").exists():
            tensors = load_file(path.with_suffix(".safetensors"))
            near = np.isin(tensors["index"], rows.loc[rows["success"], "index"].to_numpy())
            tensors = {name: array[near] for name, array in tensors.items()}
            tensors["x_adv"] = np.full_like(tensors["x_adv"], MARK)
            save_file(tensors, beside.with_suffix(".safetensors"))


def fill(store: Path) -> receipts.Receipt:
    report = evaluate(Linear(), two_groups(40), THREAT, [Shift(0.5), Shift()], [Exact()], store=store)
    receipt = receipts.receipt_of(report, {}, store)
    assert receipt is not None
    return receipt


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(KEY, ignore_index=True)


@pytest.mark.parametrize("merged", [False, True], ids=["as written", "compacted"])
@pytest.mark.parametrize("unique", ["000", "zzz"], ids=["read first", "read last"])
def test_every_reader_takes_the_less_flattering_row(unique: str, merged: bool, tmp_path: Path) -> None:
    receipt = fill(tmp_path)
    mine = ordered(Store(tmp_path).records())
    frames = [other_answers(rows) for _, rows in mine.groupby(["kind", "method"], sort=False)]
    expected = wanted(mine, ordered(pd.concat(frames)))
    contradict(tmp_path, unique)
    if merged:
        compact(tmp_path)
        assert sum(len(pq.ParquetFile(path).read()) for path in tmp_path.rglob("*.parquet")) == len(expected)
    opened = Store(tmp_path)
    pd.testing.assert_frame_equal(ordered(opened.records()), expected)
    assert not opened.records(success=True).empty
    for columns in (["success", "seconds"], ["seconds"], ["correct", "radius"]):
        found = ordered(opened.records([*columns, *KEY]))[columns]
        pd.testing.assert_frame_equal(found, expected[columns])
    table = summarize(opened.records(), opened.flags())
    assert table["worst_case"].item() < 1 - table["clean_low"].item()
    pd.testing.assert_frame_equal(scan(tmp_path).table, table)
    served = receipts.report_of(receipt, tmp_path)
    assert served is not None
    assert served.summary()[table.columns].equals(table)
    again = evaluate(Linear(), two_groups(40), THREAT, [Shift(0.5), Shift()], [Exact()], store=tmp_path)
    pd.testing.assert_frame_equal(ordered(again.records), expected)


@pytest.mark.parametrize("unique", ["000", "zzz"], ids=["read first", "read last"])
def test_a_success_is_read_with_its_own_example(unique: str, tmp_path: Path) -> None:
    fill(tmp_path)
    contradict(tmp_path, unique)

    def check() -> int:
        opened, seen = Store(tmp_path), 0
        records = opened.records(success=True)
        for head in opened.heads():
            mine = records[records["method"] == head.row["method"]]
            cell: Any = type("Cell", (), {"key": head.name})
            for index, image, label in zip(mine["index"], mine["sample_hash"], mine["label"], strict=True):
                examples = next(e for e in opened.examples(cell, (index, image, label)) if index in e.index)
                nearer = bool((examples.x_adv[examples.index == index] == MARK).all())
                assert nearer == (index % 5 == 0)
                seen += nearer
        return seen

    before = check()
    compact(tmp_path)
    assert check() == before > 0
    paths = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 * len(paths)  # of each group


def test_rows_of_a_lucky_run_do_not_hide_behind_an_unlucky_one(tmp_path: Path) -> None:
    """What `rbl verify` counts as an example is a row of the table, after a compaction too."""
    fill(tmp_path)
    for path in sorted(tmp_path.rglob("*.parquet")):  # failures alone, under names that come first
        table = pq.ParquetFile(path).read()
        rows = to_frame(table.replace_schema_metadata(None))
        if rows["kind"].iloc[0] == "attack":
            rows[["success", "distance", "first_success"]] = [False, np.inf, -1]
            written = pa.Table.from_pandas(rows, SCHEMA, preserve_index=False)
            written = written.replace_schema_metadata(table.schema.metadata)
            pq.write_table(written, path.with_name(f"{path.name.partition('-')[0]}-000.parquet"))
    before = verify(tmp_path, lambda _: Linear(), two_groups(40))
    compact(tmp_path)
    after = verify(tmp_path, lambda _: Linear(), two_groups(40))
    assert before.ok
    assert after.ok
    assert before.examples == after.examples > 0
    assert after.table.equals(before.table)


ROWS = [
    {"kind": "attack", "success": True, "distance": 0.1, "seconds": 2.0},
    {"kind": "attack", "success": True, "distance": 0.2, "seconds": 1.0},
    {"kind": "attack", "success": False, "distance": np.inf, "status": "refuted", "seconds": 2.0},
    {"kind": "attack", "success": False, "distance": np.inf, "seconds": 1.0},
    {"kind": "attack", "success": False, "distance": np.inf, "seconds": 1.5},
    {"kind": "attack", "success": False, "distance": np.inf, "seconds": np.nan},
    {"kind": "clean", "correct": False, "prediction": -2},
    {"kind": "clean", "correct": False, "prediction": 1},
    {"kind": "clean", "correct": True, "prediction": 0},
    {"kind": "certifier", "certified": False, "status": "falsified", "radius": 0.0},
    {"kind": "certifier", "certified": False, "status": "unknown", "radius": 0.0},
    {"kind": "certifier", "certified": False, "status": "unknown", "radius": 0.1},
    {"kind": "certifier", "certified": True, "status": "verified", "radius": 0.1, "correct": True},
    {"kind": "certifier", "certified": True, "status": "verified", "radius": 0.2, "correct": True},
]
"""Rows of each kind, in the order in which they go before each other."""


@pytest.mark.parametrize("kind", ["clean", "attack", "certifier"])
def test_one_order_whatever_the_order_of_files(kind: str) -> None:
    rows = [row for row in ROWS if row["kind"] == kind]
    name = {"dataset": "d", "index": 7, "sample_hash": "h", "label": 0, "defense": "x", "fingerprint": "f"}
    name |= {"method": "m", "version": 1, "seed": 0, "precision": "float32"}
    for turn in itertools.permutations(range(len(rows))):
        table = pa.Table.from_pylist([name | rows[place] for place in turn], SCHEMA)
        assert [turn[place] for place in best_first(table)] == list(range(len(rows)))
        kept = each_once(table).to_pylist()
        assert len(kept) == 1
        assert kept[0]["distance"] == rows[0].get("distance")
