"""Compaction makes few files of many, and neither a kill nor anybody who reads or writes meanwhile can tell."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluation_fakes as fakes
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_fakes import Exact, Linear, Shift, linear_data

from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Store, StoreError, evaluate, parquet, summarize
from robustbench_lite.evaluation.cells import BLOCK
from robustbench_lite.evaluation.compact import compact
from robustbench_lite.evaluation.folders import fresh_path, overlap, span
from robustbench_lite.evaluation.parquet import NewerSchemaError
from robustbench_lite.evaluation.records import to_frame

BLOCKS, SIZE = 5, 6
THREAT = Lp("linf", 0.05)
KEY = ["kind", "method", "index", "label"]


def data(blocks: int = BLOCKS, relabelled: bool = False) -> Dataset:
    x, y = linear_data(8 * SIZE)
    place = torch.arange(8 * SIZE)
    y = torch.where(place % 4 == 0, 1 - y, y) if relabelled else y
    return Dataset("linear", "test", x, y, place % SIZE + BLOCK * (place // SIZE), 2).head(blocks * SIZE)


def fill(store: Path, samples: Dataset | None = None) -> Any:
    """Evaluate block by block, so that each has files of its own; return the report of the whole."""
    whole = samples or data()
    blocks = whole.indices // BLOCK
    for part in [*(whole.take(blocks == block) for block in blocks.unique()), whole]:
        report = evaluate(Linear(), part, THREAT, [Shift(0.5), Shift()], [Exact()], store=store)
    return report


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    fill(folder)
    return folder


@pytest.fixture
def filled(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def files(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*.parquet"))


def every_row(store: Path) -> pd.DataFrame:
    """Every row in every file, as often as it is there."""
    frames = [to_frame(pq.ParquetFile(path).read()) for path in files(store)]
    return pd.concat(frames).sort_values(KEY, ignore_index=True)


def examples(store: Path) -> dict[tuple[str, int, int], bytes]:
    """Every example that has a row which counts it, by cell, index and label."""
    found = {}
    opened = Store(store)
    for part in opened.parts():
        kept, rows = opened.examples_of(part.path), opened.file_records(part)
        assert rows is not None
        labels = dict(zip(rows["index"], rows["label"], strict=True))
        for index, image in zip(*((kept.index, kept.x_adv) if kept else ([], [])), strict=True):
            found[part.path.parent.name, int(index), labels[int(index)]] = image.tobytes()
    return found


def read(store: Path) -> pd.DataFrame:
    opened = Store(store)
    frame = opened.records(all_versions=True).sort_values(KEY, ignore_index=True)
    assert not opened.warnings
    return frame


def test_few_files_hold_what_many_did(filled: Path, original: Path) -> None:
    done = compact(filled)
    assert done.cells == 4
    assert (done.before, done.after) == (len(list(original.glob("cells/*/*"))), len(list(filled.glob("cells/*/*"))))
    assert len(files(filled)) == 4 < len(files(original)) == 4 * BLOCKS
    assert all(span(path) == (0, BLOCKS - 1) for path in files(filled))
    assert every_row(filled).equals(every_row(original))
    assert examples(filled) == examples(original) != {}
    assert summarize(Store(filled).records()).equals(summarize(Store(original).records()))
    assert not done.left
    metadata = pq.read_schema(files(filled)[0]).metadata
    assert metadata == next(m for p in files(original) if (m := pq.read_schema(p).metadata) == metadata)


def test_a_compacted_store_is_left_alone(filled: Path) -> None:
    compact(filled)
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()}
    again = compact(filled)
    assert again.before == again.after
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*") if path.is_file()} == before


def test_nothing_is_computed_again_and_more_can_be_added(filled: Path) -> None:
    compact(filled)
    fakes.CALLS.clear()
    report = fill(filled)
    assert not fakes.CALLS
    assert len(report.records) == 4 * BLOCKS * SIZE
    more = data(BLOCKS + 2)
    fill(filled, more)
    assert fakes.count("Shift 1") == 2 * SIZE
    fakes.CALLS.clear()
    compact(filled)
    assert len(files(filled)) == 4
    assert len(fill(filled, more).records) == 4 * (BLOCKS + 2) * SIZE
    assert not fakes.CALLS


def test_groups_of_blocks_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.setattr("robustbench_lite.evaluation.compact.BLOCKS_PER_FILE", 2)
    compact(tmp_path)
    assert {span(path) for path in files(tmp_path)} == {(0, 1), (2, 3), (4, 4)}
    monkeypatch.setattr("robustbench_lite.evaluation.compact.BLOCKS_PER_FILE", 20)
    monkeypatch.setattr("robustbench_lite.evaluation.compact.LARGEST", 1)  # examples are never held together
    before = len(list(tmp_path.rglob("*.safetensors")))
    compact(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == before > 3


class Killed(BaseException):
    """The process is no more: nothing it would still do to the disk happens."""


class Reaper:
    """Ends everything at a given one of the operations that change the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.left = last
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync"), (Path, "open")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return real(*arguments, **options)

        return operation


