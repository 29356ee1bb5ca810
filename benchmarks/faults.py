"""Faults, for real: kill -9 at random moments, a full disk, a read-only one, damage, errors, hangs, NaN, no memory.

Kills: an evaluation of 200 cells (40 blocks of twelve digits, clean answers, two attacks, two certifiers) is killed at
random moments, started again, killed again, and at last left alone; its rows and examples must be those of a run that
nobody disturbed, each once. After each kill what was on the disk before must still be there.

The others each disturb a small evaluation and check what docs/faults.md says: what is reported, what is kept, and that
the next run, undisturbed, completes it. Full and read-only disks are real file systems (tmpfs in a mount namespace of
its own: Linux, root); lack of memory is a limit of the address space.

    python benchmarks/faults.py --kills 50
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from robustbench_lite.attacks import PGD, RandomNoise
from robustbench_lite.attacks.base import Attack
from robustbench_lite.certify import CROWNIBP, IBP
from robustbench_lite.core.threats import Lp
from robustbench_lite.data import load_data
from robustbench_lite.data.base import Dataset
from robustbench_lite.evaluation import EvaluationError, Report, Store, StoreError, UnsavedError, evaluate, samples
from robustbench_lite.zoo import load_defense

BLOCKS, SIZE = 40, 12
samples.UNIT = SIZE  # many units of work, and each of them one block: a small cell is quickly killed
THREAT = Lp("linf", 0.1)
ROOM = 288 * 2**20  # bytes beyond what is held: six images of `Wide` do not fit, three leave room for libraries
KEY = ["kind", "method", "index"]
METHODS: dict[str, Any] = {"attacks": [RandomNoise(draws=5), PGD(steps=5)], "certifiers": [IBP(), CROWNIBP()]}


def data(blocks: int = BLOCKS) -> Dataset:
    """Twelve digits in each of several blocks."""
    digits, place = load_data("digits").head(blocks * SIZE), torch.arange(blocks * SIZE)
    return Dataset("digits", "test", digits.images, digits.labels, place % SIZE + 500 * (place // SIZE), 10)


def run(store: Path | str | None, blocks: int = BLOCKS, model: nn.Module | None = None, **changes: Any) -> Report:
    """Evaluate."""
    given = METHODS | {"store": store, "device": "cpu", "adaptive": False, "name": "net", "batch_size": SIZE} | changes
    return evaluate(model or load_defense("digits/pgd_at").eval(), data(blocks), THREAT, **given)


def rows(store: Path) -> pd.DataFrame:
    """Return every row in every file, as often as it is there."""
    tables = [pq.read_table(path).to_pandas() for path in store.rglob("*.parquet")]
    return pd.concat(tables).drop(columns="seconds").sort_values(KEY, ignore_index=True)


def examples(store: Path) -> dict[tuple[str, int], bytes]:
    """Return every stored example, by cell and index."""
    files = [path for path in store.glob("cells/*/*.safetensors") if path.with_suffix(".parquet").exists()]
    tensors = [(path.parent.name, load_file(path)) for path in files]
    return {
        (cell, int(index)): image.tobytes()
        for cell, file in tensors
        for index, image in zip(file["index"], file["x_adv"], strict=True)
    }


def kills(count: int, seed: int, folder: Path) -> str:
    """Kill, resume, and compare; return what happened in words.

    Moments are uniform from the start on, up to one that leaves about four fifths of the cells to the killed runs.

    Raises:
        RuntimeError: a row was lost, or is there twice.
    """
    whole, killed, rng = folder / "whole", folder / "killed", random.Random(seed)
    run(None, 1)  # imports what is imported late, once for all forks
    begin, duration = _undisturbed(whole)
    share = 0.8 * (duration - begin) / count  # what a kill should leave of the work, on average
    longest = begin + share + math.sqrt(share**2 + 2 * share * begin)
    hits, seen, partly = 0, set[Path](), 0
    for _ in range(count):
        child = _fork(lambda: run(killed))
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        hits += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        kept = set(killed.rglob("*.parquet"))
        _check(seen <= kept, "a file has gone")
        partly, seen = partly + (len(kept) > len(seen)), kept
        _check(not kept or not rows(killed).duplicated(KEY).any(), "a row is there twice")
    before = len(seen)
    _check(_forked(lambda: run(killed)) == 0, "the last run failed")
    _check(rows(killed).equals(rows(whole)), "rows differ from those of an undisturbed run")
    _check(examples(killed) == examples(whole), "examples differ from those of an undisturbed run")
    _check(not Store(killed).warnings, "something was damaged")
    cells, total = len(set(whole.rglob("*.parquet"))), len(rows(whole))
    return (
        f"{hits} of {count} kills hit a run, {partly} of them had added cells; {before} of {cells} cells were there "
        f"before the last run; {total} rows, none lost, none twice"
    )


def _undisturbed(store: Path) -> tuple[float, float]:
    """Run once, and return the seconds until the first file, and until the end."""
    start = time.monotonic()
    child = _fork(lambda: run(store))
    first = 0.0
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        first = first or (time.monotonic() - start if any(store.rglob("*.parquet")) else 0.0)
        time.sleep(0.01)
    _check(ended[1] == 0, "the undisturbed run failed")
    return first, time.monotonic() - start


@dataclass(frozen=True)
class Hangs(PGD):
    """Sleeps in C, every signal blocked and Python's lock held, on a block's last batch, while a file is there."""

    fault: str = ""

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        """Search, or hang."""
        if Path(self.fault).exists() and len(x) < SIZE / 2:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.PyDLL(None).sleep(10_000)
        return super().run(oracle, x, goal, threat, streams)


class Fails(nn.Module):
    """A net that fails on a batch with a certain image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.net = load_defense("digits/pgd_at")
        self.image, self.sound = image, False

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        if not self.sound and bool((x == self.image).flatten(1).all(dim=1).any()):
            raise ArithmeticError("not this one")
        logits: Tensor = self.net(x)
        return logits


