"""A sample that the model failed on is in no figure, and the table of the store says so like the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from evaluation_fakes import Linear, Shift, two_blocks

from robustbench_lite.core.threats import Lp
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import EvaluationError, Store, evaluate, runner, summarize
from robustbench_lite.evaluation.compact import compact
from robustbench_lite.evaluation.scan import scan

NEAR, FAR = Lp("linf", 0.01), Lp("linf", 0.05)
ATTACKS = (Shift(0.1),)
FAILS = 5  # samples in the batch with the bright image
MOOD = "RBL_TEST_BAD_MOOD"  # in the environment: what a model refers to is part of its fingerprint


class Moody(Linear):
    """Answers about no batch with a very bright image, while its mood is bad."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.environ.get(MOOD) and bool((x[:, 0, 0, 0] > 0.995).any()):
            raise ZeroDivisionError("too bright")
        return super().forward(x)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(runner, "LOOKED_AT", 20)  # the first look does not see the image
    monkeypatch.setenv(MOOD, "yes")
    samples = two_blocks(40)
    samples.images[:, :, 0, 0] = samples.images[:, :, 0, 0].clamp(max=0.9)
    samples.images[37, 0, 0, 0] = 1.0
    return Dataset("bright", "test", samples.images, samples.labels, samples.indices, 2)


def run(data: Dataset, store: Path, threat: Any = FAR, attacks: Any = ATTACKS, **more: Any) -> pd.DataFrame:
    """The table of an evaluation, which may fail on some samples."""
    try:
        return evaluate(Moody(), data, threat, attacks, batch_size=FAILS, store=store, **more).summary()
    except EvaluationError as error:
        return error.report.summary() if error.report else pd.DataFrame()


def told(store: Path) -> pd.DataFrame:
    """The table of the store, which is the same however it is made."""
    opened = Store(store)
    table = summarize(opened.records(), opened.flags())
    pd.testing.assert_frame_equal(scan(store).table, table)
    return table


@pytest.mark.parametrize("mode", ["full", "cascade"])
def test_the_store_counts_what_the_report_does(
    data: Dataset, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run(data, tmp_path, [NEAR, FAR], mode=mode)
    assert own["incomplete"].tolist() == [FAILS, FAILS]
    assert own["n"].tolist() == [40 - FAILS] * 2
    pd.testing.assert_frame_equal(told(tmp_path), own.drop(columns="unfinished"))
    compact(tmp_path)
    pd.testing.assert_frame_equal(told(tmp_path), own.drop(columns="unfinished"))
    monkeypatch.delenv(MOOD)
    healed = run(data, tmp_path, [NEAR, FAR], mode=mode)
    assert healed["incomplete"].tolist() == [0, 0]
    pd.testing.assert_frame_equal(told(tmp_path), healed.drop(columns="unfinished"))


def test_the_flag_of_another_run_does_not_hide_it(data: Dataset, tmp_path: Path) -> None:
    run(data, tmp_path)
    run(data.head(20), tmp_path)  # finished: its notes replace those of the first
    (row,) = told(tmp_path).to_dict("records")
    assert (row["incomplete"], row["flags"], row["verdict"]) == (FAILS, "", "doubtful")


def test_only_rows_of_that_evaluation_lack_them(data: Dataset, tmp_path: Path) -> None:
    run(data, tmp_path)
    run(data.head(20), tmp_path, seed=1)
    run(data.head(20), tmp_path, precision="float64")
    run(data.head(20), tmp_path, NEAR)
    table = told(tmp_path)
    named = zip(table["eps"], table["seed"], table["precision"], table["incomplete"], strict=True)
    found = {(eps, seed, precision): int(count) for eps, seed, precision, count in named}
    assert found == {
        (0.05, 0, "float32"): FAILS,
        (0.05, 1, "float32"): 0,
        (0.05, 0, "float64"): 0,
        (0.01, 0, "float32"): 0,
    }


def test_without_any_method_too(data: Dataset, tmp_path: Path) -> None:
    run(data, tmp_path, attacks=())
    assert told(tmp_path)["incomplete"].tolist() == [FAILS]


def test_older_data_are_not_asked_for(data: Dataset, tmp_path: Path) -> None:
    run(data, tmp_path)
    dark = data.images.clone()
    dark[37] = 1 - dark[37]
    run(Dataset("bright", "test", dark, data.labels, data.indices, 2), tmp_path)
    assert told(tmp_path)["incomplete"].tolist() == [0]


def test_a_damaged_list_says_nothing(data: Dataset, tmp_path: Path) -> None:
    run(data, tmp_path)
    (path,) = (tmp_path / "slices").glob("*@*.json")
    path.write_text(path.read_text()[:30])
    assert told(tmp_path)["incomplete"].tolist() == [0]
