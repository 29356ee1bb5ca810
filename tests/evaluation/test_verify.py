"""Verification accepts a store as it was written, and names every record that was tampered with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import Exact, Linear, Shift, two_blocks
from safetensors.numpy import load_file, save_file

from robustbench_lite.attacks import PGD, RandomNoise
from robustbench_lite.core.spatial import RotationTranslation
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Store, evaluate
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


def edit_records(column: str, value: Any) -> Callable[[Path], None]:
    def tamper(store: Path) -> None:
        path = attacked(store, ".parquet")
        table = pq.read_table(path)
        place = table.schema.get_field_index(column)
        changed = pa.array([value] * len(table), type=table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), changed), path)

    return tamper


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
    ],
    ids=["outside", "nan", "clean", "distance", "success", "hash", "missing"],
)
def test_tampering_is_named(filled: Path, tamper: Callable[[Path], None], reason: str) -> None:
    tamper(filled)
    found = verify(filled, MODELS, DATA)
    assert not found.ok
    assert any(reason in mismatch.reason for mismatch in found.mismatches)
    assert {mismatch.file for mismatch in found.mismatches} == {str(attacked(filled, ".parquet").relative_to(filled))}


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