def test_a_kill_at_any_moment_loses_nothing(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, rows, images = read(original), every_row(original), examples(original)
    copies = [path for path in (original / "cells").iterdir() if any(path.glob("*.safetensors"))][:1]
    kills = 0
    while True:
        store = Path(shutil.copytree(original, tmp_path / f"{kills}"))
        for folder in set((store / "cells").iterdir()) - {store / path.relative_to(original) for path in copies}:
            shutil.rmtree(folder)  # one cell is enough, and quicker
        own = wanted[wanted["method"].isin(read(store)["method"])].reset_index(drop=True)
        with monkeypatch.context() as patch:
            Reaper(patch, kills)
            try:
                compact(store)
                break
            except Killed:
                kills += 1
        assert read(store).equals(own)
        assert examples(store).items() <= images.items()
        compact(store)
        mine = rows[rows["method"].isin(own["method"])].reset_index(drop=True)
        assert every_row(store).equals(mine)  # each row once, in one file
        assert {key: value for key, value in images.items() if key[0] == copies[0].name} == examples(store)
        shutil.rmtree(store)
    assert kills > 2 * BLOCKS


def test_a_reader_whose_files_go_reads_the_merged_one(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, real, merged = read(filled), parquet.read_rows, []

    def slow(path: Path, names: list[str]) -> Any:
        table = real(path, names)
        if not merged:
            merged.append(compact(filled))
        return table

    monkeypatch.setattr("robustbench_lite.evaluation.store.read_rows", slow)
    assert read(filled).equals(wanted)
    assert merged[0].after < merged[0].before
    fakes.CALLS.clear()
    merged.clear()
    shutil.rmtree(filled)
    fill(filled)
    fakes.CALLS.clear()
    assert len(fill(filled).records) == len(wanted)  # a run that reads its blocks from files that go
    assert merged
    assert not fakes.CALLS


def test_a_listing_during_a_merge_misses_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, real = read(filled), Path.glob
    victim = files(filled)[0].parent
    state = {"merged": False}

    def torn(folder: Path, pattern: str) -> Any:
        """A listing that shows neither the old files, gone before it came to them, nor the new one, behind it."""
        found = list(real(folder, pattern))
        if folder == victim and pattern == "*.parquet" and not state["merged"]:
            state["merged"] = True
            compact(filled)
            return iter([])
        return iter(found)

    monkeypatch.setattr(Path, "glob", torn)
    assert read(filled).equals(wanted)
    assert state["merged"]


def test_two_compactions_at_a_time(filled: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[compact.__module__]
    for moment in ("_read", "_write", "_same"):
        store = Path(shutil.copytree(original, filled.parent / moment))
        real, state = getattr(module, moment), {"calls": 0}

        def interrupted(*arguments: Any, real: Any = real, state: Any = state, store: Path = store) -> Any:
            state["calls"] += 1
            if state["calls"] == 2:
                compact(store)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, moment, interrupted)
            compact(store)
        assert read(store).equals(read(original)), moment
        compact(store)
        assert every_row(store).equals(every_row(original)), moment
        assert examples(store) == examples(original), moment


def test_examples_that_go_between_two_looks(filled: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compaction takes a file away after its records were read, and before its examples are."""
    module, calls = sys.modules[compact.__module__], []
    real = module.read_whole

    def slow(path: Path, names: list[str]) -> Any:
        found = real(path, names)
        calls.append(path)
        if len(calls) == 1 or (len(calls) < 40 and path.with_suffix(".safetensors").exists()):
            monkeypatch.setattr(module, "read_whole", real)
            compact(filled)
            monkeypatch.setattr(module, "read_whole", slow)
        return found

    monkeypatch.setattr(module, "read_whole", slow)
    compact(filled)
    monkeypatch.undo()
    compact(filled)
    assert every_row(filled).equals(every_row(original))
    assert examples(filled) == examples(original)


def test_an_example_whose_file_goes_is_read_from_the_merged_one(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fallen = Store(filled).records(success=True)
    real, calls = Store.examples_of, []

    def slow(store: Store, records: Path) -> Any:
        calls.append(records)
        if len(calls) == 1:
            compact(filled)  # after the rows were read, and before their examples are
        return real(store, records)

    monkeypatch.setattr(Store, "examples_of", slow)
    for head in Store(filled).heads():
        cell: Any = SimpleNamespace(key=head.name)
        rows = fallen[fallen["method"] == head.row["method"]]
        for name in zip(rows["index"], rows["sample_hash"], rows["label"], strict=True):
            found = list(Store(filled).examples(cell, name))
            assert len(found) == 1
            assert name[0] in found[0].index
    assert len(calls) == len(fallen) + 1


def test_samples_are_cut_out_of_a_merged_file(filled: Path) -> None:
    compact(filled)
    for head in Store(filled).heads():
        cell: Any = SimpleNamespace(key=head.name, renamed=lambda rows: rows)
        for block in range(BLOCKS):
            own = np.arange(BLOCK * block, BLOCK * block + SIZE)
            assert Store(filled).rows(cell, own[1:])["index"].to_pylist() == own[1:].tolist()


def test_readers_and_writers_beside_it(tmp_path: Path) -> None:
    fill(tmp_path)
    opened, stop, trouble, written = Store(tmp_path), threading.Event(), [], [0]
    head = next(head for head in opened.heads() if head.row["method"] == "Shift")
    table = parquet.read_rows(next(iter((tmp_path / "cells" / head.name).glob("*.parquet"))), parquet.SCHEMA.names)
    about = pq.read_schema(next(iter((tmp_path / "cells" / head.name).glob("*.parquet")))).metadata

    def write() -> None:
        place = table.schema.get_field_index("index")
        for block in range(10, 70):
            moved = [index + block * BLOCK for index in range(len(table))]
            rows = table.set_column(place, table.schema.field(place), [moved]).replace_schema_metadata(about)
            path = fresh_path(tmp_path / "cells" / head.name, block, block)
            pq.write_table(rows, path.with_suffix(".tmp-x"))
            path.with_suffix(".tmp-x").replace(path)
            written[0] = block
        stop.set()

    def merge() -> None:
        while not stop.is_set():
            compact(tmp_path)

    def look() -> None:
        while not stop.is_set():
            known = written[0]
            found = Store(tmp_path).records(["index"], method="Shift")["index"]
            if found.duplicated().any() or (known and set(range(10, known + 1)) - set(found // BLOCK)):
                trouble.append((known, len(found)))

    workers = [threading.Thread(target=work) for work in (write, merge, look, look)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not trouble
    compact(tmp_path)
    found = every_row(tmp_path)
    assert (found["method"] == "Shift").sum() == BLOCKS * SIZE + 60 * len(table)
    assert not found.duplicated(KEY).any()


def test_an_index_with_two_labels_keeps_both_examples(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path, data(relabelled=True))
    rows, images, table = every_row(tmp_path), examples(tmp_path), summarize(Store(tmp_path).records())
    compact(tmp_path)
    assert len(files(tmp_path)) == 8
    assert every_row(tmp_path).equals(rows)
    assert examples(tmp_path) == images
    assert summarize(Store(tmp_path).records()).equals(table)


def test_files_of_other_versions_are_not_mixed(filled: Path) -> None:
    victim = files(filled)[0]
    table = pq.ParquetFile(victim).read()
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"environment": b'{"torch":"1"}'}), victim)
    wanted = read(filled)
    compact(filled)
    mine = {pq.read_schema(path).metadata[b"environment"] for path in victim.parent.glob("*.parquet")}
    assert len(mine) == 2
    assert len(files(filled)) == 5
    assert read(filled).equals(wanted)


def test_a_row_that_two_machines_wrote_is_kept_once(filled: Path) -> None:
    wanted, rows = read(filled), every_row(filled)
    for path in files(filled):
        for suffix in (".parquet", ".safetensors"):
            if path.with_suffix(suffix).exists():
                shutil.copy(path.with_suffix(suffix), path.with_name(path.name.replace("-", "-0")).with_suffix(suffix))
    compact(filled)
    assert every_row(filled).equals(rows)
    assert read(filled).equals(wanted)


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_what_is_damaged_is_left_and_named(filled: Path, suffix: str) -> None:
    victim = next(path for path in files(filled) if path.with_suffix(".safetensors").exists()).with_suffix(suffix)
    victim.write_bytes(victim.read_bytes()[:200])
    kept = victim.read_bytes()
    done = compact(filled)
    assert len(done.left) == 1
    assert victim.stem in done.left[0]
    assert victim.read_bytes() == kept
    assert victim.with_suffix(".parquet").exists()
    assert len(files(filled)) == 5


def test_a_full_disk_loses_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, before = read(filled), sorted(filled.rglob("*"))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        compact(filled)
    monkeypatch.undo()
    assert sorted(filled.rglob("*")) == before
    assert read(filled).equals(wanted)


def test_what_does_not_read_back_does_not_replace(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(filled)
    monkeypatch.setattr("robustbench_lite.evaluation.compact._equal", lambda *_: False)
    with pytest.raises(StoreError, match="old files are still there"):
        compact(filled)
    assert set(before) <= set(files(filled))


def test_a_store_that_is_none_or_newer(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        compact(tmp_path / "nowhere")
    path = files(filled)[0]
    table = pq.ParquetFile(path).read()
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"schema_version": b"99"}), path)
    with pytest.raises(NewerSchemaError):
        compact(filled)


def test_spans_of_names(tmp_path: Path) -> None:
    assert span(fresh_path(tmp_path, 3, 3)) == (3, 3)
    assert span(fresh_path(tmp_path, 0, 123456)) == (0, 123456)
    paths = [tmp_path / f"{name}-a.parquet" for name in ("00000_00019", "00021", "00030_00040")]
    assert not overlap(paths)
    assert overlap([*paths, tmp_path / "00007-b.parquet"])
    assert overlap([*paths, tmp_path / "00040-b.parquet"])
    assert not overlap([])
