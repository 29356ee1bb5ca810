"""The store keeps what it was given, once, and loses nothing else when something breaks."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import evaluation_fakes as fakes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import Exact, Linear, Shift, two_blocks, two_groups

from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import Report, Store, StoreError, evaluate, files, summarize
from robustbench_lite.evaluation import store as store_module
from robustbench_lite.evaluation.harness import UnsavedError
from robustbench_lite.evaluation.records import SCHEMA, empty_records, to_frame

THREAT = Lp("linf", 0.05)
COUNT = 40  # in two files a cell
KEY = ["kind", "method", "index"]


@pytest.fixture(autouse=True)
def _fresh_calls() -> None:
    fakes.CALLS.clear()


def run(store: Any, **more: Any) -> Report:
    arguments: dict[str, Any] = {"attacks": [Shift(0.5), Shift()], "certifiers": [Exact()]} | more
    return evaluate(Linear(), two_groups(COUNT), THREAT, store=store, **arguments)


def comparable(frame: Any) -> Any:
    return frame.drop(columns="seconds").sort_values(KEY, ignore_index=True)


def same(one: Any, two: Any) -> bool:
    return bool(comparable(one).equals(comparable(two)))


def parquet(root: Path) -> list[Path]:
    return sorted(root.rglob("*.parquet"))


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    report = run(tmp_path)
    assert same(Store(tmp_path).records(), report.records)
    assert same(run(None).records, report.records)
    names = [path.name.partition("-")[0] for path in parquet(tmp_path)]
    assert sorted(names) == ["00000"] * 4 + ["00020"] * 4
    for path in parquet(tmp_path):
        index = pq.read_table(path).column("index").to_numpy()
        assert (index // 500 == int(path.name[:5])).all()


def test_a_sparse_draw_is_one_file_a_cell_and_is_read_by_sample(tmp_path: Path) -> None:
    samples = two_blocks(COUNT)
    report = evaluate(Linear(), samples, THREAT, [Shift()], [Exact()], store=tmp_path)
    assert [path.name.partition("-")[0] for path in parquet(tmp_path)] == ["00000_00001"] * 3
    fakes.CALLS.clear()
    part = samples.take(range(COUNT // 4, COUNT - 5))
    some = evaluate(Linear(), part, THREAT, [Shift()], [Exact()], store=tmp_path)
    assert not fakes.CALLS
    kept = report.records[report.records["index"].isin(part.indices.tolist())]
    assert some.records.equals(kept.reset_index(drop=True))


def test_a_newer_file_is_refused_whichever_samples_it_is_about(tmp_path: Path) -> None:
    samples = two_blocks(COUNT)
    evaluate(Linear(), samples.take(range(5)), THREAT, [Shift()], store=tmp_path)
    for path in parquet(tmp_path):
        table = pq.ParquetFile(path).read()
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"schema_version": b"99"}), path)
    with pytest.raises(StoreError, match="schema version 99"):
        evaluate(Linear(), samples.take(range(5, 12)), THREAT, [Shift()], store=tmp_path)


def test_files_about_other_samples_of_a_block_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, real, seen = two_blocks(COUNT), store_module.read_rows, []
    for part in (samples.take(range(5)), samples.take(range(5, 12)), samples.take(range(12, COUNT))):
        evaluate(Linear(), part, THREAT, [Shift()], store=tmp_path)
    monkeypatch.setattr(store_module, "read_rows", lambda path, names: seen.append(path) or real(path, names))
    fakes.CALLS.clear()
    report = evaluate(Linear(), samples.take(range(4, 10)), THREAT, [Shift()], store=tmp_path)
    assert not fakes.CALLS
    assert report.records["index"].tolist() == 2 * list(range(4, 10))
    assert len(seen) == len(set(seen)) == 4  # two files a cell


def test_a_second_run_computes_nothing_and_gives_the_same_table(tmp_path: Path) -> None:
    first, written = run(tmp_path), parquet(tmp_path)
    fakes.CALLS.clear()
    second = run(tmp_path)
    assert not fakes.CALLS
    assert parquet(tmp_path) == written
    assert second.records.equals(first.records)  # seconds included: they are the first run's
    assert second.summary().equals(first.summary())


def test_the_table_follows_from_the_store(tmp_path: Path) -> None:
    report = run(tmp_path)
    assert summarize(Store(tmp_path).records(), Store(tmp_path).flags()).equals(
        report.summary()[summarize(Store(tmp_path).records()).columns.tolist()]
    )


def test_reading_projects_and_filters(tmp_path: Path) -> None:
    run(tmp_path)
    part = Store(tmp_path).records(["method", "success"], kind="attack", method="Shift")
    assert list(part.columns) == ["method", "success"]
    assert len(part) == COUNT
    assert set(part["method"]) == {"Shift"}


@pytest.mark.parametrize("rows", [0, 1])
def test_dtypes_follow_from_the_schema_alone(rows: int, tmp_path: Path) -> None:
    full = run(None).records
    frame = to_frame(empty_records()) if rows == 0 else full[full["kind"] == "clean"]
    assert (frame.dtypes == full.dtypes).all()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "noise"])
def test_a_damaged_file_is_reported_set_aside_and_computed_again(tmp_path: Path, damage: str) -> None:
    before = run(tmp_path)
    victim = next(p for p in parquet(tmp_path) if pq.read_table(p).column("method")[0].as_py() == "Shift")
    data = bytearray(victim.read_bytes())
    middle = pq.ParquetFile(victim).metadata.row_group(0).column(12).dictionary_page_offset or 400
    data[middle + 40] ^= 0xFF
    victim.write_bytes(
        {"truncated": data[: len(data) // 2], "empty": b"", "flipped": data, "noise": b"x" * 999}[damage]
    )
    fakes.CALLS.clear()
    after = run(tmp_path)
    assert len(after.warnings) == 1
    assert victim.name in after.warnings[0]
    assert victim.with_name(victim.name + ".corrupt").exists()
    assert not victim.exists()
    assert set(fakes.CALLS) == {"Shift 1"}
    assert fakes.count("Shift 1") == COUNT // 2
    assert same(after.records, before.records)
    assert same(Store(tmp_path).records(), before.records)


def test_a_reader_reports_damage_and_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    victim = parquet(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:100])
    store = Store(tmp_path)
    assert len(store.records()) < 4 * COUNT
    assert len(store.warnings) == 1
    assert victim.exists()


def test_a_system_error_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(store_module, "read_rows", fail)
    with pytest.raises(OSError, match="too many"):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.corrupt"))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = parquet(tmp_path)[0]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"schema_version": b"99"}), path)
    for use in (lambda: run(tmp_path), lambda: Store(tmp_path).records(), lambda: list(Store(tmp_path).parts())):
        with pytest.raises(StoreError, match=r"schema version 99.*upgrade"):
            use()


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_a_full_disk_costs_the_cell_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    writes, real = [], os.fsync

    def full(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists(f"/proc/self/fd/{handle}") else ""
        if f"{suffix}.tmp" in name:
            writes.append(name)
            if len(writes) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to know which file is written")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnsavedError, match="No space left") as caught:
        run(tmp_path)
    whole = run(None)
    assert same(caught.value.report.records, whole.records)  # the table is there all the same
    assert len(caught.value.report.unsaved) == 1
    assert len(parquet(tmp_path)) == 7
    assert not list(tmp_path.rglob("*.tmp*"))
    monkeypatch.undo()
    fakes.CALLS.clear()
    assert same(run(tmp_path).records, whole.records)
    assert sum(len(calls) for calls in fakes.CALLS.values()) == 1  # the lost file alone


def test_a_store_that_cannot_be_written_stops_the_run_before_it_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:
        if "probe" in path.name:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreError, match=r"cannot be written \(Read-only file system\)"):
        run(tmp_path)
    assert not fakes.CALLS
    monkeypatch.undo()
    run(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert len(run(tmp_path).records) == 4 * COUNT  # a finished store need not be written


def test_a_file_in_the_place_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        run(tmp_path / "here")
    with pytest.raises(StoreError, match="no store"):
        Store(tmp_path / "nowhere").records()


def test_leftovers_are_ignored_and_old_ones_removed(tmp_path: Path) -> None:
    before = run(tmp_path)
    folder = parquet(tmp_path)[0].parent
    old = [folder / "00000-aa.parquet.tmp-1", folder / "00000-bb.safetensors"]
    young = [folder / "00000-cc.parquet.tmp-2", folder / "00000-dd.safetensors"]
    for path in [*old, *young]:
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (time.time() - 2 * files.STALE,) * 2)
    assert same(run(tmp_path).records, before.records)
    assert [path.exists() for path in [*old, *young]] == [False, False, True, True]
    assert sum(p.suffix == ".safetensors" for p in folder.iterdir()) >= 1


def test_a_row_that_two_machines_wrote_is_read_once(tmp_path: Path) -> None:
    report = run(tmp_path)
    for path in parquet(tmp_path):
        path.with_name(path.name.replace("-", "-0")).write_bytes(path.read_bytes())
    assert same(Store(tmp_path).records(), report.records)
    assert same(run(tmp_path).records, report.records)
    assert len(Store(tmp_path).records(["method"])) == 4 * COUNT


def test_examples_are_there_before_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        order.append(Path(target).suffix)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    run(tmp_path)
    assert order.count(".parquet") == 8
    for place, suffix in enumerate(order):
        if suffix == ".safetensors":
            assert order[place + 1] == ".parquet"


def test_every_success_has_its_example(tmp_path: Path) -> None:
    run(tmp_path)
    store = Store(tmp_path)
    for part in store.parts():
        rows, examples = store.file_records(part), store.examples_of(part.path)
        assert rows is not None
        wanted = sorted(rows.loc[rows["success"].fillna(False).astype(bool), "index"])
        assert wanted == sorted([] if examples is None else examples.index.tolist())


def test_schema_of_the_design() -> None:
    design = (
        "dataset index sample_hash label defense fingerprint threat eps kind method version prediction correct success"
    )
    design += " certified status distance radius margin forwards backwards first_success seconds seed precision"
    names = design.split()
    assert SCHEMA.names[: len(names)] == names
    assert SCHEMA.names[len(names) :] == ["certificate", "confidence", "suspicion"]
    assert isinstance(SCHEMA, pa.Schema)
