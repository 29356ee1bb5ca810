"""The table against a recomputation by loops over samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_fakes import Exact, Linear, Shift, two_blocks

from robustbench_lite.core.threats import Lp
from robustbench_lite.evaluation import Store, clopper_pearson, evaluate, summarize
from robustbench_lite.evaluation.scan import scan

THREAT = Lp("linf", 0.05)


def records(n: int, seed: int, attacks: int = 3, certifiers: int = 2) -> pd.DataFrame:
    """Random records of n samples: attacks that succeed here and there, certifiers that prove some of the rest."""
    rng = np.random.default_rng(seed)
    base = evaluate(Linear(), two_blocks(2), THREAT, [Shift()], [Exact()]).records
    correct, parts = rng.random(n) < 0.8, []
    won = rng.random((attacks, n)) < 0.3
    proven = (rng.random((certifiers, n)) < 0.4) & ~won.any(axis=0) & correct

    def rows(kind: str, **values: Any) -> pd.DataFrame:
        one = base[base["kind"] == kind].iloc[:1]
        return one.iloc[[0] * n].assign(index=range(n), label=0, **values).astype(base.dtypes)

    parts.append(rows("clean", correct=correct, prediction=np.where(correct, 0, 1)))
    for place in range(attacks):
        success = won[place] | ~correct
        parts.append(rows("attack", method=f"A{place}", success=success, distance=np.where(success, 0.01, np.inf)))
    parts += [
        rows("certifier", method=f"C{i}", correct=correct, certified=proof, radius=proof * 0.05)
        for i, proof in enumerate(proven)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("seed", range(3))
def test_every_figure_by_brute_force(seed: int) -> None:
    n, rows = 37, records(37, seed)
    table = summarize(rows.sample(frac=1.0, random_state=seed)).iloc[0]  # the order of records does not matter
    facts: dict[str, list[bool]] = {}
    for index in range(n):
        mine = rows[rows["index"] == index].set_index("method")
        correct = bool(mine.loc["clean", "correct"])
        facts.setdefault("clean", []).append(correct)
        outcomes = [correct and not mine.loc[f"A{i}", "success"] for i in range(3)]
        for i, outcome in enumerate(outcomes):
            facts.setdefault(f"A{i}", []).append(outcome)
        facts.setdefault("worst_case", []).append(min(outcomes))
        proofs = [bool(mine.loc[f"C{i}", "certified"]) for i in range(2)]
        for i, proof in enumerate(proofs):
            facts.setdefault(f"C{i}", []).append(proof)
        facts.setdefault("certified", []).append(max(proofs))
    for name, outcomes in facts.items():
        low, high = clopper_pearson(sum(outcomes), n)
        assert (table[name], table[f"{name}_low"], table[f"{name}_high"]) == (sum(outcomes) / n, low, high), name
    assert table["worst_case"] < min(table[f"A{i}"] for i in range(3))  # the mean of the min, not the min of means
    assert table["gap"] == table["worst_case"] - table["certified"]
    assert table["certified"] <= table["worst_case"]


def test_complementary_attacks_leave_nothing() -> None:
    rows = records(20, 0, attacks=2, certifiers=0)
    first = rows["index"] < 10
    for method, mask in (("A0", first), ("A1", ~first)):
        rows.loc[rows["method"] == method, "success"] = mask[rows["method"] == method]
    rows.loc[rows["kind"] == "clean", "correct"] = True
    table = summarize(rows).iloc[0]
    assert table["A0"] == table["A1"] == 0.5
    assert table["worst_case"] == 0.0
    assert np.isnan(table["certified"])
    assert np.isnan(table["gap"])


def test_a_missing_attack_is_counted() -> None:
    rows = records(20, 1)
    gone = (rows["method"] == "A1") & (rows["index"] < 6)
    table = summarize(rows[~gone]).iloc[0]
    left = rows[~gone & (rows["kind"] == "attack")].groupby("index")["success"].any()
    right = rows[rows["kind"] == "clean"].set_index("index")["correct"]
    assert table["incomplete"] == sum(bool(right[i] and not left[i]) for i in range(6))
    assert table["mode"] == "cascade"
    assert np.isnan(table["A1"])
    assert table["worst_case"] == sum(bool(right[i] and not left[i]) for i in range(20)) / 20


def test_kinds_of_certificates_stand_apart() -> None:
    report = evaluate(
        Linear(), two_blocks(60), THREAT, [Shift()], [Exact(0.5), Exact(0.9, kind="probabilistic", alpha=0.01)]
    )
    row = report.summary().iloc[0]
    assert row["certified"] == row["Exact(factor=0.5)"]
    assert row["certified_probabilistic"] == row["Exact(factor=0.9, kind=probabilistic, alpha=0.01)"] > row["certified"]


def test_timeouts_have_a_column() -> None:
    report = evaluate(Linear(), two_blocks(60), THREAT, certifiers=[Exact(timeout=True), Exact(0.5)])
    rows = report.records
    proven = rows.loc[(rows["method"] == "Exact(factor=0.5)"), "certified"].sum()
    row = report.summary().iloc[0]
    assert row["timeouts"] == 60 - proven
    assert row["certified"] == proven / 60


def test_one_row_for_each_model_and_threat(tmp_path: Path) -> None:
    for threshold in (7.5, 8.0):
        for threat in (THREAT, Lp("linf", 0.02)):
            evaluate(
                Linear(threshold), two_blocks(30).head(20), threat, [Shift()], store=tmp_path, name=f"t{threshold}"
            )
    evaluate(Linear(), two_blocks(30), Lp("linf", 0.01), [Shift()], store=tmp_path, mode="cascade", name="t8.0")
    table = summarize(Store(tmp_path).records())
    assert sorted(zip(table["defense"], table["eps"], table["n"], strict=True)) == [
        ("t7.5", 0.02, 20), ("t7.5", 0.05, 20), ("t8.0", 0.01, 30), ("t8.0", 0.02, 20), ("t8.0", 0.05, 20),
    ]  # fmt: skip
    assert len({*table["fingerprint"]}) == 2


@pytest.mark.parametrize("attacked", ["in vain", "not at all"])
def test_what_is_proven_stands_where_nothing_is_left_to_attack(attacked: str, tmp_path: Path) -> None:
    everything = Lp("linf", 1e-4)  # proven of each sample that is right
    attacks = [Shift(0.5), Shift()] if attacked == "in vain" else []
    report = evaluate(Linear(), two_blocks(40), everything, attacks, [Exact()], mode="cascade", audit=0, store=tmp_path)
    row, right = report.summary().iloc[0], report.records.query("kind == 'clean'")["correct"]
    assert row["n"] == 40 > right.sum()
    assert row["worst_case"] == row["clean"] == row["certified"] == right.mean()
    assert (row["worst_case_low"], row["worst_case_high"]) == clopper_pearson(int(right.sum()), 40)
    assert row["gap"] == row["incomplete"] == 0
    assert row["mode"] == "cascade"
    assert all(np.isnan(row[name]) for name in ("Shift", "Shift(reach=0.5)") if name in row)
    (outcomes,) = scan(tmp_path).outcomes
    assert outcomes is not None
    assert outcomes.standing.sum() == right.sum()
    assert scan(tmp_path).table["worst_case"].item() == row["worst_case"]


def test_who_stands_is_not_known_where_something_is_left_to_attack() -> None:
    some = evaluate(Linear(), two_blocks(40), THREAT, certifiers=[Exact(0.5)]).summary().iloc[0]
    assert some["certified"] < some["clean"]
    assert np.isnan(some["worst_case"])
    votes = Exact(
        kind="probabilistic", alpha=0.01
    )  # what holds with confidence 1 - alpha does not prove that it stands
    likely = evaluate(Linear(), two_blocks(40), Lp("linf", 1e-4), certifiers=[votes]).summary().iloc[0]
    assert likely["certified_probabilistic"] == likely["clean"]
    assert np.isnan(likely["worst_case"])


def test_no_method_at_all() -> None:
    row = evaluate(Linear(), two_blocks(10), THREAT).summary().iloc[0]
    assert (row["threat"], row["eps"], row["n"]) == ("linf", 0.05, 10)
    assert np.isnan(row["worst_case"])
    assert np.isnan(row["certified"])
