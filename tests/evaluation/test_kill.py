"""kill -9 at random moments, resume, and nothing is lost or there twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from robustbench_lite.evaluation import Store

CHILD = Path(__file__).with_name("kill_child.py")
KEY = ["kind", "method", "index"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Runs:
    """Runs that can be killed."""

    def __init__(self) -> None:
        command = [sys.executable, str(CHILD)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def start(self, store: Path) -> int:
        self.stdin.write(f"{store}\n")
        self.stdin.flush()
        return int(self.stdout.readline())

    def status(self) -> int:
        return int(self.stdout.readline())

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *error: object) -> None:
        self.stdin.close()
        self.process.wait()
        self.stdout.close()


def rows(store: Path) -> pd.DataFrame:
    """Every row in every file, as often as it is there."""
    tables = [pq.read_table(path).to_pandas() for path in store.rglob("*.parquet")]
    return pd.concat(tables).drop(columns="seconds").sort_values(KEY, ignore_index=True)


def examples(store: Path) -> dict[tuple[str, int], bytes]:
    """Every stored example, by cell and index."""
    found: dict[tuple[str, int], bytes] = {}
    for path in store.glob("cells/*/*.safetensors"):
        if path.with_suffix(".parquet").exists():
            tensors = load_file(path)
            for index, image in zip(tensors["index"], tensors["x_adv"], strict=True):
                assert (path.parent.name, int(index)) not in found
                found[path.parent.name, int(index)] = image.tobytes()
    return found


def check(kills: int, tmp_path: Path) -> None:
    reference, store = tmp_path / "whole", tmp_path / "killed"
    rng, interrupted, seen = random.Random(0), 0, set[Path]()
    with Runs() as runs:
        runs.start(reference)
        start = time.monotonic()
        assert runs.status() == 0
        duration = time.monotonic() - start
        for _ in range(kills):
            child = runs.start(store)
            time.sleep(rng.uniform(0, duration / (1 + 0.15 * kills)))
            os.kill(child, signal.SIGKILL)
            interrupted += runs.status() == signal.SIGKILL
            kept = set(store.rglob("*.parquet"))
            assert seen <= kept  # what was there stays
            seen = kept
            if kept:
                assert not rows(store).duplicated(KEY).any()
                Store(store).records()
        runs.start(store)
        assert runs.status() == 0
    assert interrupted >= kills // 2
    assert rows(store).equals(rows(reference))
    assert examples(store) == examples(reference)
    assert not Store(store).warnings
    witnesses = [sorted(p.name for p in s.glob("violations/*.json")) for s in (store, reference)]
    assert witnesses[0] == witnesses[1] != []


def test_a_few_kills(tmp_path: Path) -> None:
    check(4, tmp_path)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    check(20, tmp_path)
