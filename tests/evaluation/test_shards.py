"""Shards: whoever computes a sample, it meets the same, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_fakes import CALLS, Exact, Linear, Shift, two_blocks
from hypothesis import given
from hypothesis import strategies as st

from robustbench_lite import Lp, evaluate
from robustbench_lite.attacks import PGD
from robustbench_lite.evaluation.samples import Samples
from robustbench_lite.evaluation.shards import share
from robustbench_lite.evaluation.store import Store

THREAT = Lp("linf", 0.05)


@given(st.sets(st.integers(0, 1200), min_size=1, max_size=60), st.integers(1, 9), st.sampled_from([1, 7, 20, 250]))
def test_each_batch_has_one_shard(indices: set[int], shards: int, batch_size: int) -> None:
    order = sorted(indices, key=lambda index: index * 7 % 11)
    samples = named(order).in_batches(batch_size)
    expected = {index: place // batch_size for place, index in enumerate(sorted(indices))}
    assert samples.batch.tolist() == [expected[index] for index in order]
    assert samples.unit.tolist() == [expected[index] // (500 // batch_size) for index in order]
    for pieces in (samples.batch, samples.unit):
        owners = np.array([share(pieces, shard, shards) for shard in range(shards)])
        assert (owners.sum(axis=0) == 1).all()
        assert owners.any(axis=1).sum() == min(shards, len(set(pieces.tolist())))
        owner = owners.argmax(axis=0)
        assert len(set(zip(pieces.tolist(), owner.tolist(), strict=True))) == len(set(pieces.tolist()))
        assert (np.diff(owner[np.argsort(order)]) >= 0).all()


def named(indices: list[int]) -> Samples:
    """Samples of which only the indices matter."""
    n = len(indices)
    x, y = torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64)
    return Samples("none", x, y, np.array(indices), [""] * n, *np.zeros((2, n), dtype=np.int64))


class Noisy(Linear):
    """Other logits at each call, from the global generator: what a batch holds decides what it meets."""

    stochastic = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.05 * torch.randn(len(x), 2, dtype=x.dtype)


def rows(store: Path) -> pd.DataFrame:
    names = ["kind", "method", "threat", "eps", "index"]
    return Store(store).records().drop(columns="seconds").sort_values(names, ignore_index=True)


@pytest.mark.parametrize("mode", ["full", "cascade"])
@pytest.mark.parametrize("model", [Linear(), Noisy()], ids=["deterministic", "stochastic"])
def test_shards_and_the_whole_give_the_rows_of_one_process(
    model: Linear, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustbench_lite.evaluation.samples.UNIT", 20)  # three batches of 6

    def run(store: str, shard: tuple[int, int] | None = None) -> object:
        methods = ([PGD(steps=1), Shift()], [Exact(0.3)])
        settings = {"mode": mode, "audit": 0.3, "batch_size": 6, "device": "cpu", "seed": 3}
        return evaluate(model, two_blocks(60), THREAT, *methods, store=tmp_path / store, shard=shard, **settings)

    whole = run("one")
    parts = [run("three", (shard, 3)) for shard in (2, 0, 1)]
    CALLS.clear()
    joined = run("three")
    assert CALLS == {}  # all rows were there
    pd.testing.assert_frame_equal(rows(tmp_path / "three"), rows(tmp_path / "one"), check_exact=True)
    assert joined.summary().to_csv() == whole.summary().to_csv()
    assert joined.notes == whole.notes
    assert all(part.notes == [] for part in parts)
    assert sum(len(part.records) for part in parts) == len(whole.records)
    assert all(len(part.records) for part in parts)


def test_whoever_does_not_prune_shares_by_batches(tmp_path: Path) -> None:
    parts = [evaluate(Linear(), two_blocks(24), THREAT, [Shift()], batch_size=6, shard=(k, 4)) for k in range(4)]
    assert [len(part.records) for part in parts] == [12] * 4


def test_a_share_of_nothing(tmp_path: Path) -> None:
    report = evaluate(Linear(), two_blocks(4), THREAT, [Shift()], store=tmp_path, shard=(1, 5))
    assert len(report.records) == 0
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize("shard", [(0, 0), (2, 2), (-1, 2), (0, 1.5), (True, 2)])
def test_a_shard_that_makes_no_sense(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shard"):
        evaluate(Linear(), two_blocks(4), THREAT, shard=shard)
