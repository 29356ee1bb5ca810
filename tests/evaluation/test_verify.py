"""Verification accepts a store as it was written, and names every record that was tampered with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_fakes import Exact, Linear, Shift, two_blocks
from safetensors.numpy import load_file, save_file

from robustbench_lite.attacks import PGD, RandomNoise
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Store, evaluate, summarize
from robustbench_lite.evaluation.compact import compact
from robustbench_lite.evaluation.fingerprint import fingerprint
from robustbench_lite.evaluation.verify import verify

DATA = two_blocks(30)
MODELS = {fingerprint(Linear()): Linear()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    fill(folder)
    return folder


@pytest.fixture
def filled(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def fill(store: Path, mode: str = "full") -> Any:
    methods: dict[str, Any] = {"attacks": [Shift(), PGD(steps=3), RandomNoise(draws=3)], "certifiers": [Exact()]}
    threats = [Lp("linf", 0.05), RotationTranslation(20, 2)]
    return evaluate(Linear(), DATA, threats, store=store, mode=mode, **methods)


def attacked(store: Path, suffix: str) -> Path:
    """A file of `Shift`'s, which has successes at a distance."""
    for part in Store(store).parts():
        if part.identity["kind"] == "attack" and part.identity["method"]["_target_"].endswith("Shift"):
            return part.path.with_suffix(suffix)
    raise LookupError("no such file")


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_an_honest_store_holds(tmp_path: Path, mode: str) -> None:
    report = fill(tmp_path, mode)
    found = verify(str(tmp_path), MODELS, DATA)
    assert found.ok, (found.mismatches, found.skipped, found.warnings)
    rows = report.records
    assert found.examples == rows["success"].sum() > 0
    assert found.clean == 30
    assert found.records == len(rows)
    pd.testing.assert_frame_equal(found.table, summarize(Store(tmp_path).records(), Store(tmp_path).flags()))
    for name in ("clean", "worst_case", "certified"):
        assert sorted(found.table[name].fillna(-1)) == sorted(report.summary()[name].fillna(-1))
    assert rows.loc[rows["threat"].fillna("").str.startswith("rotation") & (rows["distance"] > 0), "success"].any()


def edit_examples(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(store: Path) -> None:
        path = attacked(store, ".safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return tamper


def edit_records(column: str, value: Any, kind: str = "attack") -> Callable[[Path], None]:
    """Set a column of a file, or change its values one by one."""

    def tamper(store: Path) -> None:
        path = attacked(store, ".parquet") if kind == "attack" else of_kind(store, kind)
        table = pq.ParquetFile(path).read()
        place = table.schema.get_field_index(column)
        old = table[column].to_pylist()
        new = [value(item) for item in old] if callable(value) else [value] * len(old)
        changed = pa.array(new, type=table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), changed), path)

    return tamper


def of_kind(store: Path, kind: str) -> Path:
    """A file of a kind of methods, or of a class of them."""
    for part in Store(store).parts():
        if kind == part.identity["kind"] or str((part.identity["method"] or {}).get("_target_")).endswith(f".{kind}"):
            return part.path
    raise LookupError(kind)


def drop_rows(kind: str, successes: bool) -> Callable[[Path], None]:
    """Take rows out of a file: of an attack the failures or the successes, of others every second one."""

    def tamper(store: Path) -> None:
        path = attacked(store, ".parquet") if kind == "attack" else of_kind(store, kind)
        table = pq.ParquetFile(path).read()
        won = table["success"].to_pylist()
        keep = [place for place, success in enumerate(won) if bool(success) != successes]
        pq.write_table(table.take(keep), path)

    return tamper


def twice(store: Path) -> None:
    path = of_kind(store, "certifier")
    table = pq.ParquetFile(path).read()
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path)


def move_to_another_cell(store: Path) -> None:
    """The rows of the weaker attack in the place of the stronger one's."""
    attacks = [part.path for part in Store(store).parts() if part.identity["kind"] == "attack"]
    mine = attacked(store, ".parquet")
    other = next(path for path in attacks if path.parent != mine.parent and path.name[:5] == mine.name[:5])
    mine.write_bytes(other.read_bytes())


def move_out(tensors: dict[str, Any]) -> None:
    tensors["x_adv"][:] = np.clip(tensors["x_adv"] + 0.2, 0, 1)


def make_clean(tensors: dict[str, Any]) -> None:
    places = {int(index): place for place, index in enumerate(DATA.indices)}
    tensors["x_adv"][:] = DATA.images.numpy()[[places[int(i)] for i in tensors["index"]]]


