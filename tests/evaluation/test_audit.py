"""The audit catches those who lie, and nobody else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from evaluation_fakes import Exact, Liar, Linear, Shift, exact_radius, two_blocks
from safetensors.numpy import load_file
from scipy.stats import binom

from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import evaluate
from robustbench_lite.evaluation.audit import audit
from robustbench_lite.evaluation.records import SCHEMA, to_frame
from robustbench_lite.evaluation.witnesses import may_contradict

THREAT = Lp("linf", 0.05)


def ids(contradictions: Any) -> set[str]:
    return {c.id for c in contradictions}


def test_the_honest_are_left_alone() -> None:
    report = evaluate(Linear(), two_blocks(80), THREAT, [Shift(), Shift(0.5)], [Exact()])
    assert report.violations == []
    assert report.findings == []


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_a_lying_certifier_is_caught_with_both_witnesses(tmp_path: Path, mode: str) -> None:
    data, liar = two_blocks(80), Exact(factor=3.0, lies_about=2)
    report = evaluate(Linear(), data, THREAT, [Shift()], [liar], store=tmp_path, mode=mode, audit=1.0)
    above = (data.images.flatten(1).sum(dim=1) >= 8).reshape(-1, 1, 1, 1)
    right = ((~above).flatten().long() == data.labels).numpy()
    worst = torch.where(above, data.images - 0.05, data.images + 0.05).clamp(0, 1)  # linear: no attack does better
    falls = ((worst.flatten(1).sum(dim=1) >= 8) != above.flatten()).numpy()
    lied = right & falls & (3 * exact_radius(data.images).numpy() > 0.05) & (data.indices.numpy() % 2 == 0)
    assert lied.sum() >= 2
    assert {v.facts["index"] for v in report.violations} == set(data.indices[lied].tolist())
    assert ids(report.violations) == {"broken_certificate"}
    assert report.verdict == "invalid"
    assert report.summary()["verdict"].item() == "invalid"
    assert len(report.records[report.records["kind"] == "clean"]) == 80  # all samples were finished
    for violation in report.violations:
        listed = json.loads((tmp_path / violation.witness).read_text())
        kept = next(entry for entry in listed if entry["index"] == violation.facts["index"])
        tensors = load_file((tmp_path / violation.witness).with_suffix(".safetensors"))
        row = tensors["index"].tolist().index(kept["index"])
        x, x_adv = tensors["x"][row].astype(float), tensors["x_adv"][row].astype(float)
        assert abs(x_adv - x).max() == pytest.approx(kept["witness_distance"]) != 0
        assert abs(x_adv - x).max() <= kept["certifier_radius"]
        assert (x_adv.sum() < 8) != (x.sum() < 8)
        assert np.array_equal(violation.example, tensors["x_adv"][row])


def test_witnesses_survive_resume(tmp_path: Path) -> None:
    first = evaluate(Linear(), two_blocks(40), THREAT, [Shift()], [Exact(3.0)], store=tmp_path)
    files = sorted(tmp_path.glob("violations/*"))
    again = evaluate(Linear(), two_blocks(40), THREAT, [Shift()], [Exact(3.0)], store=tmp_path)
    assert [v.evidence for v in again.violations] == [v.evidence for v in first.violations]
    assert sorted(tmp_path.glob("violations/*")) == files


def test_a_witness_keeps_its_precision(tmp_path: Path) -> None:
    methods: dict[str, Any] = {"attacks": [Shift()], "certifiers": [Exact(3.0)], "precision": "float64"}
    report = evaluate(Linear(), two_blocks(40), THREAT, store=tmp_path, **methods)
    paths = sorted(tmp_path.glob("violations/*.safetensors"))
    assert report.violations
    assert paths
    assert all(load_file(path)["x_adv"].dtype == np.float64 for path in paths)


def test_a_witness_whose_example_is_damaged_is_told_without_an_image(tmp_path: Path) -> None:
    evaluate(Linear(), two_blocks(40), THREAT, [Shift()], [Exact(3.0)], store=tmp_path)
    shutil.rmtree(tmp_path / "violations")
    for path in tmp_path.glob("cells/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    report = evaluate(Linear(), two_blocks(40), THREAT, [Shift()], [Exact(3.0)], store=tmp_path)
    listed = {v["index"]: v for path in tmp_path.glob("violations/*.json") for v in json.loads(path.read_text())}
    kept = np.concatenate([load_file(path)["index"] for path in tmp_path.glob("violations/*.safetensors")])
    assert set(listed) == {v.facts["index"] for v in report.violations} != set()
    assert set(kept.tolist()) == {index for index, v in listed.items() if v["witness_distance"] == 0}
    assert all((v.example is None) == (v.facts["witness_distance"] > 0) for v in report.violations)
    assert any("damaged examples" in warning for warning in report.warnings)


def test_a_proof_for_a_misclassified_image_is_caught_without_any_attack() -> None:
    class Overconfident(Exact):
        def __call__(self, model: Any, x: Any, y: Any, threat: Any, **rest: Any) -> Any:
            found = super().__call__(model, x, y, threat, **rest)
            object.__setattr__(found, "prediction", y)
            object.__setattr__(found, "certified", found.status == 1)
            return found

    report = evaluate(Linear(), two_blocks(80), THREAT, certifiers=[Overconfident()])
    assert "broken_certificate" in ids(report.violations)
    assert all(v.facts["witness_distance"] == 0 for v in report.violations)
    assert "other_model" in ids(report.findings)


def test_an_attack_at_one_eps_audits_a_certificate_at_another() -> None:
    data = two_blocks(80)
    report = evaluate(Linear(), data, [Lp("linf", 0.01), Lp("linf", 0.06)], [Shift()], [Exact(8.0)])
    crossed = [v for v in report.violations if v.facts["certifier_eps"] != v.facts["witness_eps"]]
    assert crossed
    assert all(v.facts["witness_distance"] <= v.facts["certifier_radius"] for v in crossed)
    assert all(len(v.groups) == 2 for v in crossed)
    alone = evaluate(Linear(), data, Lp("linf", 0.01), [Shift()], [Exact(8.0)])
    assert len(alone.violations) < len(report.violations)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_a_lying_attack_is_refuted_and_gains_nothing(outside: bool, mode: str) -> None:
    data = two_blocks(40)
    report = evaluate(Linear(), data, THREAT, [Liar(outside=outside)], [Exact()], mode=mode, audit=1.0)
    row = report.summary().iloc[0]
    assert row["worst_case"] == row["clean"]
    assert ids(report.violations) == {"refuted_attack"}
    assert row["verdict"] == "invalid"
    rows = report.records[(report.records["kind"] == "attack") & (report.records["status"] == "refuted").fillna(False)]
    assert len(rows) == len(report.violations) >= row["clean"] * 40
    assert (rows["distance"] == np.inf).all()
    assert (rows["first_success"] == -1).all()
    images = {int(index): image.numpy() for index, image in zip(data.indices, data.images, strict=True)}
    for violation in report.violations:
        moved = not np.array_equal(violation.example, images[violation.facts["index"]])
        assert moved == outside


def probabilistic(failures: int, n: int, alpha: float) -> pd.DataFrame:
    """Records of n probabilistic certificates, of which an attack breaks the first `failures`."""
    report = evaluate(Linear(), two_blocks(2), THREAT, [Shift()], [Exact(kind="probabilistic", alpha=alpha)])
    rows = report.records
    parts = []
    for kind, values in {
        "clean": {"prediction": 0, "correct": True, "margin": 1.0},
        "attack": {"margin": -1.0, "prediction": 1, "status": pd.NA},
        "certifier": {"prediction": 0, "correct": True, "certified": True, "radius": 0.05, "status": "verified"},
    }.items():
        one = rows[rows["kind"] == kind].iloc[:1]
        part = one.iloc[[0] * n].assign(index=range(n), label=0, **values).astype(rows.dtypes)
        broken = np.arange(n) < failures
        if kind == "attack":
            part = part.assign(success=broken, distance=np.where(broken, 0.04, np.inf)).astype(rows.dtypes)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(("n", "alpha"), [(50, 0.01), (200, 0.001), (400, 0.05)])
def test_probabilistic_certificates_may_fail_as_often_as_the_binomial_allows(n: int, alpha: float) -> None:
    allowed = int(binom.isf(1e-3, n, alpha))  # the largest count with P(X >= count + 1) <= 1e-3 still ahead
    for failures in (1, allowed, allowed + 1, allowed + 2):
        found = audit(probabilistic(failures, n, alpha))
        chance = binom.sf(failures - 1, n, alpha)
        assert ids(found.violations) == ({"too_many_failures"} if chance < 1e-3 else set())
        assert ids(found.findings) == (set() if chance < 1e-3 else {"expected_failure"})
    assert audit(probabilistic(0, n, alpha)).findings == []


def test_a_broken_estimate_is_a_finding() -> None:
    report = evaluate(Linear(), two_blocks(80), THREAT, [Shift()], [Exact(3.0, kind="estimate")])
    assert ids(report.findings) == {"broken_estimate"}
    assert report.violations == []
    row = report.summary().iloc[0]
    assert row["Exact(factor=3.0, kind=estimate)"] == 0
    assert np.isnan(row["certified"])


def test_a_near_tie_is_a_finding() -> None:
    rows = probabilistic(1, 5, 0.0).assign(certificate="deterministic")
    rows.loc[rows["kind"] == "attack", "margin"] = -1e-7
    found = audit(rows.astype(rows.dtypes))
    assert found.violations == []
    assert ids(found.findings) == {"near_tie"}
    rows.loc[rows["kind"] == "attack", "margin"] = -1e-5
    assert ids(audit(rows).violations) == {"broken_certificate"}


def test_a_witness_beyond_the_radius_proves_nothing() -> None:
    rows = probabilistic(3, 5, 0.0).assign(certificate="deterministic")
    rows.loc[rows["kind"] == "attack", "distance"] = np.nextafter(0.05, 1)
    assert audit(rows).violations == []
    rows.loc[rows["kind"] == "attack", "distance"] = 0.05
    assert len(audit(rows).violations) == 3
    rows.loc[rows["kind"] == "attack", "threat"] = "l2"
    assert audit(rows).violations == []


def test_the_quick_look_at_a_unit_never_misses_a_violation() -> None:
    rng, found = np.random.default_rng(0), []
    kinds = {"clean": None, "attack": Shift(), "certifier": Exact()}
    report = evaluate(Linear(), two_blocks(8), THREAT, [kinds["attack"]], [kinds["certifier"]])
    honest = pa.Table.from_pandas(report.records, schema=SCHEMA, preserve_index=False)
    for _ in range(300):
        rows = report.records.sample(int(rng.integers(3, 13)), random_state=rng).reset_index(drop=True)
        attack, proof = rows["kind"] == "attack", rows["kind"] == "certifier"
        lies = rng.random(len(rows)) < 0.2
        rows.loc[attack & lies, ["success", "distance", "margin"]] = [True, 0.01, -1.0]
        rows.loc[attack & (rng.random(len(rows)) < 0.02), "status"] = "refuted"
        rows.loc[proof & lies, "radius"] = 0.02
        rows.loc[proof & lies, "certified"] = rng.random() < 0.5
        table = pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False)
        violations = ids(audit(to_frame(table)).violations)
        assert may_contradict(table) or not violations
        found.append((may_contradict(table), bool(violations)))
    assert {(True, True), (False, False)} <= set(found)
    assert not may_contradict(honest)