class Wide(nn.Module):
    """A net that takes 64 MiB for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = load_defense("digits/pgd_at")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        wide = x.flatten(1).repeat(1, 2**18)
        logits: Tensor = self.net(x) + 0 * wide[:, :1]
        return logits


@dataclass(frozen=True)
class NaN(Attack):
    """Returns NaN."""

    def supports(self, threat: Any) -> bool:
        """Say yes."""
        return True

    def run(self, oracle: Any, x: Tensor, goal: Any, threat: Any, streams: Any) -> Tensor:
        """Return what is no image."""
        return torch.full_like(x, torch.nan)


def full_disk(folder: Path) -> str:
    """A file system of 96 KiB."""
    with _disk(folder, "size=96k") as disk:
        try:
            run(disk, 4)
            raise RuntimeError("nothing was too large")
        except UnsavedError as error:
            report, lost = error.report, len(error.report.unsaved)
        _check(len(report.records) == len(run(None, 4).records), "the report is not complete")
        kept = len(Store(disk).records())
        _mount("-o", "remount,size=16m", str(disk))
        _same(run(disk, 4), report)
    return f"UnsavedError: {lost} parts not kept, {kept} rows kept, the report whole; with room again all was kept"


def read_only(folder: Path) -> str:
    """A store that can only be read: before the first row, and when it is complete."""
    with _disk(folder, "ro") as disk:
        try:
            run(disk / "store", 4)
            raise RuntimeError("it could be written")
        except StoreError as error:
            message = str(error).replace(str(disk), "DISK")
        _mount("-o", "remount,rw", str(disk))
        whole = run(disk / "store", 4)
        _mount("-o", "remount,ro", str(disk))
        _same(run(disk / "store", 4), whole)
    return f"StoreError before anything was computed ({message}); a complete one is read"


def truncated(folder: Path) -> str:
    """A file of records cut in half."""
    whole = run(folder, 4)
    path = sorted(folder.rglob("*.parquet"))[3]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = run(folder, 4)
    _same(again, whole)
    _check(len(again.warnings) == 1 and path.with_name(path.name + ".corrupt").exists(), "damage went unsaid")
    return "warning, the file set aside, its rows computed again"


def failing(folder: Path) -> str:
    """A model that raises on one batch, of images that the first look does not see."""
    model, settings = Fails(data(10).images[75]), {"batch_size": 5, "name": "fails"}
    try:
        run(folder, 10, model, **settings)
        raise RuntimeError("nothing failed")
    except EvaluationError as error:
        if error.report is None:
            raise
        left = error.report.unfinished
    model.sound = True
    _same(run(folder, 10, model, **settings), run(None, 10, model, **settings))
    open_ = next(part.samples for part in left if part.kind == "clean")
    return f"EvaluationError with the report of the others, {open_} samples open; the next run computed them"


def hanging(folder: Path) -> str:
    """An attack that hangs in a kernel that ignores exceptions and signals."""
    fault = folder / "fault"
    fault.touch()
    attacks = [RandomNoise(draws=5), Hangs(steps=5, fault=str(fault)), PGD(steps=5)]
    start = time.monotonic()
    report = run(folder / "store", 2, attacks=attacks, batch_size=7, time_limit=5)
    taken = time.monotonic() - start
    (left,) = report.unfinished
    _check(report.verdict == "doubtful" and left.reason == "time limit", "the hang went unsaid")
    fault.unlink()
    _same(run(folder / "store", 2, attacks=attacks, batch_size=7), run(None, 2, attacks=attacks, batch_size=7))
    return f"cut off twice at 5 s ({taken:.0f} s in all), {left.samples} samples open; the next run computed them"


def nan(folder: Path) -> str:
    """An attack that returns NaN."""
    report = run(folder, 4, attacks=[NaN(), PGD(steps=5)])
    found = report.records[report.records["method"] == "NaN"]
    right = report.records.loc[report.records["kind"] == "clean", "correct"].to_numpy(dtype=bool)
    _check(int(found["success"].sum()) == int((~right).sum()), "NaN has broken something")
    return f"{int(found['success'].sum())} of {len(found)} samples fall to it; the rows of the others are complete"


def no_memory(folder: Path) -> str:
    """An address space with room for a few images at a time."""
    given: dict[str, Any] = {"model": Wide(), "attacks": [RandomNoise(draws=5)], "certifiers": []}
    whole = run(None, 4, **given)  # libraries have their threads now
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, resource.RLIM_INFINITY))
    short = run(folder, 4, **given)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _same(short, whole)
    _check(bool(short.remarks), "the halved batch went unsaid")
    return f"notes ({'; '.join(short.remarks)}), rows the same"


FAULTS: dict[str, Callable[[Path], str]] = {
    "full disk": full_disk,
    "read-only store": read_only,
    "truncated parquet": truncated,
    "model raises on a batch": failing,
    "attack hangs in C": hanging,
    "attack returns NaN": nan,
    "out of memory": no_memory,
}
MOUNTS = ("full disk", "read-only store")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # one fault, in a process of its own
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        if options.inside:
            print(FAULTS[options.inside](Path(folder)))
            return
        if options.kills:
            _say(f"{options.kills} x kill -9", kills(options.kills, options.seed, Path(folder)))
    failed = False
    for fault in options.faults:
        command = [sys.executable, __file__, "--inside", fault]
        command = ["unshare", "--mount", *command] if fault in MOUNTS else command
        ended = subprocess.run(command, capture_output=True, text=True)
        failed |= ended.returncode != 0
        _say(fault, ended.stdout.strip() if ended.returncode == 0 else f"FAILED: {ended.stderr.strip()[-400:]}")
    if failed:
        raise SystemExit(1)


def _say(fault: str, what: str) -> None:
    print(f"{fault:24s} {what}", flush=True)


def _check(good: bool, what: str) -> None:
    if not good:
        raise RuntimeError(what)


def _same(one: Report, two: Report) -> None:
    """Check that two reports hold the same rows, rounding and times aside."""
    columns = [*KEY, "prediction", "correct", "success", "certified", "forwards", "backwards"]
    a, b = (r.records.sort_values(KEY, ignore_index=True)[columns] for r in (one, two))
    _check(a.equals(b), "rows differ from those of an undisturbed run")
    _check(not one.unfinished and one.summary().equals(two.summary()), "the tables differ")


@contextmanager
def _disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    disk = folder / "disk"
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", options, "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _fork(work: Callable[[], object]) -> int:
    """Start `work` in a forked process, and return its id: torch is imported once."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def _forked(work: Callable[[], object]) -> int:
    return os.waitpid(_fork(work), 0)[1]


if __name__ == "__main__":
    main()