def blank(tensors: dict[str, Any]) -> None:
    tensors["x_adv"][:] = np.nan


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (edit_examples(move_out), "outside the threat"),
        (edit_examples(blank), "outside the threat"),
        (edit_examples(make_clean), "the model is right"),
        (edit_records("distance", 0.049), "another distance"),
        (edit_records("success", True), "no stored example"),
        (edit_records("sample_hash", "0" * 16), "hash on record"),
        (lambda store: attacked(store, ".safetensors").unlink(), "no stored example"),
        (edit_records("success", False), "its record counts none"),
        (drop_rows("attack", successes=True), "but no record"),
        (edit_records("margin", lambda lead: lead + 0.1), "the true class leads by"),
        (edit_records("eps", 0.3), "eps is 0.3, the cell's is 0.05"),
        (edit_records("threat", None), "threat is None"),
        (edit_records("method", "Strong", "PGD"), "method is Strong"),
        (edit_records("fingerprint", "f" * 16), "fingerprint is"),
        (edit_records("seed", 7), "seed is 7"),
        (edit_records("label", lambda label: 1 - label), "the label is not the one"),
        (edit_records("correct", lambda right: not right), "does not follow from prediction"),
        (edit_records("certified", True), "certified says something about"),
        (edit_records("distance", lambda far: 0.01 if far == np.inf else far), "a distance without a success"),
        (move_to_another_cell, "the folder should be called"),
        (edit_records("prediction", lambda answer: 1 - answer, "clean"), "the model answers"),
        (edit_records("correct", True, "clean"), "does not follow from prediction"),
        (edit_records("margin", lambda lead: -lead, "clean"), "the true class leads by"),
        (edit_records("sample_hash", "0" * 16, "certifier"), "hash on record"),
        (edit_records("certified", True, "certifier"), "certified, but not by"),
        (edit_records("certificate", "estimate", "certifier"), "certified, but not by"),
        (twice, "there twice"),
    ],
)
def test_tampering_is_named(filled: Path, tamper: Callable[[Path], None], reason: str) -> None:
    before = {path: path.read_bytes() for path in filled.rglob("*") if path.is_file()}
    tamper(filled)
    found = verify(filled, MODELS, DATA)
    assert not found.ok
    assert any(reason in mismatch.reason for mismatch in found.mismatches), found.mismatches
    changed = {p.with_suffix(".parquet") for p, data in before.items() if not p.exists() or p.read_bytes() != data}
    assert {mismatch.file for mismatch in found.mismatches} == {str(path.relative_to(filled)) for path in changed}


class Coin:
    """A model that errs with some probability, whatever it sees; it is no part of its fingerprint."""

    stochastic = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wrong = torch.rand(len(x)) < float(os.environ["COIN"])
        return torch.stack([wrong.double(), 1 - wrong.double()], dim=1)


@pytest.mark.parametrize(("share", "holds"), [(0.95, True), (0.6, True), (0.1, False)])
def test_a_randomised_model_must_err_often(
    share: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lucky draw is not enough: the example of a model that errs often is put to one that rarely does."""
    x = torch.rand(10, 1, 4, 4)
    data = Dataset("coin", "test", x, torch.ones(10, dtype=torch.int64), torch.arange(10), 2)
    monkeypatch.setenv("COIN", "0.95")
    evaluate(Coin(), data, Lp("linf", 0.05), [RandomNoise(draws=2)], store=tmp_path, name="Coin")
    monkeypatch.setenv("COIN", str(share))
    found = verify(tmp_path, lambda _: Coin(), data)
    assert found.examples == 10
    assert [m.reason for m in found.mismatches] == ([] if holds else ["the model is right on the example"] * 10)


def test_files_that_are_merged_meanwhile_are_checked_once_more(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, real, merged = verify(filled, MODELS, DATA), Store.file_records, []

    def slow(store: Store, part: Any) -> Any:
        if len(merged) < 4:
            merged.append(part)
        if len(merged) == 3:
            compact(filled)
        return real(store, part)

    monkeypatch.setattr(Store, "file_records", slow)
    found = verify(filled, MODELS, DATA)
    assert found.ok, (found.mismatches, found.skipped, found.warnings)
    assert found.examples >= wanted.examples


def test_a_compacted_store_holds(filled: Path) -> None:
    wanted = verify(filled, MODELS, DATA)
    compact(filled)
    found = verify(filled, MODELS, DATA)
    assert found.ok
    assert (found.examples, found.clean, found.records) == (wanted.examples, wanted.clean, wanted.records)
    pd.testing.assert_frame_equal(found.table, wanted.table)


def test_what_is_not_at_hand_is_not_passed_over(filled: Path) -> None:
    assert all("not at hand" in reason for reason in verify(filled, {}, DATA).skipped)
    assert verify(filled, lambda _: None, DATA).skipped
    assert verify(filled, MODELS, {}).skipped
    wrong = verify(filled, lambda _: Linear(7.0), DATA)
    assert all("has the fingerprint" in reason for reason in wrong.skipped)
    assert not wrong.ok
    assert wrong.examples == 0
    assert verify(filled, MODELS, {"linear": DATA}).ok
    shuffled = Dataset("linear", "test", DATA.images.flip(0), DATA.labels, DATA.indices, 2)
    assert any("hash" in m.reason for m in verify(filled, MODELS, shuffled).mismatches)
    assert any("hash" in m.reason for m in verify(filled, MODELS, DATA.head(5)).mismatches)


def test_damaged_examples_are_reported(filled: Path) -> None:
    attacked(filled, ".safetensors").write_bytes(b"half")
    found = verify(filled, MODELS, DATA)
    assert found.warnings
    assert any("no stored example" in mismatch.reason for mismatch in found.mismatches)


def test_violations_are_found_again(tmp_path: Path) -> None:
    report = evaluate(Linear(), DATA, Lp("linf", 0.05), [Shift()], [Exact(3.0)], store=tmp_path)
    assert len(verify(tmp_path, MODELS, DATA).violations) == len(report.violations) > 0


def test_parameters_and_image_must_agree(filled: Path) -> None:
    for part in Store(filled).parts():
        path = part.path.with_suffix(".safetensors")
        if path.exists() and "parameters" in (tensors := load_file(path)):
            tensors["parameters"][:] = -tensors["parameters"] + 1e-2
            save_file(tensors, path)
    reasons = {mismatch.reason for mismatch in verify(filled, MODELS, DATA).mismatches}
    assert any("parameters stand for" in reason for reason in reasons)
