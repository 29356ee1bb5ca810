"""Budgets, time limits and failing methods at the command line: a table all the same, and status 1."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from robustbench_lite.evaluation import Store

NET = ("model._target_=users_net.Net", "model.weights=net.safetensors", "limit=20")
SMALL = ("suite.attacks.pgd.steps=3", "suite.attacks.random_noise.draws=2", "suite.certifiers.cascade=null")

FAILING = """
from dataclasses import dataclass

from robustbench_lite.attacks import FGSM


@dataclass(frozen=True)
class Failing(FGSM):
    def run(self, oracle, x, goal, threat, streams):
        raise ArithmeticError("no figure today")
"""


def row(folder: Path) -> pd.Series:
    (path,) = (folder / "results" / "tables").glob("*.csv")
    return pd.read_csv(path).iloc[0]


def test_a_budget_leaves_open_what_it_does_not_pay_and_the_next_run_goes_on(rbl, folder: Path) -> None:
    status, out, err = rbl("evaluate", *NET, *SMALL, "budget.queries=40")
    assert status == 1
    assert "not run: budget" in out
    assert "not finished (budget)" in err
    some = len(Store(folder / "results").records())
    again = rbl("evaluate", *NET, *SMALL)  # nothing that is not finished is served
    whole = rbl("evaluate", *NET, *SMALL, "store=other")
    assert again[0] == whole[0] == 0
    assert again[1].replace("results", "other") == whole[1]
    assert some < len(Store(folder / "results").records()) == len(Store(folder / "other").records()) == 80
    served = rbl("evaluate", *NET, *SMALL, "budget.queries=1")  # finished: a budget does not matter any more
    assert served[0] == 0
    assert "served from" in served[1]


def test_in_a_sweep_the_row_stands_in_the_table_unfinished(rbl, folder: Path) -> None:
    status, out, _ = rbl("evaluate", "--multirun", *NET, *SMALL, "budget.queries=40", "seed=0")
    assert status == 1
    assert "not run: budget" in out
    assert "samples not run: budget; " in out
    assert row(folder)["incomplete"] > 0
    assert "budget" in row(folder)["unfinished"]


@pytest.mark.parametrize("sweep", [False, True])
def test_a_failing_attack_leaves_the_others_and_shows_its_traceback(rbl, folder: Path, sweep: bool) -> None:
    (folder / "users_failing.py").write_text(FAILING)
    failing = "+suite.attacks.failing._target_=users_failing.Failing"
    status, out, err = rbl("evaluate", *(["--multirun"] if sweep else []), *NET, *SMALL, failing, "seed=0")
    assert status == 1
    assert "open: error" in out
    assert "FGSM" in out and "doubtful" in out
    assert "ArithmeticError: no figure today" in err
    assert ("Traceback" in err) == sweep
    assert len(Store(folder / "results").records()) == 80


@pytest.mark.parametrize("fault", ["budget", "failing method"])
def test_the_table_of_a_sweep_that_was_cut_off_follows_from_the_records(rbl, folder: Path, fault: str) -> None:
    (folder / "users_failing.py").write_text(FAILING)
    cut = {"budget": "budget.queries=40", "failing method": "+suite.attacks.failing._target_=users_failing.Failing"}
    command = ("evaluate", "--multirun", *NET, *SMALL, cut[fault], "seed=0")
    assert rbl(*command)[0] == 1
    (path,) = (folder / "results" / "tables").glob("*.csv")
    status, out, _ = rbl("verify")
    assert (status, "all of it holds" in out) == (0, True), out
    for changed in (path, path.with_suffix(".md")):
        honest = changed.read_text()
        clean = row(folder)["clean"]
        figure = f"{clean}" if changed == path else f"{100 * clean:.1f}"
        assert figure in honest
        changed.write_text(honest.replace(figure, "0.99", 1))
        status, out, _ = rbl("verify")
        assert status == 1
        assert f"does not hold: tables/{changed.name}" in out
        changed.write_text(honest)
    assert rbl("evaluate", *NET, *SMALL, cut[fault], "seed=1")[0] == 1  # no table is made of it
    assert rbl("verify")[0] == 0
    again = rbl(*command)  # what is unfinished is never served
    assert again[0] == 1
    assert "Net: from the store" not in again[2]
    assert rbl("verify")[0] == 0


def test_a_table_of_a_part_still_follows_when_the_whole_is_there(rbl, folder: Path) -> None:
    command = ("evaluate", "--multirun", *NET, *SMALL, "seed=0")
    rbl(*command, "budget.queries=40")
    part = {path: path.read_text() for path in (folder / "results" / "tables").iterdir()}
    assert rbl(*command)[0] == 0
    assert rbl("verify")[0] == 0
    assert all(path.read_text() != text for path, text in part.items())
    for path, text in part.items():
        path.write_text(text)
    assert rbl("verify")[0] == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("time_limit=0", "time_limit must be a positive number of seconds"),
        ("time_limit=soon", "time_limit must be a positive number of seconds"),
        ("budget.minutes=-1", "budget.minutes must be a positive number"),
        ("budget.queries=many", "budget.queries must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(rbl, setting: str, message: str) -> None:
    status, _, err = rbl("evaluate", *NET, setting)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("multirun", [False, True])
def test_a_forecast_writes_nothing(rbl, folder: Path, multirun: bool) -> None:
    sweep = ["--multirun", "seed=0,1"] if multirun else []
    status, out, err = rbl("evaluate", *sweep, *NET, *SMALL, "forecast=true")
    assert (status, err) == (0, "")
    assert out.count("forecast: Net, 20 samples") == (2 if multirun else 1)
    assert "PGD(steps=3, loss=margin)" in out and "peak MiB" in out
    assert not (folder / "results").exists()
    refused = rbl("evaluate", *NET, "forecast=true", "shard=0", "shards=2")
    assert refused[0] == 2
    assert "a forecast is about the whole run" in refused[2]


def test_a_forecast_of_a_finished_run_has_nothing_to_compute(rbl) -> None:
    rbl("evaluate", *NET, *SMALL)
    status, out, _ = rbl("evaluate", *NET, *SMALL, "forecast=true")
    assert status == 0
    assert "nothing to compute" in out
