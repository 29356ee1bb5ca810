"""Budgets: spent where it pays, never silently, and the next run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluation_fakes as fakes
import numpy as np
import pyarrow as pa
import pytest
import torch
from evaluation_fakes import Exact, Liar, Linear, Shift, linear_data, two_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_lite.attacks import PGD, RandomNoise
from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import Budget, Report, Store, evaluate
from robustbench_lite.evaluation.budget import Purse
from robustbench_lite.evaluation.unfinished import BUDGET

THREAT = Lp("linf", 0.05)


@pytest.fixture(autouse=True)
def _fresh_calls() -> None:
    fakes.CALLS.clear()


def data(n: int = 60) -> Dataset:
    """Half of the samples in each of two blocks, all of them right."""
    x, y = linear_data(n, wrong=0.0)
    place = torch.arange(n)
    return Dataset("linear", "test", x, y, place % (n // 2) + 500 * (place // (n // 2)), 2)


def asked(name: str) -> list[int]:
    return [index for call in fakes.CALLS.get(name, []) for index in call]


def spent(report: Report) -> int:
    rows = report.records
    return int(rows["forwards"].sum())


def rows_of(count: int, seconds: float, forwards: int, fell: int = 0) -> pa.Table:
    success = [place < fell for place in range(count)]
    return pa.table({"seconds": [seconds] * count, "forwards": [forwards] * count, "success": success})


def test_without_a_limit_everything_is_affordable() -> None:
    purse = Purse(Budget())
    assert purse.affords("a", 250) == 250
    purse.pay("a", rows_of(10, 1e9, 10**9))
    assert purse.affords("a", 250) == 250


@settings(max_examples=80, deadline=None)
@given(
    limit=st.integers(1, 500),
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    most=st.integers(1, 20),
)
def test_queries_are_overspent_by_a_misjudged_batch_at_most(limit: int, costs: list[int], most: int) -> None:
    purse, left, batches = Purse(Budget(queries=limit)), list(costs), []
    while left and (size := purse.affords("a", min(most, len(left)))):
        batches.append(sum(left[:size]))
        purse.pay("a", pa.concat_tables([rows_of(1, 0.0, cost) for cost in left[:size]]))
        left = left[size:]
    assert purse.queries == sum(batches)
    assert purse.queries - batches[-1] < limit  # what was begun, was begun within the budget
    if len(set(costs)) == 1 and purse.queries > limit:
        assert len(batches) == 1  # where the cost is known, nothing is overspent
    if left and len(set(costs)) == 1:
        assert purse.queries + costs[0] > limit  # and nothing that fits is left undone


def test_time_is_that_of_the_clock() -> None:
    clock = [100.0]
    purse = Purse(Budget(minutes=1), clock=lambda: clock[0])
    assert purse.affords("a", 50) == 1  # nothing is known of its cost
    purse.learn("a", rows_of(4, 2.0, 5))
    assert purse.affords("a", 50) == 30
    clock[0] += 45
    assert purse.affords("a", 50) == 7
    clock[0] += 14
    assert purse.affords("a", 50) == 0
    purse.learn("b", rows_of(4, 0.01, 5))
    assert purse.affords("b", 50) == 50  # a cheaper one still fits
    assert "1.0 of 1 minutes" in str(purse)


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_what_breaks_most_for_its_cost_goes_first(mode: str) -> None:
    weak, strong = RandomNoise(draws=30), Shift()
    methods: dict[str, Any] = {"attacks": [weak, strong], "certifiers": [Exact(0.1)], "mode": mode, "audit": 0.0}
    report = evaluate(Linear(), data(), THREAT, **methods, budget=Budget(queries=60 + 16 * 31 + 30 * 3))
    rows = report.records
    seen = rows.groupby("method")["index"].nunique()
    assert seen["Shift"] > 40 > seen["RandomNoise(draws=30)"] > 0
    assert {part.method for part in report.unfinished} >= {"RandomNoise(draws=30)"}
    assert all(part.reason == BUDGET for part in report.unfinished)
    row = report.summary().iloc[0]
    assert row["n"] == 60  # all samples, not those that some attack could be afforded for
    assert "RandomNoise(draws=30): not run: budget" in row["unfinished"]
    assert (row["verdict"], row["flags"]) == ("doubtful", "unfinished")
    whole = evaluate(Linear(), data(), THREAT, **methods).summary().iloc[0]
    assert whole["worst_case"] <= row["worst_case"]
    assert row["incomplete"] > 0 == whole["incomplete"]


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_runs_with_more_and_more_budget_end_as_one_without(tmp_path: Path, mode: str) -> None:
    attacks = [PGD(steps=3), Shift(0.5), RandomNoise(draws=5)]
    methods: dict[str, Any] = {"attacks": attacks, "certifiers": [Exact(0.3, cheap=False)], "mode": mode}
    known, runs = 0, 0
    while True:
        report = evaluate(Linear(), data(), THREAT, **methods, store=tmp_path, budget=Budget(queries=150))
        now = len(Store(tmp_path).records())
        fresh = asked("Shift 0.5")
        assert len(fresh) == len(set(fresh))  # over all runs: nothing is computed twice
        if not report.unfinished:
            break
        assert now > known
        known, runs = now, runs + 1
    assert runs >= 3
    again = evaluate(Linear(), data(), THREAT, **methods, store=tmp_path, budget=Budget(queries=1))
    assert not again.unfinished  # what the store holds costs nothing
    whole = evaluate(Linear(), data(), THREAT, **methods).summary().iloc[0]
    for name in ("n", "clean", "worst_case", "certified", "incomplete", "verdict"):
        assert again.summary().iloc[0][name] == whole[name]


def test_clean_answers_are_given_whatever_the_budget() -> None:
    report = evaluate(Linear(), data(), THREAT, [Shift()], budget=Budget(queries=1))
    assert set(report.records["kind"]) == {"clean"}
    (row,) = (row for _, row in report.summary().iterrows())
    assert row["clean"] == 1.0
    assert np.isnan(row["Shift"]) and np.isnan(row["worst_case"])
    assert row["incomplete"] == 60


def test_a_budget_that_suffices_changes_no_row() -> None:
    methods: dict[str, Any] = {"attacks": [Shift(0.5), Shift(), RandomNoise(draws=4)], "certifiers": [Exact()]}
    one = evaluate(Linear(), data(), THREAT, **methods)
    two = evaluate(Linear(), data(), THREAT, **methods, budget=Budget(queries=10**9, minutes=10**6))
    order = ["kind", "method", "index"]
    a, b = (r.records.sort_values(order, ignore_index=True).drop(columns=["seconds", "margin"]) for r in (one, two))
    assert a.equals(b)
    assert list(one.summary().columns) == list(two.summary().columns)
    assert one.summary().equals(two.summary())


def test_witnesses_are_kept_without_a_store() -> None:
    lies = [Liar(), Shift(0.5)]
    report = evaluate(Linear(), data(), THREAT, lies, [Exact(3.0)], budget=Budget(queries=10**6))
    assert report.verdict == "invalid"
    moved = [v for v in report.violations if v.facts.get("witness_method") == "Shift(reach=0.5)"]
    assert {v.facts["index"] >= 500 for v in moved} == {True, False}  # of both blocks
    clean = {int(i): x for i, x in zip(data().indices, data().images, strict=True)}
    for violation in moved:
        assert not np.array_equal(violation.example, clean[violation.facts["index"]].numpy())


@pytest.mark.parametrize("given_", [{"queries": 0}, {"minutes": -1.0}, {"minutes": float("nan")}, {"queries": True}])
def test_limits_that_make_no_sense_are_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"budget\.(queries|minutes) must be a positive number"):
        Budget(**given_)


def test_the_witness_of_each_unit_is_its_own_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget all units are at hand at once: what one of them is done with, the others still need."""
    monkeypatch.setattr("robustbench_lite.evaluation.samples.UNIT", 5)
    data = two_blocks(60)
    report = evaluate(Linear(), data, THREAT, [Shift()], [Exact(1.3)], batch_size=5, budget=Budget(queries=10**9))
    place = {index: row for row, index in enumerate(data.indices.tolist())}
    assert len(report.violations) > 3
    for violation in report.violations:
        moved = torch.as_tensor(violation.example) - data.images[place[int(violation.facts["index"])]]
        assert float(moved.abs().max()) > 0.01  # the clean image would be a witness of nothing


def test_a_failed_slice_is_no_error_where_others_leave_nothing_to_do() -> None:
    x, y = linear_data(60, wrong=0.0)
    data = Dataset("linear", "test", x, y, torch.arange(60), 2)
    attacks, budget = [Shift(), Shift(0.5, fail_from=0)], Budget(queries=10**9)  # at this eps the first fells all
    report = evaluate(Linear(), data, Lp("linf", 0.9), attacks, mode="cascade", budget=budget, batch_size=5)
    assert (report.summary()["worst_case"].item(), report.unfinished) == (0.0, [])
